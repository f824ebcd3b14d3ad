// The forward sweep: masks, pooled features, gates and gated features in one pass over the feature map.
//
//   l = W_H Z + b_H,  A = softmax over positions of l,  P = A Z^T,  lse = log sum exp l     (online: m, d, P rescaled)
//   t_k = W_G[k] . P_k + b_G[k],  g = softmax over heads of tanh t,  x = g P
//
// A spatial mean is one more row of masks, of ones. A tile of positions stays in cache between its two products, so
// that Z comes from memory once. Bytes: |Z| read, O(N K C) written.

#include "maps.h"

namespace ar_kernels::AR_TARGET {

namespace {

// Running sums of an image, or of a split of it.
template <class A>
struct Sums {
  A* m;  // [K] largest logit
  A* d;  // [K] sum of exp(l - m)
  A* p;  // [K + mean, channel_step] sum of exp(l - m) Z; of the mean's row, sum of Z

  static Sums take(Scratch& scratch, const ForwardArguments& a) {
    const int64_t heads = a.layer.heads;
    A* m = scratch.take<A>(heads);
    A* d = scratch.take<A>(heads);
    return {m, d, scratch.take<A>((heads + 1) * channel_step<A>(a.layer))};
  }
};

template <class A>
void clear(const ForwardArguments& a, const Sums<A>& sums) {
  for (int64_t k = 0; k < a.layer.heads; ++k) {
    sums.m[k] = -A(INFINITY);
    sums.d[k] = 0;
  }
  memset(sums.p, 0, (a.layer.heads + 1) * channel_step<A>(a.layer) * sizeof(A));
}

template <class A>
void scale(A* row, int64_t size, A factor) {  // size in whole vectors
  for (int64_t i = 0; i < size; i += kLanes<A>) store(row + i, load(row + i) * factor);
}

// What exponents are counted from: the largest logit, or 0 where that is infinite and nothing could be counted.
template <class A>
A origin(A m) {
  return m == A(INFINITY) || m == -A(INFINITY) ? A(0) : m;
}

// Logits without bias to exp(l - m) of the largest logit so far; returns what the sums so far shrink by. Lanes beyond
// `count`, up to a whole vector, become 0.
template <class A>
A softmax_step(A* row, int64_t count, A bias, A* logits, A* m, A* d) {
  const int64_t last = count - (count - 1) % kLanes<A> - 1;
  Vector<A> top = all<A>(*m);
  for (int64_t i = 0; i <= last; i += kLanes<A>) {
    Vector<A> l = load(row + i) + bias;
    for (int64_t lane = count - i; lane < kLanes<A>; ++lane) l[lane] = -A(INFINITY);
    store(row + i, l);
    top = maximum<A>(top, l);
  }
  if (logits != nullptr) memcpy(logits, row, count * sizeof(A));
  A largest = top[0];
  for (int lane = 1; lane < kLanes<A>; ++lane) largest = top[lane] > largest ? top[lane] : largest;
  const A start = origin(largest), shrink = exponential(*m - start);
  Vector<A> total = {};
  for (int64_t i = 0; i <= last; i += kLanes<A>) {
    const Vector<A> p = exponential<A>(load(row + i) - start);
    store(row + i, p);
    total += p;
  }
  *m = largest;
  *d = *d * shrink + sum<A>(total);
  return shrink;
}

template <class T>
void sweep(const ForwardArguments& a, int64_t n, int64_t begin, int64_t end, const Accumulator<T>* weights,
           Accumulator<T>* masks, T* gathered, const Sums<Accumulator<T>>& sums) {
  using A = Accumulator<T>;
  const Layer& layer = a.layer;
  const int64_t heads = layer.heads, c_step = channel_step<A>(layer), s_step = position_step<A>(layer);
  clear(a, sums);
  for (int64_t start = begin; start < end; start += layer.tile) {
    const int64_t count = smaller(layer.tile, end - start);
    const Tile<const T> z = read_tile<T>(layer, a.z, n, start, count, gathered);
    project<T, A>(layer, weights, heads, z, masks);
    for (int64_t k = 0; k < heads; ++k) {
      A* logits = a.logits == nullptr ? nullptr : (A*)a.logits + (n * heads + k) * layer.positions() + start;
      const A bias = a.b == nullptr ? A(0) : ((const A*)a.b)[k];
      const A shrink = softmax_step(masks + k * s_step, count, bias, logits, sums.m + k, sums.d + k);
      if (start > begin && shrink != 1) scale(sums.p + k * c_step, c_step, shrink);
    }
    pool<T, A>(layer, masks, heads + (a.mean != nullptr), z, sums.p);
  }
}

// What an image's sums come to, where the user looks for it.
template <class T>
void finish(const ForwardArguments& a, int64_t n, const Sums<Accumulator<T>>& sums) {
  using A = Accumulator<T>;
  const Layer& layer = a.layer;
  const int64_t channels = layer.channels, heads = layer.heads, gated = layer.gated, c_step = channel_step<A>(layer);
  A* pooled = (A*)a.pooled + n * heads * channels;
  for (int64_t k = 0; k < heads; ++k) {
    scale(sums.p + k * c_step, c_step, 1 / sums.d[k]);
    memcpy(pooled + k * channels, sums.p + k * c_step, channels * sizeof(A));
    ((A*)a.lse)[n * heads + k] = origin(sums.m[k]) + logarithm(sums.d[k]);
  }
  if (a.mean != nullptr) {
    A* row = sums.p + heads * c_step;
    scale(row, c_step, 1 / A(layer.positions()));
    memcpy((A*)a.mean + n * channels, row, channels * sizeof(A));
  }
  if (gated == 0) return;
  A* scores = (A*)a.scores + n * heads;
  for (int64_t k = 0; k < heads; ++k) {
    scores[k] = 0;
    if (a.score_w == nullptr) continue;
    const A* weights = (const A*)a.score_w + k * channels;
    const A* p = sums.p + k * c_step;
    Vector<A> products = {};
    int64_t c = 0;
    for (; c + kLanes<A> <= channels; c += kLanes<A>) products += load(weights + c) * load(p + c);
    if (c < channels) products += load(weights + c, (int)(channels - c)) * load(p + c, (int)(channels - c));
    scores[k] = sum<A>(products) + (a.score_b == nullptr ? A(0) : ((const A*)a.score_b)[k]);
  }
  A* gates = (A*)a.gates + n * gated;
  A total = 0;  // no maximum is needed, tanh is bounded
  for (int64_t k = 0; k < gated; ++k) total += gates[k] = exponential(hyperbolic_tangent(scores[k]));
  for (int64_t k = 0; k < gated; ++k) {
    gates[k] /= total;
    T* features = (T*)a.features + (n * gated + k) * channels;
    const A* p = sums.p + k * c_step;
    int64_t c = 0;
    for (; c + kLanes<A> <= channels; c += kLanes<A>) store(features + c, load(p + c) * gates[k]);
    if (c < channels) store(features + c, load(p + c) * gates[k], (int)(channels - c));
  }
}

template <class A>
Sums<A> part_of(const ForwardArguments& a, int64_t item) {
  Scratch size(nullptr);
  Sums<A>::take(size, a);
  Scratch part((char*)a.parts + item * size.used());
  return Sums<A>::take(part, a);
}

// Items [first, last); with `used`, only what they need of memory.
template <class T>
void forward(const ForwardArguments& a, int64_t first, int64_t last, void* memory, int64_t* used) {
  using A = Accumulator<T>;
  const Layer& layer = a.layer;
  const int64_t heads = layer.heads, s_step = position_step<A>(layer);
  Scratch scratch(memory);
  A* weights = scratch.take<A>(heads * channel_step<A>(layer));
  A* masks = scratch.take<A>((heads + 1) * s_step);
  T* gathered = lies_in_rows(layer, a.z) ? nullptr : scratch.take<T>(gathered_size<T>(layer));
  Sums<A> sums = Sums<A>::take(scratch, a);
  if (used != nullptr) {
    *used = scratch.used();
    return;
  }
  copy_rows(layer, (const A*)a.w, heads, weights);
  for (int64_t s = 0; s < s_step; ++s) masks[heads * s_step + s] = 1;
  for (int64_t item = first; item < last; ++item) {
    const int64_t n = item / layer.splits, begin = item % layer.splits * layer.split_length;
    if (layer.splits > 1) sums = part_of<A>(a, item);
    sweep<T>(a, n, begin, smaller(begin + layer.split_length, layer.positions()), weights, masks, gathered, sums);
    if (layer.splits == 1) finish<T>(a, n, sums);
  }
}

void run(const ForwardArguments& a, int64_t begin, int64_t end, void* memory, int64_t* used) {
  switch (a.layer.kind) {
    case Kind::kHalf: return forward<Half>(a, begin, end, memory, used);
    case Kind::kBFloat16: return forward<BFloat16>(a, begin, end, memory, used);
    case Kind::kFloat: return forward<float>(a, begin, end, memory, used);
    case Kind::kDouble: return forward<double>(a, begin, end, memory, used);
  }
}

// The splits of each image, in order, into the first.
template <class T>
void merge(const ForwardArguments& a, int64_t first, int64_t last) {
  using A = Accumulator<T>;
  const Layer& layer = a.layer;
  const int64_t heads = layer.heads, c_step = channel_step<A>(layer), rows = heads + (a.mean != nullptr);
  for (int64_t n = first; n < last; ++n) {
    const Sums<A> sums = part_of<A>(a, n * layer.splits);
    for (int64_t split = 1; split < layer.splits; ++split) {
      const Sums<A> part = part_of<A>(a, n * layer.splits + split);
      for (int64_t k = 0; k < rows; ++k) {
        A mine = 1, theirs = 1;
        if (k < heads) {
          const A largest = part.m[k] > sums.m[k] ? part.m[k] : sums.m[k];
          mine = exponential(sums.m[k] - origin(largest));
          theirs = exponential(part.m[k] - origin(largest));
          sums.m[k] = largest;
          sums.d[k] = sums.d[k] * mine + part.d[k] * theirs;
        }
        for (int64_t c = k * c_step; c < (k + 1) * c_step; c += kLanes<A>)
          store(sums.p + c, load(sums.p + c) * mine + load(part.p + c) * theirs);
      }
    }
    finish<T>(a, n, sums);
  }
}

}  // namespace

int64_t forward_scratch(const ForwardArguments& a) {
  int64_t used = 0;
  run(a, 0, 0, nullptr, &used);
  return used;
}

void attend_forward(const ForwardArguments& a, int64_t begin, int64_t end, void* memory) {
  run(a, begin, end, memory, nullptr);
}

int64_t forward_part(const ForwardArguments& a) {
  Scratch counter(nullptr);
  if (a.layer.kind == Kind::kDouble)
    Sums<double>::take(counter, a);
  else
    Sums<float>::take(counter, a);
  return counter.used();
}

void merge_splits(const ForwardArguments& a, int64_t begin, int64_t end) {
  switch (a.layer.kind) {
    case Kind::kHalf: return merge<Half>(a, begin, end);
    case Kind::kBFloat16: return merge<BFloat16>(a, begin, end);
    case Kind::kFloat: return merge<float>(a, begin, end);
    case Kind::kDouble: return merge<double>(a, begin, end);
  }
}

}  // namespace ar_kernels::AR_TARGET
