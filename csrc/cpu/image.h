// What a layer does image by image, beside its sweeps over positions: gates forward, and backward what reaches the
// pooled features. Rows of weights and of pooled features are [K, taps], taps 1 or 9, each of C channels.
#pragma once

#include "maps.h"

namespace ar_kernels::AR_TARGET {

// sum over i of a[i] b[i]
template <class T, class A>
A dot(const T* a, const A* b, int64_t count) {
  Vector<A> products = {};
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) products += load(a + i) * load(b + i);
  if (i < count) products += load(a + i, (int)(count - i)) * load(b + i, (int)(count - i));
  return sum<A>(products);
}

// to[i] += factor * from[i]
template <class T, class A>
void add_scaled(A* to, A factor, const T* from, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) store(to + i, load(to + i) + load(from + i) * factor);
  if (i < count) store(to + i, load(to + i) + load(from + i, (int)(count - i)) * factor);  // to is padded
}

template <class A>
void scale(A* row, int64_t size, A factor) {  // size in whole vectors
  for (int64_t i = 0; i < size; i += kLanes<A>) store(row + i, load(row + i) * factor);
}

// ------------------------------------------------------------------------------------------- forward

// What exponents are counted from: the largest logit, or 0 where that is infinite and nothing could be counted.
template <class A>
A origin(A m) {
  return m == A(INFINITY) || m == -A(INFINITY) ? A(0) : m;
}

// Running sums of an image, or of a split of it.
template <class A>
struct Sums {
  A* m;  // [K] largest logit
  A* d;  // [K, lanes] sums of exp(l - m), to be added up
  A* p;  // [K taps + mean, channel_step] sum of exp(l - m) Z; of the mean's row, sum of Z

  static Sums take(Scratch& scratch, const ForwardArguments& a) {
    const int64_t heads = a.layer.heads;
    A* m = scratch.take<A>(heads);
    A* d = scratch.take<A>(heads * kLanes<A>);
    return {m, d, scratch.take<A>((a.layer.rows() + 1) * channel_step<A>(a.layer))};
  }

  // Those of one item among a.parts.
  static Sums part(const ForwardArguments& a, int64_t item) {
    Scratch size(nullptr);
    take(size, a);
    Scratch memory((char*)a.parts + item * size.used());
    return take(memory, a);
  }
};

// g P in the map's dtype, taps last.
template <class T, class A>
void store_features(const Layer& layer, A gate, const A* p, T* features) {
  const int64_t channels = layer.channels, taps = layer.taps, c_step = channel_step<A>(layer);
  for (int64_t tap = 0; tap < taps; ++tap, p += c_step) {
    for (int64_t c = 0; c < channels; c += kLanes<A>) {
      const int count = (int)smaller(channels - c, kLanes<A>);
      const Vector<A> value = load(p + c) * gate;
      if (taps == 1) {
        put(features + c, value, count);
        continue;
      }
      T some[kLanes<A>];
      store(some, value);
      for (int i = 0; i < count; ++i) features[(c + i) * taps + tap] = some[i];
    }
  }
}

// Pooled features, the mean, gates and gated features of image n, from its sums' rows p.
template <class T>
void store_pooled(const ForwardArguments& a, int64_t n, Accumulator<T>* p) {
  using A = Accumulator<T>;
  const Layer& layer = a.layer;
  const int64_t channels = layer.channels, heads = layer.heads, taps = layer.taps, gated = layer.gated;
  const int64_t c_step = channel_step<A>(layer);
  for (int64_t k = 0; k < heads; ++k) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      A* pooled = (A*)a.pooled + ((n * taps + tap) * heads + k) * channels;
      memcpy(pooled, p + (k * taps + tap) * c_step, channels * sizeof(A));
    }
  }
  if (a.mean != nullptr) {
    A* row = p + layer.rows() * c_step;
    scale(row, c_step, 1 / A(layer.positions()));
    memcpy((A*)a.mean + n * channels, row, channels * sizeof(A));
  }
  if (gated == 0) return;
  A* scores = (A*)a.scores + n * heads;
  for (int64_t k = 0; k < heads; ++k) {
    scores[k] = 0;
    if (a.score_w == nullptr) continue;
    for (int64_t row = k * taps; row < (k + 1) * taps; ++row)
      scores[k] += dot((const A*)a.score_w + row * channels, p + row * c_step, channels);
    if (a.score_b != nullptr) scores[k] += ((const A*)a.score_b)[k];
  }
  A* gates = (A*)a.gates + n * gated;
  A total = 0;  // no maximum is needed, tanh is bounded
  for (int64_t k = 0; k < gated; ++k) total += gates[k] = exponential(hyperbolic_tangent(scores[k]));
  for (int64_t k = 0; k < gated; ++k) {
    gates[k] /= total;
    T* features = (T*)a.features + (n * gated + k) * channels * taps;
    store_features(layer, gates[k], p + k * taps * c_step, features);
  }
}

// ------------------------------------------------------------------------------------------- backward

// The rows that a tile meets, weights by channels and masks by positions: K taps of W_H beside dl, as many of dP beside
// a, one of the mean's gradient beside 1/S.
template <class A>
struct Rows {
  A* weights;
  A* masks;
  A* center;  // [K] dP . P
  A* rest;    // [K] sum of a (dA - dP . P)
  A* dt;      // [K]
  A* dg;      // [K]

  static Rows take(Scratch& scratch, const Layer& layer) {
    const int64_t rows = 2 * layer.rows() + 1;
    A* weights = scratch.take<A>(rows * channel_step<A>(layer));
    A* masks = scratch.take<A>(rows * position_step<A>(layer));
    A* center = scratch.take<A>(layer.heads);
    A* rest = scratch.take<A>(layer.heads);
    A* dt = scratch.take<A>(layer.heads);
    return {weights, masks, center, rest, dt, scratch.take<A>(layer.heads)};
  }

  // What is the same for every image.
  void fill(const BackwardArguments& a) const {
    const int64_t s_step = position_step<A>(a.layer);
    copy_rows(a.layer, (const A*)a.w, a.layer.rows(), weights);
    for (int64_t s = 0; s < s_step; ++s) masks[2 * a.layer.rows() * s_step + s] = 1 / A(a.layer.positions());
  }
};

// dt and dg of one image: what reaches the gates.
template <class T, class A>
void gate_gradient(const BackwardArguments& a, int64_t n, const Rows<A>& rows) {
  const int64_t heads = a.layer.heads, gated = a.layer.gated, width = a.layer.taps * a.layer.channels;
  for (int64_t k = 0; k < heads; ++k) rows.dt[k] = 0;
  if (a.score_w == nullptr || gated == 0) return;
  const A* gates = (const A*)a.gates + n * gated;
  A common = 0;
  for (int64_t k = 0; k < gated; ++k) {
    A dg = a.grad_gates == nullptr ? A(0) : ((const A*)a.grad_gates)[n * gated + k];
    if (a.grad_features != nullptr) {
      const T* dx = (const T*)a.grad_features + (n * gated + k) * width;
      dg += dot(dx, (const A*)a.pooled + (n * heads + k) * width, width);
    }
    rows.dg[k] = dg;
    common += gates[k] * dg;
  }
  for (int64_t k = 0; k < heads; ++k) {
    if (k < gated) {
      const A u = hyperbolic_tangent(((const A*)a.scores)[n * heads + k]);
      rows.dt[k] = gates[k] * (rows.dg[k] - common) * (1 - u * u);
    }
    if (a.grad_scores != nullptr) rows.dt[k] += ((const A*)a.grad_scores)[n * heads + k];
  }
}

// dP and the mean's gradient of one image.
template <class T, class A>
void pooled_gradient(const BackwardArguments& a, int64_t n, const Rows<A>& rows) {
  const int64_t heads = a.layer.heads, gated = a.layer.gated, channels = a.layer.channels, taps = a.layer.taps;
  const int64_t c_step = channel_step<A>(a.layer);
  memset(rows.weights + a.layer.rows() * c_step, 0, (a.layer.rows() + 1) * c_step * sizeof(A));
  for (int64_t k = 0; k < heads; ++k) {
    for (int64_t row = k * taps; row < (k + 1) * taps; ++row) {
      A* dp = rows.weights + (heads * taps + row) * c_step;
      const int64_t place = (n * heads * taps + row) * channels;
      if (a.grad_pooled != nullptr) add_scaled(dp, A(1), (const A*)a.grad_pooled + place, channels);
      if (a.score_w != nullptr && rows.dt[k] != 0)
        add_scaled(dp, rows.dt[k], (const A*)a.score_w + row * channels, channels);
      if (a.grad_features != nullptr && k < gated) {
        const A gate = ((const A*)a.gates)[n * gated + k];
        add_scaled(dp, gate, (const T*)a.grad_features + (n * gated * taps + row) * channels, channels);
      }
    }
  }
  if (a.grad_mean != nullptr)
    add_scaled(rows.weights + 2 * a.layer.rows() * c_step, A(1), (const A*)a.grad_mean + n * channels, channels);
}

template <class A>
A lse_gradient(const BackwardArguments& a, int64_t n, int64_t k) {
  return a.grad_lse == nullptr ? A(0) : ((const A*)a.grad_lse)[n * a.layer.heads + k];
}

// What pooled_gradient needs first; dt is the user's too, of one of an image's items.
template <class T, class A>
void image_gradient(const BackwardArguments& a, int64_t n, bool keeps_dt, const Rows<A>& rows) {
  gate_gradient<T, A>(a, n, rows);
  if (a.dt != nullptr && keeps_dt) memcpy((A*)a.dt + n * a.layer.heads, rows.dt, a.layer.heads * sizeof(A));
  if (a.dw_shares != nullptr || a.dz != nullptr) pooled_gradient<T, A>(a, n, rows);
}

// ------------------------------------------------------------------------------------------- dZ

template <class T>
T* take_gathered(Scratch& scratch, const Layer& layer, const Map& map) {
  return map.data == nullptr || lies_in_rows(layer, map) ? nullptr : scratch.take<T>(gathered_size<T>(layer));
}

// dZ and where tiles of it, of the feature map and of upstream pass through where these do not lie in the sweep's rows;
// else null.
template <class T>
struct Gradient {
  Map map;
  T *z, *upstream, *dz;

  static Gradient take(Scratch& scratch, const BackwardArguments& a) {
    const Layer& layer = a.layer;
    const int64_t channels = layer.channels, positions = layer.positions();
    Map map = {a.dz, channels * positions, positions, layer.width, 1};
    if (a.channels_last) map = {a.dz, channels * positions, 1, layer.width * channels, channels};
    T* z = take_gathered<T>(scratch, layer, a.z);
    T* upstream = take_gathered<T>(scratch, layer, a.upstream);
    return {map, z, upstream, take_gathered<T>(scratch, layer, map)};
  }
};

// dW_H += dl Z^T and dZ = sum of a dP and dl W_H + upstream, of one tile, whose rows of masks are dl and a.
template <class T, class A>
void tile_gradient(const BackwardArguments& a, int64_t n, int64_t start, const Tile<const T>& z, int64_t count,
                   const Rows<A>& rows, const Gradient<T>& gradient, A* dw) {
  const Layer& layer = a.layer;
  if (dw != nullptr) pool<T, A>(layer, rows.masks, layer.rows(), z, dw);
  if (a.dz == nullptr) return;
  Tile<const T> upstream = {};
  const bool tapped = a.upstream.data != nullptr;
  if (tapped) upstream = read_tile<T>(layer, a.upstream, n, start, count, gradient.upstream);
  const int64_t used = 2 * layer.rows() + (a.grad_mean != nullptr);
  if (gradient.dz == nullptr) {
    const Tile<const T> place = read_tile<T>(layer, gradient.map, n, start, count, nullptr);
    const Tile<T> dz = {const_cast<T*>(place.data), place.row_step, place.rows, place.columns};
    spread<T, A>(layer, rows.weights, rows.masks, used, tapped ? &upstream : nullptr, dz, a.streams);
  } else {
    const Tile<T> dz = gathered_tile(layer, gradient.dz, count);
    spread<T, A>(layer, rows.weights, rows.masks, used, tapped ? &upstream : nullptr, dz, false);
    for_each_element(layer, gradient.map, n, start, count, dz.row_step,
                     [&](int64_t to, int64_t from) { ((T*)a.dz)[to] = dz.data[from]; });
  }
}

// Calls sweep(n, split) for every item of each group in [first, last), which add up the group's share of dW_H in dw
// (null: not asked for).
template <class A, class Sweep>
void for_each_group(const BackwardArguments& a, int64_t first, int64_t last, A* dw, const Sweep& sweep) {
  const Layer& layer = a.layer;
  const int64_t rows = layer.rows(), channels = layer.channels, c_step = channel_step<A>(layer);
  for (int64_t group = first; group < last; ++group) {
    if (dw != nullptr) memset(dw, 0, rows * c_step * sizeof(A));
    const int64_t items = layer.items();
    for (int64_t item = first_of(group, a.groups, items); item < first_of(group + 1, a.groups, items); ++item)
      sweep(item / layer.splits, item % layer.splits);
    if (dw == nullptr) continue;
    for (int64_t row = 0; row < rows; ++row)
      memcpy((A*)a.dw_shares + (group * rows + row) * channels, dw + row * c_step, channels * sizeof(A));
  }
  if (a.streams) streamed();
}

}  // namespace ar_kernels::AR_TARGET
