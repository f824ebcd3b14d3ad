// The sweeps as operators: what kernels get to know of tensors. ar_kernels/kernels/hopper.py calls them.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <utility>
#include <vector>

#include "../checks.h"
#include "../filling.h"
#include "../handover.h"
#include "../stream.h"
#include "attend_backward.h"
#include "attend_forward.h"

namespace ar_kernels {

namespace {

using Numbers = std::vector<int64_t>;

constexpr int64_t kFewest = 1, kMost = 1 << 30;  // of what the kernels count in 32 bits

bool kind_of(ScalarType dtype, Kind* kind) {
  switch (dtype) {
    case ScalarType::Half: *kind = Kind::kHalf; return true;
    case ScalarType::BFloat16: *kind = Kind::kBFloat16; return true;
    case ScalarType::Float: *kind = Kind::kFloat; return true;
    default: return false;
  }
}

// No strides where positions do not all follow each other at the same distance.
FlatMap map_of(int64_t dims, const int64_t* sizes, const int64_t* strides, void* data) {
  if (dims == 3) return {data, strides[0], strides[1], strides[2]};
  const bool one_column = sizes[3] == 1;
  if (!one_column && sizes[2] > 1 && strides[2] != sizes[3] * strides[3]) return {data, 0, 0, 0};
  return {data, strides[0], strides[1], one_column ? strides[2] : strides[3]};
}

template <class Sweep>
bool set_sizes(Sweep* a, int64_t dims, const int64_t* sizes, int64_t heads) {
  const int64_t positions = dims == 3 ? sizes[2] : sizes[2] * sizes[3];
  for (const int64_t size : {sizes[0], sizes[1], positions, sizes[0] * heads})
    if (size < kFewest || size > kMost) return false;
  a->images = static_cast<int>(sizes[0]);
  a->channels = static_cast<int>(sizes[1]);
  a->positions = static_cast<int>(positions);
  a->heads = static_cast<int>(heads);
  return true;
}

Values values_of(const char* name, const View& view) {
  Values values = {nullptr, Kind::kFloat};
  if (!view.has_value()) return values;
  values.data = view.data;
  STD_TORCH_CHECK(kind_of(view.dtype, &values.kind) && view.is_contiguous(), name,
                  " must be contiguous and float16, bfloat16 or float32, got ",
                  torch::headeronly::toString(view.dtype));
  return values;
}

// Of every channel: of the map's dtype, or float32.
Values weights_of(const char* name, const View& view, Kind kind) {
  const Values values = values_of(name, view);
  STD_TORCH_CHECK(values.kind == kind || values.kind == Kind::kFloat, name, " must be float32 or of z's dtype, got ",
                  torch::headeronly::toString(view.dtype));
  return values;
}

// Of the map's dtype, in whole words of the copy engine.
FlatMap map_of(const char* name, const View& view) {
  constexpr uintptr_t kAlignment = 16;
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(view.data) % kAlignment == 0, name, " must begin at a multiple of ",
                  kAlignment, " bytes");
  return map_of(view.dims, view.sizes, view.strides, view.data);
}

// What is not a map but has its dtype.
void* like_map(const char* name, const View& view, const View& z) {
  check_dtype(name, view, "z", z);
  STD_TORCH_CHECK(!view.has_value() || view.is_contiguous(), name, " must be contiguous");
  return view.data;
}

float* floats(const char* name, const View& view) {
  if (!view.has_value()) return nullptr;
  STD_TORCH_CHECK(view.dtype == ScalarType::Float && view.is_contiguous(), name,
                  " must be contiguous and float32, got ", torch::headeronly::toString(view.dtype));
  return static_cast<float*>(view.data);
}

void check_started(const char* name, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, name, " did not start: ", cudaGetErrorString(error));
}

// The sweeps, the first that takes a map makes it. splits: null where images are never split.
struct Forward {
  bool (*can)(const ForwardSweep&);
  cudaError_t (*sweep)(const ForwardSweep&, cudaStream_t);
  int (*splits)(const ForwardSweep&, bool);
  bool needs_score_w;  // where there are gates
};

// Where every image is to be cut alike, nothing here takes maps that would be spread.
int spread_splits(const ForwardSweep&, bool alike) { return alike ? 0 : 1; }

constexpr Forward kForward[] = {
    {can_sweep_forward_spread, sweep_forward_spread, spread_splits, false},
    {can_sweep_forward, sweep_forward, forward_splits, true},
    {can_sweep_forward_rows, sweep_forward_rows, nullptr, true},
    {can_sweep_forward_floats, sweep_forward_floats, forward_floats_splits, true},
    {can_sweep_forward_float_images, sweep_forward_float_images, nullptr, true},
    {can_sweep_forward_float_rows, sweep_forward_float_rows, forward_float_rows_splits, true},
};

struct Backward {
  bool (*can)(const BackwardSweep&);
  cudaError_t (*sweep)(const BackwardSweep&, cudaStream_t);
  int (*programs)(const BackwardSweep&);
};

constexpr Backward kBackward[] = {
    {can_sweep_backward, sweep_backward, backward_programs},
    {can_sweep_backward_rows, sweep_backward_rows, backward_rows_programs},
    {can_sweep_backward_floats, sweep_backward_floats, backward_floats_programs},
    {can_sweep_backward_float_images, sweep_backward_float_images, backward_float_images_programs},
    {can_sweep_backward_float_rows, sweep_backward_float_rows, backward_float_rows_programs},
};

// Null: there is none.
template <class Entry, size_t kCount, class Sweep>
const Entry* find(const Entry (&entries)[kCount], const Sweep& a) {
  for (const Entry& entry : entries)
    if (entry.can(a)) return &entry;
  return nullptr;
}

// Half precision is alike whichever it is.
Kind kind_of_size(int64_t itemsize) { return itemsize == 4 ? Kind::kFloat : Kind::kHalf; }

// Into how many splits the forward sweep of maps of such sizes and strides, of 2 or 4 bytes a number, cuts an image; 0:
// there is none here. More than 1: it must be given parts, and leaves the rest to a kernel that merges them.
int64_t sweep_forward_splits(Numbers sizes, Numbers strides, int64_t heads, int64_t itemsize, bool alike) {
  ForwardSweep a = {};
  a.kind = a.w.kind = kind_of_size(itemsize);
  a.z = map_of(sizes.size(), sizes.data(), strides.data(), nullptr);
  if (!set_sizes(&a, sizes.size(), sizes.data(), heads)) return 0;
  const Forward* found = find(kForward, a);
  return found == nullptr ? 0 : found->splits == nullptr ? 1 : found->splits(a, alike);
}

void fill_forward(const View* arguments, void* stream) {
  const auto& [z, w, b, score_w, score_b, pooled, lse, logits, mean, scores, gates, features, part_m, part_d, part_p] =
      *reinterpret_cast<const View(*)[15]>(arguments);
  check_map("z", z);
  ForwardSweep a = {};
  STD_TORCH_CHECK(kind_of(z.dtype, &a.kind) && set_sizes(&a, z.dims, z.sizes, w.size(0)),
                  "z is too large or empty, got ", shape_of(z));
  const int64_t images = a.images, channels = a.channels, heads = a.heads;
  check_shape("w", w, {heads, channels});
  check_shape("b", b, {heads});
  check_shape("score_w", score_w, {heads, channels});
  check_shape("score_b", score_b, {heads});
  check_shape("pooled", pooled, {images, heads, channels});
  check_shape("lse", lse, {images, heads});
  check_shape("logits", logits, {images, heads, a.positions});
  check_shape("mean", mean, {images, channels});
  if (gates.has_value()) {
    const int64_t gated = gates.dim() == 2 ? gates.size(1) : 0;
    STD_TORCH_CHECK(gated <= heads && scores.has_value() && features.has_value(),
                    "gates [N, K'] must come with scores and features, and K' at most K = ", heads);
    check_shape("scores", scores, {images, heads});
    check_shape("gates", gates, {images, gated});
    check_shape("features", features, {images, gated * channels});
    a.gated = static_cast<int>(gated);
    a.scores = floats("scores", scores);
    a.gates = floats("gates", gates);
    a.features = like_map("features", features, z);
  }
  a.z = map_of("z", z);
  a.w = weights_of("w", w, a.kind);
  a.b = values_of("b", b);
  a.score_w = weights_of("score_w", score_w, a.kind);
  a.score_b = values_of("score_b", score_b);
  a.pooled = floats("pooled", pooled);
  a.lse = floats("lse", lse);
  a.logits = floats("logits", logits);
  a.mean = floats("mean", mean);
  if (part_m.has_value()) {
    const int64_t parts = part_m.dim() == 2 ? part_m.size(0) : 0, rows = heads + mean.has_value();
    STD_TORCH_CHECK(parts > 0 && parts % images == 0 && parts <= kMost && part_d.has_value() && part_p.has_value(),
                    "part_m [N splits, rows] must come with part_d and part_p, got ", shape_of(part_m),
                    " for N = ", images);
    check_shape("part_m", part_m, {parts, rows});
    check_shape("part_d", part_d, {parts, rows});
    check_shape("part_p", part_p, {parts, rows, channels});
    a.splits = static_cast<int>(parts / images);
    a.part_m = floats("part_m", part_m);
    a.part_d = floats("part_d", part_d);
    a.part_p = floats("part_p", part_p);
  }
  const Forward* found = find(kForward, a);
  STD_TORCH_CHECK(found != nullptr && (a.splits <= 1 || found->splits != nullptr), "no sweep takes such a map, got ",
                  shape_of(z));
  STD_TORCH_CHECK(!gates.has_value() || score_w.has_value() || !found->needs_score_w,
                  "gates must come with score_w for such a map, got ", shape_of(z));
  check_started("sweep_forward_", found->sweep(a, static_cast<cudaStream_t>(stream)));
}

// How many shares of dW_H the backward sweep of such maps makes on the current device; 0: there is none here.
int64_t sweep_backward_programs(Numbers sizes, Numbers strides, std::optional<Numbers> upstream,
                                std::optional<Numbers> dz, int64_t heads, int64_t itemsize) {
  static char there = 0;  // what is not null counts, not where it is
  BackwardSweep a = {};
  a.kind = kind_of_size(itemsize);
  const auto map = [&](const Numbers& of) { return map_of(sizes.size(), sizes.data(), of.data(), &there); };
  if (!set_sizes(&a, sizes.size(), sizes.data(), heads)) return 0;
  a.z = map(strides);
  if (dz.has_value()) a.dz = map(*dz);
  if (upstream.has_value()) a.upstream = map(*upstream);
  const Backward* found = find(kBackward, a);
  return found == nullptr ? 0 : found->programs(a);
}

// Without pairs, which only bfloat16 does without, the sweep makes dP itself, of w and what follows it; and dt.
void fill_backward(const View* arguments, void* stream) {
  const auto& [z, b, lse, pairs, delta, unscale, grad_logits, upstream, dz, dw, w, score_w, pooled, scores, gates,
               grad_features, grad_gates, grad_scores, grad_pooled, grad_lse, grad_mean, dt] =
      *reinterpret_cast<const View(*)[22]>(arguments);
  check_map("z", z);
  if (dz.has_value()) check_like("dz", dz, "z", z);
  if (upstream.has_value()) check_like("upstream", upstream, "z", z);
  BackwardSweep a = {};
  const int64_t heads = lse.dim() == 2 ? lse.size(1) : 0;
  STD_TORCH_CHECK(kind_of(z.dtype, &a.kind) && set_sizes(&a, z.dims, z.sizes, heads), "z is too large or empty, got ",
                  shape_of(z));
  const int64_t images = a.images, channels = a.channels;
  check_shape("b", b, {heads});
  check_shape("lse", lse, {images, heads});
  check_shape("unscale", unscale, {images});
  STD_TORCH_CHECK(!unscale.has_value() || a.kind == Kind::kHalf, "unscale is for float16 maps alone");
  check_shape("grad_logits", grad_logits, {images, heads, a.positions});
  if (pairs.has_value()) {
    STD_TORCH_CHECK(delta.has_value(), "pairs must come with delta");
    a.mean = pairs.dim() == 4 && pairs.size(1) == heads + 1;
    check_shape("pairs", pairs, {images, heads + a.mean, 2, channels});
    check_shape("delta", delta, {images, heads});
    a.pairs = like_map("pairs", pairs, z);
  } else {
    STD_TORCH_CHECK(a.kind == Kind::kBFloat16 && w.has_value() && pooled.has_value(),
                    "pairs may be missing for bfloat16 maps alone, with w and pooled");
    a.mean = grad_mean.has_value();
    PooledGradient& of = a.of;
    if (gates.has_value()) {
      STD_TORCH_CHECK(gates.dim() == 2 && gates.size(1) <= heads && score_w.has_value() && scores.has_value(),
                      "gates [N, K'] must come with score_w and scores, and K' at most K = ", heads);
      of.gated = static_cast<int>(gates.size(1));
    }
    check_shape("w", w, {heads, channels});
    check_shape("score_w", score_w, {heads, channels});
    check_shape("pooled", pooled, {images, heads, channels});
    check_shape("scores", scores, {images, heads});
    check_shape("gates", gates, {images, of.gated});
    check_shape("grad_features", grad_features, {images, of.gated * channels});
    check_shape("grad_gates", grad_gates, {images, of.gated});
    check_shape("grad_scores", grad_scores, {images, heads});
    check_shape("grad_pooled", grad_pooled, {images, heads, channels});
    check_shape("grad_lse", grad_lse, {images, heads});
    check_shape("grad_mean", grad_mean, {images, channels});
    check_shape("dt", dt, {images, heads});
    of.w = weights_of("w", w, a.kind);
    if (gates.has_value()) of.score_w = weights_of("score_w", score_w, a.kind);
    of.pooled = floats("pooled", pooled);
    of.scores = floats("scores", scores);
    of.gates = floats("gates", gates);
    of.grad_features = like_map("grad_features", grad_features, z);
    of.grad_gates = floats("grad_gates", grad_gates);
    of.grad_scores = floats("grad_scores", grad_scores);
    of.grad_pooled = floats("grad_pooled", grad_pooled);
    of.grad_lse = floats("grad_lse", grad_lse);
    of.grad_mean = floats("grad_mean", grad_mean);
    of.dt = floats("dt", dt);
  }
  a.z = map_of("z", z);
  if (dz.has_value()) a.dz = map_of("dz", dz);
  if (upstream.has_value()) a.upstream = map_of("upstream", upstream);
  a.b = values_of("b", b);
  a.lse = floats("lse", lse);
  a.delta = floats("delta", delta);
  a.unscale = floats("unscale", unscale);
  a.grad_logits = floats("grad_logits", grad_logits);
  a.dw = floats("dw", dw);
  const Backward* found = find(kBackward, a);
  STD_TORCH_CHECK(found != nullptr, "no sweep takes such a map, got ", shape_of(z));
  if (dw.has_value()) check_shape("dw", dw, {found->programs(a), heads, channels});
  check_started("sweep_backward_", found->sweep(a, static_cast<cudaStream_t>(stream)));
}

// What the dispatcher calls.
template <int kNumber>
void operate(StableIValue* stack, uint64_t count, uint64_t) {
  const Filling& filling = filling_of(kNumber);
  check_count(filling.arguments, count);
  const Tensors tensors = tensors_of(stack, filling.arguments);
  std::vector<View> views;
  for (const std::optional<Tensor>& tensor : tensors) {
    views.push_back({});
    if (!tensor.has_value()) continue;
    views.back() = {const_cast<void*>(tensor->const_data_ptr()), tensor->sizes().data(), tensor->strides().data(),
                    tensor->dim(), tensor->scalar_type()};
  }
  const int32_t device = tensors[0]->get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  filling.fill(views.data(), current_stream(device));
}

const bool are_there = [] {
  ar_kernels_put_filling(kSweepForward, fill_forward);
  ar_kernels_put_filling(kSweepBackward, fill_backward);
  return true;
}();

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ar_kernels_native, m) {
  m.def("sweep_forward_splits(int[] sizes, int[] strides, int heads, int itemsize, bool alike) -> int");
  m.def(
      "sweep_forward_(Tensor z, Tensor w, Tensor? b, Tensor? score_w, Tensor? score_b, Tensor(a!) pooled, "
      "Tensor(b!) lse, Tensor(c!)? logits, Tensor(d!)? mean, Tensor(e!)? scores, Tensor(f!)? gates, "
      "Tensor(g!)? features, Tensor(h!)? part_m, Tensor(i!)? part_d, Tensor(j!)? part_p) -> ()");
  m.def(
      "sweep_backward_programs(int[] sizes, int[] strides, int[]? upstream_strides, int[]? dz_strides, int heads, "
      "int itemsize) -> int");
  m.def(
      "sweep_backward_(Tensor z, Tensor? b, Tensor lse, Tensor? pairs, Tensor? delta, Tensor? unscale, "
      "Tensor? grad_logits, Tensor? upstream, Tensor(a!)? dz, Tensor(b!)? dw, Tensor? w, Tensor? score_w, "
      "Tensor? pooled, Tensor? scores, Tensor? gates, Tensor? grad_features, Tensor? grad_gates, Tensor? grad_scores, "
      "Tensor? grad_pooled, Tensor? grad_lse, Tensor? grad_mean, Tensor(c!)? dt) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ar_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("sweep_forward_splits", TORCH_BOX(&sweep_forward_splits));
  m.impl("sweep_backward_programs", TORCH_BOX(&sweep_backward_programs));
}

STABLE_TORCH_LIBRARY_IMPL(ar_kernels_native, CUDA, m) {
  m.impl("sweep_forward_", &operate<kSweepForward>);
  m.impl("sweep_backward_", &operate<kSweepBackward>);
}

}  // namespace ar_kernels
