// The backward sweeps on Hopper: what they are told, as plain data.
#pragma once

#include "sweep.h"

namespace ar_kernels {

// What the gradients of pooled features come from, image by image (attend_backward.py): where w is null, `pairs`,
// `delta` and `unscale` have them already.
struct PooledGradient {
  Values w, score_w;  // [heads, C]; without score_w there are no gates
  int gated;
  const float *pooled, *scores, *gates;             // [N, heads, C], [N, heads], [N, gated]
  const void* grad_features;                        // [N, gated, C] of the map's dtype; it and what follows may be null
  const float *grad_gates, *grad_scores;            // [N, gated], [N, heads]
  const float *grad_pooled, *grad_lse, *grad_mean;  // [N, heads, C], [N, heads], [N, C]
  float* dt;                                        // [N, heads]: the scores' gradient
};

struct BackwardSweep {
  Kind kind;  // of the maps and of pairs
  int images, channels, positions, heads;
  FlatMap z, upstream, dz;   // float32 kernels do without dz
  PooledGradient of;         // of bfloat16 and channels_last alone
  const void* pairs;         // [N, heads (+ 1: the mean's row), 2, C]: W_H and dP
  bool mean;                 // whether there is such a row
  Values b;                  // [heads]
  const float *lse, *delta;  // [N, heads]; δ = Σ_c dP P − dlse
  const float* unscale;      // [N]: takes what comes of dP out of the image's scale, in float16; null: 1
  const float* grad_logits;  // [N, heads, S] or null
  float* dw;                 // [backward_programs, heads, C] or null: each program's share of dW_H
};

// Whether this kernel takes such a sweep, on a GPU that it runs on. What data points to does not count.
bool can_sweep_backward(const BackwardSweep& a);

// How many programs launch on the current device.
int backward_programs(const BackwardSweep& a);

// Launches them, of maps that are aligned to 16 bytes; cudaErrorInvalidValue where can_sweep_backward is false.
cudaError_t sweep_backward(const BackwardSweep& a, cudaStream_t stream);

// The same of NCHW maps with rows of any length, of pairs alone, without an upstream gradient.
bool can_sweep_backward_rows(const BackwardSweep& a);
int backward_rows_programs(const BackwardSweep& a);
cudaError_t sweep_backward_rows(const BackwardSweep& a, cudaStream_t stream);

// The same of float32 maps, channels_last and NCHW, with an upstream gradient or without.
bool can_sweep_backward_floats(const BackwardSweep& a);
int backward_floats_programs(const BackwardSweep& a);
cudaError_t sweep_backward_floats(const BackwardSweep& a, cudaStream_t stream);

bool can_sweep_backward_float_rows(const BackwardSweep& a);
int backward_float_rows_programs(const BackwardSweep& a);
cudaError_t sweep_backward_float_rows(const BackwardSweep& a, cudaStream_t stream);

// NCHW of few positions, with rows of any length.
bool can_sweep_backward_float_images(const BackwardSweep& a);
int backward_float_images_programs(const BackwardSweep& a);
cudaError_t sweep_backward_float_images(const BackwardSweep& a, cudaStream_t stream);

}  // namespace ar_kernels
