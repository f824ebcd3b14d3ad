// Backward of 3x3 heads: two sweeps over the feature map, the second from cache where an image fits there, and one
// write of its gradient. dt and dP are those of 1x1 heads, then
//   dA[k][s] = sum over taps of (dP[k][tap] Z)[s + tap],  A = exp(l - lse)
//   dl = A (dA - sum over s of A dA + dlse) + direct
//   dZ[s] = sum over k, taps of A[k][s - tap] dP[k][tap] + dl[k][s - tap] W_H[k][tap], + upstream
//   dW_H[k][tap] = sum over s of dl[k][s - tap] Z[s]

#include "image.h"
#include "taps.h"

namespace ar_kernels::AR_TARGET {

namespace {

// dl and A of image n in their frames, from dA.
template <class A>
void mask_gradients(const BackwardArguments& a, int64_t n) {
  const Layer& layer = a.layer;
  const int64_t heads = layer.heads, size = frame_size(layer);
  A* frames = (A*)a.masks + n * 2 * heads * size;
  for (int64_t k = 0; k < heads; ++k) {
    const int64_t place = (n * heads + k) * layer.positions();
    const A *logits = (const A*)a.logits + place, *da = (const A*)a.dmasks + place;
    const A* direct = a.grad_logits == nullptr ? nullptr : (const A*)a.grad_logits + place;
    const A lse = ((const A*)a.lse)[n * heads + k];
    A *dl_frame = frames + k * size, *a_frame = frames + (heads + k) * size;
    clear_frame(layer, dl_frame);
    clear_frame(layer, a_frame);
    Vector<A> total = {};
    for_each_framed<A>(layer, [&](int64_t from, int64_t to, int count) {
      put(a_frame + to, exponential<A>(some(logits + from, count) - lse), count);
      total += some(a_frame + to, count) * some(da + from, count);
    });
    const A center = sum<A>(total) - lse_gradient<A>(a, n, k);
    for_each_framed<A>(layer, [&](int64_t from, int64_t to, int count) {
      Vector<A> dl = some(a_frame + to, count) * (some(da + from, count) - center);
      if (direct != nullptr) dl += some(direct + from, count);
      put(dl_frame + to, dl, count);
    });
  }
}

// Groups [first, last) in kAll and kMaps, items in kLogits, images in kMasks; with `used`, only what they need of
// memory.
template <class T>
void backward(const BackwardArguments& a, Stage stage, int64_t first, int64_t last, void* memory, int64_t* used) {
  using A = Accumulator<T>;
  const Layer& layer = a.layer;
  const int64_t count_rows = layer.rows(), c_step = channel_step<A>(layer), s_step = position_step<A>(layer);
  const int64_t size = layer.heads * layer.positions();
  Scratch scratch(memory);
  const Rows<A> rows = Rows<A>::take(scratch, layer);
  A* dw = a.dw_shares == nullptr ? nullptr : scratch.take<A>(count_rows * c_step);
  const Gradient<T> gradient = Gradient<T>::take(scratch, a);
  if (used != nullptr) {
    *used = scratch.used();
    return;
  }
  rows.fill(a);
  const bool sweeps = dw != nullptr || a.dz != nullptr;
  const auto make_mask_sums = [&](int64_t n, const Lines& lines) {
    A* da = (A*)a.dmasks + n * size;
    for (int64_t k = 0; k < layer.heads; ++k) {
      A* row = da + k * layer.positions();
      memset(row + lines.first * layer.width, 0, (lines.last - lines.first) * layer.width * sizeof(A));
    }
    add_taps<T, A>(layer, a.z, n, lines.first, lines.last, rows.weights + count_rows * c_step, rows.masks, gradient.z,
                   da);
  };
  if (stage == Stage::kLogits || stage == Stage::kMasks) {
    for (int64_t item = first; item < last; ++item) {
      const int64_t n = stage == Stage::kMasks ? item : item / layer.splits;
      image_gradient<T, A>(a, n, stage == Stage::kMasks, rows);
      if (stage == Stage::kMasks)
        mask_gradients<A>(a, n);
      else
        make_mask_sums(n, lines_of(layer, item % layer.splits));
    }
    return;
  }
  for_each_group<A>(a, first, last, dw, [&](int64_t n, int64_t split) {
    const Lines lines = lines_of(layer, split);
    const bool all = stage == Stage::kAll;
    image_gradient<T, A>(a, n, all, rows);
    if (!sweeps) return;
    if (all) {
      make_mask_sums(n, lines);
      mask_gradients<A>(a, n);
    }
    const A* frames = (const A*)a.masks + n * 2 * layer.heads * frame_size(layer);
    const int64_t end = lines.last * layer.width;
    for (int64_t start = lines.first * layer.width; start < end; start += layer.tile) {
      const int64_t count = smaller(layer.tile, end - start);
      shift_rows(layer, frames, start, count, rows.masks);
      shift_rows(layer, frames + layer.heads * frame_size(layer), start, count, rows.masks + count_rows * s_step);
      const Tile<const T> z = read_tile<T>(layer, a.z, n, start, count, gradient.z);
      tile_gradient<T, A>(a, n, start, z, count, rows, gradient, dw);
    }
  });
}

void run(const BackwardArguments& a, Stage stage, int64_t begin, int64_t end, void* memory, int64_t* used) {
  switch (a.layer.kind) {
    case Kind::kHalf: return backward<Half>(a, stage, begin, end, memory, used);
    case Kind::kBFloat16: return backward<BFloat16>(a, stage, begin, end, memory, used);
    case Kind::kFloat: return backward<float>(a, stage, begin, end, memory, used);
    case Kind::kDouble: return backward<double>(a, stage, begin, end, memory, used);
  }
}

}  // namespace

int64_t backward3x3_scratch(const BackwardArguments& a) {
  int64_t used = 0;
  run(a, Stage::kAll, 0, 0, nullptr, &used);
  return used;
}

void attend3x3_backward(const BackwardArguments& a, Stage stage, int64_t begin, int64_t end, void* memory) {
  run(a, stage, begin, end, memory, nullptr);
}

}  // namespace ar_kernels::AR_TARGET
