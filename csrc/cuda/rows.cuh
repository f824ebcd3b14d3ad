// What the Hopper kernels of NCHW maps with rows of any length share.
//
// An image is one run of memory, whatever the length of its rows. A block takes whole images, in chunks of 128 channels
// that the copy engine brings into slots of shared memory. The first sweep over an image's chunks makes sums over all
// channels at every position; the second goes backwards, and begins with the chunks that are still in their slots:
// only what had to leave is read again, from L2.
//
// A row's 16-byte blocks are not its neighbours': row c begins c S % 8 elements after one. Rows whose numbers leave the
// same remainder by `classes` = 8 / gcd(S, 8) are alike; matrices of 16 channels are of one class. Columns of a matrix
// are blocks, so row c has its position s in column s + c S % 8, and in the first and the last columns there are
// elements of other rows: of no use to products that keep columns apart, to be left out of those that add them up.
#pragma once

#include "primitives.cuh"
#include "sweep.h"
#include "values.cuh"

namespace ar_kernels {

constexpr int kChunk = 128;  // channels
constexpr int kWarps = 8;    // as many as there are matrices of 16 channels in a chunk
constexpr int kThreads = 32 * kWarps;
constexpr int kColumnTiles = 4;  // of 16 columns, the most that a warp sums at once
constexpr int kLoads = 32;       // barriers and places in the table of slots: twice as many as slots, at least

// How an image is cut, and where what lies in shared memory.
struct RowsCut {
  int classes, tiles;  // of rows; of 16 columns, of a row
  int chunks, chunk_bytes, slots;
  int weights;  // [chunks, kChunk, 8] of 16 bits, class by class: matrices touch all banks
  int sums;     // [classes, 16 tiles, 8] floats
  int masks;    // [16 + S + 16 rounded up, 8] of 16 bits: zeros before and behind
  int table;    // [kLoads] ints: the slot of each load
  int barriers, rest, bytes;
};

// No slots: it does not fit.
inline RowsCut rows_cut(int channels, int positions, int rest) {
  RowsCut cut = {};
  cut.classes = positions % 8 == 0 ? 1 : positions % 4 == 0 ? 2 : positions % 2 == 0 ? 4 : 8;
  const int shift = cut.classes == 1 ? 0 : 8 - 8 / cut.classes;  // the most
  cut.tiles = (positions + shift + 15) / 16;
  if (channels < kChunk || channels % kChunk != 0 || cut.tiles > kColumnTiles * kWarps / cut.classes) return cut;
  cut.chunks = channels / kChunk;
  cut.chunk_bytes = 2 * kChunk * positions;
  const int weights = 16 * channels, sums = cut.classes * cut.tiles * 16 * 8 * 4, masks = (16 * cut.tiles + 32) * 16;
  const int others = weights + sums + masks + kLoads * (4 + 8) + (rest + 15) / 16 * 16;
  const int slots = (kSharedBytes - others - 64) / cut.chunk_bytes;  // the last rows' columns reach beyond their slot
  cut.slots = slots < kLoads / 2 ? slots : kLoads / 2;
  if (cut.slots > cut.chunks) cut.slots = cut.chunks;
  if (cut.slots == 1 && cut.chunks > 1) cut.slots = 0;  // nothing could be on its way
  cut.weights = cut.slots * cut.chunk_bytes;
  cut.sums = cut.weights + weights;
  cut.masks = cut.sums + sums;
  cut.table = cut.masks + masks;
  cut.barriers = cut.table + kLoads * 4;
  cut.rest = cut.barriers + kLoads * 8;
  cut.bytes = others + cut.slots * cut.chunk_bytes + 64;
  return cut;
}

// Whether the copy engine can bring chunks of it.
inline bool is_rows(const Map& map, int positions) {
  return map.position == 1 && map.channel == positions && map.image > 0 && map.image % 8 == 0;
}

#if AR_HOPPER

// The slots, and what is asked for into them. All of a block's threads follow it; thread 0 asks.
//
// An image's loads are its chunks in order, then, backwards, those that the second sweep must read again. A slot is
// asked for again as soon as what it held was used the last time: in order, but that the last `slots` chunks of the
// first sweep, which stay for the second, go in reverse.
struct Slots {
  const RowsCut& cut;
  const uint8_t* first_image;  // of this block, in global memory
  int64_t image_bytes;
  uint8_t* memory;
  uint32_t base;
  int loads, per_image;  // of this block, of an image
  int next;              // load to ask for

  __device__ Slots(const RowsCut& cut, const void* map, int64_t image_bytes, int images, uint8_t* memory)
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

// Elements between a 16-byte block's begin and that of a row of a class.
__device__ __forceinline__ int shift_of(int row_class, int positions) { return row_class * positions & 7; }

// Where a channel's weights are.
__device__ __forceinline__ int weight_place(int channel, int classes) {
  const int of_chunk = channel % kChunk;
  return channel - of_chunk + of_chunk % classes * (kChunk / classes) + of_chunk / classes;
}

// The first sweep: sums[class, column, 8] = Σ_c weights[c] z[c], of the rows of each class. Ends with a barrier.
template <class T>
__device__ __forceinline__ void sum_over_channels(Slots& slots, int image, int positions) {
  const RowsCut& cut = slots.cut;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, column = lane % 4;
  const int row_class = warp % cut.classes, group = warp / cut.classes, groups = kWarps / cut.classes;
  float both[kColumnTiles][4];
#pragma unroll
  for (int u = 0; u < kColumnTiles; ++u)
#pragma unroll
    for (int i = 0; i < 4; ++i) both[u][i] = 0;
  // Matrices 0 and 1 of a fragment are columns 0 to 7 and 8 to 15 of the first eight channels, 2 and 3 of the others.
  const uint32_t lane_row = cut.classes * (lane % 8 + lane / 16 * 8) + row_class;
  const uint32_t lane_offset = 2 * (lane_row * positions - shift_of(row_class, positions)) + lane / 8 % 2 * 16;
  for (int chunk = 0; chunk < cut.chunks; ++chunk) {
    const int slot = slots.wait(image, chunk, false);
    const uint32_t z = slots.base + slot * cut.chunk_bytes + lane_offset;
    const uint32_t weights = slots.base + cut.weights + 16 * (chunk * kChunk + row_class * (kChunk / cut.classes));
    for (int block = 0; block < groups; ++block) {
      uint32_t weight[2];
      load_matrix_transposed(weight, weights + 16 * (16 * block + lane % 16));
#pragma unroll
      for (int u = 0; u < kColumnTiles; ++u) {
        const int tile = group + groups * u;
        if (tile >= cut.tiles) continue;
        uint32_t fragment[4];
        load_matrix_transposed(fragment, z + block * 16 * cut.classes * 2 * positions + 32 * tile);
        mma<T>(both[u], fragment, weight[0], weight[1]);
      }
    }
    if (chunk < cut.chunks - cut.slots) {  // the others stay
      __syncthreads();
      if (threadIdx.x == 0) slots.ask(slot);
    }
  }
  float* sums = reinterpret_cast<float*>(slots.memory + cut.sums) + row_class * cut.tiles * 16 * 8;
#pragma unroll
  for (int u = 0; u < kColumnTiles; ++u) {
    const int tile = group + groups * u;
    if (tile >= cut.tiles) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      *reinterpret_cast<float2*>(sums + (16 * tile + 8 * half + row) * 8 + 2 * column) =
          make_float2(both[u][2 * half], both[u][2 * half + 1]);
  }
  __syncthreads();
}

// Of all classes: columns 2 * pair and + 1 of `sums` at a position.
__device__ __forceinline__ float2 class_sum(const Slots& slots, int positions, int position, int pair) {
  const RowsCut& cut = slots.cut;
  float2 sum = {0, 0};
  for (int row_class = 0; row_class < cut.classes; ++row_class) {
    const int at = row_class * cut.tiles * 16 + position + shift_of(row_class, positions);
    const float2 part =
        *reinterpret_cast<const float2*>(reinterpret_cast<const float*>(slots.memory + cut.sums) + at * 8 + 2 * pair);
    sum = make_float2(sum.x + part.x, sum.y + part.y);
  }
  return sum;
}

// In the second sweep a warp has 16 channels of a chunk, `classes` apart.
struct OwnRows {
  int row_class, first, shift;  // first: channel, in the chunk
  uint32_t weights;             // address of the first one's, in the first chunk
  uint32_t masks;               // of what belongs to column 0

  __device__ OwnRows(const Slots& slots, int positions) {
    const int warp = threadIdx.x / 32, classes = slots.cut.classes;
    row_class = warp % classes;
    first = 16 * classes * (warp / classes) + row_class;
    shift = shift_of(row_class, positions);
    weights = slots.base + slots.cut.weights + 16 * weight_place(first, classes);
    masks = slots.base + slots.cut.masks + 16 * (16 - shift);
  }

  // Σ_s z[c, s] masks[s] of these channels.
  template <class T>
  __device__ void sum_over_positions(const Slots& slots, uint32_t chunk, int positions, float (&sums)[4]) const {
    const RowsCut& cut = slots.cut;
    const int lane = threadIdx.x % 32;
    const uint32_t z = chunk + 2 * ((first + cut.classes * (lane % 16)) * positions - shift) + lane / 16 * 16;
    float chains[2][4] = {};  // of products that don't wait for each other
    for (int tile = 0; tile < cut.tiles; tile += 2)
#pragma unroll
      for (int chain = 0; chain < 2; ++chain) {
        if (tile + chain >= cut.tiles) continue;
        const int begin = 16 * (tile + chain);
        uint32_t fragment[4], mask[2];
        load_matrix(fragment, z + 2 * begin);
        load_matrix_transposed(mask, masks + 16 * (begin + lane % 16));
        if (begin < shift || begin + 16 - shift > positions)  // other rows' elements, which may be infinite
#pragma unroll
          for (int i = 0; i < 4; ++i) fragment[i] &= real_pair(begin + i / 2 * 8, positions);
        mma<T>(chains[chain], fragment, mask[0], mask[1]);
      }
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] = chains[0][i] + chains[1][i];
  }

  // Which halves of a lane's word of eight columns are positions of its row.
  __device__ uint32_t real_pair(int begin, int positions) const {
    const int position = begin + threadIdx.x % 4 * 2 - shift;
    const bool low = position >= 0 && position < positions, high = position >= -1 && position + 1 < positions;
    return (low ? 0xffffu : 0u) | (high ? 0xffff0000u : 0u);
  }
};

#endif  // AR_HOPPER

}  // namespace ar_kernels
