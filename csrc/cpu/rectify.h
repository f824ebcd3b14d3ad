// What the kernels of the rectified output are told, as plain data: the same for every target.
#pragma once

#include <stdint.h>

#include "kind.h"

namespace ar_kernels {

enum class Mix { kLogit, kLog, kProb };
enum class Gating { kSoftmax, kSigmoid, kEqual };

// Pointers to the accumulator's dtype unless said otherwise.
struct RectifyArguments {
  Kind kind;  // of the hypotheses
  Mix mix;
  Gating gating;
  int64_t images, hypotheses, labels;
  const void* h;       // [N, D+1, L], the hypotheses' dtype
  const void* scores;  // [N, D+1]
  void* output;        // [N, L], written forward and read backward, as is
  void* lse;           // [N, D+1], null for kLogit
  const void* grad;    // [N, L]; this and what follows, backward alone
  void* dh;            // [D+1, N, L], the hypotheses' dtype
  void* ds;            // [N, D+1]
};

}  // namespace ar_kernels
