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

// A tile from memory; its bytes were announced.
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

// The first factor of a product over channels, [16 positions, 16 channels], or over positions, the other way round. A
// lane's row is of the matrix that the product wants there: 1 and 3 are the second eight of its rows, 2 and 3 of what
// it sums over.
template <Layout kLayout, bool kOverChannels>
__device__ __forceinline__ void load_rows(uint32_t (&to)[4], uint32_t row) {
  if constexpr ((kLayout == Layout::kChannelsLast) == kOverChannels)
    load_matrix(to, row);
  else
    load_matrix_transposed(to, row);
}

}  // namespace ar_kernels
