// Softmaxes and gates: what both forward sweeps make of their sums.
#pragma once

#include "attend_forward.h"
#include "values.cuh"

namespace ar_kernels {

constexpr uint32_t kAll = 0xffffffff;  // lanes

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
  const float e = __expf(-2.f * fabsf(t)), y = (1.f - e) / (1.f + e);
  return t < 0 ? -y : y;
}

// Scores, from what each warp's channels add to them, and gates of an image, 0 beyond `gated`; thread 0 stores them.
__device__ __forceinline__ void make_gates(const ForwardSweep& a, int64_t image, const float* score_parts, int warps,
                                           float (&gates)[kHeads]) {
  float total = 0;
#pragma unroll
  for (int k = 0; k < kHeads; ++k) {
    float score = a.score_b.data != nullptr && k < a.heads ? value_of(a.score_b, k) : 0.f;
    for (int warp = 0; warp < warps; ++warp) score += score_parts[warp * kHeads + k];
    if (threadIdx.x == 0 && k < a.heads) a.scores[image * a.heads + k] = score;
    gates[k] = k < a.gated ? __expf(gate_tanh(score)) : 0.f;
    total += gates[k];
  }
#pragma unroll
  for (int k = 0; k < kHeads; ++k) {
    gates[k] /= total;
    if (threadIdx.x == 0 && k < a.gated) a.gates[image * a.gated + k] = gates[k];
  }
}

}  // namespace ar_kernels
