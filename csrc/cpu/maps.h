// Tiles of a feature map where they lie, or gathered where neither channels nor positions are adjacent.
#pragma once

#include "attend.h"
#include "products.h"

namespace ar_kernels::AR_TARGET {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Memory of one thread, handed out in aligned pieces; from null it only counts.
class Scratch {
 public:
  explicit Scratch(void* memory) : memory_((char*)memory) {}

  template <class A>
  A* take(int64_t count) {
    char* piece = memory_ + used_;
    used_ += (count * (int64_t)sizeof(A) + 63) / 64 * 64;
    return memory_ == nullptr ? nullptr : (A*)piece;
  }

  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

// The sizes of a tile's matrices: rows of heads by padded channels, or by padded positions.
template <class A>
int64_t channel_step(const Layer& layer) {
  return padded<A>(layer.channels);
}

template <class A>
int64_t position_step(const Layer& layer) {
  return padded<A>(layer.tile);
}

// One past another in memory along positions, row by row?
inline bool flat(const Layer& layer, const Map& map) {
  return layer.height == 1 || layer.width == 1 || map.h == layer.width * map.w;
}

inline int64_t position_stride(const Layer& layer, const Map& map) { return layer.width == 1 ? map.h : map.w; }

inline bool lies_in_rows(const Layer& layer, const Map& map) {
  if (!flat(layer, map)) return false;
  if (layer.positions_adjacent) return layer.positions() == 1 || position_stride(layer, map) == 1;
  return layer.channels == 1 || map.c == 1;
}

// Calls visit(element of the map, element of the tile) for every element of the tile, offsets both.
template <class Visit>
void for_each_element(const Layer& layer, const Map& map, int64_t n, int64_t begin, int64_t count, int64_t row_step,
                      const Visit& visit) {
  const int64_t along_positions = layer.positions_adjacent ? 1 : row_step;
  const int64_t along_channels = layer.positions_adjacent ? row_step : 1;
  for (int64_t c = 0; c < layer.channels; ++c) {
    for (int64_t s = 0; s < count;) {
      const int64_t y = (begin + s) / layer.width, x = (begin + s) % layer.width;
      const int64_t run = smaller(layer.width - x, count - s);
      const int64_t from = n * map.n + c * map.c + y * map.h + x * map.w;
      const int64_t to = c * along_channels + s * along_positions;
      for (int64_t i = 0; i < run; ++i) visit(from + i * map.w, to + i * along_positions);
      s += run;
    }
  }
}

template <class T>
int64_t gathered_size(const Layer& layer) {
  using A = Accumulator<T>;
  return layer.positions_adjacent ? layer.channels * position_step<A>(layer) : layer.tile * channel_step<A>(layer);
}

template <class T>
Tile<T> tile_at(const Layer& layer, T* data, int64_t count, int64_t row_step) {
  if (layer.positions_adjacent) return {data, row_step, layer.channels, count};
  return {data, row_step, count, layer.channels};
}

template <class T>
Tile<T> gathered_tile(const Layer& layer, T* gathered, int64_t count) {
  using A = Accumulator<T>;
  return tile_at(layer, gathered, count, layer.positions_adjacent ? position_step<A>(layer) : channel_step<A>(layer));
}

// Positions [begin, begin + count) of image n; gathered: memory for them, null where the map lies in rows.
template <class T>
Tile<const T> read_tile(const Layer& layer, const Map& map, int64_t n, int64_t begin, int64_t count, T* gathered) {
  const T* data = (const T*)map.data;
  if (gathered == nullptr) {
    const int64_t step = position_stride(layer, map);
    return tile_at(layer, data + n * map.n + begin * step, count, layer.positions_adjacent ? map.c : step);
  }
  const Tile<T> tile = gathered_tile(layer, gathered, count);
  for_each_element(layer, map, n, begin, count, tile.row_step,
                   [&](int64_t from, int64_t to) { gathered[to] = data[from]; });
  return {tile.data, tile.row_step, tile.rows, tile.columns};
}

// Whether a tile of channels_last, of which products send for the next one, stays in the first-level cache.
template <class T>
bool is_small(const Tile<const T>& z) {
  return z.rows * z.row_step * (int64_t)sizeof(T) <= kSmallTileBytes;
}

// out[k][s] = sum over c of weights[k][c] Z[c][s], of a tile that comes from memory
template <class T, class A>
void project(const Layer& layer, const A* weights, int64_t rows, const Tile<const T>& z, A* out) {
  const int64_t c_step = channel_step<A>(layer), s_step = position_step<A>(layer);
  if (layer.positions_adjacent)
    sum_rows<Ahead::kSoon>(weights, c_step, rows, z, out, s_step, false);
  else if (is_small(z))
    dot_rows<Ahead::kNextTile>(weights, c_step, rows, z, out, s_step, false);
  else
    dot_rows<Ahead::kSoon>(weights, c_step, rows, z, out, s_step, false);
}

// out[k][c] += sum over s of masks[k][s] Z[c][s], of a tile that was read just before
template <class T, class A>
void pool(const Layer& layer, const A* masks, int64_t rows, const Tile<const T>& z, A* out) {
  const int64_t c_step = channel_step<A>(layer), s_step = position_step<A>(layer);
  if (layer.positions_adjacent)
    dot_rows<Ahead::kNothing>(masks, s_step, rows, z, out, c_step, true);
  else if (is_small(z))
    sum_rows<Ahead::kNextTile>(masks, s_step, rows, z, out, c_step, true);
  else
    sum_rows<Ahead::kNothing>(masks, s_step, rows, z, out, c_step, true);
}

// dZ[c][s] = sum over k of weights[k][c] masks[k][s] + upstream[c][s]
template <class T, class A>
void spread(const Layer& layer, const A* weights, const A* masks, int64_t rows, const Tile<const T>* upstream,
            const Tile<T>& dz, bool streams) {
  const int64_t c_step = channel_step<A>(layer), s_step = position_step<A>(layer);
  if (layer.positions_adjacent)
    outer_rows<T, A>(weights, c_step, masks, s_step, rows, upstream, dz, streams);
  else
    outer_rows<T, A>(masks, s_step, weights, c_step, rows, upstream, dz, streams);
}

// Rows of a [rows, channels] matrix, padded with zeros to whole vectors.
template <class A>
void copy_rows(const Layer& layer, const A* from, int64_t rows, A* to) {
  const int64_t step = channel_step<A>(layer);
  for (int64_t k = 0; k < rows; ++k) {
    memcpy(to + k * step, from + k * layer.channels, layer.channels * sizeof(A));
    memset(to + k * step + layer.channels, 0, (step - layer.channels) * sizeof(A));
  }
}

}  // namespace ar_kernels::AR_TARGET
