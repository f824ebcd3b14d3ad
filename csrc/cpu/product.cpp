// W_O's products with few rows: the images of a batch are the rows that a tile's products keep in registers.

#include "product.h"

#include "products.h"

namespace ar_kernels::AR_TARGET {

int64_t product_lanes() { return kLanes<float>; }

void multiply(const ProductArguments& p, int64_t begin, int64_t end) {
  constexpr int64_t kInner = 512;      // so much of a's and b's rows stays in the first-level cache
  constexpr int64_t kOuterRows = 128;  // as many as one sum runs over: a longer one would round worse
  const int64_t step = part_columns(p.way), first = begin * step;
  const int64_t last = end * step < p.columns ? end * step : p.columns;
  if (p.way == Way::kDots) {
    for (int64_t j = 0; j < p.inner; j += kInner)
      for (int64_t n = first; n < last; n += step) {
        const int64_t inner = p.inner - j < kInner ? p.inner - j : kInner;
        const Tile<const float> tile = {p.b + n * p.b_step + j, p.b_step, last - n < step ? last - n : step, inner};
        dot_rows<Ahead::kNothing>(p.a + j, p.a_step, p.rows, tile, p.out + n, p.columns, j > 0);
      }
    return;
  }
  for (int64_t n = first; n < last; n += step) {
    const int64_t columns = last - n < step ? last - n : step;
    if (p.way == Way::kSums) {
      const Tile<const float> tile = {p.b + n, p.b_step, p.inner, columns};
      sum_rows<Ahead::kNothing>(p.a, p.a_step, p.rows, tile, p.out + n, p.columns, false);
      continue;
    }
    const Tile<float> tile = {p.out + n, p.columns, p.rows, columns};
    const Tile<const float> before = {p.out + n, p.columns, p.rows, columns};
    for (int64_t j = 0; j < p.inner; j += kOuterRows)
      outer_rows<float, float>(p.a + j * p.a_step, p.a_step, p.b + n + j * p.b_step, p.b_step,
                               p.inner - j < kOuterRows ? p.inner - j : kOuterRows, j > 0 ? &before : nullptr, tile,
                               false);
  }
}

}  // namespace ar_kernels::AR_TARGET
