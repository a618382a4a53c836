// Reading tensors without their library: a signature of five operands takes 0.4 us, from Python 3.4 us
// (Zen 3, benchmarks/bench_host_overhead.py).
#include "bindings_tensor.h"

#include <stdexcept>

namespace {

using lk::dlpack::Exchange;
using lk::dlpack::Tensor;

const Exchange* exchange = nullptr;
PyTypeObject *plain = nullptr, *parameter = nullptr;

// use_exchange(capsule, Tensor, Parameter) -> bool: whether `signature` can be used with this tensor library.
PyObject* use_exchange(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 3 || !PyType_Check(args[1]) || !PyType_Check(args[2])) {
    PyErr_SetString(PyExc_TypeError, "use_exchange(capsule, Tensor, Parameter)");
    return nullptr;
  }
  const auto* found = static_cast<const Exchange*>(PyCapsule_GetPointer(args[0], "dlpack_exchange_api"));
  if (found == nullptr) return nullptr;
  if (found->version.major != 1 || found->view == nullptr) Py_RETURN_FALSE;
  exchange = found;
  Py_INCREF(args[1]), Py_INCREF(args[2]);  // for good, like the module
  plain = reinterpret_cast<PyTypeObject*>(args[1]), parameter = reinterpret_cast<PyTypeObject*>(args[2]);
  Py_RETURN_TRUE;
}

// signature(*tensors or None) -> bytes of shapes, strides, dtypes, devices and whether all addresses are multiples of 16;
// None where one is not exactly a Tensor or Parameter, or has no memory that can be shown (meta).
PyObject* signature(PyObject*, PyObject* const* args, Py_ssize_t count) {
  constexpr int kMost = 256;
  int64_t words[kMost];
  int used = 0;
  uint64_t addresses = 0;
  for (Py_ssize_t i = 0; i < count; i++) {
    if (used + 3 > kMost) Py_RETURN_NONE;
    if (args[i] == Py_None) {
      words[used++] = -1;
      continue;
    }
    if (exchange == nullptr || (Py_TYPE(args[i]) != plain && Py_TYPE(args[i]) != parameter)) Py_RETURN_NONE;
    Tensor t;
    if (exchange->view(args[i], &t) != 0) {
      PyErr_Clear();
      Py_RETURN_NONE;
    }
    if (used + 3 + 2 * t.ndim > kMost) Py_RETURN_NONE;
    addresses |= reinterpret_cast<uintptr_t>(t.data) + t.byte_offset;
    words[used++] = (int64_t{t.device.type} << 32) | static_cast<uint32_t>(t.device.index);
    words[used++] = (int64_t{t.dtype.code} << 40) | (int64_t{t.dtype.bits} << 32) | static_cast<uint32_t>(t.ndim);
    for (int d = 0; d < t.ndim; d++) words[used++] = t.shape[d], words[used++] = t.strides[d];
  }
  words[used++] = static_cast<int64_t>(addresses & 15);
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(words), used * sizeof(int64_t));
}

// addresses(*tensors, tuples of them, or None) -> bytes of their addresses, 0 for None.
PyObject* addresses(PyObject*, PyObject* const* args, Py_ssize_t count) {
  constexpr int kMost = 128;
  uintptr_t found[kMost];
  int used = 0;
  const auto add = [&](PyObject* object) {
    if (used == kMost || exchange == nullptr) {
      PyErr_SetString(PyExc_ValueError, "addresses: too many tensors, or use_exchange was not called");
      return false;
    }
    Tensor t{};
    if (object != Py_None && exchange->view(object, &t) != 0) return false;
    found[used++] = reinterpret_cast<uintptr_t>(t.data) + t.byte_offset;
    return true;
  };
  for (Py_ssize_t i = 0; i < count; i++) {
    if (!PyTuple_Check(args[i])) {
      if (!add(args[i])) return nullptr;
      continue;
    }
    for (Py_ssize_t j = 0; j < PyTuple_GET_SIZE(args[i]); j++)
      if (!add(PyTuple_GET_ITEM(args[i], j))) return nullptr;
  }
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(found), used * static_cast<Py_ssize_t>(sizeof(uintptr_t)));
}

PyMethodDef methods[] = {{"use_exchange", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(use_exchange)), METH_FASTCALL, nullptr},
                         {"signature", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(signature)), METH_FASTCALL, nullptr},
                         {"addresses", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(addresses)), METH_FASTCALL, nullptr},
                         {nullptr, nullptr, 0, nullptr}};

}  // namespace

namespace lk {

Operand::Operand(pybind11::handle object) : Tensor{} {
  if (object.is_none()) return;
  if (exchange == nullptr) throw std::runtime_error("lora_kernels._C: use_exchange was not called");
  if (exchange->view(object.ptr(), this) != 0) throw pybind11::error_already_set();
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
