// Operators that fill tensors and return nothing, of csrc/cuda: what they are told of tensors, so that a plan repeats
// them without making any.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "checks.h"

namespace ar_kernels {

// What a tensor is: where it begins, and how it lies there. Without sizes it is None.
struct View {
  void* data;
  const int64_t *sizes, *strides;
  int64_t dims;
  ScalarType dtype;

  bool has_value() const { return sizes != nullptr; }
  int64_t dim() const { return dims; }
  int64_t size(int64_t i) const { return sizes[i < 0 ? i + dims : i]; }
  ScalarType scalar_type() const { return dtype; }
  bool is_contiguous() const {
    int64_t step = 1;
    for (int64_t i = dims - 1; i >= 0; --i) {
      if (sizes[i] == 0) return true;
      if (sizes[i] != 1 && strides[i] != step) return false;
      step *= sizes[i];
    }
    return true;
  }
};

// As of checks.h: what is None is as it should be.
inline void check_shape(const char* name, const View& view, std::initializer_list<int64_t> sizes) {
  if (view.has_value()) check_shape<View>(name, view, sizes);
}

inline void check_dtype(const char* name, const View& view, const char* other_name, const View& other) {
  if (view.has_value()) check_same_dtype(name, view, other_name, other);
}

// arguments: as many views as the operator has letters. stream: of the device that is current.
using Fill = void (*)(const View* arguments, void* stream);

// arguments: t for a tensor, ? for one that may be None. fill: null where the library was built without it.
struct Filling {
  const char *name, *arguments;
  Fill fill;
};

// In the order of ar_kernels/kernels/hopper.py.
enum FillingNumber { kSweepForward, kSweepBackward, kFillings };

const Filling& filling_of(int64_t number);

}  // namespace ar_kernels

// Says who does it from now on, and returns who did: csrc/cuda when it is loaded.
extern "C" __attribute__((visibility("default"))) ar_kernels::Fill ar_kernels_put_filling(int64_t number,
                                                                                          ar_kernels::Fill fill);
