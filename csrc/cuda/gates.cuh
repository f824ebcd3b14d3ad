// Softmaxes and gates: what the forward sweeps make of their sums.
#pragma once

#include "attend_forward.h"
#include "values.cuh"

namespace ar_kernels {

constexpr uint32_t kAll = 0xffffffff;  // lanes
constexpr float kSlack = 8;            // that a maximum may grow before sums are rescaled: float16 still has e^8
constexpr float kLog2OfE = 1.44269504089f;

// Whether it is of half precision, with weights and heads as the sweeps of such maps take them.
inline bool is_half(const ForwardSweep& a) {
  if (a.kind != Kind::kHalf && a.kind != Kind::kBFloat16) return false;
  for (const Values& w : {a.w, a.score_w})
    if (w.data != nullptr && w.kind != a.kind && w.kind != Kind::kFloat) return false;
  return a.heads >= 1 && a.heads <= kHeads && a.images >= 1;
}

// The largest of a warp's values, or NaN where one is.
__device__ __forceinline__ float warp_maximum(float value) {
  // Floats as integers of the same order, NaN above all.
  const int bits = value != value ? 0x7fffffff : __float_as_int(value);
  const int most = __reduce_max_sync(kAll, bits ^ (bits >> 31 & 0x7fffffff));
  return __int_as_float(most ^ (most >> 31 & 0x7fffffff));
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) value += __shfl_xor_sync(kAll, value, lanes);
  return value;
}

__device__ __forceinline__ float gate_tanh(float t) {
  const float e = __expf(-2.f * fabsf(t)), y = __fdividef(1.f - e, 1.f + e);
  return t < 0 ? -y : y;
}

// Scores, from `count` parts of each head's, and gates of an image, 0 beyond `gated`; thread 0 stores them.
__device__ __forceinline__ void make_gates(const ForwardSweep& a, int64_t image, const float* score_parts, int count,
                                           float (&gates)[kHeads]) {
  float total = 0;
  uint32_t biases[kHeads];  // all loads before the first store
#pragma unroll
  for (int k = 0; k < kHeads; ++k) biases[k] = a.score_b.data != nullptr && k < a.heads ? raw_value(a.score_b, k) : 0;
#pragma unroll
  for (int k = 0; k < kHeads; ++k) {
    float score = 0;
    if (k < a.heads) {
      score = value_from(a.score_b, biases[k]);
      for (int i = 0; i < count; ++i) score += score_parts[i * kHeads + k];
      if (threadIdx.x == 0) a.scores[image * a.heads + k] = score;
    }
    gates[k] = k < a.gated ? __expf(gate_tanh(score)) : 0.f;
    total += gates[k];
  }
#pragma unroll
  for (int k = 0; k < kHeads; ++k) {
    gates[k] /= total;
    if (threadIdx.x == 0 && k < a.gated) a.gates[image * a.gated + k] = gates[k];
  }
}

// gates[row] of a register array.
__device__ __forceinline__ float gate_of(const float (&gates)[kHeads], int row) {
  return row == 0 ? gates[0] : row == 1 ? gates[1] : row == 2 ? gates[2] : gates[3];
}

}  // namespace ar_kernels
