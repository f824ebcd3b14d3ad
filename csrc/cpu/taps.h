// The nine taps of 3x3 heads, tau = (y, x) from (-1, -1) to (1, 1), zeros around the map. The map stays where it is,
// and what is small moves:
//   l[k][s] = sum over taps of (W[k][tap] Z)[s + tap]                    add_taps
//   P[k][tap] = sum over s of A[k][s - tap] Z[s], and dZ likewise        shift_rows, of masks in frames of zeros
#pragma once

#include "maps.h"

namespace ar_kernels::AR_TARGET {

struct Tap {
  int64_t y, x;
};

inline Tap tap_of(int64_t index) { return {index / 3 - 1, index % 3 - 1}; }

// Calls visit(i, y, x, count) for each piece of a line among positions [begin, begin + count), i its place among them.
template <class Visit>
void for_each_line(const Layer& layer, int64_t begin, int64_t count, const Visit& visit) {
  for (int64_t i = 0; i < count;) {
    const int64_t y = (begin + i) / layer.width, x = (begin + i) % layer.width;
    const int64_t run = smaller(layer.width - x, count - i);
    visit(i, y, x, run);
    i += run;
  }
}

template <class A>
void add(A* to, const A* from, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) store(to + i, load(to + i) + load(from + i));
  if (i < count) store(to + i, load(to + i, (int)(count - i)) + load(from + i, (int)(count - i)), (int)(count - i));
}

// sums[k][s] += sum over taps of (rows[k][tap] Z)[s + tap], for s in lines [first, last); sums [K, H, W] of image n.
// products: memory of a tile's rows.
template <class T, class A>
void add_taps(const Layer& layer, const Map& map, int64_t n, int64_t first, int64_t last, const A* rows, A* products,
              T* gathered, A* sums) {
  const int64_t s_step = position_step<A>(layer), width = layer.width, positions = layer.positions();
  const int64_t end = smaller(last + 1, layer.height) * width;
  for (int64_t start = first == 0 ? 0 : (first - 1) * width; start < end; start += layer.tile) {
    const int64_t count = smaller(layer.tile, end - start);
    project<T, A>(layer, rows, layer.rows(), read_tile<T>(layer, map, n, start, count, gathered), products);
    for_each_line(layer, start, count, [&](int64_t i, int64_t y, int64_t x, int64_t run) {
      for (int64_t row = 0; row < layer.rows(); ++row) {
        const Tap tap = tap_of(row % layer.taps);
        const int64_t line = y - tap.y;
        if (line < first || line >= last) continue;
        const int64_t begin = x < tap.x ? tap.x : x, stop = smaller(x + run, width + tap.x);
        A* to = sums + row / layer.taps * positions + line * width + begin - tap.x;
        add(to, products + row * s_step + i + begin - x, stop - begin);
      }
    });
  }
}

inline int64_t frame_width(const Layer& layer) { return layer.width + 2; }
inline int64_t frame_size(const Layer& layer) { return (layer.height + 2) * frame_width(layer); }

// The zeros around a map of masks.
template <class A>
void clear_frame(const Layer& layer, A* frame) {
  const int64_t step = frame_width(layer);
  memset(frame, 0, step * sizeof(A));
  for (int64_t y = 1; y <= layer.height; ++y) frame[y * step] = frame[(y + 1) * step - 1] = 0;
  memset(frame + (layer.height + 1) * step, 0, step * sizeof(A));
}

// Calls visit(offset in the map, offset in its frame, count) for every vector of a map, those at lines' ends in part.
template <class A, class Visit>
void for_each_framed(const Layer& layer, const Visit& visit) {
  for (int64_t y = 0; y < layer.height; ++y) {
    for (int64_t x = 0; x < layer.width; x += kLanes<A>)
      visit(y * layer.width + x, (y + 1) * frame_width(layer) + x + 1, (int)smaller(layer.width - x, kLanes<A>));
  }
}

// rows[k][tap][s] = frames[k][s - tap] for positions [begin, begin + count); lanes beyond, up to a whole vector, are 0.
template <class A>
void shift_rows(const Layer& layer, const A* frames, int64_t begin, int64_t count, A* rows) {
  const int64_t s_step = position_step<A>(layer), step = frame_width(layer), size = frame_size(layer);
  for_each_line(layer, begin, count, [&](int64_t i, int64_t y, int64_t x, int64_t run) {
    for (int64_t row = 0; row < layer.rows(); ++row) {
      const Tap tap = tap_of(row % layer.taps);
      const A* from = frames + row / layer.taps * size + (y - tap.y + 1) * step + x - tap.x + 1;
      memcpy(rows + row * s_step + i, from, run * sizeof(A));
    }
  });
  for (int64_t row = 0; row < layer.rows(); ++row)
    for (int64_t i = count; i < padded<A>(count); ++i) rows[row * s_step + i] = 0;
}

// The lines of a split.
struct Lines {
  int64_t first, last;
};

inline Lines lines_of(const Layer& layer, int64_t split) {
  const int64_t lines = layer.split_length / layer.width;
  return {split * lines, smaller((split + 1) * lines, layer.height)};
}

}  // namespace ar_kernels::AR_TARGET
