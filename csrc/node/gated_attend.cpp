// An attended layer's node of autograd: what ops._WantedGatedAttend is in Python, for eager calls that nobody looks on.
//
// The backward then never takes Python's lock. What is out of the ordinary, a first call, a double backward, a batch of
// gradients, is left to Python.

#include <ATen/record_function.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <array>
#include <optional>
#include <utility>

#include "calls.h"
#include "module.h"

namespace ar_kernels {

using c10::DispatchKey;
using c10::DispatchKeySet;
using torch::autograd::AutogradContext;

constexpr size_t kInputs = 6;   // z, w, b, score_w, score_b, output_w
constexpr size_t kMade = 8;     // pooled, lse, logits, scores, gates, features, mean, hypothesis
constexpr size_t kOutputs = 9;  // those and the tapped map
constexpr size_t kGradients = 5;

// All of a call but its tensors; made once for each kind of call, and kept.
struct Call {
  Operator forward, backward;
  int64_t gated_heads, wants_logits, wants_mean, taps_first;
  Numbers wanted;               // which of the kOutputs
  PyObject *options, *indices;  // the same two as Python has them
};

// Neither a subclass's nor a transformation's, whose tensors every operator has to see; dense and on a CPU or GPU.
bool is_plain(const Tensor& tensor) {
  const DispatchKeySet keys =
      tensor.key_set() - c10::autograd_dispatch_keyset_with_ADInplaceOrView - c10::autocast_dispatch_keyset;
  return keys == DispatchKeySet(DispatchKey::CPU) || keys == DispatchKeySet(DispatchKey::CUDA);
}

bool is_watched() {
  return c10::impl::TorchDispatchModeTLS::stack_len() > 0 ||
         c10::impl::tls_local_dispatch_key_set().included_.has(DispatchKey::FuncTorchDynamicLayerFrontMode);
}

variable_list forward_by_python(const Call& call, const variable_list& inputs, bool is_recorded) {
  const pybind11::gil_scoped_acquire lock;
  THPObjectPtr given = tuple_of(inputs);
  PyObject* recorded = is_recorded ? call.indices : Py_None;
  return tensors_of(owned(PyObject_CallFunctionObjArgs(in_python.made, given.get(), call.options, recorded, nullptr)));
}

variable_list backward_by_python(const Call& call, const variable_list& saved, const std::array<bool, kInputs>& needs,
                                 bool channels_last, const variable_list& grads) {
  const pybind11::gil_scoped_acquire lock;
  THPObjectPtr kept = tuple_of(saved), received = tuple_of(grads), needed = owned(PyTuple_New(kInputs));
  for (size_t i = 0; i < kInputs; ++i)
    PyTuple_SET_ITEM(needed.get(), static_cast<Py_ssize_t>(i), PyBool_FromLong(needs[i]));
  PyObject* layout = channels_last ? Py_True : Py_False;
  return tensors_of(owned(PyObject_CallFunctionObjArgs(in_python.gradients, kept.get(), call.options, call.indices,
                                                       needed.get(), layout, received.get(), nullptr)));
}

// ---------------------------------------------------------------------------------------------- the node

// Only lse and the logits know the masks' bias.
Tensor bias_gradient(const Tensor& lse, const Tensor& b, const Tensor& grad_lse, const Tensor& grad_logits) {
  Tensor gradient = lse.new_zeros({lse.size(1)});
  if (grad_lse.defined()) gradient = gradient.add(grad_lse.sum(0));
  if (grad_logits.defined()) gradient = gradient.add(grad_logits.sum(at::IntArrayRef{0, 2}));
  return gradient.to(b.scalar_type());
}

struct GatedAttend : torch::autograd::Function<GatedAttend> {
  static variable_list forward(AutogradContext* context, const Tensor& z, const Tensor& w,
                               const std::optional<Tensor>& b, const std::optional<Tensor>& score_w,
                               const std::optional<Tensor>& score_b, const std::optional<Tensor>& output_w,
                               const Call* call, bool is_recorded) {
    RECORD_FUNCTION("ar_kernels::gated_attend", std::vector<c10::IValue>());
    const auto given = [](const std::optional<Tensor>& tensor) { return tensor.value_or(Tensor()); };
    const variable_list inputs = {z, w, given(b), given(score_w), given(score_b), given(output_w)};
    const bool alike = at::globalContext().deterministicAlgorithms();
    variable_list made =
        run(call->forward, inputs, {call->gated_heads, call->wants_logits, call->wants_mean, alike, call->taps_first});
    if (made.empty()) made = forward_by_python(*call, inputs, is_recorded);
    TORCH_CHECK(made.size() == kMade, "expected ", kMade, " results of a layer, got ", made.size());
    variable_list outputs;
    for (const int64_t i : call->wanted) outputs.push_back(i < static_cast<int64_t>(kMade) ? made[i] : z.view_as(z));
    variable_list saved = inputs;
    saved.insert(saved.end(), made.begin(), made.begin() + 6);
    if (w.dim() == 2) saved[8] = Tensor();  // the logits, of 3x3 heads alone
    context->save_for_backward(std::move(saved));
    context->set_materialize_grads(false);
    context->saved_data["call"] = reinterpret_cast<int64_t>(call);
    context->saved_data["channels_last"] = z.stride(1) < z.stride(-1);
    return outputs;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const Call& call = *reinterpret_cast<const Call*>(context->saved_data["call"].toInt());
    const bool channels_last = context->saved_data["channels_last"].toBool();
    const variable_list saved = context->get_saved_variables();
    const Tensor &z = saved[0], &b = saved[2], &score_b = saved[4], &lse = saved[7];
    std::array<bool, kInputs> needs = {};
    size_t edge = 0;
    for (size_t i = 0; i < kInputs; ++i)
      if (saved[i].defined()) needs[i] = context->needs_input_grad(edge++);
    variable_list received(kOutputs);
    for (size_t i = 0; i < grads.size(); ++i) received[call.wanted[i]] = grads[i];
    const auto& upstream = received[kMade];

    variable_list gradients(kInputs + 2);  // and none for the call and whether it is recorded
    const auto is_given = [](const Tensor& tensor) { return tensor.defined(); };
    const auto is_usual = [](const Tensor& tensor) { return !tensor.defined() || is_plain(tensor); };
    const bool is_tap_alone = std::none_of(received.begin(), received.begin() + kMade, is_given);
    const bool is_ordinary = !c10::GradMode::is_enabled() && !is_watched() &&
                             std::all_of(grads.begin(), grads.end(), is_usual) &&
                             std::all_of(saved.begin(), saved.end(), is_usual);
    variable_list found;
    if (is_ordinary && is_tap_alone) {
      gradients[0] = upstream;
      return gradients;
    }
    if (is_ordinary) {
      variable_list tensors = {z, saved[1], b, saved[3], saved[5]};
      tensors.insert(tensors.end(), saved.begin() + kInputs, saved.end());
      tensors.insert(tensors.end(), received.begin(), received.end());
      found = run(call.backward, tensors,
                  {needs[0], needs[1], needs[3], needs[4], needs[5], channels_last, call.taps_first});
    }
    if (found.empty()) {
      found = backward_by_python(call, saved, needs, channels_last, grads);
      TORCH_CHECK(found.size() == kInputs, "expected ", kInputs, " gradients of a layer, got ", found.size());
      std::move(found.begin(), found.end(), gradients.begin());
      return gradients;
    }
    TORCH_CHECK(found.size() == kGradients, "expected ", kGradients, " gradients of a layer, got ", found.size());
    gradients[0] = found[0];
    gradients[1] = found[1];
    if (needs[2]) gradients[2] = bias_gradient(lse, b, received[1], received[2]);
    gradients[3] = found[2];
    if (found[3].defined()) gradients[4] = found[3].to(score_b.scalar_type());
    gradients[5] = found[4];
    return gradients;
  }
};

// ---------------------------------------------------------------------------------------------- the module

constexpr const char* kCall = "ar_kernels._node.Call";

Numbers numbers_of(PyObject* tuple) {
  Numbers numbers;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); ++i) numbers.push_back(number_of(PyTuple_GET_ITEM(tuple, i)));
  return numbers;
}

Operator operator_of(uint64_t address, PyObject* plan) {
  TORCH_CHECK_VALUE(address != 0, "an operator must have an address, got 0");
  return {reinterpret_cast<Direct>(address), plan == Py_None ? std::nullopt : std::optional(number_of(plan))};
}

// (forward, plan, backward, plan, options, wanted) -> a call: the operators' addresses; the numbers of plans' names,
// or None; ops's `how` and `wanted`.
PyObject* make_call(PyObject*, PyObject* arguments) {
  HANDLE_TH_ERRORS
  unsigned long long forward, backward;
  PyObject *forward_plan, *backward_plan, *options, *wanted;
  if (!PyArg_ParseTuple(arguments, "KOKOO!O!", &forward, &forward_plan, &backward, &backward_plan, &PyTuple_Type,
                        &options, &PyTuple_Type, &wanted))
    return nullptr;
  constexpr Py_ssize_t kOptions = 6;  // gated_heads, wants_logits, wants_mean, through, implementation, taps_first
  TORCH_CHECK_VALUE(PyTuple_GET_SIZE(options) == kOptions, "options must be ", kOptions, ", got ",
                    PyTuple_GET_SIZE(options));
  const auto option = [&](Py_ssize_t i) { return number_of(PyTuple_GET_ITEM(options, i)); };
  const Numbers indices = numbers_of(wanted);
  for (const int64_t i : indices)
    TORCH_CHECK_VALUE(i >= 0 && i < static_cast<int64_t>(kOutputs), "wanted must be below ", kOutputs, ", got ", i);
  auto* call = new Call{operator_of(forward, forward_plan),
                        operator_of(backward, backward_plan),
                        option(0),
                        option(1),
                        option(2),
                        option(5),
                        indices,
                        Py_NewRef(options),
                        Py_NewRef(wanted)};
  return PyCapsule_New(call, kCall, nullptr);
  END_HANDLE_TH_ERRORS
}

// The tensor, if it is one that nobody has to see operators of.
const Tensor* plain_tensor(PyObject* object) {
  if (!THPVariable_CheckExact(object)) return nullptr;  // a parameter is one, a subclass may see functions
  const Tensor& tensor = THPVariable_Unpack(object);
  return is_plain(tensor) ? &tensor : nullptr;
}

// (call, z, w, b, score_w, score_b, output_w) -> the outputs that are wanted, or None where Python has to do it.
PyObject* apply(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == kInputs + 1, "apply takes ", kInputs + 1, " arguments, got ", count);
  const auto* call = static_cast<const Call*>(PyCapsule_GetPointer(arguments[0], kCall));
  if (call == nullptr) return nullptr;
  std::array<std::optional<Tensor>, kInputs> inputs;
  for (size_t i = 0; i < kInputs; ++i) {
    if (i > 1 && arguments[i + 1] == Py_None) continue;
    const Tensor* tensor = plain_tensor(arguments[i + 1]);
    if (tensor == nullptr) Py_RETURN_NONE;
    inputs[i] = *tensor;
  }
  if (is_watched()) Py_RETURN_NONE;
  variable_list outputs;
  {
    const pybind11::gil_scoped_release unlock;
    const bool is_recorded = c10::GradMode::is_enabled();
    outputs = GatedAttend::apply(*inputs[0], *inputs[1], inputs[2], inputs[3], inputs[4], inputs[5], call, is_recorded);
  }
  return tuple_of(outputs).release();
  END_HANDLE_TH_ERRORS
}

// Of a layer with W_O as a Linear stores it: (feature_map, mask_weight, mask_bias, gate_weight, gate_bias,
// output_weight, output_bias) -> whether all is as functional.attention_module wants it. Where it is not, Python finds
// out what is wrong, if anything is.
PyObject* fits(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  constexpr Py_ssize_t kTensors = 7;
  TORCH_CHECK_TYPE(count == kTensors, "fits takes ", kTensors, " arguments, got ", count);
  const Tensor* tensors[kTensors] = {};
  for (Py_ssize_t i = 0; i < kTensors; ++i) {
    if (arguments[i] == Py_None) continue;
    tensors[i] = plain_tensor(arguments[i]);
    if (tensors[i] == nullptr) Py_RETURN_FALSE;
  }
  const auto [z, w, b, gate_w, gate_b, output_w, output_b] = tensors;
  if (z == nullptr || w == nullptr || output_w == nullptr || (gate_b != nullptr && gate_w == nullptr)) Py_RETURN_FALSE;
  const at::ScalarType dtype = z->scalar_type();
  const bool is_half = dtype == at::kHalf || dtype == at::kBFloat16;
  if (!is_half && dtype != at::kFloat && dtype != at::kDouble) Py_RETURN_FALSE;
  if (z->dim() < 3 || z->dim() > 4 || z->size(1) == 0 || z->size(2) == 0 || z->size(-1) == 0) Py_RETURN_FALSE;
  const int64_t channels = z->size(1), heads = w->dim() > 0 ? w->size(0) : 0;
  const bool is_pointwise = w->dim() == 2 && w->size(1) == channels;
  if (heads == 0 || !(is_pointwise || (z->dim() == 4 && w->sizes() == at::IntArrayRef{heads, channels, 3, 3})))
    Py_RETURN_FALSE;
  if (output_w->dim() != 2 || output_w->size(0) == 0 || output_w->size(1) != w->numel()) Py_RETURN_FALSE;
  if (gate_w != nullptr && gate_w->sizes() != w->sizes()) Py_RETURN_FALSE;
  for (const Tensor* bias : {b, gate_b})
    if (bias != nullptr && bias->sizes() != at::IntArrayRef{heads}) Py_RETURN_FALSE;
  if (output_b != nullptr && output_b->sizes() != at::IntArrayRef{heads, output_w->size(0)}) Py_RETURN_FALSE;
  for (const Tensor* weight : {w, b, gate_w, gate_b, output_w, output_b}) {
    if (weight == nullptr) continue;
    const bool has_dtype = weight->scalar_type() == dtype || (is_half && weight->scalar_type() == at::kFloat);
    if (!has_dtype || weight->device() != z->device()) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
  END_HANDLE_TH_ERRORS
}

}  // namespace ar_kernels
