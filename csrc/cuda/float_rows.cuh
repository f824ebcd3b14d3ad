// What the Hopper kernels of float32 NCHW maps share.
//
// A tile is 16, 32 or 64 positions of an image with all their channels. It comes into shared memory by the copy engine,
// in chunks [channels, positions] that are slots of a ring. A warp works on 8 channels at a time: a lane has four
// adjacent positions of every (32 / kQuads)th of them, so that a warp's loads are 512 bytes in a row. Sums over
// channels are added up from lanes and warps once for each tile; sums over positions leave a lane the one of one of the
// 8 channels and one of the 4 heads, which it adds to its own in shared memory.
#pragma once

#include "floats.cuh"

namespace ar_kernels {

constexpr int kBatch = 8;  // channels

struct FloatRowsCut {
  int quads, positions, tiles;       // lanes beside each other: 4 positions each; of a tile; of an image
  int splits;                        // of an image: some of its tiles, none of them no tile
  int blocks;                        // of a multiprocessor at once
  int warps, rows, chunks;           // of a block; channels of a chunk; chunks of a tile
  int slots, map_bytes, slot_bytes;  // a slot has a chunk of every map
  int weights, sums, means;          // [C, columns], [C, kHeads], [C] floats; C rounded up to whole chunks
  int parts, masks;                  // [warps, columns, positions], [columns, positions] floats
  int rest, barriers, bytes;         // rest: 1 KB
};

// most_rows: of a chunk, a batch for each warp. columns: sums over channels at every position. No slots: it does not
// fit.
inline FloatRowsCut float_rows_cut_of(int quads, int blocks, int most_rows, int channels, int positions, int columns,
                                      int maps) {
  FloatRowsCut cut = {};
  if (channels < kBatch || channels % kBatch != 0 || positions < 1) return cut;
  cut.quads = quads;
  cut.positions = 4 * quads;
  cut.tiles = (positions + cut.positions - 1) / cut.positions;
  cut.splits = 1;
  cut.blocks = blocks;
  const int most_warps = kGroupWarps / blocks;
  cut.chunks = (channels + most_rows - 1) / most_rows;
  cut.rows = (channels / kBatch + cut.chunks - 1) / cut.chunks * kBatch;
  const int batches = cut.rows / kBatch, rounds = (batches + most_warps - 1) / most_warps;
  cut.warps = (batches + rounds - 1) / rounds;
  if (cut.warps < kHeads) cut.warps = kHeads;  // each head has one
  cut.map_bytes = 4 * cut.rows * cut.positions;
  cut.slot_bytes = cut.map_bytes * maps;
  const int all = cut.chunks * cut.rows;
  const int weights = 4 * all * columns, sums = 4 * all * kHeads, means = 4 * all;
  const int masks = 4 * columns * cut.positions, parts = cut.warps * masks;
  const int others = weights + sums + means + parts + masks + 1024 + 8 * kMostSlots;
  const int slots = (shared_bytes(blocks) - others) / cut.slot_bytes;
  cut.slots = slots < kMostSlots ? slots : kMostSlots;
  // A slot may be filled again when the chunk after it was worked on.
  if (cut.slots <= cut.chunks) {
    cut.slots = 0;
    return cut;
  }
  cut.weights = cut.slots * cut.slot_bytes;
  cut.sums = cut.weights + weights;
  cut.means = cut.sums + sums;
  cut.parts = cut.means + means;
  cut.masks = cut.parts + parts;
  cut.rest = cut.masks + masks;
  cut.barriers = cut.rest + 1024;
  cut.bytes = cut.barriers + 8 * kMostSlots;
  return cut;
}

// Of the tiles that fit those with which an image is done first. No slots: none fits. With tiles of 64 positions two
// blocks on a multiprocessor, where both have room: one works while the other's warps wait for each other. Measured on
// an H100, forward and backward, two blocks for one: 512 images of 160 x 32 x 32 take 128 and 268 us for 176 and 263,
// 1024 of 64 x 56 x 56 374 and 632 for 583 and 767; but with 32 positions 128 of 320 x 16 x 16 33 and 52 for 28 and 49.
inline FloatRowsCut float_rows_cut(int channels, int positions, int columns, int maps) {
  FloatRowsCut best = {};
  int64_t least = INT64_MAX;
  for (int quads = 16; quads >= 4; quads /= 2) {
    const FloatRowsCut cut = float_rows_cut_of(quads, 1, quads == 4 ? 256 : 128, channels, positions, columns, maps);
    if (cut.slots == 0) continue;
    // What a tile costs besides is about what 16 positions do. How many images there are must not count: sums over
    // channels would be added in another order.
    const int64_t time = int64_t{cut.tiles} * (cut.positions + 16);
    if (time < least) least = time, best = cut;
  }
  if (best.quads < 16) return best;
  for (const int rows : {128, 64}) {
    const FloatRowsCut half = float_rows_cut_of(16, 2, rows, channels, positions, columns, maps);
    if (half.slots > 0) return half;
  }
  return best;
}

// Whether the copy engine can bring tiles of it.
inline bool is_float_rows(const FlatMap& map) {
  return map.position == 1 && map.channel > 0 && map.channel % 4 == 0 && map.image > 0 && map.image % 4 == 0;
}

// Nothing more than a tile's own bytes, as well as memory can bring them: what lies beside them is the next tile's, and
// L2 may have lost it until then.
inline bool encode(CUtensorMap* tensor, const FlatMap& map, int images, int channels, int positions,
                   const FloatRowsCut& cut) {
  return encode_map<float, 3>(
      tensor, map.data,
      {static_cast<uint64_t>(positions), static_cast<uint64_t>(channels), static_cast<uint64_t>(images)},
      {static_cast<uint64_t>(4 * map.channel), static_cast<uint64_t>(4 * map.image)},
      {static_cast<uint32_t>(cut.positions), static_cast<uint32_t>(cut.rows), 1}, CU_TENSOR_MAP_SWIZZLE_NONE,
      CU_TENSOR_MAP_L2_PROMOTION_L2_64B);
}

#if AR_HOPPER

// What a block reads, tile by tile, chunk by chunk. All threads follow it; thread 0 asks.
struct Ring {
  const FloatRowsCut& cut;
  uint32_t base;
  int slot = 0;
  uint32_t parity = 0;

  __device__ Ring(const FloatRowsCut& cut, const uint8_t* memory) : cut(cut), base(shared_address(memory)) {}

  __device__ uint32_t barrier(int which) const { return base + cut.barriers + 8 * which; }

  __device__ void start() const {
    for (int i = 0; i < cut.slots; ++i) barrier_init(barrier(i), 1);
    fence_barrier_init();
  }

  // Another slot of the tile that `slot` begins, and its parity.
  __device__ int next(int chunk) const { return slot + chunk < cut.slots ? slot + chunk : slot + chunk - cut.slots; }
  __device__ void wait(int chunk) const {
    barrier_wait(barrier(next(chunk)), slot + chunk < cut.slots ? parity : parity ^ 1);
  }
  __device__ void advance() {
    slot += cut.chunks;
    if (slot >= cut.slots) slot -= cut.slots, parity ^= 1;
  }

  __device__ void load(const CUtensorMap* map, int which, int of_map, int position, int chunk, int image) const {
    tensor_load(base + which * cut.slot_bytes + of_map * cut.map_bytes, map, position, chunk * cut.rows, image,
                barrier(which), cut.quads == 16 ? kEvictFirst : kEvictNormal);
  }
};

// A lane's place: its positions are 4 quad to 4 quad + 3, its channels of 8 row, row + kAtOnce, ... After sums over
// positions it has the one of channel `channel` of 8 and of head `head`.
template <int kQuads>
struct Place {
  static constexpr int kAtOnce = 32 / kQuads, kSets = kBatch / kAtOnce;
  static_assert(4 * kSets == kQuads, "a lane gets one sum");
  int lane = threadIdx.x % 32, quad = lane % kQuads, row = lane / kQuads;
  int channel = quad / 4 * kAtOnce + row, head = quad % 4;

  // Of a batch's sets the i-th, beginning with its own (halve_sums).
  __device__ int set(int i) const { return i ^ quad / 4; }
};

// Of sums at a lane's four positions, [columns, 4], the sum over all of the warp's lanes; to [columns, positions].
template <int kQuads, int kValues>
__device__ __forceinline__ void store_sums(float (&values)[kValues], const Place<kQuads>& place, float* to) {
  constexpr int kAtOnce = 32 / kQuads, kLeft = kValues / kAtOnce;
  if constexpr (kAtOnce > 1) halve_sums<kValues / 2, kQuads * kAtOnce / 2, kLeft>(values);
  const int begin = place.row * kLeft;  // of values
  to += begin / 4 * 4 * kQuads + 4 * place.quad + begin % 4;
#pragma unroll
  for (int i = 0; i < kLeft; i += 4)
    if constexpr (kLeft >= 4)
      *reinterpret_cast<float4*>(to + i * kQuads) = make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]);
    else
      *reinterpret_cast<float2*>(to) = make_float2(values[0], values[1]);
}

#endif  // AR_HOPPER

}  // namespace ar_kernels
