// What Python calls, each beside what it is of.
#pragma once

#include <Python.h>

namespace ar_kernels {

PyObject* make_call(PyObject*, PyObject* arguments);
PyObject* apply(PyObject*, PyObject* const* arguments, Py_ssize_t count);
PyObject* fits(PyObject*, PyObject* const* arguments, Py_ssize_t count);
PyObject* take_operator(PyObject*, PyObject* arguments);
PyObject* use_plans(PyObject*, PyObject* yes);

}  // namespace ar_kernels
