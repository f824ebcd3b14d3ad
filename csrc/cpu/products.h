// The three products of a tile of the feature map with few rows of weights or masks, blocked for registers.
//
// A tile is `rows` rows of `columns` adjacent elements, row_step apart: channels by positions for NCHW, positions by
// channels for channels_last. The few rows on the other side (heads) lie as [head][...], `step` apart, padded with
// zeros to whole vectors; they are in the accumulator's dtype, or F: halves that are widened as they are read.
//
//   sum_rows     out[k][x]  = sum over i of u[k][i] z[i][x]         (adds to out where `add`)
//   dot_rows     out[k][i] += sum over x of v[k][x] z[i][x]         (sets out where not `add`)
//   (where z comes from memory and not from cache, what is needed soon is sent for: Ahead)
//   outer_rows   dz[i][x]   = sum over k of u[k][i] v[k][x] + upstream[i][x]   (past the caches where `streams`)
#pragma once

#include "simd.h"

namespace ar_kernels::AR_TARGET {

// Sends for the lines of `Bytes` bytes, into the cache of that level; to memory that is not there too, nothing comes of
// it then.
template <int Bytes, int Level>
inline void fetch(const void* from) {
  AR_UNROLL for (int i = 0; i < Bytes; i += 64)
    __builtin_prefetch((const char*)from + i, 0, 4 - Level);
}

// What a product sends for while it is at a tile. A tile that fits the first-level cache is read by two products, which
// send for half of the next tile each: so memory never waits for a product that needs nothing of it.
enum class Ahead { kNothing, kSoon, kNextTile };

inline constexpr int kBlockVectors = kManyRegisters ? 4 : 2;  // of a block of columns
inline constexpr int kBlockSums = kManyRegisters ? 16 : 8;    // of a block of dot products

template <class T>
struct Tile {
  T* data;
  int64_t row_step;
  int64_t rows;
  int64_t columns;
};

// ------------------------------------------------------------------------------------------- sum_rows

// Rows [begin, end), and a block of columns from x on.
struct Block {
  int64_t begin, end, x;
};

template <class T, class A, int Heads, Ahead Sends, int Vectors, bool Tail, class F>
inline void sum_rows_block(const F* u, int64_t u_step, const Tile<const T>& z, const Block& block, A* out,
                           int64_t out_step, bool add) {
  constexpr int kStep = kLanes<A>;
  constexpr int64_t kSoonRows = 32;  // the same columns that much further down, at the end those beside them
  [[maybe_unused]] const int64_t below = kSoonRows * z.row_step;
  [[maybe_unused]] const int64_t beside = below - z.rows * z.row_step + Vectors * kStep;
  const int last = (int)(z.columns - block.x - (Vectors - 1) * kStep);
  Vector<A> sums[Heads][Vectors] = {};
  const T* row = z.data + block.begin * z.row_step + block.x;
  for (int64_t i = block.begin; i < block.end; ++i, row += z.row_step) {
    if constexpr (Sends == Ahead::kSoon) {
      fetch<Vectors * kStep * sizeof(T), 2>(row + (i + kSoonRows < z.rows ? below : beside));
    } else if constexpr (Sends == Ahead::kNextTile) {
      if (i % 2 == 1) fetch<Vectors * kStep * sizeof(T), 1>(row + z.rows * z.row_step);
    }
    Vector<A> values[Vectors];
    AR_UNROLL for (int j = 0; j < Vectors; ++j) {
      values[j] = Tail && j == Vectors - 1 ? load(row + j * kStep, last) : load(row + j * kStep);
    }
    AR_UNROLL for (int k = 0; k < Heads; ++k) {
      const Vector<A> weight = spread(u + k * u_step + i);
      AR_UNROLL for (int j = 0; j < Vectors; ++j)
        sums[k][j] += weight * values[j];
    }
  }
  AR_UNROLL for (int k = 0; k < Heads; ++k) {
    AR_UNROLL for (int j = 0; j < Vectors; ++j) {
      A* target = out + k * out_step + block.x + j * kStep;
      store(target, add ? load(target) + sums[k][j] : sums[k][j]);
    }
  }
}

// As many vectors as are left, the last one perhaps in part.
template <class T, class A, int Heads, Ahead Sends, int Vectors, class F>
inline void sum_rows_end(const F* u, int64_t u_step, const Tile<const T>& z, const Block& block, A* out,
                         int64_t out_step, bool add) {
  if (z.columns - block.x > (Vectors - 1) * kLanes<A>)
    sum_rows_block<T, A, Heads, Sends, Vectors, true>(u, u_step, z, block, out, out_step, add);
  else if constexpr (Vectors > 1)
    sum_rows_end<T, A, Heads, Sends, Vectors - 1>(u, u_step, z, block, out, out_step, add);
}

template <class T, class A, int Heads, Ahead Sends, class F>
inline void sum_rows_columns(const F* u, int64_t u_step, const Tile<const T>& z, const Block& block, A* out,
                             int64_t out_step, bool add) {
  if (block.x + kBlockVectors * kLanes<A> <= z.columns)
    sum_rows_block<T, A, Heads, Sends, kBlockVectors, false>(u, u_step, z, block, out, out_step, add);
  else
    sum_rows_end<T, A, Heads, Sends, kBlockVectors>(u, u_step, z, block, out, out_step, add);
}

// Heads from k on, of which the first ones' product sends for all; returns how many.
template <class T, class A, int Heads, Ahead Sends, class F>
inline int sum_rows_of(const F* u, int64_t u_step, int64_t k, const Tile<const T>& z, const Block& block, A* out,
                       int64_t out_step, bool add) {
  u += k * u_step;
  out += k * out_step;
  if (k == 0)
    sum_rows_columns<T, A, Heads, Sends>(u, u_step, z, block, out, out_step, add);
  else
    sum_rows_columns<T, A, Heads, Ahead::kNothing>(u, u_step, z, block, out, out_step, add);
  return Heads;
}

template <Ahead Sends, class T, class A, class F>
void sum_rows(const F* u, int64_t u_step, int64_t heads, const Tile<const T>& z, A* out, int64_t out_step, bool add) {
  constexpr int64_t kRows = 128;  // as many as one sum runs over: a longer one would round worse
  for (int64_t x = 0; x < z.columns; x += kBlockVectors * kLanes<A>) {
    for (int64_t begin = 0; begin < z.rows; begin += kRows) {
      const Block block = {begin, begin + kRows < z.rows ? begin + kRows : z.rows, x};
      const bool adds = add || begin > 0;
      int64_t k = 0;
      while (k + 4 <= heads) k += sum_rows_of<T, A, 4, Sends>(u, u_step, k, z, block, out, out_step, adds);
      if (k + 2 <= heads) k += sum_rows_of<T, A, 2, Sends>(u, u_step, k, z, block, out, out_step, adds);
      if (k < heads) k += sum_rows_of<T, A, 1, Sends>(u, u_step, k, z, block, out, out_step, adds);
    }
  }
}

// ------------------------------------------------------------------------------------------- dot_rows

// Rows from i on; where there are fewer than Rows, the last one stands for those that are missing. It sends for what is
// `ahead` elements further on.
template <class T, class A, int Heads, Ahead Sends, int Rows, class F>
inline void dot_rows_block(const F* v, int64_t v_step, const Tile<const T>& z, int64_t i, int64_t ahead, A* out,
                           int64_t out_step, bool add) {
  constexpr int kStep = kLanes<A>;
  const int64_t real = z.rows - i < Rows ? z.rows - i : Rows;
  const T* rows[Rows];
  AR_UNROLL for (int j = 0; j < Rows; ++j)
    rows[j] = z.data + (i + (j < real ? j : real - 1)) * z.row_step;
  Vector<A> sums[Heads * Rows] = {};
  const auto step = [&](int64_t x, auto&& loaded) {
    if constexpr (Sends != Ahead::kNothing) {
      AR_UNROLL for (int j = 0; j < Rows; j += Sends == Ahead::kNextTile ? 2 : 1)
        fetch<1, 1>(rows[j] + x + ahead);
    }
    Vector<A> values[Rows];
    AR_UNROLL for (int j = 0; j < Rows; ++j)
      values[j] = loaded(rows[j] + x);
    AR_UNROLL for (int k = 0; k < Heads; ++k) {
      const Vector<A> weight = load(v + k * v_step + x);
      AR_UNROLL for (int j = 0; j < Rows; ++j)
        sums[k * Rows + j] += weight * values[j];
    }
  };
  int64_t x = 0;
  for (; x + kStep <= z.columns; x += kStep) step(x, [](const T* from) { return load(from); });
  if (x < z.columns) {
    const int last = (int)(z.columns - x);
    step(x, [last](const T* from) { return load(from, last); });
  }
  sums_of_vectors<A, Heads * Rows>(sums);
  A totals[Heads * Rows];
  AR_UNROLL for (int j = 0; j < Heads * Rows / kStep; ++j)
    store(totals + j * kStep, sums[j]);
  if (real == Rows) {  // of a size that the compiler knows
    typedef A Few __attribute__((vector_size(Rows * sizeof(A))));
    AR_UNROLL for (int k = 0; k < Heads; ++k) {
      Few total, before = {};
      memcpy(&total, totals + k * Rows, sizeof(Few));
      if (add) memcpy(&before, out + k * out_step + i, sizeof(Few));
      total += before;
      memcpy(out + k * out_step + i, &total, sizeof(Few));
    }
    return;
  }
  for (int k = 0; k < Heads; ++k) {
    A* target = out + k * out_step + i;
    for (int64_t j = 0; j < real; ++j) target[j] = add ? target[j] + totals[k * Rows + j] : totals[k * Rows + j];
  }
}

// Heads from k on, of which the first ones' product sends for all.
template <class T, class A, int Heads, Ahead Sends, class F>
inline void dot_rows_of(const F* v, int64_t v_step, int64_t k, const Tile<const T>& z, int64_t i, int64_t ahead, A* out,
                        int64_t out_step, bool add) {
  constexpr int kRows = kBlockSums / Heads;
  v += k * v_step;
  out += k * out_step;
  if (k == 0)
    dot_rows_block<T, A, Heads, Sends, kRows>(v, v_step, z, i, ahead, out, out_step, add);
  else
    dot_rows_block<T, A, Heads, Ahead::kNothing, kRows>(v, v_step, z, i, ahead, out, out_step, add);
}

template <Ahead Sends, class T, class A, class F>
void dot_rows(const F* v, int64_t v_step, int64_t heads, const Tile<const T>& z, A* out, int64_t out_step, bool add) {
  constexpr int kSums = kBlockSums;
  // Some rows of every block on, so far that memory has answered when the sweep gets there; or the next tile's.
  constexpr int64_t kSoonBytes = 8192;
  const int64_t block = kSums / 4 * z.row_step;
  const int64_t soon = block * (kSoonBytes / (block * (int64_t)sizeof(T) + 1) + 1);
  const int64_t ahead = Sends == Ahead::kNextTile ? z.rows * z.row_step : soon;
  for (int64_t i = 0; i < z.rows; i += kSums / 4)
    for (int64_t k = 0; k + 4 <= heads; k += 4)
      dot_rows_of<T, A, 4, Sends>(v, v_step, k, z, i, ahead, out, out_step, add);
  int64_t k = heads / 4 * 4;
  if (k + 2 <= heads) {
    for (int64_t i = 0; i < z.rows; i += kSums / 2)
      dot_rows_of<T, A, 2, Sends>(v, v_step, k, z, i, ahead, out, out_step, add);
    k += 2;
  }
  if (k < heads)
    for (int64_t i = 0; i < z.rows; i += kSums)
      dot_rows_of<T, A, 1, Sends>(v, v_step, k, z, i, ahead, out, out_step, add);
}

// ------------------------------------------------------------------------------------------- outer_rows

template <class T, class A, int Rows, int Vectors, bool Tail, class F>
inline void outer_rows_block(const F* u, int64_t u_step, const F* v, int64_t v_step, int64_t heads,
                             const Tile<const T>* upstream, const Tile<T>& dz, bool streams, int64_t i, int64_t x,
                             int last) {
  constexpr int kStep = kLanes<A>;
  const int64_t real = dz.rows - i < Rows ? dz.rows - i : Rows;
  Vector<A> sums[Rows][Vectors] = {};
  int64_t offsets[Rows];
  AR_UNROLL for (int j = 0; j < Rows; ++j)
    offsets[j] = i + (j < real ? j : real - 1);
  if (upstream != nullptr) {  // read while dZ goes past the caches: without asking ahead it waits for memory
    constexpr int64_t kAhead = 8;
    AR_UNROLL for (int j = 0; j < Rows; ++j)
      fetch<Vectors * kStep * sizeof(T), 2>(upstream->data + (i + j + kAhead) * upstream->row_step + x);
  }
  for (int64_t k = 0; k < heads; ++k) {
    Vector<A> values[Vectors];
    AR_UNROLL for (int l = 0; l < Vectors; ++l)
      values[l] = load(v + k * v_step + x + l * kStep);
    AR_UNROLL for (int j = 0; j < Rows; ++j) {
      const Vector<A> weight = spread(u + k * u_step + offsets[j]);
      AR_UNROLL for (int l = 0; l < Vectors; ++l)
        sums[j][l] += weight * values[l];
    }
  }
  if (upstream != nullptr) {  // last: it is as large as all else, and rounds once
    AR_UNROLL for (int j = 0; j < Rows; ++j) {
      if (j < real) {
        const T* from = upstream->data + (i + j) * upstream->row_step + x;
        AR_UNROLL for (int l = 0; l < Vectors; ++l)
          sums[j][l] += Tail && l == Vectors - 1 ? load(from + l * kStep, last) : load(from + l * kStep);
      }
    }
  }
  AR_UNROLL for (int j = 0; j < Rows; ++j) {
    if (j < real) {
      T* const row = dz.data + (i + j) * dz.row_step;
      // What passes the caches does so in whole lines: half of one by the other way is slower than either.
      const uintptr_t begin = ((uintptr_t)row + 63) / 64 * 64;
      const uintptr_t end = (uintptr_t)(row + dz.columns / kStep * kStep) / 64 * 64;
      AR_UNROLL for (int l = 0; l < Vectors; ++l) {
        T* to = row + x + l * kStep;
        if (Tail && l == Vectors - 1 && last < kStep)
          store(to, sums[j][l], last);
        else if (streams && (uintptr_t)to >= begin && (uintptr_t)to < end)
          stream(to, sums[j][l]);
        else
          store(to, sums[j][l]);
      }
    }
  }
}

template <class T, class A, int Rows, int Vectors, class F>
inline void outer_rows_end(const F* u, int64_t u_step, const F* v, int64_t v_step, int64_t heads,
                           const Tile<const T>* upstream, const Tile<T>& dz, bool streams, int64_t i, int64_t x) {
  const int64_t left = dz.columns - x - (Vectors - 1) * kLanes<A>;
  if (left > 0)
    outer_rows_block<T, A, Rows, Vectors, true>(u, u_step, v, v_step, heads, upstream, dz, streams, i, x, (int)left);
  else if constexpr (Vectors > 1)
    outer_rows_end<T, A, Rows, Vectors - 1>(u, u_step, v, v_step, heads, upstream, dz, streams, i, x);
}

template <class T, class A, class F>
void outer_rows(const F* u, int64_t u_step, const F* v, int64_t v_step, int64_t heads, const Tile<const T>* upstream,
                const Tile<T>& dz, bool streams) {
  constexpr int kRows = 4, kVectors = kBlockVectors;
  for (int64_t i = 0; i < dz.rows; i += kRows) {
    int64_t x = 0;
    for (; x + kVectors * kLanes<A> <= dz.columns; x += kVectors * kLanes<A>)
      outer_rows_block<T, A, kRows, kVectors, false>(u, u_step, v, v_step, heads, upstream, dz, streams, i, x, 0);
    if (x < dz.columns) outer_rows_end<T, A, kRows, kVectors>(u, u_step, v, v_step, heads, upstream, dz, streams, i, x);
  }
}

}  // namespace ar_kernels::AR_TARGET
