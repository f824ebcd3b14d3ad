// What every operator's arguments are checked with: messages say what was expected and what came.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

namespace ar_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class AnyTensor>
std::string shape_of(const AnyTensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + "]";
}

template <class AnyTensor>
void check_shape(const char* name, const AnyTensor& tensor, std::initializer_list<int64_t> sizes) {
  bool same = tensor.dim() == static_cast<int64_t>(sizes.size());
  std::string expected = "[";
  int64_t i = 0;
  for (const int64_t size : sizes) {
    expected += (i ? ", " : "") + std::to_string(size);
    same = same && tensor.size(i) == size;
    ++i;
  }
  STD_TORCH_CHECK(same, name, " must be ", expected, "], got ", shape_of(tensor));
}

inline void check_shape(const char* name, const std::optional<Tensor>& tensor, std::initializer_list<int64_t> sizes) {
  if (tensor.has_value()) check_shape(name, *tensor, sizes);
}

template <class AnyTensor>
void check_float(const char* name, const AnyTensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16 || dtype == ScalarType::Float ||
                      dtype == ScalarType::Double,
                  name, " must be float16, bfloat16, float32 or float64, got ", torch::headeronly::toString(dtype));
}

// A feature map [N, C, H, W] or [N, C, S], or what has another's shape.
template <class AnyTensor>
void check_map(const char* name, const AnyTensor& z) {
  const bool is_map = (z.dim() == 3 || z.dim() == 4) && z.size(1) > 0 && z.size(2) > 0 && z.size(-1) > 0;
  STD_TORCH_CHECK(is_map, name, " must be [N, C, H, W] or [N, C, S] with a channel and a position, got ", shape_of(z));
  check_float(name, z);
}

template <class AnyTensor>
void check_same_dtype(const char* name, const AnyTensor& tensor, const char* other_name, const AnyTensor& other) {
  STD_TORCH_CHECK(tensor.scalar_type() == other.scalar_type(), name, " must be ",
                  torch::headeronly::toString(other.scalar_type()), " like ", other_name, ", got ",
                  torch::headeronly::toString(tensor.scalar_type()));
}

inline void check_dtype(const char* name, const std::optional<Tensor>& tensor, const char* other_name,
                        const Tensor& other) {
  if (tensor.has_value()) check_same_dtype(name, *tensor, other_name, other);
}

template <class AnyTensor>
void check_like(const char* name, const AnyTensor& tensor, const char* other_name, const AnyTensor& other) {
  bool same = tensor.dim() == other.dim();
  for (int64_t i = 0; same && i < other.dim(); ++i) same = tensor.size(i) == other.size(i);
  STD_TORCH_CHECK(same && tensor.scalar_type() == other.scalar_type(), name, " must be ",
                  torch::headeronly::toString(other.scalar_type()), " ", shape_of(other), " like ", other_name,
                  ", got ", torch::headeronly::toString(tensor.scalar_type()), " ", shape_of(tensor));
}

// The dtype that sums are kept in.
inline ScalarType accumulator_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace ar_kernels
