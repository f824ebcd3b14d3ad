// The forward sweep: masks, pooled features, gates and gated features in one pass over the feature map.
//
//   l = W_H Z + b_H,  A = softmax over positions of l,  P = A Z^T,  lse = log sum exp l     (online: m, d, P rescaled)
//   t_k = W_G[k] . P_k + b_G[k],  g = softmax over heads of tanh t,  x = g P
//
// A spatial mean is one more row of masks, of ones. A tile of positions stays in cache between its two products, so
// that Z comes from memory once. Bytes: |Z| read, O(N K C) written.

#include "image.h"

namespace ar_kernels::AR_TARGET {

namespace {

template <class A>
void clear(const ForwardArguments& a, const Sums<A>& sums) {
  for (int64_t k = 0; k < a.layer.heads; ++k) sums.m[k] = -A(INFINITY);
  memset(sums.d, 0, a.layer.heads * kLanes<A> * sizeof(A));
  memset(sums.p, 0, (a.layer.heads + 1) * channel_step<A>(a.layer) * sizeof(A));
}

// Logits without bias to exp(l - m) of the largest logit so far, which d has the sums of, one for each lane; returns
// what the sums so far shrink by. Lanes beyond `count`, up to a whole vector, become 0.
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
  A largest = *m, shrink = 1;
  if (any_above<A>(top, *m)) {
    for (int lane = 0; lane < kLanes<A>; ++lane) largest = top[lane] > largest ? top[lane] : largest;
    shrink = exponential(*m - origin(largest));
    *m = largest;
  }
  const A start = origin(largest);
  Vector<A> total = load(d) * shrink;
  for (int64_t i = 0; i <= last; i += kLanes<A>) {
    const Vector<A> p = exponential<A>(load(row + i) - start);
    store(row + i, p);
    total += p;
  }
  store(d, total);
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
      const A shrink = softmax_step(masks + k * s_step, count, bias, logits, sums.m + k, sums.d + k * kLanes<A>);
      if (start > begin && shrink != 1) scale(sums.p + k * c_step, c_step, shrink);
    }
    pool<T, A>(layer, masks, heads + (a.mean != nullptr), z, sums.p);
  }
}

// What an image's sums come to, where the user looks for it.
template <class T>
void finish(const ForwardArguments& a, int64_t n, const Sums<Accumulator<T>>& sums) {
  using A = Accumulator<T>;
  const int64_t heads = a.layer.heads, c_step = channel_step<A>(a.layer);
  for (int64_t k = 0; k < heads; ++k) {
    const A d = sum<A>(load(sums.d + k * kLanes<A>));
    scale(sums.p + k * c_step, c_step, 1 / d);
    ((A*)a.lse)[n * heads + k] = origin(sums.m[k]) + logarithm(d);
  }
  store_pooled<T>(a, n, sums.p);
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
    if (layer.splits > 1) sums = Sums<A>::part(a, item);
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
    const Sums<A> sums = Sums<A>::part(a, n * layer.splits);
    for (int64_t split = 1; split < layer.splits; ++split) {
      const Sums<A> part = Sums<A>::part(a, n * layer.splits + split);
      for (int64_t k = 0; k < rows; ++k) {
        A mine = 1, theirs = 1;
        if (k < heads) {
          const A largest = part.m[k] > sums.m[k] ? part.m[k] : sums.m[k];
          mine = exponential(sums.m[k] - origin(largest));
          theirs = exponential(part.m[k] - origin(largest));
          sums.m[k] = largest;
          A* d = sums.d + k * kLanes<A>;
          store(d, load(d) * mine + load(part.d + k * kLanes<A>) * theirs);
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
