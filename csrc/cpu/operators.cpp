// The operators on the CPU: checks, allocation, how the work is cut, and threads. ar_kernels/ops.py has the schemas.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <array>
#include <memory>
#include <new>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "../checks.h"
#include "../handover.h"
#include "targets.h"

namespace ar_kernels {

namespace {

using MaybeTensor = std::optional<Tensor>;
using Options = std::vector<int64_t>;
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

constexpr int64_t kTileBytes = 1 << 18;   // of a tile, which stays in the second-level cache
constexpr int64_t kFewestPositions = 16;  // of a tile, if the map has them; AVX-512's lanes
constexpr int64_t kMostPositions = 128;   // of channels_last, where one sum runs over all of them: it rounds less so
// Parts that the work is cut into for threads to share: by shape alone, so that sums don't depend on the threads.
constexpr int64_t kItems = 32;
constexpr int64_t kFewestLines = 4;  // of a split, of 3x3 heads
constexpr int64_t kElementsOfGroup = 1 << 16, kMostGroups = 128;
constexpr int64_t kStreamedBytes = 1 << 23;       // of dZ: a larger one leaves the caches before it is read again
constexpr int64_t kLargePagesBytes = 1 << 22;     // of dZ: wherever it begins, 2 MB of it are a page of their own
constexpr int64_t kElementsPerThread = 1 << 17;   // less is not worth another thread
constexpr int64_t kAdditionsPerThread = 1 << 20;  // likewise, of the last sums
constexpr int64_t kProductPerThread = 1 << 23;    // likewise, multiply-adds of a product
constexpr int64_t kFewestRows = 4;                // for which a thread reads all of W_O: a product's block of rows
constexpr int64_t kMostShared = 1 << 21;          // elements of W_O, of which every thread reads all
// Multiply-adds of a product: with more, PyTorch's are as fast or faster, by instructions for bfloat16.
constexpr int64_t kMostInBFloat16 = 1 << 25;
constexpr int64_t kProductLanes = 16;  // AVX-512's: with fewer, PyTorch's products are as fast or faster

Kind kind_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half: return Kind::kHalf;
    case ScalarType::BFloat16: return Kind::kBFloat16;
    case ScalarType::Double: return Kind::kDouble;
    default: return Kind::kFloat;
  }
}

int64_t bytes_of(Kind kind) { return kind == Kind::kDouble ? 8 : kind == Kind::kFloat ? 4 : 2; }

Map map_of(const Tensor& z) {
  if (z.dim() == 3) return {z.const_data_ptr(), z.stride(0), z.stride(1), 0, z.stride(2)};
  return {z.const_data_ptr(), z.stride(0), z.stride(1), z.stride(2), z.stride(3)};
}

// The way round that the map lies in memory; where it lies neither way, tiles are gathered either way.
bool positions_are_adjacent(const Map& z, int64_t channels, int64_t height, int64_t width) {
  if (channels == 1 || height * width == 1) return height * width > channels;
  const int64_t between_positions = width == 1 ? z.h : z.w;
  return between_positions < z.c;
}

// w: [K, C] or [K, C, 3, 3]. alike: an image is cut up as in a batch large enough that none is split.
Layer layer_of(const Tensor& z, const Tensor& w, int64_t gated, bool alike) {
  Layer layer;
  layer.kind = kind_of(z.scalar_type());
  layer.images = z.size(0);
  layer.channels = z.size(1);
  layer.height = z.dim() == 4 ? z.size(2) : 1;
  layer.width = z.size(-1);
  layer.heads = w.size(0);
  layer.taps = w.dim() == 2 ? 1 : 9;
  layer.gated = gated;
  layer.positions_adjacent = positions_are_adjacent(map_of(z), layer.channels, layer.height, layer.width);

  const int64_t element = bytes_of(layer.kind);
  const int64_t step = layer.positions_adjacent ? 4 * kFewestPositions : kFewestPositions;
  const int64_t positions = layer.positions();
  const int64_t images = alike ? kItems : std::max<int64_t>(layer.images, 1);
  layer.tile = std::min(positions, std::max(step, kTileBytes / (layer.channels * element) / step * step));
  if (!layer.positions_adjacent) {  // nor longer than the splits of few images
    const int64_t items = kItems / std::min(images, kItems);
    layer.tile = std::min({layer.tile, kMostPositions, (positions + items * step - 1) / (items * step) * step});
    if (layer.taps == 1 && step * layer.channels * element <= kSmallTileBytes) layer.tile = std::min(layer.tile, step);
  }
  if (layer.taps > 1) {  // whole lines, and not so few that those around them, which are read too, outweigh them
    const int64_t wanted = (kItems + images - 1) / images;
    const int64_t lines = std::max(kFewestLines, (layer.height + wanted - 1) / wanted);
    layer.splits = (layer.height + lines - 1) / lines;
    layer.split_length = lines * layer.width;
    return layer;
  }
  const int64_t tiles = (positions + layer.tile - 1) / layer.tile;
  const int64_t wanted = std::min(tiles, (kItems + images - 1) / images);
  layer.split_length = (tiles + wanted - 1) / wanted * layer.tile;
  layer.splits = (positions + layer.split_length - 1) / layer.split_length;
  return layer;
}

Tensor in_dtype(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

// Small tensors in the accumulator's dtype, contiguous; what they already are costs nothing.
MaybeTensor accumulated(const MaybeTensor& tensor, ScalarType dtype) {
  if (!tensor.has_value()) return tensor;
  const Tensor converted = in_dtype(*tensor, dtype);
  return converted.is_contiguous() ? converted : torch::stable::contiguous(converted);
}

MaybeTensor contiguous(const MaybeTensor& tensor) {
  if (!tensor.has_value() || tensor->is_contiguous()) return tensor;
  return torch::stable::contiguous(*tensor);
}

// [..., C, 3, 3] or [..., C, 9] as [..., taps, C] in the accumulator's dtype, contiguous; [..., C] as it is.
MaybeTensor tap_rows(const MaybeTensor& tensor, int64_t taps, ScalarType dtype) {
  if (!tensor.has_value() || taps == 1) return accumulated(tensor, dtype);
  const Tensor flat = tensor->dim() == 4 && tensor->size(3) == 3 ? torch::stable::flatten(*tensor, 2) : *tensor;
  return accumulated(torch::stable::transpose(flat, -2, -1), dtype);
}

// [K, taps, C] as [K, C] or [K, C, 3, 3].
Tensor weight_of(const Tensor& rows, int64_t heads, int64_t taps, int64_t channels) {
  if (taps == 1) return torch::stable::view(rows, {heads, channels});
  const Tensor turned = torch::stable::transpose(torch::stable::view(rows, {heads, taps, channels}), 1, 2);
  return torch::stable::view(torch::stable::contiguous(turned), {heads, channels, 3, 3});
}

const void* data(const MaybeTensor& tensor) { return tensor.has_value() ? tensor->const_data_ptr() : nullptr; }

Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype);
}

void* written(const Tensor& tensor) { return tensor.numel() == 0 ? nullptr : tensor.mutable_data_ptr(); }

// Calls work(begin, end, memory) on parts of [0, count), each thread with memory of its own.
template <class Work>
void in_parallel(int64_t count, int64_t elements, int64_t scratch, const Work& work) {
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread * count / std::max<int64_t>(elements, 1));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    constexpr std::align_val_t kAlignment{64};
    const auto free = [=](void* memory) { ::operator delete(memory, kAlignment); };
    const std::unique_ptr<void, decltype(free)> memory(::operator new(scratch, kAlignment), free);
    work(begin, end, memory.get());
  });
}

// Whether a matrix has its elements of the second dimension beside each other.
bool has_rows(const Tensor& matrix) { return matrix.stride(1) == 1 && matrix.stride(0) >= matrix.size(1); }

bool has_columns(const Tensor& matrix) { return matrix.stride(0) == 1 && matrix.stride(1) >= matrix.size(0); }

// A product of ours, which is yet to be computed.
struct Product {
  ProductArguments arguments;
  Tensor a, b, out;
};

int64_t multiply_adds(const ProductArguments& p) { return p.rows * p.inner * p.columns; }

// The dtype in which products take W_O: float32 as it is, beside a map of halves too.
ScalarType weight_dtype(ScalarType weight, ScalarType map) { return weight == ScalarType::Float ? weight : map; }

// a b of matrices in `dtype`: ours with AVX-512, where both lie as in a product with W_O and K C is whole vectors;
// nothing where it is PyTorch's. W_O is b; where a's columns lie in memory, what is made is its gradient.
std::optional<Product> our_product(const Tensor& a, const Tensor& b, ScalarType dtype) {
  ProductArguments p = {};
  p.way = Way::kSums;
  p.map = kind_of(a.scalar_type());
  p.weight = kind_of(b.scalar_type());
  p.rows = a.size(0);
  p.inner = a.size(1);
  p.columns = b.size(1);
  p.a_step = a.stride(0);
  p.b_step = b.stride(0);
  Kind other = kind_of(dtype);  // of what is made, or of b where that is W_O's gradient
  bool fits = p.map != Kind::kDouble && multiply_adds(p) > 0;
  fits = fits && (p.map != Kind::kBFloat16 || multiply_adds(p) <= kMostInBFloat16);
  if (has_rows(a) && has_columns(b) && !has_rows(b)) {
    p.way = Way::kDots;
    p.b_step = b.stride(1);
  } else if (has_columns(a) && has_rows(b) && !has_rows(a)) {
    p.way = Way::kOuter;
    p.a_step = a.stride(1);
    std::swap(p.weight, other);
  } else {
    fits = fits && has_rows(a) && has_rows(b);
  }
  fits = fits && other == p.map;
  const int64_t lanes = kernels().product_lanes(), vectors = p.way == Way::kDots ? p.inner : p.columns;
  if (!fits || lanes < kProductLanes || vectors % lanes != 0) return std::nullopt;
  const Tensor out = empty({p.rows, p.columns}, dtype);
  p.a = a.const_data_ptr();
  p.b = b.const_data_ptr();
  p.out = out.mutable_data_ptr();
  return Product{p, a, b, out};
}

// Of a feature map, which take as long.
int64_t elements_worth(int64_t multiply_adds) { return multiply_adds / (kProductPerThread / kElementsPerThread); }

// Computes a product of ours, if there is one that still has to be.
void multiply(std::optional<Product>& product) {
  if (!product.has_value()) return;
  const ProductArguments& p = product->arguments;
  const Kernels& target = kernels();
  const int64_t grain = kProductPerThread * parts(p) / multiply_adds(p) + 1;
  torch::stable::parallel_for(0, parts(p), grain, [&](int64_t begin, int64_t end) { target.multiply(p, begin, end); });
  product.reset();
}

// a b of matrices, by PyTorch in a's dtype, or by us in `dtype`: then it is left to the caller to compute.
Tensor begun(const Tensor& a, const Tensor& b, ScalarType dtype, std::optional<Product>& ours) {
  ours = our_product(a, b, dtype);
  return ours.has_value() ? ours->out : torch::stable::matmul(a, in_dtype(b, a.scalar_type()));
}

// a b of matrices in a's dtype.
Tensor multiplied(const Tensor& a, const Tensor& b) {
  std::optional<Product> ours;
  const Tensor out = begun(a, b, a.scalar_type(), ours);
  multiply(ours);
  return out;
}

Tensor product(const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(a.dim() == 2, "a must be a matrix, got ", shape_of(a));
  STD_TORCH_CHECK(b.dim() == 2 && b.size(0) == a.size(1), "b must be a matrix [", a.size(1), ", N], got ", shape_of(b));
  check_float("a", a);
  check_dtype("b", b, "a", a);
  return multiplied(a, b);
}

// A layer's products with W_O, of ours, that threads compute beside their sweeps over images: to wake them once more
// takes as long as a product.
struct Products {
  std::optional<Product> of_images;  // rows are images: the hypothesis, or the gradient of features
  std::optional<Product> of_weight;  // W_O's gradient

  int64_t elements() const {
    const int64_t images = of_images.has_value() ? multiply_adds(of_images->arguments) : 0;
    const int64_t weight = of_weight.has_value() ? multiply_adds(of_weight->arguments) : 0;
    return elements_worth(images + weight);
  }

  // What groups [begin, end) of images have to do: the rows of their images, and a share of W_O's columns.
  void multiply_share(int64_t begin, int64_t end, int64_t groups) const {
    const Kernels& target = kernels();
    if (of_images.has_value()) {
      ProductArguments p = of_images->arguments;
      const int64_t first = first_of(begin, groups, p.rows), last = first_of(end, groups, p.rows);
      p.a = static_cast<const char*>(p.a) + first * of_images->a.stride(0) * bytes_of(p.map);
      p.out = static_cast<char*>(p.out) + first * p.columns * bytes_of(p.map);
      p.rows = last - first;
      target.multiply(p, 0, parts(p));
    }
    if (of_weight.has_value()) {
      const ProductArguments& p = of_weight->arguments;
      target.multiply(p, first_of(begin, groups, parts(p)), first_of(end, groups, parts(p)));
    }
  }
};

// Whether threads that sweep over images had better multiply the rows of theirs: each reads all of W_O for that, which
// for few rows, or where W_O comes from memory, takes longer than to wake them again for a part of W_O each. The
// forward of 32 images by two threads takes 10 % less time so with W_O of 5 MB, 15 % more with 16 MB.
bool images_fit(const Layer& layer, int64_t elements, int64_t output_w) {
  if (layer.taps > 1 || layer.splits > 1 || layer.images == 0) return false;
  const int64_t threads = torch::stable::get_num_threads();
  elements += elements_worth(layer.images * output_w);
  const int64_t images = std::max(layer.images / threads, kElementsPerThread * layer.images / elements);
  return images >= kFewestRows && output_w <= kMostShared;
}

// Calls work(stage, items): all stages in one where images are not split, else one after another.
template <class Work>
void in_stages(const Layer& layer, std::initializer_list<Stage> stages, const Work& work) {
  if (layer.splits == 1) return work(Stage::kAll, layer.images);
  for (const Stage stage : stages) {
    const bool by_image = stage == Stage::kMasks || stage == Stage::kMerge;
    work(stage, by_image ? layer.images : layer.items());
  }
}

// K of w [K, C] or [K, C, 3, 3], after the checks of it.
int64_t heads_of(const Tensor& z, const Tensor& w, int64_t taps) {
  const int64_t heads = w.dim() == (taps == 1 ? 2 : 4) ? w.size(0) : 0;
  STD_TORCH_CHECK(heads > 0, "w must be ", taps == 1 ? "[K, C]" : "[K, C, 3, 3]", " with a head, got ", shape_of(w));
  STD_TORCH_CHECK(taps == 1 || z.dim() == 4, "z must be [N, C, H, W] for 3x3 heads, got ", shape_of(z));
  return heads;
}

void check_weight(const char* name, const MaybeTensor& weight, int64_t heads, int64_t channels, int64_t taps) {
  if (taps == 1)
    check_shape(name, weight, {heads, channels});
  else
    check_shape(name, weight, {heads, channels, 3, 3});
}

void check_output_weight(const Tensor& output_w, int64_t gated_heads, int64_t width) {
  STD_TORCH_CHECK(gated_heads > 0, "output_w must be None without gated heads, got ", shape_of(output_w));
  STD_TORCH_CHECK(output_w.dim() == 2 && output_w.size(1) == gated_heads * width, "output_w must be [L, ",
                  gated_heads * width, "], got ", shape_of(output_w));
  check_float("output_w", output_w);
}

// The attention's outputs, and the hypothesis where there is W_O.
std::pair<Outputs, MaybeTensor> forward(const Tensor& z, const Tensor& w, const MaybeTensor& b,
                                        const MaybeTensor& score_w, const MaybeTensor& score_b,
                                        const MaybeTensor& output_w, int64_t gated_heads, bool wants_logits,
                                        bool wants_mean, bool alike, int64_t taps) {
  check_map("z", z);
  const int64_t images = z.size(0), channels = z.size(1), heads = heads_of(z, w, taps);
  check_weight("w", w, heads, channels, taps);
  check_shape("b", b, {heads});
  check_weight("score_w", score_w, heads, channels, taps);
  check_shape("score_b", score_b, {heads});
  STD_TORCH_CHECK(gated_heads >= 0 && gated_heads <= heads, "gated_heads must be from 0 to K = ", heads, ", got ",
                  gated_heads);
  if (output_w.has_value()) check_output_weight(*output_w, gated_heads, channels * taps);

  const ScalarType dtype = accumulator_dtype(z.scalar_type());
  const Layer layer = layer_of(z, w, gated_heads, alike);
  const bool gated = gated_heads > 0;
  const Tensor pooled =
      taps == 1 ? empty({images, heads, channels}, dtype) : empty({images, taps, heads, channels}, dtype);
  const Tensor lse = empty({images, heads}, dtype);
  const Tensor logits = wants_logits ? empty({images, heads, layer.positions()}, dtype) : empty({0}, dtype);
  const Tensor scores = gated ? empty({images, heads}, dtype) : empty({0}, dtype);
  const Tensor gates = gated ? empty({images, gated_heads}, dtype) : empty({0}, dtype);
  const Tensor features =
      gated ? empty({images, gated_heads * channels * taps}, z.scalar_type()) : empty({0}, z.scalar_type());
  const Tensor mean = wants_mean ? empty({images, channels}, dtype) : empty({0}, dtype);

  MaybeTensor factor;
  Products products;
  if (output_w.has_value()) {
    const ScalarType weight = weight_dtype(output_w->scalar_type(), z.scalar_type());
    factor = torch::stable::transpose(in_dtype(*output_w, weight), 0, 1);
    if (images_fit(layer, z.numel(), output_w->numel()))
      products.of_images = our_product(features, *factor, z.scalar_type());
  }
  if (images > 0) {
    const MaybeTensor weights[] = {tap_rows(w, taps, dtype), accumulated(b, dtype), tap_rows(score_w, taps, dtype),
                                   accumulated(score_b, dtype)};
    ForwardArguments arguments = {layer,
                                  map_of(z),
                                  data(weights[0]),
                                  data(weights[1]),
                                  data(weights[2]),
                                  data(weights[3]),
                                  written(pooled),
                                  written(lse),
                                  written(logits),
                                  written(mean),
                                  written(scores),
                                  written(gates),
                                  written(features),
                                  nullptr,
                                  nullptr};
    const Kernels& target = kernels();
    Tensor parts, masks;
    if (layer.splits > 1) {
      parts = empty({layer.items(), target.forward_part(arguments)}, ScalarType::Byte);
      arguments.parts = parts.mutable_data_ptr();
    }
    if (taps == 1) {
      in_parallel(layer.items(), z.numel() + products.elements(), target.forward_scratch(arguments),
                  [&](int64_t begin, int64_t end, void* memory) {
                    target.attend_forward(arguments, begin, end, memory);
                    products.multiply_share(begin, end, layer.items());
                  });
      if (layer.splits > 1)
        in_parallel(images, layer.items() * heads * channels, 1,
                    [&](int64_t begin, int64_t end, void*) { target.merge_splits(arguments, begin, end); });
    } else {
      masks = empty({images, heads, layer.height + 2, layer.width + 2}, dtype);
      arguments.masks = masks.mutable_data_ptr();
      in_stages(layer, {Stage::kLogits, Stage::kMasks, Stage::kMaps, Stage::kMerge}, [&](Stage stage, int64_t items) {
        in_parallel(items, z.numel() * taps, target.forward3x3_scratch(arguments),
                    [&](int64_t begin, int64_t end, void* memory) {
                      target.attend3x3_forward(arguments, stage, begin, end, memory);
                    });
      });
    }
  }
  const Tensor by_channel = taps == 1 ? pooled : torch::stable::transpose(torch::stable::transpose(pooled, 1, 2), 2, 3);
  MaybeTensor hypothesis;
  if (products.of_images.has_value())
    hypothesis = products.of_images->out;
  else if (output_w.has_value())
    hypothesis = multiplied(features, *factor);
  return {{by_channel, lse, logits, scores, gates, features, mean}, hypothesis};
}

Outputs gated_attend(const Tensor& z, const Tensor& w, const MaybeTensor& b, const MaybeTensor& score_w,
                     const MaybeTensor& score_b, int64_t gated_heads, bool wants_logits, bool wants_mean, bool alike) {
  return forward(z, w, b, score_w, score_b, std::nullopt, gated_heads, wants_logits, wants_mean, alike, 1).first;
}

Outputs gated_attend3x3(const Tensor& z, const Tensor& w, const MaybeTensor& b, const MaybeTensor& score_w,
                        const MaybeTensor& score_b, int64_t gated_heads, bool wants_mean, bool alike) {
  return forward(z, w, b, score_w, score_b, std::nullopt, gated_heads, true, wants_mean, alike, 9).first;
}

// Memory new to the process is cleared page by page as it is first written: with small pages that takes longer than
// the backward itself. A hint, for the pages that the tensor has to itself; the system may ignore it.
void ask_for_large_pages([[maybe_unused]] const Tensor& tensor) {
#if defined(__linux__)
  const int64_t bytes = tensor.numel() * static_cast<int64_t>(tensor.element_size());
  if (bytes < kLargePagesBytes) return;
  const uintptr_t page = sysconf(_SC_PAGESIZE), data = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t begin = (data + page - 1) / page * page, end = (data + bytes) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// z's gradient, contiguous or channels_last.
Tensor empty_gradient(const Tensor& z, bool channels_last) {
  const int64_t channels = z.size(1), width = z.size(-1), positions = z.size(2) * (z.dim() == 4 ? width : 1);
  const int64_t step = channels_last ? channels : 1;
  std::vector<int64_t> strides = {channels * positions, channels_last ? 1 : positions};
  if (z.dim() == 4) strides.push_back(step * width);
  strides.push_back(step);
  std::array<StableIValue, 7> stack{torch::stable::detail::from(z),
                                    torch::stable::detail::from(z.sizes()),
                                    torch::stable::detail::from(torch::headeronly::IntHeaderOnlyArrayRef(strides)),
                                    torch::stable::detail::from(std::optional<ScalarType>()),
                                    torch::stable::detail::from(std::optional<torch::headeronly::Layout>()),
                                    torch::stable::detail::from(std::optional<torch::stable::Device>()),
                                    torch::stable::detail::from(std::optional<bool>())};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::new_empty_strided", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor gradient = torch::stable::detail::to<Tensor>(stack[0]);
  ask_for_large_pages(gradient);
  return gradient;
}

// sum over r of weights[r][k] rows[r][k][c] in `dtype`, [K, C] of rows [R, K, C]; of rows [R, K], [K].
Tensor summed(const Kernels& target, const Tensor& rows, const MaybeTensor& weights, ScalarType dtype) {
  const int64_t count = rows.size(0), heads = rows.size(1), channels = rows.dim() == 3 ? rows.size(2) : 1;
  const Tensor sums =
      rows.dim() == 3 ? empty({heads, channels}, rows.scalar_type()) : empty({heads}, rows.scalar_type());
  const Kind kind = kind_of(rows.scalar_type());
  const void *from = rows.const_data_ptr(), *weight = data(weights);
  void* to = sums.mutable_data_ptr();
  torch::stable::parallel_for(0, heads * channels, kAdditionsPerThread / count + 1, [&](int64_t begin, int64_t end) {
    target.weight_sums(kind, from, weight, count, heads, channels, to, begin, end);
  });
  return in_dtype(sums, dtype);
}

// products: still to be computed; grad_features may be one of them.
Gradients backward(const Tensor& z, const Tensor& w, const MaybeTensor& b, const MaybeTensor& score_w,
                   const Tensor& pooled, const Tensor& lse, const MaybeTensor& logits, const MaybeTensor& scores,
                   const MaybeTensor& gates, const MaybeTensor& grad_pooled, const MaybeTensor& grad_lse,
                   const MaybeTensor& grad_logits, const MaybeTensor& grad_scores, const MaybeTensor& grad_gates,
                   const MaybeTensor& grad_features, const MaybeTensor& grad_mean, const MaybeTensor& upstream,
                   bool needs_z, bool needs_w, bool needs_score, bool channels_last, int64_t taps,
                   Products products = {}) {
  check_map("z", z);
  const int64_t images = z.size(0), channels = z.size(1), heads = heads_of(z, w, taps);
  const int64_t gated = gates.has_value() && gates->dim() == 2 ? gates->size(1) : 0;
  STD_TORCH_CHECK(gated <= heads, "gates must be [N, K'] with K' at most K = ", heads, ", got ", gated, " columns");
  const Layer layer = layer_of(z, w, gated, false);  // no result of an image depends on how it is cut here
  check_weight("w", w, heads, channels, taps);
  check_shape("b", b, {heads});
  check_weight("score_w", score_w, heads, channels, taps);
  for (const auto& [name, tensor] :
       {std::pair<const char*, MaybeTensor>{"pooled", pooled}, {"grad_pooled", grad_pooled}}) {
    if (taps == 1)
      check_shape(name, tensor, {images, heads, channels});
    else
      check_shape(name, tensor, {images, heads, channels, taps});
  }
  check_shape("lse", lse, {images, heads});
  check_shape("logits", logits, {images, heads, layer.positions()});
  if (gated > 0) {
    STD_TORCH_CHECK(scores.has_value(), "scores must come with gates, got None");
    check_shape("scores", scores, {images, heads});
    check_shape("gates", gates, {images, gated});
  }
  check_shape("grad_lse", grad_lse, {images, heads});
  check_shape("grad_logits", grad_logits, {images, heads, layer.positions()});
  check_shape("grad_scores", grad_scores, {images, heads});
  check_shape("grad_gates", grad_gates, {images, gated});
  check_shape("grad_features", grad_features, {images, gated * channels * taps});
  check_dtype("grad_features", grad_features, "z", z);
  check_shape("grad_mean", grad_mean, {images, channels});
  if (upstream.has_value()) check_like("upstream", *upstream, "z", z);

  const ScalarType dtype = accumulator_dtype(z.scalar_type());
  const bool scored = needs_score && score_w.has_value();
  Tensor dz = needs_z ? empty_gradient(z, channels_last) : empty({0}, z.scalar_type());
  const Tensor none = empty({0}, dtype);
  if (images == 0) {
    const auto zeros = [&](bool wanted, ScalarType kind) {
      Tensor rows = empty({wanted ? layer.rows() : 0, channels}, kind);
      torch::stable::zero_(rows);
      return wanted ? weight_of(rows, heads, taps, channels) : empty({0}, kind);
    };
    Tensor dscore_b = empty({scored ? heads : 0}, dtype);
    torch::stable::zero_(dscore_b);
    return {dz, zeros(needs_w, w.scalar_type()), zeros(scored, scored ? score_w->scalar_type() : w.scalar_type()),
            dscore_b};
  }
  if (products.of_images.has_value() && !images_fit(layer, z.numel(), products.of_images->b.numel()))
    multiply(products.of_images);
  if (taps > 1) multiply(products.of_weight);
  MaybeTensor features = grad_features;
  if (features.has_value() && taps > 1) {  // taps before channels
    const Tensor rows = torch::stable::reshape(*features, {images, gated, channels, taps});
    features = torch::stable::transpose(rows, 2, 3);
  }
  const MaybeTensor small[] = {tap_rows(w, taps, dtype),
                               accumulated(b, dtype),
                               tap_rows(score_w, taps, dtype),
                               tap_rows(pooled, taps, dtype),
                               accumulated(lse, dtype),
                               accumulated(scores, dtype),
                               accumulated(gates, dtype),
                               contiguous(features),
                               accumulated(grad_gates, dtype),
                               accumulated(grad_scores, dtype),
                               tap_rows(grad_pooled, taps, dtype),
                               accumulated(grad_lse, dtype),
                               accumulated(grad_logits, dtype),
                               accumulated(grad_mean, dtype),
                               accumulated(logits, dtype)};
  const int64_t groups = std::clamp<int64_t>(z.numel() / kElementsOfGroup, 1, std::min(layer.items(), kMostGroups));
  const Tensor dw_shares = needs_w ? empty({groups, layer.rows(), channels}, dtype) : none;
  const Tensor dt = scored ? empty({images, heads}, dtype) : none;
  const Map tap = upstream.has_value() ? map_of(*upstream) : Map{};
  const bool streams = needs_z && z.numel() * static_cast<int64_t>(z.element_size()) >= kStreamedBytes;
  Tensor dmasks, masks;
  if (taps > 1) {
    dmasks = empty({images, heads, layer.positions()}, dtype);
    masks = empty({images, 2 * heads, layer.height + 2, layer.width + 2}, dtype);
  }
  const BackwardArguments arguments = {layer,
                                       map_of(z),
                                       tap,
                                       data(small[0]),
                                       data(small[1]),
                                       data(small[2]),
                                       data(small[3]),
                                       data(small[4]),
                                       data(small[5]),
                                       data(small[6]),
                                       data(small[7]),
                                       data(small[8]),
                                       data(small[9]),
                                       data(small[10]),
                                       data(small[11]),
                                       data(small[12]),
                                       data(small[13]),
                                       written(dz),
                                       channels_last,
                                       streams,
                                       written(dt),
                                       groups,
                                       written(dw_shares),
                                       data(small[14]),
                                       taps > 1 ? dmasks.mutable_data_ptr() : nullptr,
                                       taps > 1 ? masks.mutable_data_ptr() : nullptr};
  const Kernels& target = kernels();
  if (taps == 1) {
    in_parallel(groups, z.numel() + products.elements(), target.backward_scratch(arguments),
                [&](int64_t begin, int64_t end, void* memory) {
                  products.multiply_share(begin, end, groups);
                  target.attend_backward(arguments, begin, end, memory);
                });
  } else {
    in_stages(layer, {Stage::kLogits, Stage::kMasks, Stage::kMaps}, [&](Stage stage, int64_t items) {
      const bool by_group = stage == Stage::kAll || stage == Stage::kMaps;
      in_parallel(by_group ? groups : items, z.numel() * taps, target.backward3x3_scratch(arguments),
                  [&](int64_t begin, int64_t end, void* memory) {
                    target.attend3x3_backward(arguments, stage, begin, end, memory);
                  });
    });
  }
  Tensor dw = empty({0}, w.scalar_type()), dscore_w = empty({0}, w.scalar_type()), dscore_b = none;
  if (needs_w) dw = weight_of(summed(target, dw_shares, std::nullopt, w.scalar_type()), heads, taps, channels);
  if (scored) {
    const Tensor rows = torch::stable::view(*small[3], {images, heads, taps * channels});
    dscore_w = weight_of(summed(target, rows, dt, score_w->scalar_type()), heads, taps, channels);
    dscore_b = summed(target, dt, std::nullopt, dtype);
  }
  return {dz, dw, dscore_w, dscore_b};
}

Gradients gated_attend_backward(const Tensor& z, const Tensor& w, const MaybeTensor& b, const MaybeTensor& score_w,
                                const Tensor& pooled, const Tensor& lse, const MaybeTensor& scores,
                                const MaybeTensor& gates, const MaybeTensor& grad_pooled, const MaybeTensor& grad_lse,
                                const MaybeTensor& grad_logits, const MaybeTensor& grad_scores,
                                const MaybeTensor& grad_gates, const MaybeTensor& grad_features,
                                const MaybeTensor& grad_mean, const MaybeTensor& upstream, bool needs_z, bool needs_w,
                                bool needs_score, bool channels_last) {
  return backward(z, w, b, score_w, pooled, lse, std::nullopt, scores, gates, grad_pooled, grad_lse, grad_logits,
                  grad_scores, grad_gates, grad_features, grad_mean, upstream, needs_z, needs_w, needs_score,
                  channels_last, 1);
}

Gradients gated_attend3x3_backward(const Tensor& z, const Tensor& w, const MaybeTensor& score_w, const Tensor& pooled,
                                   const Tensor& lse, const Tensor& logits, const MaybeTensor& scores,
                                   const MaybeTensor& gates, const MaybeTensor& grad_pooled,
                                   const MaybeTensor& grad_lse, const MaybeTensor& grad_logits,
                                   const MaybeTensor& grad_scores, const MaybeTensor& grad_gates,
                                   const MaybeTensor& grad_features, const MaybeTensor& grad_mean,
                                   const MaybeTensor& upstream, bool needs_z, bool needs_w, bool needs_score,
                                   bool channels_last) {
  return backward(z, w, std::nullopt, score_w, pooled, lse, logits, scores, gates, grad_pooled, grad_lse, grad_logits,
                  grad_scores, grad_gates, grad_features, grad_mean, upstream, needs_z, needs_w, needs_score,
                  channels_last, 9);
}

RectifyArguments rectify_arguments(const Tensor& hypotheses, const Tensor& scores, const std::string& mix,
                                   const std::optional<std::string>& gating) {
  STD_TORCH_CHECK(hypotheses.dim() == 3 && hypotheses.size(1) > 0 && hypotheses.size(2) > 0,
                  "hypotheses must be [N, D+1, L], got ", shape_of(hypotheses));
  check_float("hypotheses", hypotheses);
  check_shape("scores", scores, {hypotheses.size(0), hypotheses.size(1)});
  RectifyArguments arguments = {};
  STD_TORCH_CHECK(mix == "logit" || mix == "log" || mix == "prob", "mix must be logit, log or prob, got ", mix);
  arguments.mix = mix == "logit" ? Mix::kLogit : mix == "log" ? Mix::kLog : Mix::kProb;
  STD_TORCH_CHECK(!gating.has_value() || *gating == "softmax" || *gating == "sigmoid",
                  "gating must be softmax, sigmoid or None, got ", gating.value_or(""));
  arguments.gating = !gating.has_value() ? Gating::kEqual : *gating == "softmax" ? Gating::kSoftmax : Gating::kSigmoid;
  arguments.kind = kind_of(hypotheses.scalar_type());
  arguments.images = hypotheses.size(0);
  arguments.hypotheses = hypotheses.size(1);
  arguments.labels = hypotheses.size(2);
  return arguments;
}

int64_t rectify_scratch(const RectifyArguments& arguments) {
  return 3 * arguments.hypotheses * static_cast<int64_t>(sizeof(double));
}

std::tuple<Tensor, Tensor> rectify(const Tensor& hypotheses, const Tensor& scores, const std::string& mix,
                                   const std::optional<std::string>& gating) {
  RectifyArguments arguments = rectify_arguments(hypotheses, scores, mix, gating);
  const ScalarType dtype = accumulator_dtype(hypotheses.scalar_type());
  const Tensor output = empty({arguments.images, arguments.labels}, dtype);
  const Tensor lse =
      arguments.mix == Mix::kLogit ? empty({0}, dtype) : empty({arguments.images, arguments.hypotheses}, dtype);
  const MaybeTensor inputs[] = {contiguous(hypotheses), accumulated(scores, dtype)};
  arguments.h = data(inputs[0]);
  arguments.scores = data(inputs[1]);
  arguments.output = written(output);
  arguments.lse = written(lse);
  const Kernels& target = kernels();
  in_parallel(arguments.images, hypotheses.numel(), rectify_scratch(arguments),
              [&](int64_t begin, int64_t end, void* memory) { target.rectify_forward(arguments, begin, end, memory); });
  return {output, lse};
}

std::tuple<Tensor, Tensor> rectify_backward(const Tensor& grad, const Tensor& hypotheses, const Tensor& scores,
                                            const Tensor& output, const Tensor& lse, const std::string& mix,
                                            const std::optional<std::string>& gating) {
  RectifyArguments arguments = rectify_arguments(hypotheses, scores, mix, gating);
  const ScalarType dtype = accumulator_dtype(hypotheses.scalar_type());
  check_shape("grad", grad, {arguments.images, arguments.labels});
  check_shape("output", output, {arguments.images, arguments.labels});
  if (arguments.mix != Mix::kLogit) check_shape("lse", lse, {arguments.images, arguments.hypotheses});
  const Tensor dh = empty({arguments.hypotheses, arguments.images, arguments.labels}, hypotheses.scalar_type());
  const Tensor ds = empty({arguments.images, arguments.hypotheses}, dtype);
  const MaybeTensor inputs[] = {contiguous(hypotheses), accumulated(scores, dtype), accumulated(grad, dtype),
                                accumulated(output, dtype), accumulated(lse, dtype)};
  arguments.h = data(inputs[0]);
  arguments.scores = data(inputs[1]);
  arguments.grad = data(inputs[2]);
  arguments.output = const_cast<void*>(data(inputs[3]));
  arguments.lse = const_cast<void*>(data(inputs[4]));
  arguments.dh = written(dh);
  arguments.ds = written(ds);
  const Kernels& target = kernels();
  in_parallel(
      arguments.images, hypotheses.numel(), rectify_scratch(arguments),
      [&](int64_t begin, int64_t end, void* memory) { target.rectify_backward(arguments, begin, end, memory); });
  return {dh, in_dtype(ds, scores.scalar_type())};
}

void check_order(int64_t taps_first) {
  STD_TORCH_CHECK(taps_first == 0, "taps_first must be false on a CPU, got true");
}

const Tensor& given(const char* name, const MaybeTensor& tensor) {
  STD_TORCH_CHECK(tensor.has_value(), name, " must be a tensor, got None");
  return *tensor;
}

MaybeTensor only_if(bool wanted, const Tensor& tensor) { return wanted ? MaybeTensor(tensor) : std::nullopt; }

// All that a layer makes forward, None for what was not asked for: of z, w, b, score_w, score_b and output_w, by
// gated_heads, wants_logits, wants_mean, alike and taps_first.
Tensors layer(const Tensors& tensors, const Options& options) {
  check_order(options[4]);
  const Tensor &z = given("z", tensors[0]), &w = given("w", tensors[1]);
  const int64_t gated_heads = options[0], taps = w.dim() == 4 ? 9 : 1;
  const bool wants_logits = options[1] != 0 || taps > 1, wants_mean = options[2] != 0, alike = options[3] != 0;
  const auto [outputs, hypothesis] =
      forward(z, w, tensors[2], tensors[3], tensors[4], tensors[5], gated_heads, wants_logits, wants_mean, alike, taps);
  const auto& [pooled, lse, logits, scores, gates, features, mean] = outputs;
  const bool gated = gated_heads > 0;
  return {pooled,
          lse,
          only_if(wants_logits, logits),
          only_if(gated, scores),
          only_if(gated, gates),
          only_if(gated, features),
          only_if(wants_mean, mean),
          hypothesis};
}

// Gradients of z, w, score_w, score_b (in lse's dtype) and W_O, None where they are not needed: arguments as the
// operator has them in ops.py.
Tensors layer_backward(const Tensors& tensors, const Options& options) {
  check_order(options[6]);
  const Tensor &z = given("z", tensors[0]), &w = given("w", tensors[1]);
  const Tensor &pooled = given("pooled", tensors[5]), &lse = given("lse", tensors[6]);
  const MaybeTensor &output_w = tensors[4], &gates = tensors[9], &features = tensors[10];
  const MaybeTensor &grad_hypothesis = tensors[18], &upstream = tensors[19];
  const bool needs_z = options[0] != 0, needs_w = options[1] != 0, needs_score_w = options[2] != 0;
  const bool needs_score_b = options[3] != 0, needs_output_w = options[4] != 0, channels_last = options[5] != 0;
  const bool needs_score = needs_score_w || needs_score_b, needs_attention = needs_z || needs_w || needs_score;
  const int64_t taps = w.dim() == 4 ? 9 : 1;
  check_map("z", z);
  MaybeTensor grad_features = tensors[16];
  Tensors gradients(5);
  Products products;
  if (grad_hypothesis.has_value() && features.has_value() && output_w.has_value()) {
    const int64_t gated = gates.has_value() && gates->dim() == 2 ? gates->size(1) : 0;
    check_output_weight(*output_w, gated, z.size(1) * taps);
    check_shape("features", *features, {z.size(0), output_w->size(1)});
    check_dtype("features", features, "z", z);
    check_shape("grad_hypothesis", *grad_hypothesis, {z.size(0), output_w->size(0)});
    check_dtype("grad_hypothesis", grad_hypothesis, "z", z);
    const ScalarType weight = weight_dtype(output_w->scalar_type(), z.scalar_type());
    if (needs_output_w)
      gradients[4] = begun(torch::stable::transpose(*grad_hypothesis, 0, 1), *features, weight, products.of_weight);
    const Tensor factor = in_dtype(*output_w, weight);
    if (needs_attention && grad_features.has_value())
      grad_features = torch::stable::subtract(multiplied(*grad_hypothesis, factor), *grad_features, -1);
    else if (needs_attention)
      grad_features = begun(*grad_hypothesis, factor, z.scalar_type(), products.of_images);
  }
  bool reaches_attention = grad_features.has_value() || tensors[17].has_value();
  for (int i = 11; i < 16; ++i) reaches_attention = reaches_attention || tensors[i].has_value();
  if (needs_attention && reaches_attention) {
    const auto [dz, dw, dscore_w, dscore_b] =
        backward(z, w, taps == 1 ? tensors[2] : std::nullopt, tensors[3], pooled, lse,
                 taps == 1 ? std::nullopt : MaybeTensor(given("logits", tensors[7])), tensors[8], gates, tensors[11],
                 tensors[12], tensors[13], tensors[14], tensors[15], grad_features, tensors[17], upstream, needs_z,
                 needs_w, needs_score, channels_last, taps, products);
    gradients[0] = only_if(needs_z, dz);
    gradients[1] = only_if(needs_w, dw);
    gradients[2] = only_if(needs_score_w, dscore_w);
    gradients[3] = only_if(needs_score_b, dscore_b);
  } else {
    multiply(products.of_weight);
  }
  if (gradients[4].has_value()) gradients[4] = in_dtype(*gradients[4], output_w->scalar_type());
  return gradients;
}

// Either as the dispatcher calls it. An operator returns tensors: empty ones for None.
void operate(Tensors (*of)(const Tensors&, const Options&), const char* arguments, StableIValue* stack,
             uint64_t count) {
  check_count(arguments, count);
  const Tensors tensors = tensors_of(stack, arguments);
  Options options;
  for (size_t i = tensors.size(); arguments[i] != 0; ++i)
    options.push_back(arguments[i] == 'b' ? torch::stable::detail::to<bool>(stack[i])
                                          : torch::stable::detail::to<int64_t>(stack[i]));
  const ScalarType dtype = tensors[0]->scalar_type();
  for (const MaybeTensor& output : of(tensors, options))
    *stack++ = torch::stable::detail::from(output.has_value() ? *output : empty({0}, dtype));
}

void layer_operator(StableIValue* stack, uint64_t count, uint64_t) { operate(layer, "tt????ibbbb", stack, count); }

void layer_backward_operator(StableIValue* stack, uint64_t count, uint64_t) {
  operate(layer_backward, "tt???tt?????????????bbbbbbb", stack, count);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ar_kernels_native, CPU, m) {
  m.impl("gated_attend", TORCH_BOX(&gated_attend));
  m.impl("gated_attend_backward", TORCH_BOX(&gated_attend_backward));
  m.impl("gated_attend3x3", TORCH_BOX(&gated_attend3x3));
  m.impl("gated_attend3x3_backward", TORCH_BOX(&gated_attend3x3_backward));
  m.impl("rectify", TORCH_BOX(&rectify));
  m.impl("rectify_backward", TORCH_BOX(&rectify_backward));
  m.impl("product", TORCH_BOX(&product));
  m.impl("layer", &layer_operator);
  m.impl("layer_backward", &layer_backward_operator);
}

}  // namespace ar_kernels

AR_DIRECT int64_t ar_kernels_layer(const AtenTensorHandle* tensors, size_t count, const int64_t* options,
                                   size_t options_count, AtenTensorHandle* outputs, size_t most, const char** error) {
  return ar_kernels::hand_over(outputs, most, error, [&] {
    return ar_kernels::layer(ar_kernels::owned(tensors, count), {options, options + options_count});
  });
}

AR_DIRECT int64_t ar_kernels_layer_backward(const AtenTensorHandle* tensors, size_t count, const int64_t* options,
                                            size_t options_count, AtenTensorHandle* outputs, size_t most,
                                            const char** error) {
  return ar_kernels::hand_over(outputs, most, error, [&] {
    return ar_kernels::layer_backward(ar_kernels::owned(tensors, count), {options, options + options_count});
  });
}

// What env prints: which target's kernels run on this machine.
extern "C" __attribute__((visibility("default"))) const char* ar_kernels_target() {
  try {
    return ar_kernels::kernels().target;
  } catch (const std::exception&) {
    return "";
  }
}
