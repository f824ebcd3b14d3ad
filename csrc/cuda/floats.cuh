// What the Hopper kernels of float32 maps share.
//
// Products are plain multiply-adds, so what counts is how often shared memory is read. Of the two products that a sweep
// makes with a tile one runs over what lies across a warp's lanes: its factors stay in registers, every lane has a
// share of 32 sums, and lane_sums leaves each lane one of them. The other runs along what a lane keeps: its sums stay
// in registers, and its factors come from shared memory, the same for all lanes.
//
// A block is groups of warps, each with tiles and slots of its own, so that one group's exchanges are hidden behind the
// others' work. Groups wait for each other only where an image or the block ends and may be many tiles apart: a slot
// that two of them shared would have a barrier whose phases one could miss, and parities cannot tell a phase from the
// next but one.
#pragma once

#include <algorithm>

#include "gates.cuh"
#include "sweep.h"
#include "values.cuh"

namespace ar_kernels {

constexpr int kGroupWarps = 16;  // the most, of all groups
constexpr int kFloatThreads = 32 * kGroupWarps;
constexpr int kMostSlots = 32;  // of a ring that all of a block's warps follow
constexpr int kGroupSlots = 4;  // of a group: the most
constexpr int kMostOwn = 5;     // channels of a lane, for registers' sake

// How channels_last maps are cut, and where what lies in shared memory. A tile is some positions with all their
// channels, one run of memory; a lane has every 32nd channel of its warp's.
struct FloatsCut {
  int own, warps, groups;            // channels of a lane; warps of a group; groups
  int step;                          // positions that a group works on at once
  int tile, tiles;                   // positions of a tile; tiles of an image or a split of one
  int splits, length, longer;        // of an image; positions of a split, and how many splits have one more
  int slots, map_bytes, slot_bytes;  // of a group; a slot has a tile of every map
  int parts, weights;                // [2, warps, 32], [warps, 32] floats; warps of all groups
  int sums, heads;                   // what the kernel asks for; m, d, scores
  int barriers, bytes;               // barriers: [groups, slots]
};

// most_step: positions that a group works on at once; 4 where there are not the registers, or few tiles would fit.
// wanted: slots of a group, for which tiles are made small; there are two at least. sums: bytes for each two groups;
// rest: bytes beside. No slots: it does not fit.
inline FloatsCut floats_cut(int channels, int positions, int splits, int most_step, int maps, int wanted, int sums,
                            int rest) {
  FloatsCut cut = {};
  const int planes = (channels + 31) / 32;
  if (channels < 4 || channels % 4 != 0 || positions < 1) return cut;
  // A step takes as long as a lane has channels, and about two of them more for what is exchanged.
  int best = 0;
  for (int warps = (planes + kMostOwn - 1) / kMostOwn; warps <= kGroupWarps && warps <= planes; ++warps) {
    const int own = (planes + warps - 1) / warps, speed = 1024 * (kGroupWarps / warps) / (own + 2);
    if (speed > best) best = speed, cut.own = own, cut.warps = warps, cut.groups = kGroupWarps / warps;
  }
  if (best == 0) return cut;
  cut.step = cut.own < kMostOwn && channels <= 1024 ? most_step : 4;
  cut.splits = splits;
  cut.length = positions / splits;
  cut.longer = positions % splits;
  const int all = cut.warps * cut.groups, barriers = 8 * cut.groups * kGroupSlots;
  const int others = 3 * all * 32 * 4 + cut.groups / 2 * sums + rest + 8 * kGroupWarps * kHeads * 4 + barriers;
  // More than one step a tile where `wanted` tiles fit, and every group has something to do.
  const int step_bytes = 4 * channels * maps * cut.step, most_length = cut.length + (cut.longer > 0);
  const int each = (most_length + cut.groups - 1) / cut.groups, room = (kSharedBytes - others) / cut.groups;
  int steps = (room / wanted < 8192 ? room / wanted : 8192) / step_bytes;
  if (steps > (each + cut.step - 1) / cut.step) steps = (each + cut.step - 1) / cut.step;
  if (steps < 1) steps = 1;
  cut.tile = cut.step * steps;
  cut.tiles = (most_length + cut.tile - 1) / cut.tile;
  cut.map_bytes = 4 * channels * cut.tile;
  cut.slot_bytes = cut.map_bytes * maps;
  cut.slots = room / cut.slot_bytes < kGroupSlots ? room / cut.slot_bytes : kGroupSlots;
  if (cut.slots < 2) {
    cut.slots = 0;
    return cut;
  }
  cut.parts = cut.groups * cut.slots * cut.slot_bytes;
  cut.weights = cut.parts + 2 * all * 32 * 4;
  cut.sums = cut.weights + all * 32 * 4;
  cut.heads = cut.sums + cut.groups / 2 * sums + rest;
  cut.barriers = cut.heads + 8 * kGroupWarps * kHeads * 4;
  cut.bytes = cut.barriers + barriers;
  return cut;
}

// Into how many splits a forward sweep may cut an image: few images are split, so that all blocks that run at once have
// something to do, but not into many small ones, each of which takes the merge time; or, where that must not depend on
// their number, large ones. Measured on an H100: an image of 256 x 56 x 56 takes 45 us in 132 splits, 25 in 49, 19 in
// 25, 21 in 12; eight of 512 x 28 x 28 in NCHW take 22 in 13, one for each tile, and 27 in 12 or 6.
inline int splits_of(int images, int channels, int positions, int blocks, int most, bool alike) {
  constexpr int kSplitBytes = 256 * 1024, kLeastBytes = 96 * 1024;
  const int64_t bytes = int64_t{4} * channels * positions, wanted = bytes / (alike ? kSplitBytes : kLeastBytes);
  const int64_t splits = alike ? wanted : std::min<int64_t>(wanted, blocks / images);
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(splits, most)));
}

// Whether an image of it is one run of memory, as channels_last has it, that the copy engine can bring.
inline bool is_dense_channels_last(const FlatMap& map, int channels) {
  return map.channel == 1 && map.position == channels && map.image > 0 && map.image % 4 == 0;
}

#if AR_HOPPER

// Lanes kLanes apart exchange halves of what they have sums of, 2 kSums of them; then lanes half as far apart, until
// kLeft are left. Which half a lane gives is a select for each, unless the lane has its values in an order of its own:
// that of values[i] in values[i ^ lane % kValues / kTurned * kTurned].
template <int kSums, int kLanes = kSums, int kLeft = 1, int kTurned = 2 * kSums, int kValues>
__device__ __forceinline__ void halve_sums(float (&values)[kValues]) {
  const bool upper = kSums < kTurned && (threadIdx.x & kLanes) != 0;
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    const float given = upper ? values[i] : values[i + kSums], kept = upper ? values[i + kSums] : values[i];
    values[i] = kept + __shfl_xor_sync(kAll, given, kLanes);
  }
  if constexpr (kSums > kLeft) halve_sums<kSums / 2, kLanes / 2, kLeft, kTurned>(values);
}

// Sums over a warp's lanes: lane i gets that of values[i % kValues]. kTurned: as of halve_sums.
template <int kTurned = 32, int kValues>
__device__ __forceinline__ float lane_sums(float (&values)[kValues]) {
  halve_sums<kValues / 2, kValues / 2, 1, kTurned>(values);
#pragma unroll
  for (int lanes = kValues; lanes < 32; lanes *= 2) values[0] += __shfl_xor_sync(kAll, values[0], lanes);
  return values[0];
}

// A barrier of one group.
__device__ __forceinline__ void group_sync(int group, int warps) {
  if (warps > 1)
    named_sync(2 + group, 32 * warps);
  else
    __syncwarp();
}

// A group's slots, which it goes through again and again.
struct GroupSlots {
  uint32_t slots, barriers;  // addresses of the first
  int count;
  int slot = 0;  // of the tile that is worked on
  uint32_t parity = 0;

  __device__ GroupSlots(const FloatsCut& cut, const uint8_t* memory, int group)
      : slots(shared_address(memory) + group * cut.slots * cut.slot_bytes),
        barriers(shared_address(memory) + cut.barriers + 8 * group * cut.slots),
        count(cut.slots) {}

  // By the thread that asks for the group's copies.
  __device__ void start() const {
    for (int i = 0; i < count; ++i) barrier_init(barriers + 8 * i, 1);
    fence_barrier_init();
  }

  __device__ void wait() const { barrier_wait(barriers + 8 * slot, parity); }
  __device__ int before() const { return slot > 0 ? slot - 1 : count - 1; }
  __device__ void advance() {
    if (++slot == count) slot = 0, parity ^= 1;
  }
};

// W_H to shared memory as [channels, kHeads], 0 where there is none: of a channel all loads at once.
__device__ __forceinline__ void stage_weights(float* weights, const Values& w, int heads, int channels, int padded) {
  const float* from = static_cast<const float*>(w.data);
  for (int channel = threadIdx.x; channel < padded; channel += blockDim.x) {
    float own[kHeads];
#pragma unroll
    for (int k = 0; k < kHeads; ++k) own[k] = channel < channels && k < heads ? from[k * channels + channel] : 0.f;
    reinterpret_cast<float4*>(weights)[channel] = make_float4(own[0], own[1], own[2], own[3]);
  }
}

// An image's W_H and dP, side by side, to [channels, 2 kHeads] in the same way; and what comes of the mean to `means`,
// unless that is null.
__device__ __forceinline__ void stage_pairs(float* weights, float* means, const float* pairs, int heads, int channels,
                                            int padded, int positions) {
  for (int channel = threadIdx.x; channel < padded; channel += blockDim.x) {
    float own[2 * kHeads];
#pragma unroll
    for (int i = 0; i < 2 * kHeads; ++i)
      own[i] = channel < channels && i < 2 * heads ? pairs[i * channels + channel] : 0.f;
    const float mean = means != nullptr && channel < channels ? pairs[(2 * heads + 1) * channels + channel] : 0.f;
#pragma unroll
    for (int i = 0; i < 2 * kHeads; ++i) weights[2 * kHeads * channel + i] = own[i];
    if (means != nullptr) means[channel] = mean / positions;
  }
}

// Where a group is among the tiles of rows: images or splits of them.
struct TilePlace {
  int tiles, row, tile;

  __device__ TilePlace(int tiles, int row, int tile) : tiles(tiles), row(row), tile(tile) {
    for (; this->tile >= tiles; this->tile -= tiles) ++this->row;
  }
  __device__ TilePlace after(int by) const { return TilePlace(tiles, row, tile + by); }
};

// Adds up the groups' values, in the same order every time; the first group gets the sums. offset(i): where this lane's
// i-th value lies in `buffer` when the first group takes it, -1 for one that nobody wants; the next group's lies
// `group_step` further. Where values are not just added: give(pair) by a group that gives, before, and take(pair) by
// one that takes, after, which returns how its own i-th value and the other's become one.
template <int kValues, class Offset, class Give, class Take>
__device__ __forceinline__ void add_groups(float (&values)[kValues], int group, int groups, float* buffer,
                                           int group_step, const Offset& offset, const Give& give, const Take& take) {
  for (int left = groups; left > 1;) {
    const int half = (left + 1) / 2, pair = group < half ? group : group - half;
    if (group >= half && group < left) {
      give(pair);
#pragma unroll
      for (int i = 0; i < kValues; ++i)
        if (offset(i) >= 0) buffer[pair * group_step + offset(i)] = values[i];
    }
    __syncthreads();
    if (group + half < left) {
      const auto sum = take(pair);
#pragma unroll
      for (int i = 0; i < kValues; ++i)
        if (offset(i) >= 0) values[i] = sum(i, values[i], buffer[pair * group_step + offset(i)]);
    }
    __syncthreads();
    left = half;
  }
}

template <int kValues, class Offset>
__device__ __forceinline__ void add_groups(float (&values)[kValues], int group, int groups, float* buffer,
                                           int group_step, const Offset& offset) {
  const auto sum = [](int, float own, float other) { return own + other; };
  add_groups(values, group, groups, buffer, group_step, offset, [](int) {}, [&](int) { return sum; });
}

#endif  // AR_HOPPER

}  // namespace ar_kernels
