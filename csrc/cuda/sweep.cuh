// What the Hopper kernels share whose tiles are some positions of an image with all their channels.
//
// A tile comes into shared memory by the copy engine, as rows of 128 bytes: planes of 64 channels, [planes, positions,
// 64]. It is read twice there: over its channels and over its positions. A warp has the same channels all the time;
// registers hold its weights and sums alone, so a tile may have any number of channels. One tile is worked on while
// others are on their way.
#pragma once

#include "primitives.cuh"
#include "sweep.h"
#include "values.cuh"

namespace ar_kernels {

constexpr int kRow = 64;        // elements of 128 bytes, as wide as the copy engine's swizzle
constexpr int kMostWarps = 16;  // of a multiprocessor
constexpr int kMostStages = 6;

// Whether the copy engine can bring tiles of it.
inline bool is_channels_last(const FlatMap& map) {
  return map.channel == 1 && map.image > 0 && map.image % 8 == 0 && map.position > 0 && map.position % 8 == 0;
}

// A box of a tensor map: so many positions of so many channels, a multiple of 64.
template <class T>
bool encode(CUtensorMap* tensor, const FlatMap& map, int images, int channels, int positions, int of_box, int tile) {
  const uint64_t step = sizeof(T), s = positions, n = images, planes = channels / kRow;
  return encode_map<T, 4>(tensor, map.data, {kRow, s, planes, n}, {map.position * step, kRow * step, map.image * step},
                          {kRow, static_cast<uint32_t>(tile), static_cast<uint32_t>(of_box / kRow), 1},
                          CU_TENSOR_MAP_SWIZZLE_128B);
}

}  // namespace ar_kernels
