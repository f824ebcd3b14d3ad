// Numbers as memory has them, and a block's launch: for both kinds of sweeps.
#pragma once

#include "primitives.cuh"
#include "sweep.h"

namespace ar_kernels {

constexpr int kHeads = 4;  // the most; with something beside each, the 8 columns of a product's narrow side
constexpr int kSharedBytes = 227 * 1024;

inline int processors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int programs, int threads, int bytes, cudaStream_t stream,
                   const Arguments&... arguments) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(programs);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

__device__ __forceinline__ float value_of(__half value) { return __half2float(value); }
__device__ __forceinline__ float value_of(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ __forceinline__ float value_of(const Values& values, int index) {
  switch (values.kind) {
    case Kind::kHalf: return value_of(static_cast<const __half*>(values.data)[index]);
    case Kind::kBFloat16: return value_of(static_cast<const __nv_bfloat16*>(values.data)[index]);
    default: return static_cast<const float*>(values.data)[index];
  }
}

// The lower half of a word.
template <class T>
__device__ __forceinline__ T half_of(uint32_t word) {
  const uint16_t bits = static_cast<uint16_t>(word);
  return *reinterpret_cast<const T*>(&bits);
}

}  // namespace ar_kernels
