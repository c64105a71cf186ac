// The module object of codequant._native. It holds no functions of its own: the kernels are extern "C" symbols of the
// same shared object, reached through ctypes by codequant/native/__init__.py.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

namespace {
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "codequant._native", "Native kernels of codequant.", 0,
                          nullptr, nullptr, nullptr, nullptr, nullptr};
}

PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&definition); }
