// What the kernels of the 1x1 layer are told, as plain data: the same for every target they are compiled for.
#pragma once

#include <stdint.h>

namespace ar_kernels {

enum class Kind { kHalf, kBFloat16, kFloat, kDouble };

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

// One target's kernels. An item is one split of one image; memory is aligned to 64 bytes, one thread's own.
struct Kernels {
  const char* target;
  int64_t (*forward_scratch)(const ForwardArguments&);  // bytes of memory
  int64_t (*forward_part)(const ForwardArguments&);     // bytes of one item's part
  void (*attend_forward)(const ForwardArguments&, int64_t begin, int64_t end, void* memory);  // items
  void (*merge_splits)(const ForwardArguments&, int64_t begin, int64_t end);                  // images, of their parts
  int64_t (*backward_scratch)(const BackwardArguments&);
  void (*attend_backward)(const BackwardArguments&, int64_t begin, int64_t end, void* memory);  // groups
  // out[k][c] = sum over r of weights[r][k] rows[r][k][c], always in the same order, for elements [begin, end) of out;
  // weights null: 1.
  void (*weight_sums)(Kind kind, const void* rows, const void* weights, int64_t count, int64_t heads, int64_t channels,
                      void* out, int64_t begin, int64_t end);
};

// The kernels for this machine: of the widest target that it has instructions for, or of AR_KERNELS_TARGET.
const Kernels& kernels();

}  // namespace ar_kernels
