// Numbers as memory has them, and a block's launch: for both kinds of sweeps.
#pragma once

#include <algorithm>
#include <atomic>

#include "../shares.h"
#include "primitives.cuh"
#include "sweep.h"

namespace ar_kernels {

constexpr int kHeads = 4;  // the most; with something beside each, the 8 columns of a product's narrow side
constexpr int kSharedBytes = 227 * 1024;
constexpr int kReservedBytes = 1024;  // of each block, the system's

// Of each of so many blocks on a multiprocessor.
constexpr int shared_bytes(int blocks) { return (kSharedBytes + kReservedBytes) / blocks - kReservedBytes; }

inline int processors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// Whether a kernel may be launched on the current device, with all the shared memory there is; asked once.
template <auto kKernel>
cudaError_t prepare() {
  static std::atomic<uint64_t> prepared = 0;
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  const uint64_t bit = uint64_t{1} << (device % 64);
  if (error != cudaSuccess || (prepared & bit) != 0) return error;
  cudaFuncAttributes attributes;
  error = cudaFuncGetAttributes(&attributes, kKernel);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  // Compiled for older GPUs it is empty.
  if (error == cudaSuccess && (major != 9 || attributes.ptxVersion < 90)) error = cudaErrorInvalidDeviceFunction;
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  // Or two blocks of half of it might not be put on one multiprocessor.
  if (error == cudaSuccess)
    error =
        cudaFuncSetAttribute(kKernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  // Clusters of more than 8 blocks, for whom asks for them.
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error == cudaSuccess) prepared |= bit;
  return error;
}

template <auto kKernel, class... Arguments>
cudaError_t launch(int programs, int threads, int bytes, cudaStream_t stream, const Arguments&... arguments) {
  const cudaError_t error = prepare<kKernel>();
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(programs);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kKernel, arguments...);
}

// The same in clusters of blocks that follow each other.
template <auto kKernel, class... Arguments>
cudaError_t launch_clusters(int blocks, int programs, int threads, int bytes, cudaStream_t stream,
                            const Arguments&... arguments) {
  const cudaError_t error = prepare<kKernel>();
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks * programs);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kKernel, arguments...);
}

// How many clusters of so many blocks run at once on the current device, each block with as much shared memory as is
// there for so many of them on a multiprocessor: all blocks of one are on neighbouring multiprocessors, so some may be
// left over; none, where there are no such clusters. Asked once.
template <auto kKernel>
int active_clusters(int blocks, int threads, int per_processor = 1) {
  constexpr int kMostSizes = 17, kMostPerProcessor = 2;  // of clusters, and 0
  static std::atomic<int> known[64][kMostPerProcessor][kMostSizes];
  int device = 0;
  if (blocks == 1 || blocks >= kMostSizes || cudaGetDevice(&device) != cudaSuccess)
    return processors() * per_processor / blocks;
  std::atomic<int>& found = known[device % 64][per_processor - 1][blocks];
  if (found != 0) return std::max(found.load(), 0);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes(per_processor);
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  if (prepare<kKernel>() != cudaSuccess || cudaOccupancyMaxActiveClusters(&clusters, kKernel, &config) != cudaSuccess ||
      clusters < 1) {
    cudaGetLastError();  // or the next launch that asks for an error would be told of this one
    clusters = -1;
  }
  found = clusters;
  return std::max(clusters, 0);
}

__device__ __forceinline__ float value_of(__half value) { return __half2float(value); }
__device__ __forceinline__ float value_of(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float value_of(float value) { return value; }

__device__ __forceinline__ float value_of(const Values& values, int index) {
  switch (values.kind) {
    case Kind::kHalf: return value_of(static_cast<const __half*>(values.data)[index]);
    case Kind::kBFloat16: return value_of(static_cast<const __nv_bfloat16*>(values.data)[index]);
    default: return static_cast<const float*>(values.data)[index];
  }
}

// Two adjacent values, rounded to the map's dtype. What kind they are is known: loads that follow each other then don't
// wait for each other.
template <class T>
__device__ __forceinline__ uint32_t weight_pair(const T* from) {
  return *reinterpret_cast<const uint32_t*>(from);
}
template <class T>
__device__ __forceinline__ uint32_t weight_pair(const float* from) {
  const float2 pair = *reinterpret_cast<const float2*>(from);
  return packed<T>(pair.x, pair.y);
}
template <class T>
__device__ __forceinline__ float2 float_pair(const T* from) {
  if constexpr (std::is_same_v<T, float>)
    return *reinterpret_cast<const float2*>(from);
  else
    return unpacked<T>(*reinterpret_cast<const uint32_t*>(from));
}

// A number as memory has it, and what it is: apart, so that several loads are under way at a time.
__device__ __forceinline__ uint32_t raw_value(const Values& values, int index) {
  return values.kind == Kind::kFloat ? static_cast<const uint32_t*>(values.data)[index]
                                     : static_cast<const uint16_t*>(values.data)[index];
}

__device__ __forceinline__ float value_from(const Values& values, uint32_t raw) {
  switch (values.kind) {
    case Kind::kHalf: return unpacked<__half>(raw).x;
    case Kind::kBFloat16: return unpacked<__nv_bfloat16>(raw).x;
    default: return __uint_as_float(raw);
  }
}

// The lower half of a word.
template <class T>
__device__ __forceinline__ T half_of(uint32_t word) {
  const uint16_t bits = static_cast<uint16_t>(word);
  return *reinterpret_cast<const T*>(&bits);
}

}  // namespace ar_kernels
