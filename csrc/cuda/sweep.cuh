// What the Hopper kernels share whose tiles are some positions of an image with all their channels.
//
// A tile comes into shared memory by the copy engine, as rows of 128 bytes: of channels_last, planes of 64 channels,
// [planes, positions, 64]; of NCHW [channels, 64 positions]. It is read twice there: over its channels and over its
// positions. A warp has the same channels all the time; registers hold its weights and sums alone, so a tile may have
// any number of channels. One tile is worked on while others are on their way.
#pragma once

#include "primitives.cuh"
#include "sweep.h"
#include "values.cuh"

namespace ar_kernels {

enum class Layout { kChannelsLast, kNchw };

constexpr int kRow = 64;        // elements of 128 bytes, as wide as the copy engine's swizzle
constexpr int kMostWarps = 16;  // of a multiprocessor
constexpr int kMostStages = 6;
constexpr int kTileBytes =
    64 * 1024;                     // the most of a stage of channels_last, if a block has a multiprocessor: three fit
constexpr int kMostBoxRows = 256;  // the copy engine's limit

// How an image is cut, and where what lies in shared memory.
struct Cut {
  int per_processor;                   // blocks that share a multiprocessor
  int warps, blocks;                   // of a block; of 16 channels each, of a warp
  int tile, tiles;                     // positions of a tile, tiles of an image
  int boxes;                           // copies that bring a tile
  int stages, map_bytes, stage_bytes;  // a stage has a tile of every map
  int parts, rest, barriers, bytes;    // parts: [warps, positions rounded up to 16, 8] floats
};

inline int rounded_up(int value, int unit) { return (value + unit - 1) / unit * unit; }

// maps: that are read tile by tile. rest: bytes that a kernel wants beside tiles and parts. No stages: it does not fit.
inline Cut cut_of(Layout layout, int channels, int positions, int maps, int rest, int per_processor) {
  Cut cut = {};
  cut.per_processor = per_processor;
  const int unit = layout == Layout::kChannelsLast ? kRow : 16, most_warps = kMostWarps / per_processor;
  const int shared = (kSharedBytes + 1024) / per_processor - 1024;  // 1024 of each block's are the system's
  if (channels < unit || channels % unit != 0 || positions < 1) return cut;
  cut.blocks = unit / 16;
  while (cut.blocks < 8 && channels / 16 / cut.blocks > most_warps && channels / 16 % (2 * cut.blocks) == 0)
    cut.blocks *= 2;
  cut.warps = channels / 16 / cut.blocks;
  if (cut.warps > most_warps) return cut;
  if (layout == Layout::kChannelsLast) {
    // With 8 blocks a warp and 13 warps or more there are no registers for 32 positions.
    const int most = cut.blocks == 8 && cut.warps * per_processor > 12 ? 16 : 32;
    const int fit = kTileBytes / per_processor / maps / (2 * channels);
    cut.tiles = (positions + (fit < most ? fit : most) - 1) / (fit < most ? fit : most);
    cut.tile = (positions + cut.tiles - 1) / cut.tiles;
    cut.boxes = 1;
  } else {
    cut.tile = kRow;
    cut.tiles = (positions + kRow - 1) / kRow;
    cut.boxes = (channels + kMostBoxRows - 1) / kMostBoxRows;
    while (channels % cut.boxes != 0) ++cut.boxes;
  }
  cut.map_bytes = rounded_up(cut.tile * 2 * channels, 1024);
  cut.stage_bytes = cut.map_bytes * maps;
  const int parts = cut.warps * rounded_up(cut.tile, 16) * 8 * 4;
  const int stages = (shared - 1024 - parts - rounded_up(rest, 16) - 8 * kMostStages) / cut.stage_bytes;
  cut.stages = stages < 2 ? 0 : stages < kMostStages ? stages : kMostStages;
  cut.parts = cut.stages * cut.stage_bytes;
  cut.rest = cut.parts + parts;
  cut.barriers = cut.rest + rounded_up(rest, 16);
  cut.bytes = cut.barriers + 8 * kMostStages + 1024;  // tiles begin at a multiple of 1024
  return cut;
}

// Two blocks a multiprocessor where each has three stages: one works while the other waits.
inline Cut cut_of(Layout layout, int channels, int positions, int maps, int rest) {
  const Cut shared = cut_of(layout, channels, positions, maps, rest, 2);
  return shared.stages >= 3 ? shared : cut_of(layout, channels, positions, maps, rest, 1);
}

// Whether the copy engine can bring tiles of it.
inline bool is_of(Layout layout, const Map& map) {
  const bool channels_last = layout == Layout::kChannelsLast;
  const int64_t adjacent = channels_last ? map.channel : map.position,
                other = channels_last ? map.position : map.channel;
  return adjacent == 1 && map.image > 0 && map.image % 8 == 0 && other > 0 && other % 8 == 0;
}

template <class T>
bool encode(Layout layout, CUtensorMap* tensor, const Map& map, int images, int channels, int positions,
            const Cut& cut) {
  const uint64_t step = sizeof(T), s = positions, n = images;
  const uint32_t rows = channels / cut.boxes;
  if (layout == Layout::kNchw)
    return encode_map<T, 3>(tensor, map.data, {s, static_cast<uint64_t>(channels), n},
                            {map.channel * step, map.image * step}, {kRow, rows, 1}, CU_TENSOR_MAP_SWIZZLE_128B);
  const uint32_t planes = channels / kRow;
  return encode_map<T, 4>(tensor, map.data, {kRow, s, planes, n}, {map.position * step, kRow * step, map.image * step},
                          {kRow, static_cast<uint32_t>(cut.tile), planes, 1}, CU_TENSOR_MAP_SWIZZLE_128B);
}

// A tile from memory; its bytes were announced. And back.
template <Layout kLayout>
__device__ __forceinline__ void load_tile(const Cut& cut, int channels, uint32_t to, const CUtensorMap* map, int image,
                                          int position, uint32_t barrier) {
  if constexpr (kLayout == Layout::kChannelsLast) {
    tensor_load(to, map, 0, position, 0, image, barrier, kEvictFirst);
  } else {
    const int rows = channels / cut.boxes;
    for (int row = 0; row < channels; row += rows)
      tensor_load(to + row * 2 * kRow, map, position, row, image, barrier, kEvictFirst);
  }
}

template <Layout kLayout>
__device__ __forceinline__ void store_tile(const Cut& cut, int channels, const CUtensorMap* map, uint32_t from,
                                           int image, int position) {
  if constexpr (kLayout == Layout::kChannelsLast) {
    tensor_store(map, from, 0, position, 0, image, kEvictNormal);
  } else {
    const int rows = channels / cut.boxes;
    for (int row = 0; row < channels; row += rows)
      tensor_store(map, from + row * 2 * kRow, position, row, image, kEvictNormal);
  }
}

// The offset of a lane's row of 16 positions by 16 channels in a tile, whose numbers count 16s. Matrices 0 and 1 are
// the first and the second eight of what rows are, positions or channels, and the first eight of the other; 2 and 3 are
// of the other's second eight. Positions that a tile has not are its last one once more: what they make is not used,
// but another warp may be writing where they would be.
template <Layout kLayout>
__device__ __forceinline__ uint32_t matrix_row(const Cut& cut, int channels, int positions) {
  const int lane = threadIdx.x % 32;
  if constexpr (kLayout == Layout::kNchw) return swizzled(16 * channels + lane % 16, 2 * positions + lane / 16);
  const int position = min(16 * positions + lane % 16, cut.tile - 1);
  return swizzled(channels / 4 * cut.tile + position, channels % 4 * 2 + lane / 16);
}

// The first factor of a product over channels, [16 positions, 16 channels], or over positions, the other way round.
template <Layout kLayout, bool kOverChannels>
__device__ __forceinline__ void load_factor(uint32_t (&to)[4], uint32_t row) {
  if constexpr ((kLayout == Layout::kChannelsLast) == kOverChannels) {
    load_matrix(to, row);
  } else {
    load_matrix_transposed(to, row);
    const uint32_t second = to[1];
    to[1] = to[2];
    to[2] = second;
  }
}

// The same where a lane's row is of the matrix that the product wants there: 1 and 3 are the second eight of its rows,
// 2 and 3 of what it sums over. So nothing need change places.
template <Layout kLayout, bool kOverChannels>
__device__ __forceinline__ void load_rows(uint32_t (&to)[4], uint32_t row) {
  if constexpr ((kLayout == Layout::kChannelsLast) == kOverChannels)
    load_matrix(to, row);
  else
    load_matrix_transposed(to, row);
}

}  // namespace ar_kernels
