// Whether Python objects still have the attributes they had: some hundred pointers, compared one by one.
#include <pybind11/pybind11.h>

#include "bindings_tensor.h"

namespace {

// contents: key, value, key, value, ... in the dict's order; a value of Ellipsis stands for any.
bool same_dict(PyObject* dict, PyObject* contents) {
  if (2 * PyDict_Size(dict) != PyTuple_GET_SIZE(contents)) return false;
  PyObject *key, *value;
  for (Py_ssize_t at = 0, i = 0; PyDict_Next(dict, &at, &key, &value); i += 2) {
    PyObject* expected = PyTuple_GET_ITEM(contents, i + 1);
    if (PyTuple_GET_ITEM(contents, i) != key || (expected != value && expected != Py_Ellipsis)) return false;
  }
  return true;
}

bool same_list(PyObject* list, PyObject* contents) {
  const Py_ssize_t size = PyList_GET_SIZE(list);
  if (size != PyTuple_GET_SIZE(contents)) return false;
  for (Py_ssize_t i = 0; i < size; i++)
    if (PyList_GET_ITEM(list, i) != PyTuple_GET_ITEM(contents, i)) return false;
  return true;
}

// entry: (owner, its type, contents), the owner a dict, a list, or an object with a __dict__; contents None where the type alone counts.
bool same(PyObject* entry, PyObject* self) {
  PyObject *owner = PyTuple_GET_ITEM(entry, 0), *contents = PyTuple_GET_ITEM(entry, 2);
  if (owner == Py_None) owner = self;
  if (reinterpret_cast<PyObject*>(Py_TYPE(owner)) != PyTuple_GET_ITEM(entry, 1)) return false;
  if (contents == Py_None) return true;
  if (PyDict_Check(owner)) return same_dict(owner, contents);
  if (PyList_Check(owner)) return same_list(owner, contents);
  PyObject* attributes = PyObject_GenericGetDict(owner, nullptr);
  if (attributes == nullptr) return PyErr_Clear(), false;
  const bool found = same_dict(attributes, contents);
  Py_DECREF(attributes);
  return found;
}

// unchanged(entries, self) -> bool; self takes the place of an owner None, so that an object may keep entries about itself without a cycle.
PyObject* unchanged(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 2 || !PyTuple_Check(args[0])) {
    PyErr_SetString(PyExc_TypeError, "unchanged(entries, self)");
    return nullptr;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args[0]); i++)
    if (!same(PyTuple_GET_ITEM(args[0], i), args[1])) Py_RETURN_FALSE;
  Py_RETURN_TRUE;
}

PyMethodDef methods[] = {{"unchanged", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(unchanged)), METH_FASTCALL, nullptr},
                         {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool bind_state(PyObject* module) { return PyModule_AddFunctions(module, methods) == 0; }
