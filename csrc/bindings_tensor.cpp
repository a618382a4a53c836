// Reading tensors without their library: a signature of five operands takes 0.4 us, from Python 3.4 us
// (Zen 3, benchmarks/bench_host_overhead.py).
#include "bindings_tensor.h"

#include <cstring>
#include <stdexcept>

namespace {

using lk::dlpack::Exchange;
using lk::dlpack::Tensor;

const Exchange* exchange = nullptr;
PyTypeObject *plain = nullptr, *parameter = nullptr;
PyObject* storage_offset = nullptr;

// use_exchange(capsule, Tensor, Parameter) -> bool: whether `signature` can be used with this tensor library.
PyObject* use_exchange(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 3 || !PyType_Check(args[1]) || !PyType_Check(args[2])) {
    PyErr_SetString(PyExc_TypeError, "use_exchange(capsule, Tensor, Parameter)");
    return nullptr;
  }
  const auto* found = static_cast<const Exchange*>(PyCapsule_GetPointer(args[0], "dlpack_exchange_api"));
  if (found == nullptr) return nullptr;
  if (found->version.major != 1 || found->view == nullptr) Py_RETURN_FALSE;
  PyObject* method = PyObject_GetAttrString(args[1], "storage_offset");
  if (method == nullptr) return nullptr;
  storage_offset = method;
  exchange = found;
  Py_INCREF(args[1]), Py_INCREF(args[2]);  // for good, like the module
  plain = reinterpret_cast<PyTypeObject*>(args[1]), parameter = reinterpret_cast<PyTypeObject*>(args[2]);
  Py_RETURN_TRUE;
}

// Whether a tensor has elements but no memory: its storage was freed (FSDP1, ZeRO-3), or it never had one (torch's zero and functional tensors).
// Such a tensor is shown at null, a view of it at its offset from null: only low addresses are worth the 30 ns of asking for that.
bool lacks_memory(PyObject* object, const Tensor& t) {
  const uint64_t address = reinterpret_cast<uintptr_t>(t.data) + t.byte_offset;
  if (address >> 36 != 0) return false;
  for (int d = 0; d < t.ndim; d++)
    if (t.shape[d] == 0) return false;
  if (address == 0) return true;
  PyObject* offset = PyObject_CallOneArg(storage_offset, object);
  const uint64_t elements = offset ? PyLong_AsUnsignedLongLong(offset) : 0;
  Py_XDECREF(offset);
  PyErr_Clear();
  return elements * t.dtype.bits / 8 == address;
}

// Words that become one hashable object.
struct Words {
  static constexpr int kMost = 256;
  int64_t found[kMost];
  int used = 0;

  bool room(int more) const { return used + more <= kMost; }
  void add(int64_t word) { found[used++] = word; }
  void add(int32_t high, uint32_t low) { add((int64_t{high} << 32) | low); }
  PyObject* bytes() const { return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(found), used * static_cast<Py_ssize_t>(sizeof(int64_t))); }
};

// Shapes, strides, dtypes and devices of tensors or None, and whether all addresses are multiples of 16. False, without an error set, where one
// is not exactly a Tensor or Parameter, or has no memory (meta, freed).
bool add_signature(Words& words, PyObject* const* args, Py_ssize_t count) {
  uint64_t addresses = 0;
  for (Py_ssize_t i = 0; i < count; i++) {
    if (!words.room(3)) return false;
    if (args[i] == Py_None) {
      words.add(-1);
      continue;
    }
    if (exchange == nullptr || (Py_TYPE(args[i]) != plain && Py_TYPE(args[i]) != parameter)) return false;
    Tensor t;
    if (exchange->view(args[i], &t) != 0) {
      PyErr_Clear();
      return false;
    }
    if (!words.room(3 + 2 * t.ndim) || lacks_memory(args[i], t)) return false;
    addresses |= reinterpret_cast<uintptr_t>(t.data) + t.byte_offset;
    words.add(t.device.type, t.device.index);
    words.add((t.dtype.code << 8) | t.dtype.bits, t.ndim);
    for (int d = 0; d < t.ndim; d++) words.add(t.shape[d]), words.add(t.strides[d]);
  }
  return words.add(static_cast<int64_t>(addresses & 15)), true;
}

// signature(*tensors or None) -> bytes, or None.
PyObject* signature(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Words words;
  if (!add_signature(words, args, count)) Py_RETURN_NONE;
  return words.bytes();
}

// Addresses of tensors (0 for None), integers and floats, in nested tuples and lists; false with a Python error set.
bool add_values(Words& words, PyObject* object) {
  if (PyTuple_Check(object) || PyList_Check(object)) {
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(object); i++)
      if (!add_values(words, PySequence_Fast_GET_ITEM(object, i))) return false;
    return true;
  }
  if (!words.room(1) || exchange == nullptr) {
    PyErr_SetString(PyExc_ValueError, "addresses: too many values, or use_exchange was not called");
    return false;
  }
  int64_t word = 0;
  if (PyFloat_CheckExact(object)) {
    const double value = PyFloat_AS_DOUBLE(object);
    std::memcpy(&word, &value, sizeof(word));
  } else if (PyLong_Check(object)) {
    word = static_cast<int64_t>(PyLong_AsUnsignedLongLongMask(object));
  } else if (object != Py_None) {
    Tensor t;
    if (exchange->view(object, &t) != 0) return false;
    word = static_cast<int64_t>(reinterpret_cast<uintptr_t>(t.data) + t.byte_offset);
  }
  return words.add(word), true;
}

// addresses(*values) -> bytes.
PyObject* addresses(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Words words;
  for (Py_ssize_t i = 0; i < count; i++)
    if (!add_values(words, args[i])) return nullptr;
  return words.bytes();
}

// What a call depends on besides its tensors: who may listen to it (functions without arguments, true when somebody does; the level of forward
// AD in its module's dict), and variables of the environment's own dict.
PyObject *listeners = nullptr, *levels = nullptr, *environment = nullptr, *variables = nullptr, *level_name = nullptr, *is_neg = nullptr;

// use_surroundings(listeners, forward_ad.__dict__, Tensor.is_neg, environment, variables).
PyObject* use_surroundings(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 5 || !PyTuple_Check(args[0]) || !PyDict_Check(args[1]) || !PyDict_Check(args[3]) || !PyTuple_Check(args[4])) {
    PyErr_SetString(PyExc_TypeError, "use_surroundings(tuple, dict, function, dict, tuple)");
    return nullptr;
  }
  level_name = PyUnicode_InternFromString("_current_level");
  for (Py_ssize_t i = 0; i < count; i++) Py_INCREF(args[i]);  // for good, like the module
  listeners = args[0], levels = args[1], is_neg = args[2], environment = args[3], variables = args[4];
  Py_RETURN_NONE;
}

// Whether what a call without arguments returned is true; -1 with a Python error set.
int truth(PyObject* answer) {
  if (answer == nullptr) return -1;
  const int found = PyObject_IsTrue(answer);
  Py_DECREF(answer);
  return found;
}

int observed() {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(listeners); i++)
    if (const int found = truth(PyObject_CallNoArgs(PyTuple_GET_ITEM(listeners, i)))) return found;
  PyObject* level = PyDict_GetItemWithError(levels, level_name);
  if (level == nullptr) return PyErr_Occurred() ? -1 : 1;
  return PyLong_AsLong(level) >= 0;
}

// The variables' values: -1 where unset, else their length and bytes. False, without an error set, where they do not fit or are no bytes.
bool add_environment(Words& words) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(variables); i++) {
    if (!words.room(1)) return false;
    PyObject* value = PyDict_GetItemWithError(environment, PyTuple_GET_ITEM(variables, i));
    if (value == nullptr) {
      words.add(-1);
      continue;
    }
    if (!PyBytes_Check(value)) return false;
    const Py_ssize_t size = PyBytes_GET_SIZE(value), more = (size + 7) / 8;
    if (size > 256 || !words.room(1 + static_cast<int>(more))) return false;
    words.add(size);
    if (more) words.found[words.used + more - 1] = 0;
    std::memcpy(&words.found[words.used], PyBytes_AS_STRING(value), static_cast<size_t>(size));
    words.used += static_cast<int>(more);
  }
  return true;
}

// unobserved_signature(x, *tensors or None) -> bytes: their signature and the environment; None where there is none, one has a pending sign,
// or somebody may listen to the call.
PyObject* unobserved_signature(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Words words;
  if (count == 0 || listeners == nullptr || !add_signature(words, args, count) || !add_environment(words)) Py_RETURN_NONE;
  int found = observed();
  for (Py_ssize_t i = 0; found == 0 && i < count; i++)
    if (args[i] != Py_None) found = truth(PyObject_CallOneArg(is_neg, args[i]));
  if (found < 0) return nullptr;
  if (found > 0) Py_RETURN_NONE;
  return words.bytes();
}

template <PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)>
PyMethodDef method(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr};
}

PyMethodDef methods[] = {method<use_exchange>("use_exchange"), method<use_surroundings>("use_surroundings"),
                         method<signature>("signature"),       method<unobserved_signature>("unobserved_signature"),
                         method<addresses>("addresses"),       {nullptr, nullptr, 0, nullptr}};

}  // namespace

namespace lk {

Operand::Operand(pybind11::handle object) : Tensor{} {
  if (object.is_none()) return;
  if (exchange == nullptr) throw std::runtime_error("lora_kernels._C: use_exchange was not called");
  if (exchange->view(object.ptr(), this) != 0) throw pybind11::error_already_set();
  if (!lacks_memory(object.ptr(), *this)) return;
  const pybind11::object error = pybind11::module_::import("lora_kernels._errors").attr("LoraValueError");
  PyErr_SetString(error.ptr(), "an operand has no memory: its storage was freed; fix: gather it (FSDP, ZeRO-3) before the call");
  throw pybind11::error_already_set();
}

Dtype Operand::type() const {
  constexpr int kFloat = 2, kBfloat = 4;  // kDLFloat, kDLBfloat
  if (dtype.code == kFloat && dtype.bits == 32) return kF32;
  if (dtype.code == kBfloat && dtype.bits == 16) return kBF16;
  if (dtype.code == kFloat && dtype.bits == 16) return kF16;
  throw std::invalid_argument("lora_kernels._C: a tensor that is neither float32, bfloat16 nor float16");
}

int64_t Operand::rows() const {
  int64_t count = 1;
  for (int d = 0; d + 1 < ndim; d++) count *= shape[d];
  return count;
}

}  // namespace lk

bool bind_tensors(PyObject* module) { return PyModule_AddFunctions(module, methods) == 0; }
