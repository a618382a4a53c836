// The CUDA engine's part of lora_kernels._C: pointers and the stream come as integers, row pitches in elements.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "host.h"

namespace py = pybind11;
using lk::cuda::Element;
using lk::cuda::Matrix;

namespace {

using Pointer = uintptr_t;
template <class T = void>
T* at(Pointer p) {
  return reinterpret_cast<T*>(p);
}

void linear(int element, bool backward, bool column0, bool masked, bool dependent, int block_m, int block_n, int cluster, int group_m, int M, int N,
            int K, int R, float scale, Pointer x, int64_t ldx, Pointer w, int64_t ldw, Pointer a, int64_t lda, Pointer b, int64_t ldb, Pointer y,
            int64_t ldy, Pointer bias, Pointer h, Pointer mask, Pointer sync, Pointer stream) {
  lk::cuda::LinearCall c;
  c.element = Element(element);
  c.backward = backward, c.column0 = column0, c.masked = masked, c.dependent = dependent;
  c.block_m = block_m, c.block_n = block_n, c.cluster = cluster, c.group_m = group_m;
  c.M = M, c.N = N, c.K = K, c.R = R, c.scale = scale;
  c.x = {at(x), ldx}, c.w = {at(w), ldw}, c.a = {at(a), lda}, c.b = {at(b), ldb}, c.y = {at(y), ldy};
  c.bias = at(bias), c.h = at(h), c.mask = at<const uint32_t>(mask), c.sync = at<int>(sync);
  lk::cuda::linear(c, at(stream));
}

void shrink(int element, bool backward, int M, int K, int R, int split, float scale, uint32_t threshold, Pointer x, int64_t ldx, Pointer a,
            int64_t lda, Pointer h, Pointer mask, Pointer seed, Pointer stream) {
  lk::cuda::ShrinkCall c;
  c.element = Element(element);
  c.backward = backward;
  c.M = M, c.K = K, c.R = R, c.split = split, c.scale = scale, c.threshold = threshold;
  c.x = {at(x), ldx}, c.a = {at(a), lda};
  c.h = at(h), c.mask = at<uint32_t>(mask), c.seed = at<const int64_t>(seed);
  lk::cuda::shrink(c, at(stream));
}

// name -> shared memory of a CTA in bytes; needs no driver
py::dict kernels() {
  py::dict found;
  for (const auto& k : lk::cuda::kernels()) found[py::str(k.name)] = k.shared_bytes;
  return found;
}

// name -> (registers, local memory bytes) as the driver loaded them; needs a device
py::dict loaded() {
  py::dict found;
  for (const auto& k : lk::cuda::kernels()) {
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, k.entry);
    if (error != cudaSuccess) lk::cuda::fail(k.name, "cannot be loaded", error);
    found[py::str(k.name)] = py::make_tuple(attributes.numRegs, int(attributes.localSizeBytes));
  }
  return found;
}

}  // namespace

void bind_cuda(py::module_& m) {
  py::register_exception<lk::cuda::CudaError>(m, "CudaError", PyExc_RuntimeError);
  m.def("cuda_linear", &linear);
  m.def("cuda_linear_sync_ints", &lk::cuda::linear_sync_ints);
  m.def("cuda_shrink", &shrink);
  m.def("cuda_kernels", &kernels);
  m.def("cuda_loaded", &loaded);
}
