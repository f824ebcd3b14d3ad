// The library's side of direct.h.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstring>
#include <exception>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "direct.h"

#define AR_DIRECT extern "C" __attribute__((visibility("default")))

namespace ar_kernels {

using Tensors = std::vector<std::optional<torch::stable::Tensor>>;

struct Delete {
  void operator()(AtenTensorHandle tensor) const { aoti_torch_delete_tensor_object(tensor); }
};

// A tensor that no one else has a hold of: torch::stable::Tensor, which is shared, takes memory of its own for that.
using Owned = std::unique_ptr<AtenTensorOpaque, Delete>;

// The same tensor.
inline Owned another(AtenTensorHandle tensor) {
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(tensor, &made));
  return Owned(made);
}

inline torch::stable::Tensor own(AtenTensorHandle tensor) { return torch::stable::Tensor(another(tensor).release()); }

inline AtenTensorHandle give(Owned& tensor) { return tensor.release(); }
inline AtenTensorHandle give(const std::optional<torch::stable::Tensor>& tensor) {
  return tensor.has_value() ? another(tensor->get()).release() : nullptr;
}

// That Python defined the operator as this library has it.
inline void check_count(const char* arguments, uint64_t count) {
  STD_TORCH_CHECK(count == std::strlen(arguments), "the native library was built from another csrc: expected ",
                  std::strlen(arguments), " arguments, got ", count);
}

// An operator's first arguments: t for a tensor, ? for one that may be None.
inline Tensors tensors_of(StableIValue* stack, const char* arguments) {
  Tensors found;
  for (size_t i = 0; arguments[i] == 't' || arguments[i] == '?'; ++i)
    found.push_back(arguments[i] == 't' ? torch::stable::detail::to<torch::stable::Tensor>(stack[i])
                                        : torch::stable::detail::to<std::optional<torch::stable::Tensor>>(stack[i]));
  return found;
}

inline Tensors owned(const AtenTensorHandle* tensors, size_t count) {
  Tensors found(count);
  for (size_t i = 0; i < count; ++i)
    if (tensors[i] != nullptr) found[i] = own(tensors[i]);
  return found;
}

// Calls work(), which returns the outputs, and gives them to the caller.
template <class Work>
int64_t hand_over(AtenTensorHandle* outputs, size_t most, const char** error, const Work& work) {
  thread_local std::string message;
  size_t count = 0;
  try {
    auto made = work();
    if (made.size() > most) throw std::runtime_error("there are more outputs than expected");
    for (; count < made.size(); ++count) outputs[count] = give(made[count]);
    return static_cast<int64_t>(count);
  } catch (const std::exception& exception) {
    while (count > 0)
      if (outputs[--count] != nullptr) aoti_torch_delete_tensor_object(outputs[count]);
    message = exception.what();
    *error = message.c_str();
    return -1;
  }
}

}  // namespace ar_kernels
