// Forward of 3x3 heads: two sweeps over the feature map, the second from cache where an image fits there.
//
//   l = W_H * Z + b_H    (nine products of each head with every position, each moved by its tap)
//   A = softmax over positions of l,  P[k][tap] = sum over s of A[k][s - tap] Z[s]
// and gates and gated features as of 1x1 heads. Bytes: |Z| read once or twice, O(N K (9 C + S)) written.

#include "image.h"
#include "taps.h"

namespace ar_kernels::AR_TARGET {

namespace {

// A of image n in its frame, and lse.
template <class A>
void make_masks(const ForwardArguments& a, int64_t n) {
  const Layer& layer = a.layer;
  for (int64_t k = 0; k < layer.heads; ++k) {
    const A* logits = (const A*)a.logits + (n * layer.heads + k) * layer.positions();
    A* frame = (A*)a.masks + (n * layer.heads + k) * frame_size(layer);
    A largest = -A(INFINITY);
    for (int64_t s = 0; s < layer.positions(); ++s) largest = logits[s] > largest ? logits[s] : largest;
    const A start = origin(largest);
    Vector<A> total = {};
    clear_frame(layer, frame);
    for_each_framed<A>(layer, [&](int64_t from, int64_t to, int count) {
      Vector<A> p = exponential<A>(some(logits + from, count) - start);
      for (int lane = count; lane < kLanes<A>; ++lane) p[lane] = 0;
      put(frame + to, p, count);
      total += p;
    });
    const A d = sum<A>(total), factor = d == A(INFINITY) ? A(NAN) : 1 / d;
    for_each_framed<A>(
        layer, [&](int64_t, int64_t at, int count) { put(frame + at, some(frame + at, count) * factor, count); });
    ((A*)a.lse)[n * layer.heads + k] = start + logarithm(d);
  }
}

// The splits of each image, in order, into the first.
template <class T>
void merge(const ForwardArguments& a, int64_t n) {
  using A = Accumulator<T>;
  const Layer& layer = a.layer;
  const Sums<A> sums = Sums<A>::part(a, n * layer.splits);
  for (int64_t split = 1; split < layer.splits; ++split)
    add(sums.p, Sums<A>::part(a, n * layer.splits + split).p, (layer.rows() + 1) * channel_step<A>(layer));
  store_pooled<T>(a, n, sums.p);
}

// Items [first, last) of a stage, images in kMasks and kMerge; with `used`, only what they need of memory.
template <class T>
void forward(const ForwardArguments& a, Stage stage, int64_t first, int64_t last, void* memory, int64_t* used) {
  using A = Accumulator<T>;
  const Layer& layer = a.layer;
  const int64_t rows = layer.rows(), s_step = position_step<A>(layer), c_step = channel_step<A>(layer);
  Scratch scratch(memory);
  A* weights = scratch.take<A>(rows * c_step);
  A* masks = scratch.take<A>((rows + 1) * s_step);
  T* gathered = take_gathered<T>(scratch, layer, a.z);
  Sums<A> sums = Sums<A>::take(scratch, a);
  if (used != nullptr) {
    *used = scratch.used();
    return;
  }
  const bool all = stage == Stage::kAll;
  if (all || stage == Stage::kLogits) copy_rows(layer, (const A*)a.w, rows, weights);
  for (int64_t s = 0; s < s_step; ++s) masks[rows * s_step + s] = 1;
  for (int64_t item = first; item < last; ++item) {
    if (stage == Stage::kMasks) make_masks<A>(a, item);
    if (stage == Stage::kMerge) merge<T>(a, item);
    const int64_t n = item / layer.splits;
    const Lines lines = lines_of(layer, item % layer.splits);
    if (all || stage == Stage::kLogits) {
      A* logits = (A*)a.logits + n * layer.heads * layer.positions();
      for (int64_t k = 0; k < layer.heads; ++k) {
        const A bias = a.b == nullptr ? A(0) : ((const A*)a.b)[k];
        A* row = logits + k * layer.positions();
        for (int64_t s = lines.first * layer.width; s < lines.last * layer.width; ++s) row[s] = bias;
      }
      add_taps<T, A>(layer, a.z, n, lines.first, lines.last, weights, masks, gathered, logits);
    }
    if (all) make_masks<A>(a, n);
    if (all || stage == Stage::kMaps) {
      if (!all) sums = Sums<A>::part(a, item);
      memset(sums.p, 0, (rows + 1) * c_step * sizeof(A));
      const A* frames = (const A*)a.masks + n * layer.heads * frame_size(layer);
      const int64_t end = lines.last * layer.width;
      for (int64_t start = lines.first * layer.width; start < end; start += layer.tile) {
        const int64_t count = smaller(layer.tile, end - start);
        shift_rows(layer, frames, start, count, masks);
        const Tile<const T> z = read_tile<T>(layer, a.z, n, start, count, gathered);
        pool<T, A>(layer, masks, rows + (a.mean != nullptr), z, sums.p);
      }
    }
    if (all) store_pooled<T>(a, n, sums.p);
  }
}

void run(const ForwardArguments& a, Stage stage, int64_t begin, int64_t end, void* memory, int64_t* used) {
  switch (a.layer.kind) {
    case Kind::kHalf: return forward<Half>(a, stage, begin, end, memory, used);
    case Kind::kBFloat16: return forward<BFloat16>(a, stage, begin, end, memory, used);
    case Kind::kFloat: return forward<float>(a, stage, begin, end, memory, used);
    case Kind::kDouble: return forward<double>(a, stage, begin, end, memory, used);
  }
}

}  // namespace

int64_t forward3x3_scratch(const ForwardArguments& a) {
  int64_t used = 0;
  run(a, Stage::kAll, 0, 0, nullptr, &used);
  return used;
}

void attend3x3_forward(const ForwardArguments& a, Stage stage, int64_t begin, int64_t end, void* memory) {
  run(a, stage, begin, end, memory, nullptr);
}

}  // namespace ar_kernels::AR_TARGET
