// The operators on the CPU: checks, allocation, how the work is cut, and threads. ar_kernels/ops.py has the schemas.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <memory>
#include <new>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "targets.h"

namespace ar_kernels {

namespace {

using MaybeTensor = std::optional<Tensor>;

// Bytes of a tile: a tile of channels_last rows stays in the first-level cache; NCHW has its rows far apart and wants
// long ones, in the second level.
constexpr int64_t kChannelsLastTileBytes = 1 << 15;
constexpr int64_t kContiguousTileBytes = 1 << 18;
constexpr int64_t kFewestPositions = 16;  // of a tile, if the map has them
constexpr int64_t kMostPositions = 128;   // of channels_last, where one sum runs over all of them: it rounds less so
// Parts that the work is cut into for threads to share: by shape alone, so that sums don't depend on the threads.
constexpr int64_t kItems = 32;
constexpr int64_t kElementsOfGroup = 1 << 16, kMostGroups = 128;
constexpr int64_t kStreamedBytes = 1 << 23;       // of dZ: a larger one leaves the caches before it is read again
constexpr int64_t kElementsPerThread = 1 << 17;   // less is not worth another thread
constexpr int64_t kAdditionsPerThread = 1 << 20;  // likewise, of the last sums

Kind kind_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half: return Kind::kHalf;
    case ScalarType::BFloat16: return Kind::kBFloat16;
    case ScalarType::Double: return Kind::kDouble;
    default: return Kind::kFloat;
  }
}

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

Layer layer_of(const Tensor& z, const Tensor& w, int64_t gated) {
  Layer layer;
  layer.kind = kind_of(z.scalar_type());
  layer.images = z.size(0);
  layer.channels = z.size(1);
  layer.height = z.dim() == 4 ? z.size(2) : 1;
  layer.width = z.size(-1);
  layer.heads = w.size(0);
  layer.gated = gated;
  layer.positions_adjacent = positions_are_adjacent(map_of(z), layer.channels, layer.height, layer.width);

  const int64_t bytes = layer.positions_adjacent ? kContiguousTileBytes : kChannelsLastTileBytes;
  const int64_t element = layer.kind == Kind::kDouble ? 8 : layer.kind == Kind::kFloat ? 4 : 2;
  const int64_t step = layer.positions_adjacent ? 4 * kFewestPositions : kFewestPositions;
  const int64_t positions = layer.positions();
  layer.tile = std::min(positions, std::max(step, bytes / (layer.channels * element) / step * step));
  if (!layer.positions_adjacent) layer.tile = std::min(layer.tile, kMostPositions);
  const int64_t tiles = (positions + layer.tile - 1) / layer.tile;
  const int64_t wanted = std::min(tiles, (kItems + layer.images - 1) / std::max<int64_t>(layer.images, 1));
  layer.split_length = (tiles + wanted - 1) / std::max<int64_t>(wanted, 1) * layer.tile;
  layer.splits = layer.images == 0 ? 1 : (positions + layer.split_length - 1) / layer.split_length;
  return layer;
}

// Small tensors in the accumulator's dtype, contiguous; what they already are costs nothing.
MaybeTensor accumulated(const MaybeTensor& tensor, ScalarType dtype) {
  if (!tensor.has_value()) return tensor;
  const Tensor converted = tensor->scalar_type() == dtype ? *tensor : torch::stable::to(*tensor, dtype);
  return converted.is_contiguous() ? converted : torch::stable::contiguous(converted);
}

MaybeTensor contiguous(const MaybeTensor& tensor) {
  if (!tensor.has_value() || tensor->is_contiguous()) return tensor;
  return torch::stable::contiguous(*tensor);
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_attend(
    const Tensor& z, const Tensor& w, const MaybeTensor& b, const MaybeTensor& score_w, const MaybeTensor& score_b,
    int64_t gated_heads, bool wants_logits, bool wants_mean) {
  check_map("z", z);
  const int64_t images = z.size(0), channels = z.size(1);
  const int64_t heads = w.dim() == 2 ? w.size(0) : 0;
  STD_TORCH_CHECK(heads > 0, "w must be [K, C] with a head, got ", shape_of(w));
  check_shape("w", w, {heads, channels});
  check_shape("b", b, {heads});
  check_shape("score_w", score_w, {heads, channels});
  check_shape("score_b", score_b, {heads});
  STD_TORCH_CHECK(gated_heads >= 0 && gated_heads <= heads, "gated_heads must be from 0 to K = ", heads, ", got ",
                  gated_heads);

  const ScalarType dtype = accumulator_dtype(z.scalar_type());
  const Layer layer = layer_of(z, w, gated_heads);
  const bool gated = gated_heads > 0;
  const Tensor pooled = empty({images, heads, channels}, dtype), lse = empty({images, heads}, dtype);
  const Tensor logits = wants_logits ? empty({images, heads, layer.positions()}, dtype) : empty({0}, dtype);
  const Tensor scores = gated ? empty({images, heads}, dtype) : empty({0}, dtype);
  const Tensor gates = gated ? empty({images, gated_heads}, dtype) : empty({0}, dtype);
  const Tensor features =
      gated ? empty({images, gated_heads * channels}, z.scalar_type()) : empty({0}, z.scalar_type());
  const Tensor mean = wants_mean ? empty({images, channels}, dtype) : empty({0}, dtype);

  if (images > 0) {
    const MaybeTensor weights[] = {accumulated(w, dtype), accumulated(b, dtype), accumulated(score_w, dtype),
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
                                  nullptr};
    const Kernels& target = kernels();
    Tensor parts;
    if (layer.splits > 1) {
      parts = empty({layer.items(), target.forward_part(arguments)}, ScalarType::Byte);
      arguments.parts = parts.mutable_data_ptr();
    }
    in_parallel(
        layer.items(), z.numel(), target.forward_scratch(arguments),
        [&](int64_t begin, int64_t end, void* memory) { target.attend_forward(arguments, begin, end, memory); });
    if (layer.splits > 1)
      in_parallel(images, layer.items() * heads * channels, 1,
                  [&](int64_t begin, int64_t end, void*) { target.merge_splits(arguments, begin, end); });
  }
  return {pooled, lse, logits, scores, gates, features, mean};
}

// z's gradient, contiguous or channels_last.
Tensor empty_gradient(const Tensor& z, bool channels_last) {
  const int64_t channels = z.size(1), width = z.size(-1),
                positions = z.numel() / std::max<int64_t>(z.size(0) * channels, 1);
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
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::new_empty_strided", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
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
  return sums.scalar_type() == dtype ? sums : torch::stable::to(sums, dtype);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_attend_backward(
    const Tensor& z, const Tensor& w, const MaybeTensor& b, const MaybeTensor& score_w, const Tensor& pooled,
    const Tensor& lse, const MaybeTensor& scores, const MaybeTensor& gates, const MaybeTensor& grad_pooled,
    const MaybeTensor& grad_lse, const MaybeTensor& grad_logits, const MaybeTensor& grad_scores,
    const MaybeTensor& grad_gates, const MaybeTensor& grad_features, const MaybeTensor& grad_mean,
    const MaybeTensor& upstream, bool needs_z, bool needs_w, bool needs_score, bool channels_last) {
  check_map("z", z);
  const int64_t images = z.size(0), channels = z.size(1);
  const int64_t heads = w.dim() == 2 ? w.size(0) : 0;
  STD_TORCH_CHECK(heads > 0, "w must be [K, C] with a head, got ", shape_of(w));
  const int64_t gated = gates.has_value() && gates->dim() == 2 ? gates->size(1) : 0;
  STD_TORCH_CHECK(gated <= heads, "gates must be [N, K'] with K' at most K = ", heads, ", got ", gated, " columns");
  const Layer layer = layer_of(z, w, gated);
  check_shape("w", w, {heads, channels});
  check_shape("b", b, {heads});
  check_shape("score_w", score_w, {heads, channels});
  check_shape("pooled", pooled, {images, heads, channels});
  check_shape("lse", lse, {images, heads});
  if (gated > 0) {
    STD_TORCH_CHECK(scores.has_value(), "scores must come with gates, got None");
    check_shape("scores", scores, {images, heads});
    check_shape("gates", gates, {images, gated});
  }
  check_shape("grad_pooled", grad_pooled, {images, heads, channels});
  check_shape("grad_lse", grad_lse, {images, heads});
  check_shape("grad_logits", grad_logits, {images, heads, layer.positions()});
  check_shape("grad_scores", grad_scores, {images, heads});
  check_shape("grad_gates", grad_gates, {images, gated});
  check_shape("grad_features", grad_features, {images, gated * channels});
  check_dtype("grad_features", grad_features, "z", z);
  check_shape("grad_mean", grad_mean, {images, channels});
  if (upstream.has_value()) check_like("upstream", *upstream, "z", z);

  const ScalarType dtype = accumulator_dtype(z.scalar_type());
  const bool scored = needs_score && score_w.has_value();
  Tensor dz = needs_z ? empty_gradient(z, channels_last) : empty({0}, z.scalar_type());
  if (images == 0) {
    Tensor dw = needs_w ? empty({heads, channels}, w.scalar_type()) : empty({0}, w.scalar_type());
    Tensor dscore_w = scored ? empty({heads, channels}, score_w->scalar_type()) : empty({0}, w.scalar_type());
    Tensor dscore_b = empty({scored ? heads : 0}, dtype);
    for (Tensor* sums : {&dw, &dscore_w, &dscore_b}) torch::stable::zero_(*sums);
    return {dz, dw, dscore_w, dscore_b};
  }
  const MaybeTensor small[] = {
      accumulated(w, dtype),           accumulated(b, dtype),           accumulated(score_w, dtype),
      accumulated(pooled, dtype),      accumulated(lse, dtype),         accumulated(scores, dtype),
      accumulated(gates, dtype),       contiguous(grad_features),       accumulated(grad_gates, dtype),
      accumulated(grad_scores, dtype), accumulated(grad_pooled, dtype), accumulated(grad_lse, dtype),
      accumulated(grad_logits, dtype), accumulated(grad_mean, dtype)};
  const int64_t groups = std::clamp<int64_t>(z.numel() / kElementsOfGroup, 1, std::min(layer.items(), kMostGroups));
  const Tensor none = empty({0}, dtype);
  const Tensor dw_shares = needs_w ? empty({groups, heads, channels}, dtype) : none;
  const Tensor dt = scored ? empty({images, heads}, dtype) : none;
  const Map tap = upstream.has_value() ? map_of(*upstream) : Map{};
  const bool streams = needs_z && z.numel() * static_cast<int64_t>(z.element_size()) >= kStreamedBytes;
  const BackwardArguments arguments = {layer,           map_of(z),         tap,
                                       data(small[0]),  data(small[1]),    data(small[2]),
                                       data(small[3]),  data(small[4]),    data(small[5]),
                                       data(small[6]),  data(small[7]),    data(small[8]),
                                       data(small[9]),  data(small[10]),   data(small[11]),
                                       data(small[12]), data(small[13]),   written(dz),
                                       channels_last,   streams,           written(dt),
                                       groups,          written(dw_shares)};
  const Kernels& target = kernels();
  in_parallel(groups, z.numel(), target.backward_scratch(arguments),
              [&](int64_t begin, int64_t end, void* memory) { target.attend_backward(arguments, begin, end, memory); });
  return {dz, needs_w ? summed(target, dw_shares, std::nullopt, w.scalar_type()) : empty({0}, w.scalar_type()),
          scored ? summed(target, *small[3], dt, score_w->scalar_type()) : empty({0}, w.scalar_type()),
          scored ? summed(target, dt, std::nullopt, dtype) : none};
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
  return 2 * arguments.hypotheses * static_cast<int64_t>(sizeof(double));
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
  const Tensor dh = empty({arguments.images, arguments.hypotheses, arguments.labels}, hypotheses.scalar_type());
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
  return {dh, scores.scalar_type() == dtype ? ds : torch::stable::to(ds, scores.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ar_kernels_native, CPU, m) {
  m.impl("gated_attend", TORCH_BOX(&gated_attend));
  m.impl("gated_attend_backward", TORCH_BOX(&gated_attend_backward));
  m.impl("rectify", TORCH_BOX(&rectify));
  m.impl("rectify_backward", TORCH_BOX(&rectify_backward));
}

}  // namespace ar_kernels

// What env prints: which target's kernels run on this machine.
extern "C" __attribute__((visibility("default"))) const char* ar_kernels_target() {
  try {
    return ar_kernels::kernels().target;
  } catch (const std::exception&) {
    return "";
  }
}
