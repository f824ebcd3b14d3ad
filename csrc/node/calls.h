// What an attended layer's node and the operators of compiled graphs share: how the library is called, and Python.
#pragma once

#include <Python.h>

#include <ATen/Context.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>
#include <torch/csrc/utils/object_ptr.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "../direct.h"

namespace ar_kernels {

using at::Tensor;
using torch::autograd::variable_list;
using Numbers = std::vector<int64_t>;

constexpr size_t kMost = 20;  // of tensors of an operator

// One that follows plans takes what they are found by before the options, and has no outputs where there is none.
struct Operator {
  Direct function;
  std::optional<int64_t> plan;  // the number of its name
};

// Nothing where the operator has no plan for such tensors.
inline variable_list run(const Operator& called, const variable_list& tensors, const Numbers& values) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  Numbers options;
  if (called.plan.has_value()) {
    options = {*called.plan, static_cast<int64_t>(values.size()), at::globalContext().deterministicAlgorithms()};
    options.insert(options.end(), values.begin(), values.end());
    if (tensors[0].scalar_type() == at::kFloat) {
      const auto precision = at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL);
      options.push_back(precision == at::Float32Precision::TF32);
    }
  } else {
    options = values;
  }
  std::array<AtenTensorHandle, kMost> given = {}, made = {};
  TORCH_INTERNAL_ASSERT(tensors.size() <= kMost);
  for (size_t i = 0; i < tensors.size(); ++i)
    if (tensors[i].defined())
      given[i] = torch::aot_inductor::tensor_pointer_to_tensor_handle(const_cast<Tensor*>(&tensors[i]));
  const char* error = nullptr;
  const int64_t count =
      called.function(given.data(), tensors.size(), options.data(), options.size(), made.data(), made.size(), &error);
  TORCH_CHECK(count >= 0, error);
  variable_list outputs;
  for (int64_t i = 0; i < count; ++i) {
    const std::unique_ptr<Tensor> owned(torch::aot_inductor::tensor_handle_to_tensor_pointer(made[i]));
    outputs.push_back(owned == nullptr ? Tensor() : std::move(*owned));
  }
  if (outputs.size() == 1 && !outputs[0].defined()) outputs.clear();
  return outputs;
}

// ---------------------------------------------------------------------------------------------- Python

// What is called where Python has to do it: ops._made, ops._gradients and ops._run_operator.
struct InPython {
  PyObject *made, *gradients, *run_operator;
};

extern InPython in_python;

// A new reference, or the error that came in place of one.
inline THPObjectPtr owned(PyObject* object) {
  if (object == nullptr) {
    python_error error;
    error.persist();
    throw error;
  }
  return THPObjectPtr(object);
}

inline PyObject* wrapped(const Tensor& tensor) {
  return tensor.defined() ? THPVariable_Wrap(tensor) : Py_NewRef(Py_None);
}

inline THPObjectPtr tuple_of(const variable_list& tensors) {
  THPObjectPtr tuple = owned(PyTuple_New(static_cast<Py_ssize_t>(tensors.size())));
  for (size_t i = 0; i < tensors.size(); ++i)
    PyTuple_SET_ITEM(tuple.get(), static_cast<Py_ssize_t>(i), owned(wrapped(tensors[i])).release());
  return tuple;
}

inline Tensor tensor_of(PyObject* object) { return object == Py_None ? Tensor() : THPVariable_Unpack(object); }

inline variable_list tensors_of(THPObjectPtr sequence) {
  THPObjectPtr items = owned(PySequence_Fast(sequence.get(), "ar_kernels: expected a sequence of tensors"));
  variable_list tensors;
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(items.get()); ++i)
    tensors.push_back(tensor_of(PySequence_Fast_GET_ITEM(items.get(), i)));
  return tensors;
}

inline int64_t number_of(PyObject* object) {
  const int64_t number = PyLong_AsLongLong(object);
  if (PyErr_Occurred() != nullptr) throw python_error();
  return number;
}

}  // namespace ar_kernels
