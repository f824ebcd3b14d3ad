// What the Hopper kernels of channels_last maps of many channels share.
//
// A tile is some positions of an image with all their channels: one run of memory. It comes into shared memory by the
// copy engine, as planes of 64 channels, [planes, positions, 64], and is read twice there: over its channels and over
// its positions. A warp has the same one or two planes all the time; registers hold its weights and sums alone, so a
// tile may have any number of channels. One tile is worked on while others are on their way.
#pragma once

#include "primitives.cuh"
#include "sweep.h"
#include "values.cuh"

namespace ar_kernels {

constexpr int kPlane = 64;  // channels of 128 bytes, as wide as the copy engine's swizzle
constexpr int kMostWarps = 16;
constexpr int kMostStages = 6;
constexpr int kTileBytes = 64 * 1024;  // the most of a stage: three fit

// How an image is cut, and where what lies in shared memory.
struct Cut {
  int planes, warps;                   // of the map; of a block
  int tile, tiles;                     // positions of a tile, tiles of an image
  int stages, map_bytes, stage_bytes;  // a stage has a tile of every map
  int parts, rest, barriers, bytes;    // parts: [warps, positions rounded up to 16, 8] floats
};

inline int rounded_up(int value, int unit) { return (value + unit - 1) / unit * unit; }

// maps: that are read tile by tile. rest: bytes that a kernel wants beside tiles and parts. No stages: it does not fit.
inline Cut cut_of(int channels, int positions, int maps, int rest) {
  Cut cut = {};
  cut.planes = channels / kPlane;
  cut.warps = cut.planes % 2 == 0 && cut.planes > 8 ? cut.planes / 2 : cut.planes;
  if (cut.warps == 0 || cut.warps > kMostWarps || channels % kPlane != 0 || positions < 1) return cut;
  // With two planes a warp and 13 warps or more there are no registers for 32 positions.
  const int most = cut.warps <= 12 || cut.warps == cut.planes ? 32 : 16, fit = kTileBytes / maps / (2 * channels);
  cut.tiles = (positions + (fit < most ? fit : most) - 1) / (fit < most ? fit : most);
  cut.tile = (positions + cut.tiles - 1) / cut.tiles;
  cut.map_bytes = rounded_up(cut.tile * 2 * channels, 1024);
  cut.stage_bytes = cut.map_bytes * maps;
  const int parts = cut.warps * rounded_up(cut.tile, 16) * 8 * 4;
  const int stages = (kSharedBytes - 1024 - parts - rounded_up(rest, 16) - 8 * kMostStages) / cut.stage_bytes;
  cut.stages = stages < kMostStages ? stages : kMostStages;
  cut.parts = cut.stages * cut.stage_bytes;
  cut.rest = cut.parts + parts;
  cut.barriers = cut.rest + rounded_up(rest, 16);
  cut.bytes = cut.barriers + 8 * kMostStages + 1024;  // tiles begin at a multiple of 1024
  return cut;
}

// Whether the copy engine can bring tiles of it.
inline bool is_channels_last(const Map& map) {
  return map.channel == 1 && map.image > 0 && map.image % 8 == 0 && map.position > 0 && map.position % 8 == 0;
}

template <class T>
bool encode(CUtensorMap* tensor, const Map& map, int images, int positions, const Cut& cut) {
  const uint64_t step = sizeof(T);
  return encode_map<T, 4>(
      tensor, map.data,
      {kPlane, static_cast<uint64_t>(positions), static_cast<uint64_t>(cut.planes), static_cast<uint64_t>(images)},
      {map.position * step, kPlane * step, map.image * step},
      {kPlane, static_cast<uint32_t>(cut.tile), static_cast<uint32_t>(cut.planes), 1}, CU_TENSOR_MAP_SWIZZLE_128B);
}

// The offset of a lane's row of 16 positions by 16 channels in a tile: matrices 0 and 1 are positions 0 to 7 and 8 to
// 15 of the first eight channels, 2 and 3 of the others. Positions that a tile has not are its last one once more: what
// they make is not used, but another warp may be writing where they would be.
__device__ __forceinline__ uint32_t matrix_row(const Cut& cut, int plane, int channels16, int positions16) {
  const int lane = threadIdx.x % 32, position = min(16 * positions16 + lane % 16, cut.tile - 1);
  return swizzled(plane * cut.tile + position, channels16 * 2 + lane / 16);
}

}  // namespace ar_kernels
