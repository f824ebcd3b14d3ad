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

// Four adjacent values.
__device__ __forceinline__ float4 four_of(const Values& values, int64_t index) {
  if (values.kind == Kind::kFloat)
    return *reinterpret_cast<const float4*>(static_cast<const float*>(values.data) + index);
  const uint2 words = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(values.data) + index);
  const bool is_half = values.kind == Kind::kHalf;
  const float2 low = is_half ? unpacked<__half>(words.x) : unpacked<__nv_bfloat16>(words.x);
  const float2 high = is_half ? unpacked<__half>(words.y) : unpacked<__nv_bfloat16>(words.y);
  return make_float4(low.x, low.y, high.x, high.y);
}

// Four channels of one row of P, a head's or, after them, the mean's, to where they belong. Returns their part of the
// head's score.
__device__ __forceinline__ float store_pooled(const ForwardSweep& a, int64_t image, int row, int channel,
                                              float4 values) {
  if (row == a.heads) {
    *reinterpret_cast<float4*>(a.mean + image * a.channels + channel) = values;
    return 0;
  }
  *reinterpret_cast<float4*>(a.pooled + (image * a.heads + row) * a.channels + channel) = values;
  if (a.gated == 0) return 0;
  const float4 weights = four_of(a.score_w, row * a.channels + channel);
  return values.x * weights.x + values.y * weights.y + values.z * weights.z + values.w * weights.w;
}

template <class T>
__device__ __forceinline__ void store_features(const ForwardSweep& a, int64_t image, int row, int channel,
                                               float4 values, float gate) {
  *reinterpret_cast<uint2*>(static_cast<T*>(a.features) + (image * a.gated + row) * a.channels + channel) =
      make_uint2(packed<T>(gate * values.x, gate * values.y), packed<T>(gate * values.z, gate * values.w));
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
