// The forward sweeps on Hopper: what they are told, as plain data.
#pragma once

#include "sweep.h"

namespace ar_kernels {

struct ForwardSweep {
  Kind kind;  // of the map
  int images, channels, positions, heads, gated;
  FlatMap z;
  Values w, b;                      // [heads, C], [heads] or null
  Values score_w, score_b;          // [heads, C], [heads] or null; no gates without score_w
  float *pooled, *lse;              // [N, heads, C], [N, heads]
  float *logits, *mean;             // [N, heads, S], [N, C], or null
  float *scores, *gates;            // [N, heads], [N, gated], or null
  void* features;                   // [N, gated, C] of `kind`, or null
  int splits;                       // of an image, where there are parts of it, else 0
  float *part_m, *part_d, *part_p;  // [N splits, rows], the same, [N splits, rows, C], where there are several
};

// Whether this kernel takes such a sweep, on a GPU that it runs on. What data points to does not count.
bool can_sweep_forward(const ForwardSweep& a);

// Into how many splits it is best to cut an image; alike: whatever the number of images. Where an image is split, only
// logits and parts are written: maxima m, Σ exp(l - m) and P with these weights of each split's heads (and the mean: 0,
// positions, a sum), for a kernel that merges them.
int forward_splits(const ForwardSweep& a, bool alike);

// Launches it on the current device, of a map that is aligned to 16 bytes; cudaErrorInvalidValue where
// can_sweep_forward is false.
cudaError_t sweep_forward(const ForwardSweep& a, cudaStream_t stream);

// The same of images of either layout that are few, each spread over a cluster: nothing is left to merge, but how an
// image is cut depends on how many there are. Gates without score_w weigh every head alike.
bool can_sweep_forward_spread(const ForwardSweep& a);
cudaError_t sweep_forward_spread(const ForwardSweep& a, cudaStream_t stream);

// The same of NCHW maps with rows of any length; images are not split.
bool can_sweep_forward_rows(const ForwardSweep& a);
cudaError_t sweep_forward_rows(const ForwardSweep& a, cudaStream_t stream);

// The same of float32 maps of channels_last.
bool can_sweep_forward_floats(const ForwardSweep& a);
int forward_floats_splits(const ForwardSweep& a, bool alike);
cudaError_t sweep_forward_floats(const ForwardSweep& a, cudaStream_t stream);

// The same of NCHW.
bool can_sweep_forward_float_rows(const ForwardSweep& a);
int forward_float_rows_splits(const ForwardSweep& a, bool alike);
cudaError_t sweep_forward_float_rows(const ForwardSweep& a, cudaStream_t stream);

// The same of few positions, with rows of any length; images are not split.
bool can_sweep_forward_float_images(const ForwardSweep& a);
cudaError_t sweep_forward_float_images(const ForwardSweep& a, cudaStream_t stream);

}  // namespace ar_kernels
