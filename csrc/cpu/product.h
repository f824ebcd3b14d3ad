// What the kernel of W_O's products is told, as plain data: the same for every target.
#pragma once

#include <stdint.h>

#include "kind.h"

namespace ar_kernels {

// out = a b, of matrices [rows, inner] and [inner, columns]; what lies beside each other is named by the way.
enum class Way {
  kDots,   // a's rows and b's columns, out[m][n] = a[m] . b[n]: features times W_O's transpose
  kSums,   // a's and b's rows, out[m] = sum over j of a[m][j] b[j]: a gradient times W_O
  kOuter,  // a's columns and b's rows, out[m] = sum over j of a[j][m] b[j]: W_O's gradient
};

struct ProductArguments {
  Way way;
  Kind map, weight;  // of W_O or its gradient: float, or the map's; all else has the map's
  int64_t rows, inner, columns;
  const void *a, *b;
  int64_t a_step, b_step;  // between rows or columns that lie apart
  void* out;               // [rows, columns], contiguous
};

// Threads share out's columns, so many at a time; what is summed does not depend on who has which.
constexpr int64_t kDotsColumns = 16, kSumsColumns = 64, kOuterColumns = 256;
constexpr int64_t part_columns(Way way) {
  return way == Way::kDots ? kDotsColumns : way == Way::kSums ? kSumsColumns : kOuterColumns;
}
constexpr int64_t parts(const ProductArguments& p) {
  return (p.columns + part_columns(p.way) - 1) / part_columns(p.way);
}

}  // namespace ar_kernels
