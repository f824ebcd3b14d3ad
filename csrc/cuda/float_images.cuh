// What the Hopper kernels of float32 NCHW maps of few positions, with rows of any length, share.
//
// A block takes whole images, in chunks of channels; one sweep over them makes sums over channels, a
// second one, backwards, the rest, and what had to leave in between comes from L2. A lane has every 32nd position of a
// row, so rows may begin anywhere; a warp works on 4 channels at a time.
#pragma once

#include "floats.cuh"

namespace ar_kernels {

constexpr int kUnit = 4;              // channels that a warp works on at once
constexpr int kImagePositions = 256;  // the most
constexpr int kLoads = 32;            // barriers and places in the table of slots: twice as many as slots, at least

// Where what lies in shared memory.
struct ImageSlotsCut {
  int chunks, chunk_bytes, slots;
  int weights;  // [C, columns] floats
  int sums;     // [warps / 2, columns, 32 own] floats
  int masks;    // [columns, 32 own] floats
  int table;    // [kLoads] ints: the slot of each load
  int barriers, rest, bytes;
};

struct FloatImagesCut {
  ImageSlotsCut slots;
  int own, rows;  // positions of a lane; channels of a chunk
};

// columns: sums over channels at every position. No slots: it does not fit.
inline FloatImagesCut float_images_cut(int channels, int positions, int columns) {
  FloatImagesCut cut = {};
  if (positions < 1 || positions > kImagePositions) return cut;
  cut.own = positions <= 64 ? 2 : positions <= 192 ? 6 : 8;
  for (cut.rows = 2 * kGroupWarps * kUnit; 4 * cut.rows * positions > 48 * 1024; cut.rows /= 2) {
  }
  if (channels < cut.rows || channels % cut.rows != 0) return cut;
  ImageSlotsCut& slots = cut.slots;
  slots.chunks = channels / cut.rows;
  slots.chunk_bytes = 4 * cut.rows * positions;
  const int weights = 4 * channels * columns, masks = 4 * columns * 32 * cut.own, sums = kGroupWarps / 2 * masks;
  const int others = weights + masks + sums + kLoads * (4 + 8) + 1024;
  const int most = (kSharedBytes - others) / slots.chunk_bytes;
  slots.slots = most < kLoads / 2 ? most : kLoads / 2;
  if (slots.slots > slots.chunks) slots.slots = slots.chunks;
  if (slots.slots < 2 && slots.chunks > 1) slots.slots = 0;  // nothing could be on its way
  slots.weights = slots.slots * slots.chunk_bytes;
  slots.sums = slots.weights + weights;
  slots.masks = slots.sums + sums;
  slots.table = slots.masks + masks;
  slots.barriers = slots.table + kLoads * 4;
  slots.rest = slots.barriers + kLoads * 8;  // 1 KB
  slots.bytes = slots.rest + 1024;
  return cut;
}

inline bool is_float_images(const Map& map, int positions) {
  return map.position == 1 && map.channel == positions && map.image > 0 && map.image % 4 == 0;
}

#if AR_HOPPER

// The slots, and what is asked for into them. All of a block's threads follow it; thread 0 asks.
//
// An image's loads are its chunks in order, then, backwards, those that the second sweep must read again. A slot is
// asked for again as soon as what it held was used the last time: in order, but that the last `slots` chunks of the
// first sweep, which stay for the second, go in reverse.
struct ImageSlots {
  const ImageSlotsCut& cut;
  const uint8_t* first_image;  // of this block, in global memory
  int64_t image_bytes;
  uint8_t* memory;
  uint32_t base;
  int loads, per_image;  // of this block, of an image
  int next;              // load to ask for

  __device__ ImageSlots(const ImageSlotsCut& cut, const void* map, int64_t image_bytes, int images, uint8_t* memory)
      : cut(cut), first_image(static_cast<const uint8_t*>(map)), image_bytes(image_bytes), memory(memory), next(0) {
    base = shared_address(memory);
    per_image = 2 * cut.chunks - cut.slots;
    loads = images * per_image;
    if (threadIdx.x != 0) return;
    for (int i = 0; i < kLoads; ++i) barrier_init(barrier(i), 1);
    fence_barrier_init();
    for (int slot = 0; slot < cut.slots; ++slot) ask(slot);
  }

  __device__ uint32_t barrier(int load) const { return base + cut.barriers + load % kLoads * 8; }

  // Thread 0: the next load, into a slot that nobody uses any more.
  __device__ void ask(int slot) {
    if (next >= loads) return;
    const int of_image = next % per_image;
    const int chunk = of_image < cut.chunks ? of_image : per_image - 1 - of_image;
    reinterpret_cast<int*>(memory + cut.table)[next % kLoads] = slot;
    barrier_arrive_expect(barrier(next), cut.chunk_bytes);
    bulk_load(base + slot * cut.chunk_bytes,
              first_image + next / per_image * image_bytes + static_cast<int64_t>(chunk) * cut.chunk_bytes,
              cut.chunk_bytes, barrier(next), kEvictNormal);
    ++next;
  }

  __device__ int slot_of(int load) const { return reinterpret_cast<const int*>(memory + cut.table)[load % kLoads]; }

  // The slot of a chunk, when it is there; image counts from this block's first.
  __device__ int wait(int image, int chunk, bool second_sweep) const {
    const bool again = second_sweep && chunk < cut.chunks - cut.slots;
    const int load = image * per_image + (again ? per_image - 1 - chunk : chunk);
    barrier_wait(barrier(load), load / kLoads & 1);
    return slot_of(load);
  }
};

// The first sweep: to `sums`, as [kGroupWarps / 2, kColumns, 32 kOwn], shares of Σ_c weights[c] z[c]. Ends with a
// barrier.
template <int kOwn, int kColumns>
__device__ __forceinline__ void sum_floats_over_channels(ImageSlots& slots, const FloatImagesCut& cut, int image,
                                                         int positions) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float own[kColumns][kOwn];
#pragma unroll
  for (int k = 0; k < kColumns; ++k)
#pragma unroll
    for (int i = 0; i < kOwn; ++i) own[k][i] = 0;
  for (int chunk = 0; chunk < cut.slots.chunks; ++chunk) {
    const int slot = slots.wait(image, chunk, false);
    const float* z = reinterpret_cast<const float*>(slots.memory + slot * cut.slots.chunk_bytes) + lane;
    const float4* weights = reinterpret_cast<const float4*>(slots.memory + cut.slots.weights);
    for (int channel = kUnit * warp; channel < cut.rows; channel += kUnit * kGroupWarps)
#pragma unroll
      for (int c = channel; c < channel + kUnit; ++c) {
        float weight[kColumns];
#pragma unroll
        for (int k = 0; k < kColumns; k += 4) {
          const float4 four = weights[((chunk * cut.rows + c) * kColumns + k) / 4];
          weight[k] = four.x, weight[k + 1] = four.y, weight[k + 2] = four.z, weight[k + 3] = four.w;
        }
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          const float value = lane + 32 * i < positions ? z[c * positions + 32 * i] : 0.f;
#pragma unroll
          for (int k = 0; k < kColumns; ++k) own[k][i] += weight[k] * value;
        }
      }
    if (chunk < cut.slots.chunks - cut.slots.slots) {  // the others stay
      __syncthreads();
      if (threadIdx.x == 0) slots.ask(slot);
    }
  }
  float* sums = reinterpret_cast<float*>(slots.memory + cut.slots.sums);
  float* to = sums + warp % (kGroupWarps / 2) * kColumns * 32 * kOwn + lane;
  if (warp >= kGroupWarps / 2)
#pragma unroll
    for (int i = 0; i < kColumns * kOwn; ++i) to[32 * i] = own[i / kOwn][i % kOwn];
  __syncthreads();
  if (warp < kGroupWarps / 2)
#pragma unroll
    for (int i = 0; i < kColumns * kOwn; ++i) to[32 * i] += own[i / kOwn][i % kOwn];
  __syncthreads();
}

// Of all shares, at this lane's position i.
template <int kOwn, int kColumns>
__device__ __forceinline__ float float_sum(const ImageSlots& slots, int column, int i) {
  const float* from = reinterpret_cast<const float*>(slots.memory + slots.cut.sums) + 32 * (column * kOwn + i);
  float sum = 0;
#pragma unroll
  for (int share = 0; share < kGroupWarps / 2; ++share) sum += from[share * kColumns * 32 * kOwn + threadIdx.x % 32];
  return sum;
}

#endif  // AR_HOPPER

}  // namespace ar_kernels
