// What CUDA's header of this name declares, as far as csrc/cuda uses it, for the host's compiler.
#pragma once

#include <limits.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <tuple>
#include <type_traits>
#include <utility>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))

// ------------------------------------------------------------------------------------------------ types

#define AR_VECTOR(type, name, alignment)                           \
  struct __align__(alignment) name##2 { type x, y; };              \
  struct __align__(2 * alignment) name##4 { type x, y, z, w; };    \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
AR_VECTOR(float, float, 8)
AR_VECTOR(int32_t, int, 8)
AR_VECTOR(uint32_t, uint, 8)
#undef AR_VECTOR

struct uint3 {
  uint32_t x, y, z;
};

struct dim3 {
  uint32_t x, y, z;
  constexpr dim3(uint32_t of_x = 1, uint32_t of_y = 1, uint32_t of_z = 1) : x(of_x), y(of_y), z(of_z) {}
};

// Those of the thread that runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

// ------------------------------------------------------------------------------------------------ threads

inline void __syncthreads(emulator::Site site = emulator::Site::here()) {
  emulator::enter("__syncthreads", site);
  emulator::block_sync();
}

inline void __syncwarp(uint32_t mask = 0xffffffff, emulator::Site site = emulator::Site::here()) {
  emulator::enter("__syncwarp", site);
  emulator::together("__syncwarp", mask, &site, [](void* const(&)[32], uint32_t) {}, false);
}

namespace emulator {

template <class T>
struct Shuffle {
  T value, result;
  int source;
};

// Lane `source` may lie outside of the mask only where the result is not looked at, so it is poison then.
template <class T>
T shuffle(const char* name, uint32_t mask, T value, int source) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "of registers");
  Shuffle<T> own{value, value, source};
  together(
      name, mask, &own,
      [](void* const(&arguments)[32], uint32_t) {
        for (void* argument : arguments) {
          if (argument == nullptr) continue;
          auto* lane = static_cast<Shuffle<T>*>(argument);
          const auto* source = static_cast<const Shuffle<T>*>(arguments[lane->source]);
          if (source != nullptr)
            lane->result = source->value;
          else
            memset(static_cast<void*>(&lane->result), 0xff, sizeof(T));
        }
      },
      false);
  return own.result;
}

// Whether each lane's predicate holds, as a mask.
uint32_t vote(const char* name, uint32_t mask, bool predicate);

int lane();

}  // namespace emulator

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, emulator::Site site = emulator::Site::here()) {
  emulator::enter("__shfl_sync", site);
  const int lane = emulator::lane();
  return emulator::shuffle("__shfl_sync", mask, value, (lane & ~(width - 1)) | (source & (width - 1)));
}

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = 32, emulator::Site site = emulator::Site::here()) {
  emulator::enter("__shfl_xor_sync", site);
  const int lane = emulator::lane(), source = lane ^ lanes;
  return emulator::shuffle("__shfl_xor_sync", mask, value, source / width > lane / width ? lane : source);
}

template <class T>
T __shfl_down_sync(uint32_t mask, T value, int lanes, int width = 32, emulator::Site site = emulator::Site::here()) {
  emulator::enter("__shfl_down_sync", site);
  const int lane = emulator::lane(), source = lane + lanes;
  return emulator::shuffle("__shfl_down_sync", mask, value, source / width > lane / width ? lane : source);
}

template <class T>
T __shfl_up_sync(uint32_t mask, T value, int lanes, int width = 32, emulator::Site site = emulator::Site::here()) {
  emulator::enter("__shfl_up_sync", site);
  const int lane = emulator::lane();
  return emulator::shuffle("__shfl_up_sync", mask, value, lane % width < lanes ? lane : lane - lanes);
}

inline int __reduce_max_sync(uint32_t mask, int value, emulator::Site site = emulator::Site::here()) {
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    emulator::enter("__reduce_max_sync", site);
    const int other = emulator::shuffle("__reduce_max_sync", mask, value, emulator::lane() ^ lanes);
    value = other > value ? other : value;
  }
  return value;
}

inline int __any_sync(uint32_t mask, int predicate, emulator::Site site = emulator::Site::here()) {
  emulator::enter("__any_sync", site);
  return emulator::vote("__any_sync", mask, predicate != 0) != 0;
}

inline int __all_sync(uint32_t mask, int predicate, emulator::Site site = emulator::Site::here()) {
  emulator::enter("__all_sync", site);
  return emulator::vote("__all_sync", mask, predicate != 0) == mask;
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate, emulator::Site site = emulator::Site::here()) {
  emulator::enter("__ballot_sync", site);
  return emulator::vote("__ballot_sync", mask, predicate != 0);
}

// ------------------------------------------------------------------------------------------------ memory and numbers

template <class T, class U>
T atomicAdd(T* address, U value) {
  const T before = *address;
  *address = before + static_cast<T>(value);
  return before;
}

template <class T, class U>
T atomicMax(T* address, U value) {
  const T before = *address;
  if (static_cast<T>(value) > before) *address = static_cast<T>(value);
  return before;
}

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}

inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap() { emulator::fail("__trap"); }

inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline int __float_as_int(float value) { return static_cast<int>(__float_as_uint(value)); }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<uint32_t>(bits)); }
// Bytes of two words, y the upper one; each four bits of the selector name one.
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t both = static_cast<uint64_t>(y) << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= (both >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<uint32_t>(bits)); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

template <class T, class U, class = std::enable_if_t<std::is_arithmetic_v<T> && std::is_arithmetic_v<U>>>
constexpr std::common_type_t<T, U> min(T a, U b) {
  return b < a ? b : a;
}
template <class T, class U, class = std::enable_if_t<std::is_arithmetic_v<T> && std::is_arithmetic_v<U>>>
constexpr std::common_type_t<T, U> max(T a, U b) {
  return a < b ? b : a;
}

// ------------------------------------------------------------------------------------------------ runtime

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNotSupported = 801,
  cudaErrorLaunchFailure = 719,
};

typedef struct CUstream_st* cudaStream_t;

inline const char* cudaGetErrorString(cudaError_t) { return "an error of the emulator"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = emulator::multiprocessors(); return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 227 * 1024; return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

constexpr int cudaSharedmemCarveoutMaxShared = 100;

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 14,
};

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  return emulator::allow_shared(reinterpret_cast<const void*>(kernel), value) ? cudaSuccess : cudaErrorInvalidValue;
}

struct cudaFuncAttributes {
  int ptxVersion, binaryVersion, numRegs, maxThreadsPerBlock;
  size_t sharedSizeBytes, localSizeBytes;
};

template <class... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(Parameters...)) {
  *attributes = {90, 90, 128, 1024, 0, 0};
  return cudaSuccess;
}

enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6,
};

union cudaLaunchAttributeValue {
  struct {
    uint32_t x, y, z;
  } clusterDim;
  int programmaticStreamSerializationAllowed;
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace emulator {

// 0 where the shape is not one that the emulator takes.
inline uint32_t cluster_of(const cudaLaunchConfig_t& config) {
  uint32_t cluster = 1;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id != cudaLaunchAttributeClusterDimension) continue;
    const auto& of = config.attrs[i].val.clusterDim;
    cluster = of.y == 1 && of.z == 1 ? of.x : 0;
  }
  return cluster;
}

}  // namespace emulator

template <class... Parameters>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*)(Parameters...), const cudaLaunchConfig_t* config) {
  const uint32_t size = emulator::cluster_of(*config);
  if (size < 1 || size > 16) return cudaErrorInvalidValue;
  *clusters = emulator::multiprocessors() / static_cast<int>(size);
  return cudaSuccess;
}

template <class... Parameters>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(Parameters...), int threads,
                                                          size_t shared_bytes) {
  const int by_memory = static_cast<int>(228 * 1024 / (shared_bytes + 1024));
  *blocks = min(min(by_memory, 2048 / threads), 32);
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... given) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::decay_t<Parameters>...> parameters;
  } call{kernel, {std::forward<Arguments>(given)...}};
  emulator::Launch launch{};
  for (int i = 0; i < 3; ++i) {
    const auto of = [i](const dim3& size) { return i == 0 ? size.x : i == 1 ? size.y : size.z; };
    launch.grid[i] = of(config->gridDim);
    launch.block[i] = of(config->blockDim);
  }
  launch.cluster = emulator::cluster_of(*config);
  launch.shared_bytes = config->dynamicSmemBytes;
  launch.kernel = reinterpret_cast<const void*>(kernel);
  launch.arguments = &call;
  launch.call = [](void* arguments) {
    auto* called = static_cast<Call*>(arguments);
    std::apply(called->kernel, called->parameters);
  };
  return emulator::launch(launch) ? cudaSuccess : cudaErrorLaunchFailure;
}

// What the driver is asked for by name.
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0, cudaDriverEntryPointSymbolNotFound = 1 };
constexpr unsigned long long cudaEnableDefault = 0;
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version,
                                             unsigned long long flags, cudaDriverEntryPointQueryResult* status);
