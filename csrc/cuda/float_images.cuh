// What the Hopper kernels of float32 NCHW maps of few positions, with rows of any length, share.
//
// A cluster of one to eight blocks takes whole images, each block the same share of the channels, in chunks of some of
// them. One sweep over its chunks makes sums over channels; blocks add theirs up, head by head; a second sweep,
// backwards, makes the rest, and what had to leave in between, if anything, comes from L2. A lane has every 32nd
// position of a row, so rows may begin anywhere; a warp works on 4 channels at a time.
#pragma once

#include <type_traits>

#include "floats.cuh"

namespace ar_kernels {

constexpr int kUnit = 4;              // channels that a warp works on at once
constexpr int kImagePositions = 256;  // the most
constexpr int kMostBlockBits = 3;     // 8 blocks of a cluster
constexpr int kShareBytes = 208 * 1024, kLeastChunk = 24 * 1024, kMostChunk = 52 * 1024;  // of an image; of a share
constexpr int kAhead = 24 * 1024;  // bytes of the next image that are on their way besides
constexpr int kLoads = 32;         // barriers and places in the table of slots: twice as many as slots, at least

// How many warps' sums lie side by side, to which the others add theirs.
__host__ __device__ constexpr int shares_of(int own) { return own == 2 ? 8 : 4; }

// How an image is cut, and where what lies in shared memory.
struct FloatImagesCut {
  int blocks, block_bits, channels;  // of a cluster; its logarithm; of a block
  int own, rows;                     // positions of a lane; channels of a chunk
  int chunks, chunk_bytes, slots;    // of a block's share
  int stay, loads;                   // chunks that are still there after the first sweep; loads of an image
  int weights;                       // [channels, columns] floats
  int gradients;                     // [channels, heads] floats, of dW_H
  int sums;                          // [shares_of(own), columns, 32 own] floats
  int masks;                         // [columns, 32 own] floats
  int given;                         // [heads of this block, other blocks, columns of a head, 32 own] floats
  int table;                         // [kLoads] ints: the slot of each load
  int barriers, exchanges;           // kLoads; of sums, of masks, two of scores
  int rest, bytes;                   // rest: 1 KB
  int columns_of_head, given_bytes;  // given_bytes: of a head by a block
};

// columns: sums over channels at every position. No slots: it does not fit.
inline FloatImagesCut float_images_cut(int channels, int positions, int columns) {
  FloatImagesCut cut = {};
  if (positions < 1 || positions > kImagePositions || channels < 1 || channels % (kUnit << kMostBlockBits) != 0)
    return cut;
  cut.own = positions <= 64 ? 2 : positions <= 160 ? 5 : positions <= 224 ? 7 : 8;
  // Not by the number of images: sums over channels would be added in another order.
  while (cut.block_bits < kMostBlockBits && (4 * channels >> cut.block_bits) * positions > kShareBytes)
    ++cut.block_bits;
  cut.blocks = 1 << cut.block_bits;
  cut.channels = channels / cut.blocks;
  // Small chunks, but such that all warps have channels of one.
  for (int chunks = 1; chunks <= cut.channels / kUnit; ++chunks) {
    const int rows = cut.channels / chunks, bytes = 4 * rows * positions;
    if (cut.channels % chunks != 0 || rows % kUnit != 0 || bytes > kMostChunk) continue;
    if (cut.chunks > 0 && (rows < kUnit * kGroupWarps || bytes < kLeastChunk)) break;
    cut.chunks = chunks, cut.rows = rows, cut.chunk_bytes = bytes;
  }
  if (cut.chunks == 0) return cut;
  const int line = 4 * 32 * cut.own, heads = (kHeads + cut.blocks - 1) / cut.blocks;
  cut.columns_of_head = columns / kHeads;
  cut.given_bytes = cut.columns_of_head * line;
  const int weights = 4 * cut.channels * columns, gradients = columns > kHeads ? 4 * cut.channels * kHeads : 0;
  const int sums = shares_of(cut.own) * columns * line, masks = columns * line;
  const int given = heads * (cut.blocks - 1) * cut.given_bytes;
  const int others = weights + gradients + sums + masks + given + kLoads * (4 + 8) + 4 * 8 + 1024;
  // Of what is asked for at once the first comes last: no more ahead than keeps memory busy.
  const int most = (kSharedBytes - others) / cut.chunk_bytes, ahead = kAhead / cut.chunk_bytes;
  cut.slots = std::min({most, cut.chunks + ahead, kLoads / 2});
  if (cut.slots < 2 && cut.chunks > 1) cut.slots = 0;  // nothing could be on its way
  cut.stay = cut.slots < cut.chunks ? cut.slots : cut.chunks;
  cut.loads = 2 * cut.chunks - cut.stay;
  cut.weights = cut.slots * cut.chunk_bytes;
  cut.gradients = cut.weights + weights;
  cut.sums = cut.gradients + gradients;
  cut.masks = cut.sums + sums;
  cut.given = cut.masks + masks;
  cut.table = cut.given + given;
  cut.barriers = cut.table + kLoads * 4;
  cut.exchanges = cut.barriers + kLoads * 8;
  cut.rest = cut.exchanges + 4 * 8;
  cut.bytes = cut.rest + 1024;
  return cut;
}

// Whether these kernels read it, and it is better than by tiles of its rows (float_rows.cuh), which they want to be
// multiples of 16 bytes. Measured on an H100 with 256 images, forward and backward: 1024 x 14 x 14 takes 109 and 253 us
// here, 118 and 366 there, 256 x 14 x 14 31 and 66, 37 and 83; but 320 x 16 x 16 28 and 59, 27 and 48.
inline bool is_float_images(const FlatMap& map, int channels, int positions) {
  const bool is_best = positions % 4 != 0 || channels > 1024 || (positions > 160 && positions <= 224);
  return is_best && map.position == 1 && map.channel == positions && map.image > 0 && map.image % 4 == 0;
}

// does(own): the kernels' parameter.
template <class Does>
auto with_own(const FloatImagesCut& cut, const Does& does) {
  switch (cut.own) {
    case 2: return does(std::integral_constant<int, 2>());
    case 5: return does(std::integral_constant<int, 5>());
    case 7: return does(std::integral_constant<int, 7>());
    default: return does(std::integral_constant<int, 8>());
  }
}

// How many clusters are launched for so many images: as many as are there at once.
template <auto kKernel>
int float_images_clusters(const FloatImagesCut& cut, int images) {
  return std::max(1, std::min(images, active_clusters<kKernel>(cut.blocks, kFloatThreads)));
}

template <auto kKernel, class Sweep>
cudaError_t launch_float_images(const FloatImagesCut& cut, const Sweep& a, cudaStream_t stream) {
  const int clusters = float_images_clusters<kKernel>(cut, a.images);
  if (cut.blocks == 1) return launch<kKernel>(clusters, kFloatThreads, cut.bytes, stream, a, cut);
  return launch_clusters<kKernel>(cut.blocks, clusters, kFloatThreads, cut.bytes, stream, a, cut);
}

#if AR_HOPPER

// What a block has: images begin to end, as all of its cluster, and channels from first_channel on.
struct ImageShare {
  int cluster, begin, end, first_channel;

  __device__ ImageShare(const FloatImagesCut& cut, int images) {
    const int clusters = gridDim.x >> cut.block_bits;
    cluster = blockIdx.x >> cut.block_bits;
    begin = first_of(cluster, clusters, images), end = first_of(cluster + 1, clusters, images);
    first_channel = (blockIdx.x & (cut.blocks - 1)) * cut.channels;
  }
};

// The slots, and what is asked for into them. All of a block's threads follow it; thread 0 asks.
//
// An image's loads are its chunks in order, then, backwards, those that the second sweep must read again. A slot is
// asked for again as soon as what it held was used the last time: in order, but that the last `stay` chunks of the
// first sweep, which stay for the second, go in reverse.
struct ImageSlots {
  const FloatImagesCut& cut;
  const uint8_t* first_image;  // of this block, in global memory
  int64_t image_bytes;
  uint8_t* memory;
  uint32_t base;
  int loads;  // of this block
  int next;   // load to ask for

  __device__ ImageSlots(const FloatImagesCut& cut, const float* map, int64_t image_bytes, int images, uint8_t* memory)
      : cut(cut),
        first_image(reinterpret_cast<const uint8_t*>(map)),
        image_bytes(image_bytes),
        memory(memory),
        next(0) {
    base = shared_address(memory);
    loads = images * cut.loads;
    if (threadIdx.x != 0) return;
    for (int i = 0; i < kLoads; ++i) barrier_init(barrier(i), 1);
    fence_barrier_init();
    for (int slot = 0; slot < cut.slots; ++slot) ask(slot);
  }

  __device__ uint32_t barrier(int load) const { return base + cut.barriers + load % kLoads * 8; }

  // Thread 0: the next load, into a slot that nobody uses any more.
  __device__ void ask(int slot) {
    if (next >= loads) return;
    const int of_image = next % cut.loads;
    const int chunk = of_image < cut.chunks ? of_image : cut.loads - 1 - of_image;
    reinterpret_cast<int*>(memory + cut.table)[next % kLoads] = slot;
    barrier_arrive_expect(barrier(next), cut.chunk_bytes);
    bulk_load(base + slot * cut.chunk_bytes,
              first_image + next / cut.loads * image_bytes + static_cast<int64_t>(chunk) * cut.chunk_bytes,
              cut.chunk_bytes, barrier(next), kEvictNormal);
    ++next;
  }

  __device__ int slot_of(int load) const { return reinterpret_cast<const int*>(memory + cut.table)[load % kLoads]; }

  // The slot of a chunk, when it is there; image counts from this block's first.
  __device__ int wait(int image, int chunk, bool second_sweep) const {
    const bool again = second_sweep && chunk < cut.chunks - cut.stay;
    const int load = image * cut.loads + (again ? cut.loads - 1 - chunk : chunk);
    barrier_wait(barrier(load), load / kLoads & 1);
    return slot_of(load);
  }
};

// What the blocks of a cluster tell each other of an image. Each head has one block, which is given all blocks' sums of
// it and gives its masks to all: memory is for one image, since nobody gives sums of the next before it has taken all
// masks, nor masks before it was given all sums. Scores, which are taken while the next image's sums are on their way,
// have memory for two.
struct ImageExchange {
  const ImageSlots& slots;
  const FloatImagesCut& cut;
  int rank, heads, quads;  // quads: of positions

  // Ends with a barrier of the cluster, or the block.
  __device__ ImageExchange(const ImageSlots& slots, int heads, int positions)
      : slots(slots),
        cut(slots.cut),
        rank(cut.blocks > 1 ? static_cast<int>(cluster_rank()) : 0),
        heads(heads),
        quads((positions + 3) / 4) {
    if (threadIdx.x == 0 && cut.blocks > 1) {
      for (int i = 0; i < 4; ++i) barrier_init(barrier(i), 1);
      fence_barrier_init();
      for (int i = 0; i < 4; ++i) barrier_arrive_expect(barrier(i), expected(i));
    }
    if (cut.blocks > 1) cluster_arrive(), cluster_wait();
    __syncthreads();
  }

  __device__ int block_of(int head) const { return head & (cut.blocks - 1); }
  __device__ bool owns(int head) const { return block_of(head) == rank; }
  __device__ uint32_t barrier(int i) const { return slots.base + cut.exchanges + 8 * i; }  // of sums, masks, scores

  // Bytes of an image: where there are none, nobody waits.
  __device__ int expected(int i) const {
    const int own = rank < heads ? (heads - rank + cut.blocks - 1) >> cut.block_bits : 0;  // heads
    const int of_head = cut.columns_of_head * quads * 16;
    return i == 0 ? own * (cut.blocks - 1) * of_head : i == 1 ? (heads - own) * of_head : (cut.blocks - 1) * 16;
  }

  // All threads that look at what came. times: how often this barrier was waited for before.
  __device__ void wait(int i, int times) const {
    if (expected(i) > 0) barrier_wait_cluster(barrier(i), times & 1);
  }
  // One thread, after those that wait: what the barrier waits for next.
  __device__ void expect(int i) const {
    if (expected(i) > 0) barrier_arrive_expect(barrier(i), expected(i));
  }

  // Offset of what block `from` gives to the block of a head; `column` is of that head.
  __device__ int given(int head, int to, int from, int column) const {
    const int other = from < to ? from : from - 1;
    return cut.given + ((head >> cut.block_bits) * (cut.blocks - 1) + other) * cut.given_bytes +
           column * 4 * 32 * cut.own;
  }

  // Sums at four adjacent positions of a head's column, of which this block has a part: to the head's block.
  __device__ void give_sums(int head, int column, int quad, float4 values) const {
    const int to = block_of(head);
    store_to_cluster(cluster_address(slots.base + given(head, to, rank, column) + 16 * quad, to), values,
                     cluster_address(barrier(0), to));
  }

  // By the head's block, after wait(0): the same of all blocks, in their order.
  __device__ float4 take_sums(int head, int column, int quad, float4 own) const {
    float4 sum = make_float4(0, 0, 0, 0);
    for (int from = 0; from < cut.blocks; ++from) {
      const float4 part =
          from == rank ? own : reinterpret_cast<const float4*>(slots.memory + given(head, rank, from, column))[quad];
      sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    return sum;
  }

  // Masks at four adjacent positions to all blocks, the own one included.
  __device__ void give_masks(int column, int quad, float4 values) const {
    const int place = cut.masks + column * 4 * 32 * cut.own + 16 * quad;
    *reinterpret_cast<float4*>(slots.memory + place) = values;
    for (int to = 0; to < cut.blocks; ++to)
      if (to != rank)
        store_to_cluster(cluster_address(slots.base + place, to), values, cluster_address(barrier(1), to));
  }

  // A block's share of the scores' sums, [2, blocks, kHeads] from `place` on, to all blocks. turn: of the image.
  __device__ void give_scores(int place, int turn, float4 values) const {
    place += (turn % 2 * cut.blocks + rank) * 16;
    *reinterpret_cast<float4*>(slots.memory + place) = values;
    for (int to = 0; to < cut.blocks; ++to)
      if (to != rank)
        store_to_cluster(cluster_address(slots.base + place, to), values, cluster_address(barrier(2 + turn % 2), to));
  }
};

// The first sweep: to `sums`, as [shares_of(kOwn), kColumns, 32 kOwn], shares of Σ_c weights[c] z[c]. Ends with a
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
  for (int chunk = 0; chunk < cut.chunks; ++chunk) {
    const int slot = slots.wait(image, chunk, false);
    const float* z = reinterpret_cast<const float*>(slots.memory + slot * cut.chunk_bytes) + lane;
    const float4* weights = reinterpret_cast<const float4*>(slots.memory + cut.weights);
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
    if (chunk < cut.chunks - cut.stay) {  // the others stay
      __syncthreads();
      if (threadIdx.x == 0) slots.ask(slot);
    }
  }
  constexpr int kShares = shares_of(kOwn);
  float* to = reinterpret_cast<float*>(slots.memory + cut.sums) + warp % kShares * kColumns * 32 * kOwn + lane;
  for (int first = kGroupWarps - kShares; first >= 0; first -= kShares) {
    if (warp / kShares * kShares == first)
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          float* at = to + 32 * (k * kOwn + i);
          *at = (first + kShares < kGroupWarps ? *at : 0.f) + own[k][i];
        }
        __syncwarp();  // or all would be read at once, and registers hold one such array
      }
    __syncthreads();
  }
}

// Of all of this block's shares, at four adjacent positions.
template <int kOwn, int kColumns>
__device__ __forceinline__ float4 float_sums(const ImageSlots& slots, int column, int quad) {
  constexpr int kShares = shares_of(kOwn);
  const float4* from = reinterpret_cast<const float4*>(slots.memory + slots.cut.sums) + 8 * column * kOwn + quad;
  float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
  for (int share = 0; share < kShares; ++share) {
    const float4 part = from[8 * share * kColumns * kOwn];
    sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
  }
  return sum;
}

#endif  // AR_HOPPER

}  // namespace ar_kernels
