// What C++ has no words for: copies by the copy engine, barriers in shared memory, matrix products of one warp.
//
// Everything from ldmatrix to mma runs from sm_80 on; the copy engine, mbarriers with byte counts, clusters and
// stmatrix from sm_90 on. A kernel that uses those has its body inside #if AR_HOPPER: it is compiled empty for older
// GPUs, which never launch it.
//
// Shared memory is addressed by 32-bit numbers (shared_address), as the instructions want them.
//
// With AR_EMULATOR defined, tests/emulator has what stands here in PTX, and kernels run on a CPU.
#pragma once

#include <cuda.h>  // types only: nothing links libcuda
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include <type_traits>

#if defined(AR_EMULATOR) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
#define AR_HOPPER 1
#else
#define AR_HOPPER 0
#endif

#ifdef AR_EMULATOR
#include "primitives.h"
#endif

namespace ar_kernels {

#ifndef AR_EMULATOR

// The block's dynamic shared memory.
__device__ __forceinline__ uint8_t* shared_memory() {
  extern __shared__ uint8_t dynamic_shared_memory[];
  return dynamic_shared_memory;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// So long, or up to twice as long; a millisecond at most.
__device__ __forceinline__ void pause(uint32_t nanoseconds) { __nanosleep(nanoseconds); }

// The same value, which the compiler now keeps in a register instead of finding it anew in each turn of a loop.
__device__ __forceinline__ uint32_t kept(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

// ------------------------------------------------------------------------------------------------ mbarrier

// A barrier is one 64-bit word of shared memory. Its phase ends when all arrivals and all announced bytes have come;
// waiters name the parity of the phase they wait for: 0 for the first, then 1, 0, 1, ... Waiting for parity 1 on a new
// barrier returns at once, so a producer starts with 1 where consumers start with 0.

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// After barrier_init by one thread and before others (a __syncthreads away) or the copy engine use the barriers.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// One arrival, and so many bytes that copies will bring to this phase. Before the copies are asked for.
__device__ __forceinline__ void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ bool barrier_passed(uint32_t barrier, uint32_t parity) {
  uint32_t passed;
  asm volatile("{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
               : "=r"(passed)
               : "r"(barrier), "r"(parity)
               : "memory");
  return passed != 0;
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  while (!barrier_passed(barrier, parity)) {
  }
}

// The same where what is waited for comes from other blocks of the cluster.
__device__ __forceinline__ void barrier_wait_cluster(uint32_t barrier, uint32_t parity) {
  uint32_t passed = 0;
  while (passed == 0)
    asm volatile(
        "{\n .reg .pred p;\n mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        " selp.u32 %0, 1, 0, p;\n}"
        : "=r"(passed)
        : "r"(barrier), "r"(parity)
        : "memory");
}

// ------------------------------------------------------------------------------------------------ copy engine

// Order of ordinary accesses to shared memory before later ones by the copy engine: each writing thread, then a
// barrier, then the thread that asks for the copy. Reads need none: a stage that was read may be filled after a
// barrier.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// One contiguous run of bytes; both addresses and the size are multiples of 16. Completes on the barrier by bytes.
__device__ __forceinline__ void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier,
                                          uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

// The same way back. Completes by groups of the thread that asks: bulk_commit, then bulk_wait_read before what was
// copied from is written again, bulk_wait before the kernel relies on the result.
__device__ __forceinline__ void bulk_store(void* to, uint32_t from, uint32_t bytes, uint64_t policy) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, %3;" ::"l"(to), "r"(from),
               "r"(bytes), "l"(policy)
               : "memory");
}

__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

template <int kPending>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// The line of 128 bytes that has this byte of global memory, into L2.
__device__ __forceinline__ void prefetch_l2(const void* byte) { asm volatile("prefetch.global.L2 [%0];" ::"l"(byte)); }

// A box of a tensor map (a __grid_constant__ kernel parameter), innermost coordinate first. The whole box counts in
// the barrier's bytes; what lies beyond the tensor's end arrives as zeros,
// and no coordinate may be negative.
__device__ __forceinline__ void tensor_load(uint32_t to, const CUtensorMap* map, int32_t x, int32_t y, int32_t z,
                                            uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier), "l"(policy)
      : "memory");
}

// The same of a tensor of four dimensions.
__device__ __forceinline__ void tensor_load(uint32_t to, const CUtensorMap* map, int32_t x, int32_t y, int32_t z,
                                            int32_t v, uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(v), "r"(barrier), "l"(policy)
      : "memory");
}

// The way back; what lies beyond the tensor's end is not written. Groups as of bulk_store.
__device__ __forceinline__ void tensor_store(const CUtensorMap* map, uint32_t from, int32_t x, int32_t y, int32_t z,
                                             uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group.L2::cache_hint [%0, {%2, %3, %4}], [%1], %5;" ::"l"(map),
      "r"(from), "r"(x), "r"(y), "r"(z), "l"(policy)
      : "memory");
}

__device__ __forceinline__ void tensor_store(const CUtensorMap* map, uint32_t from, int32_t x, int32_t y, int32_t z,
                                             int32_t v, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group.L2::cache_hint [%0, {%2, %3, %4, %5}], [%1], %6;" ::"l"(
          map),
      "r"(from), "r"(x), "r"(y), "r"(z), "r"(v), "l"(policy)
      : "memory");
}

// A line of global memory that ordinary loads will want, into L1.
__device__ __forceinline__ void prefetch_l1(const void* from) { asm volatile("prefetch.L1 [%0];" ::"l"(from)); }

// ------------------------------------------------------------------------------------------------ barriers of warps

// Named barriers 1 to 15 (0 is __syncthreads) of so many threads, a multiple of 32.
__device__ __forceinline__ void named_sync(int name, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// The same; whether one of them says so.
__device__ __forceinline__ bool named_any(int name, int threads, bool predicate) {
  uint32_t any;
  asm volatile(
      "{\n .reg .pred own, all;\n setp.ne.u32 own, %3, 0;\n bar.red.or.pred all, %1, %2, own;\n"
      " selp.u32 %0, 1, 0, all;\n}"
      : "=r"(any)
      : "r"(name), "r"(threads), "r"(static_cast<uint32_t>(predicate))
      : "memory");
  return any != 0;
}

// ------------------------------------------------------------------------------------------------ clusters

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// The address that block `rank` of the cluster has for what is at this block's address.
__device__ __forceinline__ uint32_t cluster_address(uint32_t address, uint32_t rank) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

// Four floats to another block, counted as 16 bytes on a barrier of that block: no fence is needed.
__device__ __forceinline__ void store_to_cluster(uint32_t to, float4 value, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
               "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "r"(barrier)
               : "memory");
}

// Of what was written before, barriers alone are sure to be seen, after fence_barrier_init.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait;" ::: "memory"); }

// ------------------------------------------------------------------------------------------------ matrix products

// ldmatrix: 8x8 matrices of 16-bit values; lane i of each group of eight gives the address of a row (16 bytes,
// aligned). Thread t gets row t/4, columns 2(t%4) and +1; transposed: rows 2(t%4) and +1 of column t/4.

__device__ __forceinline__ void load_matrix(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

__device__ __forceinline__ void load_matrix(uint32_t (&to)[2], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(to[0]), "=r"(to[1])
               : "r"(row)
               : "memory");
}

__device__ __forceinline__ void load_matrix_transposed(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

__device__ __forceinline__ void load_matrix_transposed(uint32_t (&to)[2], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(to[0]), "=r"(to[1])
               : "r"(row)
               : "memory");
}

// The reverse of load_matrix.
__device__ __forceinline__ void store_matrix(uint32_t row, const uint32_t (&from)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(from[0]),
               "r"(from[1]), "r"(from[2]), "r"(from[3])
               : "memory");
}

// The transpose of a matrix that is spread over a warp as load_matrix leaves it.
__device__ __forceinline__ uint32_t transposed(uint32_t matrix) {
  uint32_t result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(matrix));
  return result;
}

// c += a b in float32; a is 16 x k (k = 16 or 8, by rows), b k x 8, c 16 x 8. With g = lane/4 and i = lane%4:
//   a[0], a[1]: rows g and g + 8, columns 2i and +1 of the first eight; a[2], a[3]: of the second eight
//   b[0]: rows 2i and +1 (first eight), column g; b[1]: of the second eight
//   c[0], c[1]: row g, columns 2i and +1; c[2], c[3]: row g + 8
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(sizeof(T) == 2, "T is __half or __nv_bfloat16");
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[2], uint32_t b) {
  static_assert(sizeof(T) == 2, "T is __half or __nv_bfloat16");
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
  }
}

// The larger, or NaN where either is: fmaxf would drop it, and with it what the reference makes of the image.
__device__ __forceinline__ float maximum(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// 2 to a power, 0 where the result is denormal: one instruction.
__device__ __forceinline__ float power_of_two(float power) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(power));
  return result;
}

#endif  // AR_EMULATOR

// ------------------------------------------------------------------------------------------------ values

// How L2 is to treat the lines of a copy; these words are what createpolicy makes of a fraction of 1.
constexpr uint64_t kEvictNormal = 0x1000000000000000;
constexpr uint64_t kEvictFirst = 0x12F0000000000000;  // read once

// With a swizzle of 128 bytes the copy engine stores the 16-byte chunk c of row r (rows of 128 bytes, the box aligned
// to 1024) where chunk c ^ (r % 8) would be, so that a column of chunks touches all banks. Offset in bytes of a chunk.
__device__ __forceinline__ uint32_t swizzled(uint32_t row, uint32_t chunk) {
  return row * 128 + ((chunk ^ (row & 7)) << 4);
}

// Two values of T in a word, the first in its lower half.
template <class T>
__device__ __forceinline__ uint32_t packed(float first, float second) {
  static_assert(sizeof(T) == 2, "T is __half or __nv_bfloat16");
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

template <class T>
__device__ __forceinline__ float2 unpacked(uint32_t word) {
  static_assert(sizeof(T) == 2, "T is __half or __nv_bfloat16");
  if constexpr (std::is_same_v<T, __half>)
    return __half22float2(*reinterpret_cast<const __half2*>(&word));
  else
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&word));
}

template <class T>
__device__ __forceinline__ T rounded(float value) {
  if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(value);
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(value);
  else
    return value;
}

// What exponents are counted from: the maximum m, or 0 where that is infinite and nothing could be counted.
__device__ __forceinline__ float origin(float m) { return fabsf(m) == INFINITY ? 0.f : m; }

// ------------------------------------------------------------------------------------------------ tensor maps

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's function, asked for at run time so that the library loads where there is no driver; null without it.
inline EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status);
    return error == cudaSuccess && status == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(found)
                                                                         : nullptr;
  }();
  return function;
}

// A tensor of 16-bit values or floats of kRank dimensions, innermost (adjacent) first: sizes, strides in bytes of all
// but the innermost (multiples of 16), and the box that one copy brings. A line of L2 that is fetched for some of its
// bytes is filled as `promotion` says. Returns false where the driver refuses.
template <class T, int kRank>
bool encode_map(CUtensorMap* map, const void* data, const uint64_t (&sizes)[kRank],
                const uint64_t (&strides)[kRank - 1], const uint32_t (&box)[kRank], CUtensorMapSwizzle swizzle,
                CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B) {
  static_assert(sizeof(T) == 2 || std::is_same_v<T, float>, "T is __half, __nv_bfloat16 or float");
  const EncodeTiled encode = encode_tiled();
  if (encode == nullptr) return false;
  cuuint64_t global[kRank], steps[kRank - 1];
  cuuint32_t shape[kRank], elements[kRank];
  for (int i = 0; i < kRank; ++i) {
    global[i] = sizes[i];
    shape[i] = box[i];
    elements[i] = 1;
    if (i + 1 < kRank) steps[i] = strides[i];
  }
  const CUtensorMapDataType type = std::is_same_v<T, float>    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                   : std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                               : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return encode(map, type, kRank, const_cast<void*>(data), global, steps, shape, elements,
                CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace ar_kernels
