// Tensors as the bindings get them: plain Python objects, seen through DLPack's C interface.
#pragma once
#include <pybind11/pybind11.h>

#include "cpu/engine.h"
#include "dlpack.h"

namespace lk {

// A tensor argument, or None (then everything is null or zero). Its owner keeps it alive while it is used.
class Operand : dlpack::Tensor {
 public:
  explicit Operand(pybind11::handle object);  // throws where the object is no tensor with memory

  explicit operator bool() const { return data != nullptr; }
  template <class T = void>
  T* p() const {
    return reinterpret_cast<T*>(static_cast<char*>(data) + byte_offset);
  }
  int64_t item() const { return dtype.bits / 8; }
  Dtype type() const;                                                // throws for a dtype that the kernels do not take
  int64_t size(int d) const { return shape[d < 0 ? ndim + d : d]; }  // from the back when negative
  int64_t stride(int d) const { return strides[d < 0 ? ndim + d : d]; }

  // As a matrix [rows, cols]: the last dimension and, contiguous, all before it.
  int64_t cols() const { return size(-1); }
  int64_t rows() const;
  int64_t ld() const { return ndim == 2 ? strides[0] : cols(); }
  In in() const { return {p<const void>(), data ? ld() : 0}; }
  Out out() const { return {p<>(), data ? ld() : 0}; }
  // Row d of a matrix, or a vector for every d; null where there is none.
  template <class T>
  const T* row(int64_t d) const {
    return data ? p<const T>() + (ndim == 1 ? 0 : d * strides[0]) : nullptr;
  }
};

}  // namespace lk

// Adds `use_exchange`, `signature` and `addresses`; false with a Python error set.
bool bind_tensors(PyObject* module);

// Adds `unchanged`; likewise.
bool bind_state(PyObject* module);
