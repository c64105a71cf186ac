// The module object of codequant._native. Most of the library is extern "C" symbols of the same shared object, reached
// through ctypes by codequant/native/__init__.py. What decoding calls for every layer are functions of Python's here:
// with cold caches a call through ctypes takes 22 us, and one token's experts 1250.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <tuple>
#include <type_traits>
#include <utility>

#include "experts.h"

namespace {

// From an int (an address where T is a pointer, which None leaves null) or a float.
template <class T>
T convert(PyObject* object) {
  if constexpr (std::is_pointer_v<T>) {
    return static_cast<T>(object == Py_None ? nullptr : PyLong_AsVoidPtr(object));
  } else if constexpr (std::is_floating_point_v<T>) {
    return static_cast<T>(PyFloat_AsDouble(object));
  } else {
    return static_cast<T>(PyLong_AsLongLong(object));
  }
}

template <class... T, size_t... i>
PyObject* call(int (*function)(T...), PyObject* const* arguments, Py_ssize_t count, std::index_sequence<i...>) {
  if (count != sizeof...(T)) {
    return PyErr_Format(PyExc_TypeError, "%zd arguments, expected %zd", count, static_cast<Py_ssize_t>(sizeof...(T)));
  }
  const std::tuple<T...> values{convert<T>(arguments[i])...};
  if (PyErr_Occurred()) return nullptr;
  PyThreadState* state = PyEval_SaveThread();
  const int status = std::apply(function, values);
  PyEval_RestoreThread(state);
  if (status == 0) Py_RETURN_NONE;
  PyErr_SetString(PyExc_MemoryError, "codequant's native kernels could not allocate their workspace");
  return nullptr;
}

template <class... T>
PyObject* call(int (*function)(T...), PyObject* const* arguments, Py_ssize_t count) {
  return call(function, arguments, count, std::index_sequence_for<T...>{});
}

PyObject* linear(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return call(codequant_linear, arguments, count);
}

PyObject* experts(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return call(codequant_experts, arguments, count);
}

PyCFunction method(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"linear", method(linear), METH_FASTCALL, "codequant_linear of experts.h, or MemoryError."},
    {"experts", method(experts), METH_FASTCALL, "codequant_experts of experts.h, or MemoryError."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "codequant._native", "Native kernels of codequant.", 0,
                          methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&definition); }
