// The backward sweep: one read of the feature map, one write of its gradient; masks are recomputed, never stored.
//
// From the gradients of x = g P, g, t and P, image by image:
//   dg_k = dx_k . P_k,  du = g (dg - sum_j g_j dg_j),  dt = du (1 - tanh^2 t),  dP_k = g_k dx_k + dt_k W_G[k]
// then tile by tile, with a = exp(l - lse):
//   dA = dP Z,  dl = a (dA - dP . P + dlse) + direct
//   dZ = sum_k a_k dP_k + sum_k dl_k W_H[k] + upstream,  dW_H = dl Z^T - rest P,  rest = sum_s a (dA - dP . P)
// rest is 0 but for roundings, which are not small where dA is large and all positions but one have no mask. A spatial
// mean is one more row: a = 1/S, dP its gradient, no dl. Bytes: |Z| read once, |dZ| written once.

#include "image.h"

namespace ar_kernels::AR_TARGET {

namespace {

// l and dA to dl and a, in place; lanes beyond `count`, up to a whole vector, become 0. Returns the tile's part of
// rest.
template <class A>
A mask_gradient(A* l, A* da, int64_t count, A shift, A center, A of_lse, const A* direct) {
  Vector<A> rest = {};
  for (int64_t i = 0; i < count; i += kLanes<A>) {
    const int left = (int)smaller(count - i, kLanes<A>);
    const Vector<A> attends = exponential<A>(load(l + i) - shift);
    store(l + i, attends * (load(da + i) - center));
    const Vector<A> centered = some(l + i, left);
    rest += centered;
    Vector<A> dl = centered + attends * of_lse;
    if (direct != nullptr) dl += some(direct + i, left);
    store(l + i, dl);
    store(da + i, attends);
  }
  for (int64_t i = count; i < padded<A>(count); ++i) l[i] = da[i] = 0;
  return sum<A>(rest);
}

template <class T>
void sweep(const BackwardArguments& a, int64_t n, int64_t begin, int64_t end, const Rows<Accumulator<T>>& rows,
           const Gradient<T>& gradient, Accumulator<T>* dw) {
  using A = Accumulator<T>;
  const Layer& layer = a.layer;
  const int64_t heads = layer.heads, s_step = position_step<A>(layer);
  const auto pooled_of = [&](int64_t k) { return (const A*)a.pooled + (n * heads + k) * layer.channels; };
  for (int64_t k = 0; k < heads; ++k) {
    rows.center[k] = dot(pooled_of(k), rows.weights + (heads + k) * channel_step<A>(layer), layer.channels);
    rows.rest[k] = 0;
  }
  for (int64_t start = begin; start < end; start += layer.tile) {
    const int64_t count = smaller(layer.tile, end - start);
    const Tile<const T> z = read_tile<T>(layer, a.z, n, start, count, gradient.z);
    project<T, A>(layer, rows.weights, 2 * heads, z, rows.masks);
    for (int64_t k = 0; k < heads; ++k) {
      const A bias = a.b == nullptr ? A(0) : ((const A*)a.b)[k];
      const A shift = ((const A*)a.lse)[n * heads + k] - bias;
      const int64_t direct = (n * heads + k) * layer.positions() + start;
      rows.rest[k] += mask_gradient(rows.masks + k * s_step, rows.masks + (heads + k) * s_step, count, shift,
                                    rows.center[k], lse_gradient<A>(a, n, k),
                                    a.grad_logits == nullptr ? nullptr : (const A*)a.grad_logits + direct);
    }
    tile_gradient<T, A>(a, n, start, z, count, rows, gradient, dw);
  }
  if (dw == nullptr) return;
  for (int64_t k = 0; k < heads; ++k)
    add_scaled(dw + k * channel_step<A>(layer), -rows.rest[k], pooled_of(k), layer.channels);
}

// Groups [first, last); with `used`, only what they need of memory.
template <class T>
void backward(const BackwardArguments& a, int64_t first, int64_t last, void* memory, int64_t* used) {
  using A = Accumulator<T>;
  const Layer& layer = a.layer;
  Scratch scratch(memory);
  const Rows<A> rows = Rows<A>::take(scratch, layer);
  A* dw = a.dw_shares == nullptr ? nullptr : scratch.take<A>(layer.heads * channel_step<A>(layer));
  const Gradient<T> gradient = Gradient<T>::take(scratch, a);
  if (used != nullptr) {
    *used = scratch.used();
    return;
  }
  rows.fill(a);
  for_each_group<A>(a, first, last, dw, [&](int64_t n, int64_t split) {
    const int64_t begin = split * layer.split_length, end = smaller(begin + layer.split_length, layer.positions());
    image_gradient<T, A>(a, n, split == 0, rows);
    if (dw != nullptr || a.dz != nullptr) sweep<T>(a, n, begin, end, rows, gradient, dw);
  });
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
