// Small kernels with known answers for test_emulator.py, and the same with a mistake in them.
#include "primitives.cuh"

#ifndef AR_EXPORT  // not in the emulator: nvcc compiles this file as well
#define AR_EXPORT extern "C" __attribute__((visibility("default")))
#endif

using namespace ar_kernels;

namespace {

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), int blocks, int threads, int64_t bytes, int cluster, Arguments... arguments) {
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)) != cudaSuccess)
    return cudaErrorInvalidValue;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<uint32_t>(blocks));
  config.blockDim = dim3(static_cast<uint32_t>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<uint32_t>(cluster), 1, 1};
  config.attrs = &attribute;
  config.numAttrs = cluster > 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// ------------------------------------------------------------------------------------------------ numbers

template <class T>
__global__ void convert_kernel(const float* from, uint32_t* bits, float* back, int pairs) {
  for (int i = threadIdx.x; i < pairs; i += blockDim.x) {
    bits[i] = packed<T>(from[2 * i], from[2 * i + 1]);
    const float2 both = unpacked<T>(bits[i]);
    back[2 * i] = both.x;
    back[2 * i + 1] = both.y;
  }
}

// ------------------------------------------------------------------------------------------------ products

// c = a b of 16 x 16 and 16 x 8, both by rows: a as it lies, b transposed on the way; `depth` 8: twice the half.
template <class T>
__global__ void product_kernel(const T* a, const T* b, float* c, int depth) {
  T* memory = reinterpret_cast<T*>(shared_memory());
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) memory[i] = a[i];
  for (int i = lane; i < 128; i += 32) memory[256 + i] = b[i];
  __syncwarp();
  uint32_t of_a[4], of_b[2];
  load_matrix(of_a, shared_address(memory + lane % 16 * 16 + lane / 16 * 8));
  load_matrix_transposed(of_b, shared_address(memory + 256 + lane % 16 * 8));
  float sum[4] = {0, 0, 0, 0};
  if (depth == 16) {
    mma<T>(sum, of_a, of_b[0], of_b[1]);
  } else {
    const uint32_t low[2] = {of_a[0], of_a[1]}, high[2] = {of_a[2], of_a[3]};
    mma<T>(sum, low, of_b[0]);
    mma<T>(sum, high, of_b[1]);
  }
  for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}

// The transpose of one 16 x 16 matrix, in the way that `how` says.
__global__ void transpose_kernel(const uint16_t* from, uint16_t* to, int how) {
  uint16_t* memory = reinterpret_cast<uint16_t*>(shared_memory());
  const int lane = threadIdx.x, row = lane % 16, column = lane / 16 * 8;
  for (int i = lane; i < 256; i += 32) memory[i] = from[i];
  __syncwarp();
  const uint32_t as_it_is = shared_address(memory + row * 16 + column);
  const uint32_t swapped = shared_address(memory + 256 + (column + lane % 8) * 16 + row / 8 * 8);
  uint32_t f[4];
  if (how == 0) {  // on the way in
    load_matrix_transposed(f, as_it_is);
    store_matrix(swapped, f);
  } else if (how == 1) {  // in registers
    load_matrix(f, as_it_is);
    for (uint32_t& matrix : f) matrix = transposed(matrix);
    store_matrix(swapped, f);
  } else {  // two matrices after another
    for (int i = 0; i < 4; i += 2) {
      uint32_t two[2];
      load_matrix_transposed(two, shared_address(memory + (lane / 8 % 2 * 8 + lane % 8) * 16 + i / 2 * 8));
      f[i] = two[0], f[i + 1] = two[1];
    }
    store_matrix(swapped, f);
  }
  __syncwarp();
  for (int i = lane; i < 256; i += 32) to[i] = memory[256 + i];
}

// ------------------------------------------------------------------------------------------------ copy engine

// One box in, and as it lies in shared memory to `raw`; then out again.
__global__ void box_kernel(const __grid_constant__ CUtensorMap from, const __grid_constant__ CUtensorMap to, int rank,
                           const int32_t* at, uint8_t* raw, int start, int bytes) {
  uint8_t* memory = shared_memory();
  const uint32_t barrier = shared_address(memory), box = barrier + static_cast<uint32_t>(start);
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    fence_barrier_init();
    barrier_arrive_expect(barrier, static_cast<uint32_t>(bytes));
    if (rank == 3) tensor_load(box, &from, at[0], at[1], at[2], barrier, kEvictFirst);
    if (rank == 4) tensor_load(box, &from, at[0], at[1], at[2], at[3], barrier, kEvictFirst);
  }
  __syncthreads();
  barrier_wait(barrier, 0);
  for (int i = threadIdx.x; i < bytes; i += blockDim.x) raw[i] = memory[start + i];
  if (threadIdx.x == 0) {
    if (rank == 3) tensor_store(&to, box, at[0], at[1], at[2], kEvictFirst);
    if (rank == 4) tensor_store(&to, box, at[0], at[1], at[2], at[3], kEvictFirst);
    bulk_commit();
    bulk_wait_read<0>();
  }
}

// What can be wrong in the pipeline below.
enum Mistake {
  kNone,
  kNoWait,          // for a stage to be full
  kNoRelease,       // of a stage that is read: the producer fills it at once
  kTooManyBytes,    // announced
  kTooFewBytes,     // announced
  kNoInitFence,     // of the barriers
  kNoInitBarrier,   // between the barriers' initialisation and their use
  kNoFence,         // between store_matrix and the copy from there
  kNoStoreBarrier,  // the same for the barrier
  kNoWaitRead,      // before what is copied from is written again
  kNoLastWaitRead,
  kNoCommit,  // of the last one
  kArrivesTwice,
  kOutside,    // a row of load_matrix
  kUnaligned,  // the same
  kOnlySome,   // lanes take part
  kPointerOutside,
  kPointerUnaligned,
  kDivergent,  // two lines for one instruction
  kNamedHalf,  // half a warp at a named barrier
};

// y = 3 x of one run of bytes, which plain loads and stores see in shared memory; and back again, from the global one.
enum BulkMistake { kNoneOfBulk, kNoPlainFence, kWritesUnderCopy, kNoBulkWait };

__global__ void bulk_kernel(const float* x, float* y, float* again, int bytes, int mistake) {
  float* memory = reinterpret_cast<float*>(shared_memory() + 128);
  const uint32_t barrier = shared_address(shared_memory());
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    fence_barrier_init();
    barrier_arrive_expect(barrier, bytes);
    bulk_load(shared_address(memory), x, bytes, barrier, kEvictFirst);
    if (mistake == kWritesUnderCopy) memory[1] = 0;
  }
  __syncthreads();
  while (!barrier_passed(barrier, 0)) {
  }
  for (int i = threadIdx.x; i < bytes / 4; i += blockDim.x) memory[i] *= 3;
  if (mistake != kNoPlainFence || threadIdx.x != 40) fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_store(y, shared_address(memory), bytes, kEvictFirst);
    bulk_commit();
    if (mistake == kNoBulkWait)
      bulk_wait_read<0>();
    else
      bulk_wait<0>();
  }
  __syncthreads();
  for (int i = threadIdx.x; i < bytes / 4; i += blockDim.x) again[i] = y[i];
}

// y = 2 x of [tiles, 64, 64]: warp 0 brings tiles through two stages, warps 1 and 2 double them, one of their threads
// asks for the way back.
constexpr uint32_t kTile = 64 * 64 * 2;

__global__ void __launch_bounds__(96) pipeline_kernel(const __grid_constant__ CUtensorMap from,
                                                      const __grid_constant__ CUtensorMap to, int tiles, int mistake) {
  uint8_t* memory = shared_memory();
  const uint32_t stages = shared_address(memory), out = stages + 2 * kTile, full = stages + 4 * kTile;
  const uint32_t empty = full + 16;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 64) {
    for (uint32_t stage = 0; stage < 2; ++stage) {
      barrier_init(full + 8 * stage, 1);
      barrier_init(empty + 8 * stage, 2);
    }
    if (mistake != kNoInitFence) fence_barrier_init();
  }
  if (mistake != kNoInitBarrier) __syncthreads();
  if (warp == 0) {
    if (lane != 0) return;
    for (int tile = 0; tile < tiles; ++tile) {
      const uint32_t stage = tile % 2, parity = tile / 2 % 2;
      if (mistake != kNoRelease) barrier_wait(empty + 8 * stage, parity ^ 1);
      barrier_arrive_expect(full + 8 * stage,
                            kTile + (mistake == kTooManyBytes ? 16 : 0) - (mistake == kTooFewBytes ? 16 : 0));
      tensor_load(stages + stage * kTile, &from, 0, 0, tile, full + 8 * stage, kEvictFirst);
    }
    return;
  }
  for (int tile = 0; tile < tiles; ++tile) {
    const uint32_t stage = tile % 2, parity = tile / 2 % 2;
    const uint32_t in = stages + stage * kTile, target = out + stage * kTile;
    if (mistake != kNoWait) barrier_wait(full + 8 * stage, parity);
    if (threadIdx.x == 32 && mistake != kNoWaitRead) bulk_wait_read<1>();
    named_sync(1, 64);
    for (int row = warp * 32 - 32; row < warp * 32; row += 16)
      for (uint32_t chunk = 0; chunk < 8; chunk += 2) {
        const uint32_t at = swizzled(row + lane % 16, chunk + lane / 16);
        uint32_t f[4];
        uint32_t address = in + at;
        if (mistake == kOutside && lane == 5 && tile == 2) address += 8 * kTile;
        if (mistake == kUnaligned && lane == 5 && tile == 2) address += 8;
        if (mistake == kOnlySome && lane == 5 && tile == 2) return;
        if (mistake == kDivergent && lane == 5)
          load_matrix(f, address);
        else
          load_matrix(f, address);
        for (uint32_t& word : f) {
          const float2 pair = unpacked<__half>(word);
          word = packed<__half>(2 * pair.x, 2 * pair.y);
        }
        store_matrix(target + at, f);
      }
    if (mistake == kPointerOutside && tile == 2 && threadIdx.x == 40) *(memory + 4 * kTile + 1024) = 1;
    if (mistake == kPointerUnaligned && tile == 2) reinterpret_cast<float4*>(memory + 4 * kTile + 40)->x = 1;
    if (mistake != kNoFence) fence_proxy_async();
    if (lane == 0) barrier_arrive(empty + 8 * stage);
    if (lane == 0 && mistake == kArrivesTwice) barrier_arrive(empty + 8 * stage);
    if (mistake == kNamedHalf && lane >= 16)
      named_sync(3, 64);
    else if (mistake != kNoStoreBarrier)
      named_sync(2, 64);
    if (threadIdx.x == 32) {
      tensor_store(&to, target, 0, 0, tile, kEvictFirst);
      if (mistake != kNoCommit || tile + 1 < tiles) bulk_commit();
    }
  }
  if (threadIdx.x == 32 && mistake != kNoLastWaitRead) bulk_wait_read<0>();
}

// ------------------------------------------------------------------------------------------------ barriers

// One thread writes a number, all read it, in turns; named barriers 1 and 2 say whose turn it is.
__global__ void turns_kernel(int* to, int turns) {
  volatile int* number = reinterpret_cast<int*>(shared_memory());
  const int threads = blockDim.x;
  for (int turn = 0; turn < turns; ++turn) {
    if (threadIdx.x == 0) *number = turn * turn;
    named_sync(1, threads);
    to[turn * threads + threadIdx.x] = *number;
    named_sync(2, threads);
  }
}

// Whether any thread's number is this turn's, to all of them.
__global__ void any_kernel(const int* from, int* to, int turns) {
  const int threads = blockDim.x;
  for (int turn = 0; turn < turns; ++turn)
    to[turn * threads + threadIdx.x] = named_any(1, threads, from[threadIdx.x] == turn);
}

// The sum over the block's threads, most of which leave early.
__global__ void early_kernel(int* to) {
  int* sum = reinterpret_cast<int*>(shared_memory());
  if (threadIdx.x == 0) *sum = 0;
  __syncthreads();
  atomicAdd(sum, static_cast<int>(threadIdx.x));
  if (threadIdx.x >= 40) return;
  __syncthreads();
  if (threadIdx.x == 0) to[blockIdx.x] = *sum;
}

// ------------------------------------------------------------------------------------------------ clusters

enum ClusterMistake { kNoneOfCluster, kNoFirstWait, kLeaves, kWaitOfBlock, kNoSuchRank };

// Every block gets the sums over the blocks of its cluster, which send it four floats each.
__global__ void cluster_kernel(float4* sums, int blocks, int mistake) {
  float* memory = reinterpret_cast<float*>(shared_memory());
  const uint32_t own = shared_address(memory), barrier = own + 512;
  const uint32_t rank = cluster_rank();
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    fence_barrier_init();
    barrier_arrive_expect(barrier, 16 * blocks);
  }
  if (mistake != kNoFirstWait) {
    cluster_arrive();
    cluster_wait();
  }
  if (threadIdx.x < blocks + (mistake == kNoSuchRank)) {
    const float x = blockIdx.x + 1.f;
    store_to_cluster(cluster_address(own + 16 + 16 * rank, threadIdx.x), make_float4(x, 2 * x, 3 * x, 4 * x),
                     cluster_address(barrier, threadIdx.x));
  }
  if (mistake == kLeaves) return;
  if (mistake == kWaitOfBlock)
    barrier_wait(barrier, 0);
  else
    barrier_wait_cluster(barrier, 0);
  if (threadIdx.x == 0) {
    float4 sum = {0, 0, 0, 0};
    for (int other = 0; other < blocks; ++other) {
      const float4 part = *reinterpret_cast<const float4*>(memory + 4 + 4 * other);
      sum = make_float4(sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w);
    }
    sums[blockIdx.x] = sum;
  }
}

}  // namespace

AR_EXPORT int convert(const float* from, uint32_t* bits, float* back, int64_t pairs, int64_t is_half) {
  return launch(is_half ? convert_kernel<__half> : convert_kernel<__nv_bfloat16>, 1, 64, 0, 1, from, bits, back,
                static_cast<int>(pairs));
}

AR_EXPORT int product(const void* a, const void* b, float* c, int64_t depth, int64_t is_half) {
  const int k = static_cast<int>(depth);
  if (is_half)
    return launch(product_kernel<__half>, 1, 32, 768, 1, static_cast<const __half*>(a), static_cast<const __half*>(b),
                  c, k);
  return launch(product_kernel<__nv_bfloat16>, 1, 32, 768, 1, static_cast<const __nv_bfloat16*>(a),
                static_cast<const __nv_bfloat16*>(b), c, k);
}

AR_EXPORT int transpose(const uint16_t* from, uint16_t* to, int64_t how) {
  return launch(transpose_kernel, 1, 32, 1024, 1, from, to, static_cast<int>(how));
}

// Sizes and box of four dimensions, the first two of three; tensors are contiguous.
AR_EXPORT int box(const void* from, void* to, const int64_t* sizes, const int64_t* shape, const int32_t* at,
                  uint8_t* raw, int64_t rank, int64_t swizzle, int64_t start) {
  CUtensorMap maps[2];
  for (int i = 0; i < 2; ++i) {
    const void* data = i == 0 ? from : to;
    const auto swizzled_by = static_cast<CUtensorMapSwizzle>(swizzle);
    uint64_t size[4], strides[3];
    uint32_t box[4];
    for (int d = 0; d < 4; ++d) {
      size[d] = static_cast<uint64_t>(sizes[d]);
      box[d] = static_cast<uint32_t>(shape[d]);
      if (d < 3) strides[d] = (d == 0 ? 2 : strides[d - 1]) * size[d];
    }
    const bool made = rank == 4
                          ? encode_map<__half, 4>(&maps[i], data, size, strides, box, swizzled_by)
                          : encode_map<__half, 3>(&maps[i], data, {size[0], size[1], size[2]}, {strides[0], strides[1]},
                                                  {box[0], box[1], box[2]}, swizzled_by);
    if (!made) return cudaErrorInvalidValue;
  }
  const int bytes = static_cast<int>(2 * shape[0] * shape[1] * shape[2] * (rank == 4 ? shape[3] : 1));
  return launch(box_kernel, 1, 64, start + bytes, 1, maps[0], maps[1], static_cast<int>(rank), at, raw,
                static_cast<int>(start), bytes);
}

AR_EXPORT int pipeline(const void* from, void* to, int64_t tiles, int64_t mistake) {
  CUtensorMap maps[2];
  for (int i = 0; i < 2; ++i)
    if (!encode_map<__half, 3>(&maps[i], i == 0 ? from : to, {64, 64, static_cast<uint64_t>(tiles)}, {128, kTile},
                               {64, 64, 1}, CU_TENSOR_MAP_SWIZZLE_128B))
      return cudaErrorInvalidValue;
  return launch(pipeline_kernel, 1, 96, 4 * kTile + 48, 1, maps[0], maps[1], static_cast<int>(tiles),
                static_cast<int>(mistake));
}

AR_EXPORT int bulk(const float* x, float* y, float* again, int64_t bytes, int64_t mistake) {
  return launch(bulk_kernel, 1, 64, 128 + bytes, 1, x, y, again, static_cast<int>(bytes), static_cast<int>(mistake));
}

AR_EXPORT int turns(int* to, int64_t threads, int64_t count) {
  return launch(turns_kernel, 1, static_cast<int>(threads), 16, 1, to, static_cast<int>(count));
}

AR_EXPORT int any(const int* from, int* to, int64_t threads, int64_t count) {
  return launch(any_kernel, 1, static_cast<int>(threads), 16, 1, from, to, static_cast<int>(count));
}

AR_EXPORT int early(int* to, int64_t blocks, int64_t bytes) {
  return launch(early_kernel, static_cast<int>(blocks), 100, bytes, 1, to);
}

AR_EXPORT int cluster(void* sums, int64_t clusters, int64_t blocks, int64_t mistake) {
  const int size = static_cast<int>(blocks);
  return launch(cluster_kernel, static_cast<int>(clusters) * size, 64, 1024, size, static_cast<float4*>(sums), size,
                static_cast<int>(mistake));
}
