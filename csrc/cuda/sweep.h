// What the Hopper kernels are told of tensors, as plain data.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "../cpu/kind.h"

namespace ar_kernels {

// A small contiguous tensor of float16, bfloat16 or float32; null where there is none.
struct Values {
  const void* data;
  Kind kind;
};

// A map [N, C, S] and its strides in elements; null where there is none.
struct FlatMap {
  void* data;
  int64_t image, channel, position;
};

}  // namespace ar_kernels
