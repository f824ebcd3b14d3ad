// The kernels of one target, and those of this machine.
#pragma once

#include "attend.h"
#include "product.h"
#include "rectify.h"

namespace ar_kernels {

// Memory is aligned to 64 bytes, one thread's own.
struct Kernels {
  const char* target;
  int64_t (*forward_scratch)(const ForwardArguments&);  // bytes of memory
  int64_t (*forward_part)(const ForwardArguments&);     // bytes of one item's part
  void (*attend_forward)(const ForwardArguments&, int64_t begin, int64_t end, void* memory);  // items
  void (*merge_splits)(const ForwardArguments&, int64_t begin, int64_t end);                  // images, of their parts
  int64_t (*backward_scratch)(const BackwardArguments&);
  void (*attend_backward)(const BackwardArguments&, int64_t begin, int64_t end, void* memory);  // groups
  int64_t (*forward3x3_scratch)(const ForwardArguments&);
  void (*attend3x3_forward)(const ForwardArguments&, Stage, int64_t begin, int64_t end, void* memory);
  int64_t (*backward3x3_scratch)(const BackwardArguments&);
  void (*attend3x3_backward)(const BackwardArguments&, Stage, int64_t begin, int64_t end, void* memory);
  // out[k][c] = sum over r of weights[r][k] rows[r][k][c], always in the same order, for elements [begin, end) of out;
  // weights null: 1.
  void (*weight_sums)(Kind kind, const void* rows, const void* weights, int64_t count, int64_t heads, int64_t channels,
                      void* out, int64_t begin, int64_t end);
  // Images; memory for three times as many values as there are hypotheses.
  void (*rectify_forward)(const RectifyArguments&, int64_t begin, int64_t end, void* memory);
  void (*rectify_backward)(const RectifyArguments&, int64_t begin, int64_t end, void* memory);
  int64_t (*product_lanes)();  // what a product's long side must be a multiple of
  void (*multiply)(const ProductArguments&, int64_t begin, int64_t end);  // parts
};

// The kernels for this machine: of the widest target that it has instructions for, or of AR_KERNELS_TARGET.
const Kernels& kernels();

}  // namespace ar_kernels
