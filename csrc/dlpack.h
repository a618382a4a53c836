// The part of DLPack's C exchange interface (major version 1) that is used here: how a tensor library shows a tensor to C code without Python calls.
// Source: github.com/dmlc/dlpack, include/dlpack/dlpack.h. Layouts are fixed by the major version.
#pragma once
#include <cstdint>

namespace lk::dlpack {

struct Tensor {
  void* data;
  struct {
    int32_t type, index;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  const int64_t *shape, *strides;  // strides in elements; both belong to the tensor
  uint64_t byte_offset;
};

struct Exchange {
  struct {
    uint32_t major, minor;
  } version;
  const void* previous;
  void *allocate, *managed_from_object, *managed_to_object;  // not used here
  int (*view)(void* object, Tensor* out);                    // 0, or -1 with a Python error set; may be null
  void* current_stream;
};

}  // namespace lk::dlpack
