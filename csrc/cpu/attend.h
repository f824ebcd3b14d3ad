// What the kernels of the 1x1 layer are told, as plain data: the same for every target they are compiled for.
#pragma once

#include <stdint.h>

#include "kind.h"

namespace ar_kernels {

// A feature map [N, C, H, W] of any strides (in elements), or what has its shape.
struct Map {
  const void* data;
  int64_t n, c, h, w;
};

// The sizes of a layer, and how its work is cut. The cuts depend on shapes alone, so that the number of threads never
// changes a sum.
struct Layer {
  Kind kind;  // of the map
  int64_t images, channels, height, width, heads, gated;
  bool positions_adjacent;  // NCHW: a tile's rows are channels; else channels_last: they are positions
  int64_t tile;             // positions of a tile
  int64_t splits;           // parts of an image's positions
  int64_t split_length;     // a multiple of tile
  int64_t positions() const { return height * width; }
  int64_t items() const { return images * splits; }
};

// Pointers to the accumulator's dtype unless said otherwise; null where there is none.
struct ForwardArguments {
  Layer layer;
  Map z;
  const void *w, *b, *score_w, *score_b;
  void *pooled, *lse, *logits, *mean, *scores, *gates;
  void* features;  // the map's dtype
  void* parts;     // [items, forward_part bytes]: what splits found, where an image has more than one
};

struct BackwardArguments {
  Layer layer;
  Map z, upstream;
  const void *w, *b, *score_w, *pooled, *lse, *scores, *gates;
  const void* grad_features;  // the map's dtype
  const void *grad_gates, *grad_scores, *grad_pooled, *grad_lse, *grad_logits, *grad_mean;
  void* dz;  // the map's dtype
  bool channels_last;
  bool streams;  // writes dz past the caches
  void* dt;      // [N, K]
  // Every group of items adds up its share of dW_H; weight_sums adds the shares in order.
  int64_t groups;
  void* dw_shares;  // [groups, K, C]
};

}  // namespace ar_kernels
