// The Triton operators of ops.py, as compiled graphs call them: repeated by their plans without Python.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/utils/python_strings.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "calls.h"
#include "module.h"

namespace ar_kernels {

namespace {

std::atomic<bool> uses_plans = true;

bool is_tensor(const c10::Argument& argument) {
  const auto optional = argument.real_type()->cast<c10::OptionalType>();
  return (optional ? optional->getElementType() : argument.real_type())->kind() == c10::TypeKind::TensorType;
}

PyObject* python_of(const c10::IValue& value) {
  if (value.isNone()) return Py_NewRef(Py_None);
  if (value.isTensor()) return wrapped(value.toTensor());
  if (value.isBool()) return PyBool_FromLong(value.toBool());
  if (value.isInt()) return PyLong_FromLongLong(value.toInt());
  return PyUnicode_FromString(value.toStringRef().c_str());
}

// A kernel of the dispatcher. Arguments are tensors, then options: numbers and words.
class Planned final : public c10::OperatorKernel {
 public:
  Planned(const c10::FunctionSchema& schema, Operator called, std::unordered_map<std::string, int64_t> words,
          int64_t none)
      : name_(schema.name().substr(schema.name().rfind(':') + 1)),
        arguments_(schema.arguments().size()),
        tensors_(std::count_if(schema.arguments().begin(), schema.arguments().end(), is_tensor)),
        called_(called),
        words_(std::move(words)),
        none_(none) {}

  void operator()(const c10::OperatorHandle&, c10::DispatchKeySet, std::vector<c10::IValue>* stack) {
    const size_t first = stack->size() - arguments_;
    variable_list tensors;
    for (size_t i = 0; i < tensors_; ++i) {
      const c10::IValue& value = (*stack)[first + i];
      tensors.push_back(value.isNone() ? Tensor() : value.toTensor());
    }
    Numbers options;
    bool are_known = true;
    for (size_t i = tensors_; i < arguments_; ++i) {
      const auto number = number_of_option((*stack)[first + i]);
      are_known = are_known && number.has_value();
      options.push_back(number.value_or(0));
    }
    variable_list made;
    if (are_known && uses_plans) made = run(called_, tensors, options);
    if (made.empty()) made = by_python(*stack, first);
    stack->resize(first);
    for (Tensor& tensor : made)
      stack->emplace_back(tensor.defined() ? std::move(tensor) : at::empty({0}, tensors[0].options()));
  }

 private:
  std::optional<int64_t> number_of_option(const c10::IValue& value) const {
    if (value.isNone()) return none_;
    if (value.isBool()) return value.toBool();
    if (value.isInt()) return value.toInt();
    const auto found = value.isString() ? words_.find(value.toStringRef()) : words_.end();
    return found == words_.end() ? std::nullopt : std::optional(found->second);
  }

  variable_list by_python(const std::vector<c10::IValue>& stack, size_t first) const {
    const pybind11::gil_scoped_acquire lock;
    THPObjectPtr arguments = owned(PyTuple_New(static_cast<Py_ssize_t>(2 + stack.size() - first)));
    PyTuple_SET_ITEM(arguments.get(), 0, owned(PyUnicode_FromString(name_.c_str())).release());
    PyTuple_SET_ITEM(arguments.get(), 1, owned(PyLong_FromSize_t(tensors_)).release());
    for (size_t i = first; i < stack.size(); ++i)
      PyTuple_SET_ITEM(arguments.get(), static_cast<Py_ssize_t>(2 + i - first), owned(python_of(stack[i])).release());
    THPObjectPtr made = owned(PyObject_CallObject(in_python.run_operator, arguments.get()));
    if (THPVariable_Check(made.get())) return {THPVariable_Unpack(made.get())};
    return tensors_of(std::move(made));
  }

  const std::string name_;
  const size_t arguments_, tensors_;
  const Operator called_;
  const std::unordered_map<std::string, int64_t> words_;
  const int64_t none_;
};

}  // namespace

// (namespace, name, device, replay, plan, words) -> None: from now on plans answer calls of this operator on such
// devices ("CUDA"). words: the numbers of words among its options, None's too.
PyObject* take_operator(PyObject*, PyObject* arguments) {
  HANDLE_TH_ERRORS
  const char *space, *name, *device;
  unsigned long long replay;
  long long plan;
  PyObject* numbers;
  if (!PyArg_ParseTuple(arguments, "sssKLO!", &space, &name, &device, &replay, &plan, &PyDict_Type, &numbers))
    return nullptr;
  std::unordered_map<std::string, int64_t> words;
  int64_t none = 0;
  PyObject *word, *number;
  for (Py_ssize_t at = 0; PyDict_Next(numbers, &at, &word, &number) != 0;) {
    if (word == Py_None)
      none = number_of(number);
    else
      words[THPUtils_unpackString(word)] = number_of(number);
  }
  const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow((std::string(space) + "::" + name).c_str(), "");
  const Operator called = {reinterpret_cast<Direct>(replay), plan};
  auto planned = std::make_unique<Planned>(handle.schema(), called, std::move(words), none);
  // Never destroyed, for then the dispatcher may be no more.
  auto* library = new torch::Library(torch::Library::IMPL, space, c10::parseDispatchKey(device), __FILE__, __LINE__);
  library->impl(name, torch::CppFunction::makeFromBoxedFunctor(std::move(planned)));
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// (yes) -> None: whether operators that were taken may go by plans, which they do from the beginning.
PyObject* use_plans(PyObject*, PyObject* yes) {
  uses_plans = PyObject_IsTrue(yes) == 1;
  Py_RETURN_NONE;
}

}  // namespace ar_kernels
