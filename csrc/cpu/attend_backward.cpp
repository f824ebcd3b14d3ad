// The backward sweep: one read of the feature map, one write of its gradient; masks are recomputed, never stored.
//
// From the gradients of x = g P, g, t and P, image by image:
//   dg_k = dx_k . P_k,  du = g (dg - sum_j g_j dg_j),  dt = du (1 - tanh^2 t),  dP_k = g_k dx_k + dt_k W_G[k]
// then tile by tile, with a = exp(l - lse):
//   dA = dP Z,  dl = a (dA - delta) + direct,  delta_k = dP_k . P_k - dlse_k
//   dZ = sum_k a_k dP_k + sum_k dl_k W_H[k] + upstream,  dW_H = dl Z^T
// A spatial mean is one more row: a = 1/S, dP its gradient, no dl. Bytes: |Z| read once, |dZ| written once.

#include "maps.h"

namespace ar_kernels::AR_TARGET {

namespace {

// The rows that a tile meets, weights by channels and masks by positions: K of W_H beside dl, K of dP beside a, one of
// the mean's gradient beside 1/S.
template <class A>
struct Rows {
  A* weights;
  A* masks;
  A* center;  // [K] delta
  A* dt;      // [K]
  A* dg;      // [K]
};

template <class A>
Rows<A> take_rows(Scratch& scratch, const Layer& layer) {
  const int64_t rows = 2 * layer.heads + 1;
  A* weights = scratch.take<A>(rows * channel_step<A>(layer));
  A* masks = scratch.take<A>(rows * position_step<A>(layer));
  A* center = scratch.take<A>(layer.heads);
  A* dt = scratch.take<A>(layer.heads);
  return {weights, masks, center, dt, scratch.take<A>(layer.heads)};
}

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

// dt and dg of one image: what reaches the gates.
template <class T, class A>
void gate_gradient(const BackwardArguments& a, int64_t n, const Rows<A>& rows) {
  const int64_t heads = a.layer.heads, gated = a.layer.gated, channels = a.layer.channels;
  for (int64_t k = 0; k < heads; ++k) rows.dt[k] = 0;
  if (a.score_w == nullptr || gated == 0) return;
  const A* gates = (const A*)a.gates + n * gated;
  A common = 0;
  for (int64_t k = 0; k < gated; ++k) {
    A dg = a.grad_gates == nullptr ? A(0) : ((const A*)a.grad_gates)[n * gated + k];
    if (a.grad_features != nullptr) {
      const T* dx = (const T*)a.grad_features + (n * gated + k) * channels;
      dg += dot(dx, (const A*)a.pooled + (n * heads + k) * channels, channels);
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

// dP, the mean's gradient and delta of one image.
template <class T, class A>
void pooled_gradient(const BackwardArguments& a, int64_t n, const Rows<A>& rows) {
  const int64_t heads = a.layer.heads, gated = a.layer.gated, channels = a.layer.channels;
  const int64_t c_step = channel_step<A>(a.layer);
  memset(rows.weights + heads * c_step, 0, (heads + 1) * c_step * sizeof(A));
  for (int64_t k = 0; k < heads; ++k) {
    A* dp = rows.weights + (heads + k) * c_step;
    if (a.grad_pooled != nullptr) add_scaled(dp, A(1), (const A*)a.grad_pooled + (n * heads + k) * channels, channels);
    if (a.score_w != nullptr && rows.dt[k] != 0)
      add_scaled(dp, rows.dt[k], (const A*)a.score_w + k * channels, channels);
    if (a.grad_features != nullptr && k < gated) {
      const A gate = ((const A*)a.gates)[n * gated + k];
      add_scaled(dp, gate, (const T*)a.grad_features + (n * gated + k) * channels, channels);
    }
    rows.center[k] = dot((const A*)a.pooled + (n * heads + k) * channels, dp, channels);
    if (a.grad_lse != nullptr) rows.center[k] -= ((const A*)a.grad_lse)[n * heads + k];
  }
  if (a.grad_mean != nullptr)
    add_scaled(rows.weights + 2 * heads * c_step, A(1), (const A*)a.grad_mean + n * channels, channels);
}

// l and dA to dl and a, in place; lanes beyond `count`, up to a whole vector, become 0.
template <class A>
void mask_gradient(A* l, A* da, int64_t count, A shift, A center, const A* direct) {
  for (int64_t i = 0; i < count; i += kLanes<A>) {
    const Vector<A> attends = exponential<A>(load(l + i) - shift);
    Vector<A> dl = attends * (load(da + i) - center);
    const int64_t left = count - i;
    if (direct != nullptr) dl += left >= kLanes<A> ? load(direct + i) : load(direct + i, (int)left);
    store(l + i, dl);
    store(da + i, attends);
  }
  for (int64_t i = count; i < padded<A>(count); ++i) l[i] = da[i] = 0;
}

// Where the feature map, upstream and dZ do not lie in the sweep's rows, their tiles pass through here; else null.
template <class T>
struct Gathered {
  T *z, *upstream, *dz;
};

template <class T>
void sweep(const BackwardArguments& a, int64_t n, int64_t begin, int64_t end, const Rows<Accumulator<T>>& rows,
           const Map& dz_map, const Gathered<T>& gathered, Accumulator<T>* dw) {
  using A = Accumulator<T>;
  const Layer& layer = a.layer;
  const int64_t heads = layer.heads, s_step = position_step<A>(layer);
  for (int64_t start = begin; start < end; start += layer.tile) {
    const int64_t count = smaller(layer.tile, end - start);
    const Tile<const T> z = read_tile<T>(layer, a.z, n, start, count, gathered.z);
    project<T, A>(layer, rows.weights, 2 * heads, z, rows.masks);
    for (int64_t k = 0; k < heads; ++k) {
      const A bias = a.b == nullptr ? A(0) : ((const A*)a.b)[k];
      const A shift = ((const A*)a.lse)[n * heads + k] - bias;
      const int64_t direct = (n * heads + k) * layer.positions() + start;
      mask_gradient(rows.masks + k * s_step, rows.masks + (heads + k) * s_step, count, shift, rows.center[k],
                    a.grad_logits == nullptr ? nullptr : (const A*)a.grad_logits + direct);
    }
    if (dw != nullptr) pool<T, A>(layer, rows.masks, heads, z, dw);
    if (a.dz == nullptr) continue;
    Tile<const T> upstream = {};
    const bool tapped = a.upstream.data != nullptr;
    if (tapped) upstream = read_tile<T>(layer, a.upstream, n, start, count, gathered.upstream);
    const int64_t used = 2 * heads + (a.grad_mean != nullptr);
    if (gathered.dz == nullptr) {
      const Tile<const T> place = read_tile<T>(layer, dz_map, n, start, count, nullptr);
      const Tile<T> dz = {const_cast<T*>(place.data), place.row_step, place.rows, place.columns};
      spread<T, A>(layer, rows.weights, rows.masks, used, tapped ? &upstream : nullptr, dz, a.streams);
    } else {
      const Tile<T> dz = gathered_tile(layer, gathered.dz, count);
      spread<T, A>(layer, rows.weights, rows.masks, used, tapped ? &upstream : nullptr, dz, false);
      for_each_element(layer, dz_map, n, start, count, dz.row_step,
                       [&](int64_t to, int64_t from) { ((T*)a.dz)[to] = dz.data[from]; });
    }
  }
}

template <class T>
T* take_gathered(Scratch& scratch, const Layer& layer, const Map& map) {
  return map.data == nullptr || lies_in_rows(layer, map) ? nullptr : scratch.take<T>(gathered_size<T>(layer));
}

// Groups [first, last); with `used`, only what they need of memory.
template <class T>
void backward(const BackwardArguments& a, int64_t first, int64_t last, void* memory, int64_t* used) {
  using A = Accumulator<T>;
  const Layer& layer = a.layer;
  const int64_t heads = layer.heads, channels = layer.channels, size = heads * channels;
  const int64_t c_step = channel_step<A>(layer), s_step = position_step<A>(layer);
  Map dz_map = {a.dz, channels * layer.positions(), layer.positions(), layer.width, 1};
  if (a.channels_last) dz_map = {a.dz, channels * layer.positions(), 1, layer.width * channels, channels};

  Scratch scratch(memory);
  const Rows<A> rows = take_rows<A>(scratch, layer);
  A* dw = a.dw_shares == nullptr ? nullptr : scratch.take<A>(heads * c_step);
  const Gathered<T> gathered = {take_gathered<T>(scratch, layer, a.z), take_gathered<T>(scratch, layer, a.upstream),
                                take_gathered<T>(scratch, layer, dz_map)};
  if (used != nullptr) {
    *used = scratch.used();
    return;
  }
  copy_rows(layer, (const A*)a.w, heads, rows.weights);
  for (int64_t s = 0; s < s_step; ++s) rows.masks[2 * heads * s_step + s] = 1 / A(layer.positions());
  for (int64_t group = first; group < last; ++group) {
    if (dw != nullptr) memset(dw, 0, heads * c_step * sizeof(A));
    const int64_t items = layer.items();
    for (int64_t item = items * group / a.groups; item < items * (group + 1) / a.groups; ++item) {
      const int64_t n = item / layer.splits, begin = item % layer.splits * layer.split_length;
      gate_gradient<T, A>(a, n, rows);
      if (a.dt != nullptr && begin == 0) memcpy((A*)a.dt + n * heads, rows.dt, heads * sizeof(A));
      if (dw == nullptr && a.dz == nullptr) continue;
      pooled_gradient<T, A>(a, n, rows);
      const int64_t end = smaller(begin + layer.split_length, layer.positions());
      sweep<T>(a, n, begin, end, rows, dz_map, gathered, dw);
    }
    if (dw == nullptr) continue;
    for (int64_t k = 0; k < heads; ++k)
      memcpy((A*)a.dw_shares + group * size + k * channels, dw + k * c_step, channels * sizeof(A));
  }
  if (a.streams) streamed();
}

void run(const BackwardArguments& a, int64_t begin, int64_t end, void* memory, int64_t* used) {
  switch (a.layer.kind) {
    case Kind::kHalf: return backward<Half>(a, begin, end, memory, used);
    case Kind::kBFloat16: return backward<BFloat16>(a, begin, end, memory, used);
    case Kind::kFloat: return backward<float>(a, begin, end, memory, used);
    case Kind::kDouble: return backward<double>(a, begin, end, memory, used);
  }
}

template <class A>
void sum_rows_of_heads(const A* rows, const A* weights, int64_t count, int64_t heads, int64_t channels, A* out,
                       int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) out[i] = 0;
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t i = begin; i < end;) {
      const int64_t k = i / channels, stop = smaller(end, (k + 1) * channels);
      const A weight = weights == nullptr ? A(1) : weights[r * heads + k];
      for (; i < stop; ++i) out[i] += weight * rows[r * heads * channels + i];
    }
  }
}

}  // namespace

int64_t backward_scratch(const BackwardArguments& a) {
  int64_t used = 0;
  run(a, 0, 0, nullptr, &used);
  return used;
}

void attend_backward(const BackwardArguments& a, int64_t begin, int64_t end, void* memory) {
  run(a, begin, end, memory, nullptr);
}

void weight_sums(Kind kind, const void* rows, const void* weights, int64_t count, int64_t heads, int64_t channels,
                 void* out, int64_t begin, int64_t end) {
  if (kind == Kind::kDouble)
    sum_rows_of_heads((const double*)rows, (const double*)weights, count, heads, channels, (double*)out, begin, end);
  else
    sum_rows_of_heads((const float*)rows, (const float*)weights, count, heads, channels, (float*)out, begin, end);
}

}  // namespace ar_kernels::AR_TARGET
