// The module of Python: autograd's node of an attended layer, and operators of compiled graphs.
//
// It is not of the stable ABI, which has neither: it is built for one torch and one Python.

#include "module.h"

#include "calls.h"

namespace ar_kernels {

InPython in_python = {};

namespace {

// (made, gradients, run_operator): what is called where Python has to do it.
PyObject* set_python(PyObject*, PyObject* arguments) {
  InPython given;
  if (!PyArg_ParseTuple(arguments, "OOO", &given.made, &given.gradients, &given.run_operator)) return nullptr;
  for (PyObject* function : {given.made, given.gradients, given.run_operator}) Py_INCREF(function);
  for (PyObject* function : {in_python.made, in_python.gradients, in_python.run_operator}) Py_XDECREF(function);
  in_python = given;
  Py_RETURN_NONE;
}

template <class Function>
PyCFunction with_count(Function* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    // gated_attend.cpp
    {"make_call", make_call, METH_VARARGS, nullptr},
    {"apply", with_count(apply), METH_FASTCALL, nullptr},
    {"fits", with_count(fits), METH_FASTCALL, nullptr},
    // operators.cpp
    {"take_operator", take_operator, METH_VARARGS, nullptr},
    {"use_plans", use_plans, METH_O, nullptr},
    // here
    {"set_python", set_python, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_node", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

}  // namespace ar_kernels

PyMODINIT_FUNC PyInit__node() {
  PyObject* module = PyModule_Create(&ar_kernels::module);
  if (module != nullptr && PyModule_AddStringConstant(module, "sources", AR_SOURCES) != 0) Py_CLEAR(module);
  return module;
}
