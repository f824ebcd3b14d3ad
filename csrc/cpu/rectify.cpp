// The rectified output: D+1 hypotheses h_i [L] of each image, mixed by global gates c made of its scores s.
//
//   c = softmax(s), or sigmoid(s) / (1e-6 + sum sigmoid(s)), or 1/(D+1);  q_i = h_i - lse(h_i)
//   logit: y = sum_i c_i h_i      log: y = sum_i c_i q_i      prob: y = log sum_i c_i exp q_i
// and back, from g = dy:
//   logit: dh_i = c_i g                                       dc_i = g . h_i
//   log:   dh_i = c_i (g - exp(q_i) sum g)                    dc_i = g . q_i
//   prob:  dh_i = r_i g - exp(q_i) (r_i . g)                  c_i dc_i = r_i . g,   r_i = exp(log c_i + q_i - y) <= 1
// ds_i = c_i dc_i - c_i sum c dc for softmax gates, 1 - sigmoid(s_i) times that for sigmoids.

#include "rectify.h"

#include "simd.h"

namespace ar_kernels::AR_TARGET {

namespace {

// Calls visit(offset, count) for every vector of a row, the last one perhaps in part.
template <class A, class Visit>
void for_each_vector(int64_t size, const Visit& visit) {
  for (int64_t i = 0; i < size; i += kLanes<A>) visit(i, size - i < kLanes<A> ? (int)(size - i) : kLanes<A>);
}

// The first `count` lanes, and `other` in those beyond.
template <class A>
Vector<A> kept(Vector<A> value, int count, A other) {
  for (int lane = count; lane < kLanes<A>; ++lane) value[lane] = other;
  return value;
}

template <class T>
Accumulator<T> log_sum_exp(const T* row, int64_t size) {
  using A = Accumulator<T>;
  Vector<A> top = all<A>(-A(INFINITY)), total = {};
  for_each_vector<A>(
      size, [&](int64_t i, int count) { top = maximum<A>(kept<A>(some(row + i, count), count, -A(INFINITY)), top); });
  A largest = top[0];
  for (int lane = 1; lane < kLanes<A>; ++lane) largest = top[lane] > largest ? top[lane] : largest;
  if (largest - largest != 0) largest = 0;  // infinite, as the sum will be
  for_each_vector<A>(size, [&](int64_t i, int count) {
    total += kept<A>(exponential<A>(some(row + i, count) - largest), count, A(0));
  });
  const A lse = largest + logarithm(sum<A>(total));
  return lse - lse == 0 ? lse : A(NAN);  // infinite: there is no softmax
}

// The gates of one image and their logarithms, finite where a gate is too small for its type.
template <class A>
void make_gates(const A* scores, int64_t size, Gating gating, A* gates, A* logs) {
  A total = gating == Gating::kSigmoid ? A(1e-6) : A(0), largest = -A(INFINITY);
  for (int64_t i = 0; i < size; ++i) largest = scores[i] > largest ? scores[i] : largest;
  for (int64_t i = 0; i < size; ++i) {
    const A s = scores[i];
    if (gating == Gating::kSoftmax) logs[i] = s - largest;
    if (gating == Gating::kSigmoid) logs[i] = (s > 0 ? A(0) : s) - logarithm(1 + exponential(s > 0 ? -s : s));
    if (gating == Gating::kEqual) logs[i] = 0;
    gates[i] = gating == Gating::kSigmoid ? 1 / (1 + exponential(-s)) : exponential(logs[i]);
    total += gates[i];
  }
  const A log_total = logarithm(total);
  for (int64_t i = 0; i < size; ++i) gates[i] /= total, logs[i] -= log_total;
}

template <class T>
void forward(const RectifyArguments& a, int64_t begin, int64_t end, void* memory) {
  using A = Accumulator<T>;
  const int64_t count = a.hypotheses, labels = a.labels;
  A *gates = (A*)memory, *logs = gates + count;
  for (int64_t n = begin; n < end; ++n) {
    make_gates((const A*)a.scores + n * count, count, a.gating, gates, logs);
    const T* h = (const T*)a.h + n * count * labels;
    A* lse = a.lse == nullptr ? nullptr : (A*)a.lse + n * count;
    for (int64_t i = 0; lse != nullptr && i < count; ++i) lse[i] = log_sum_exp(h + i * labels, labels);
    for_each_vector<A>(labels, [&](int64_t l, int lanes) {
      Vector<A> top = all<A>(-A(INFINITY)), sums = {};
      if (a.mix == Mix::kProb) {
        for (int64_t i = 0; i < count; ++i) top = maximum<A>(some(h + i * labels + l, lanes) - lse[i] + logs[i], top);
        const Vector<A> lowest = all<A>(sizeof(A) == 8 ? A(-1e300) : A(-1e38));
        top = top < lowest ? lowest : top;  // where no hypothesis allows the label: exp(-inf) = 0, and log 0
      }
      for (int64_t i = 0; i < count; ++i) {
        Vector<A> value = some(h + i * labels + l, lanes);
        if (a.mix != Mix::kLogit) value -= lse[i];
        sums += a.mix == Mix::kProb ? exponential<A>(value + logs[i] - top) : gates[i] * value;
      }
      if (a.mix == Mix::kProb) {
        for (int lane = 0; lane < kLanes<A>; ++lane) sums[lane] = logarithm(sums[lane]) + top[lane];
      }
      put((A*)a.output + n * labels + l, sums, lanes);
    });
  }
}

template <class T>
void backward(const RectifyArguments& a, int64_t begin, int64_t end, void* memory) {
  using A = Accumulator<T>;
  const int64_t count = a.hypotheses, labels = a.labels;
  A *gates = (A*)memory, *logs = gates + count, *dgates = logs + count;  // dgates: c_i dc_i
  for (int64_t n = begin; n < end; ++n) {
    const A* scores = (const A*)a.scores + n * count;
    make_gates(scores, count, a.gating, gates, logs);
    const A *grad = (const A*)a.grad + n * labels, *y = (const A*)a.output + n * labels;
    // r_i g of one vector of labels, or c_i g
    const auto weighted = [&](Vector<A> q, int64_t i, int64_t l, int lanes) {
      const Vector<A> g = some(grad + l, lanes);
      if (a.mix != Mix::kProb) return gates[i] * g;
      const Vector<A> mixed = some(y + l, lanes);
      const Vector<A> r = exponential<A>(q + logs[i] - mixed);
      return mixed == all<A>(-A(INFINITY)) ? Vector<A>{} : r * g;
    };
    for (int64_t i = 0; i < count; ++i) {
      const T* h = (const T*)a.h + (n * count + i) * labels;
      T* dh = (T*)a.dh + (i * a.images + n) * labels;
      const A lse = a.mix == Mix::kLogit ? A(0) : ((const A*)a.lse)[n * count + i];
      Vector<A> shared = {}, dgate = {};
      for_each_vector<A>(labels, [&](int64_t l, int lanes) {
        const Vector<A> q = some(h + l, lanes) - lse, rg = weighted(q, i, l, lanes);
        shared += kept<A>(rg, lanes, A(0));
        dgate += kept<A>(a.mix == Mix::kProb ? rg : rg * q, lanes, A(0));
      });
      const A common = sum<A>(shared);
      dgates[i] = sum<A>(dgate);
      for_each_vector<A>(labels, [&](int64_t l, int lanes) {
        const Vector<A> q = some(h + l, lanes) - lse;
        Vector<A> value = weighted(q, i, l, lanes);
        if (a.mix != Mix::kLogit) value -= exponential<A>(q) * common;
        put(dh + l, value, lanes);
      });
    }
    A mean = 0;
    for (int64_t i = 0; i < count; ++i) mean += dgates[i];
    for (int64_t i = 0; i < count; ++i) {
      A ds = dgates[i] - gates[i] * mean;
      if (a.gating == Gating::kSigmoid) ds *= 1 - 1 / (1 + exponential(-scores[i]));
      ((A*)a.ds)[n * count + i] = a.gating == Gating::kEqual ? A(0) : ds;
    }
  }
}

}  // namespace

void rectify_forward(const RectifyArguments& a, int64_t begin, int64_t end, void* memory) {
  switch (a.kind) {
    case Kind::kHalf: return forward<Half>(a, begin, end, memory);
    case Kind::kBFloat16: return forward<BFloat16>(a, begin, end, memory);
    case Kind::kFloat: return forward<float>(a, begin, end, memory);
    case Kind::kDouble: return forward<double>(a, begin, end, memory);
  }
}

void rectify_backward(const RectifyArguments& a, int64_t begin, int64_t end, void* memory) {
  switch (a.kind) {
    case Kind::kHalf: return backward<Half>(a, begin, end, memory);
    case Kind::kBFloat16: return backward<BFloat16>(a, begin, end, memory);
    case Kind::kFloat: return backward<float>(a, begin, end, memory);
    case Kind::kDouble: return backward<double>(a, begin, end, memory);
  }
}

}  // namespace ar_kernels::AR_TARGET
