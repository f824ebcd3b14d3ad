// What the kernels of the layer are told, as plain data: the same for every target they are compiled for.
#pragma once

#include <stdint.h>

#include "../shares.h"
#include "kind.h"

namespace ar_kernels {

// Of a tile that stays in the first-level cache between two products.
constexpr int64_t kSmallTileBytes = 24 << 10;

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
  int64_t taps;             // 1, or 9 of 3x3 heads; rows of weights are [K, taps, C]
  bool positions_adjacent;  // NCHW: a tile's rows are channels; else channels_last: they are positions
  int64_t tile;             // positions of a tile
  int64_t splits;           // parts of an image's positions
  int64_t split_length;     // a multiple of tile; of 3x3 heads, of width
  int64_t positions() const { return height * width; }
  int64_t items() const { return images * splits; }
  int64_t rows() const { return heads * taps; }
};

// Pointers to the accumulator's dtype unless said otherwise; null where there is none.
struct ForwardArguments {
  Layer layer;
  Map z;
  const void *w, *b, *score_w, *score_b;
  void* pooled;  // [N, taps, K, C]
  void *lse, *logits, *mean, *scores, *gates;
  void* features;  // [N, K', C, taps], the map's dtype
  void* parts;     // [items, forward_part bytes]: what splits found, where an image has more than one
  void* masks;     // of 3x3 heads: A in a frame of zeros, [N, K, H+2, W+2]
};

// 3x3 heads look beyond a split, so the splits of an image wait for one another between stages: all of a stage's items
// come before the next stage. Where images are not split, one item goes through all stages while it is in cache.
enum class Stage { kAll, kLogits, kMasks, kMaps, kMerge };

struct BackwardArguments {
  Layer layer;
  Map z, upstream;
  const void *w, *b, *score_w;
  const void* pooled;  // [N, K, taps, C]
  const void *lse, *scores, *gates;
  const void* grad_features;  // [N, K', taps, C], the map's dtype
  const void *grad_gates, *grad_scores;
  const void* grad_pooled;  // [N, K, taps, C]
  const void *grad_lse, *grad_logits, *grad_mean;
  void* dz;  // the map's dtype
  bool channels_last;
  bool streams;  // writes dz past the caches
  void* dt;      // [N, K]
  // Every group of items adds up its share of dW_H; weight_sums adds the shares in order.
  int64_t groups;
  void* dw_shares;  // [groups, K, taps, C]
  // Of 3x3 heads:
  const void* logits;  // [N, K, H, W]
  void* dmasks;        // dA, [N, K, H, W]
  void* masks;         // A and dl, in frames of zeros, [N, 2K, H+2, W+2]
};

}  // namespace ar_kernels
