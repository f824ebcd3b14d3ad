// W_O's products with few rows: the images of a batch are the rows that a tile's products keep in registers.

#include "product.h"

#include "products.h"

namespace ar_kernels::AR_TARGET {

int64_t product_lanes() { return kLanes<float>; }

namespace {

template <class Map, class Weight>
void multiply_as(const ProductArguments& p, int64_t begin, int64_t end) {
  constexpr int64_t kInner = 512;  // so much of a's and b's rows stays in the first-level cache
  constexpr int64_t kSums = 1024;  // which stay there too, to be rounded once where that is not to float32
  constexpr bool kMapIsFloat = sizeof(Map) == sizeof(float);
  constexpr bool kWeightIsFloat = sizeof(Weight) == sizeof(float);
  // As many as one sum runs over: a longer one would round worse, but for halves, which themselves round far worse.
  constexpr int64_t kOuterRows = kWeightIsFloat ? 128 : INT64_MAX;
  const int64_t step = part_columns(p.way), last = end * step < p.columns ? end * step : p.columns;
  for (int64_t n = begin * step; n < last; n += step) {
    const int64_t columns = last - n < step ? last - n : step;
    if (p.way == Way::kOuter) {
      const Map *a = (const Map*)p.a, *b = (const Map*)p.b + n;
      const Tile<Weight> tile = {(Weight*)p.out + n, p.columns, p.rows, columns};
      const Tile<const Weight> before = {tile.data, p.columns, p.rows, columns};
      for (int64_t j = 0; j < p.inner; j += kOuterRows)
        outer_rows<Weight, float>(a + j * p.a_step, p.a_step, b + j * p.b_step, p.b_step,
                                  p.inner - j < kOuterRows ? p.inner - j : kOuterRows, j > 0 ? &before : nullptr, tile,
                                  false);
      continue;
    }
    alignas(64) float sums[kMapIsFloat ? 1 : kSums];
    const int64_t most = kMapIsFloat ? p.rows : kSums / step;
    for (int64_t m = 0; m < p.rows; m += most) {
      const int64_t rows = p.rows - m < most ? p.rows - m : most;
      const Map* a = (const Map*)p.a + m * p.a_step;
      const Weight* b = (const Weight*)p.b + n * (p.way == Way::kDots ? p.b_step : 1);
      Map* out = (Map*)p.out + m * p.columns + n;
      float* to = kMapIsFloat ? (float*)out : sums;
      const int64_t to_step = kMapIsFloat ? p.columns : step;
      for (int64_t j = 0; j < p.inner && p.way == Way::kDots; j += kInner) {
        const Tile<const Weight> tile = {b + j, p.b_step, columns, p.inner - j < kInner ? p.inner - j : kInner};
        dot_rows<Ahead::kNothing>(a + j, p.a_step, rows, tile, to, to_step, j > 0);
      }
      if (p.way == Way::kSums) {
        const Tile<const Weight> tile = {b, p.b_step, p.inner, columns};
        sum_rows<Ahead::kNothing>(a, p.a_step, rows, tile, to, to_step, false);
      }
      for (int64_t i = 0; i < rows && !kMapIsFloat; ++i) {
        for (int64_t x = 0; x < columns; x += kLanes<float>)
          put(out + i * p.columns + x, load(sums + i * step + x),
              (int)(columns - x < kLanes<float> ? columns - x : kLanes<float>));
      }
    }
  }
}

template <class Map>
void multiply_of(const ProductArguments& p, int64_t begin, int64_t end) {
  if (p.weight == Kind::kFloat) return multiply_as<Map, float>(p, begin, end);
  multiply_as<Map, Map>(p, begin, end);
}

}  // namespace

void multiply(const ProductArguments& p, int64_t begin, int64_t end) {
  if (p.map == Kind::kHalf) return multiply_of<Half>(p, begin, end);
  if (p.map == Kind::kBFloat16) return multiply_of<BFloat16>(p, begin, end);
  multiply_of<float>(p, begin, end);
}

}  // namespace ar_kernels::AR_TARGET
