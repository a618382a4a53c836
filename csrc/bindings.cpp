// Only the files bindings*.cpp know Python. Pointers come as integers (tensor.data_ptr()), leading dimensions in elements, dtypes as lk::Dtype numbers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "cpu/engine.h"
#include "cpu/threads.h"

namespace py = pybind11;

namespace {

using Ptr = uintptr_t;
template <class T = void>
T* ptr(Ptr p) {
  return reinterpret_cast<T*>(p);
}
lk::In in(Ptr p, int64_t ld) { return {ptr(p), ld}; }
lk::Out out(Ptr p, int64_t ld) { return {ptr(p), ld}; }
lk::Dtype dtype(int t) { return static_cast<lk::Dtype>(t); }

void cpu_linear_fwd(int64_t M, int64_t N, int64_t K, int64_t R, int type, int form, int threads, double scaling, uint32_t threshold, Ptr x,
                    int64_t ldx, Ptr w, int64_t ldw, Ptr bias, Ptr a, int64_t lda, int a_type, Ptr b, int64_t ldb, int b_type, Ptr seed, Ptr y, Ptr h,
                    Ptr mask) {
  const lk::Problem p{M,
                      N,
                      K,
                      dtype(type),
                      {in(a, lda), in(b, ldb), dtype(a_type), dtype(b_type), R},
                      static_cast<float>(scaling),
                      threshold,
                      threads,
                      static_cast<lk::Form>(form)};
  lk::lora_linear_fwd(p, {in(x, ldx), in(w, ldw), ptr(bias), ptr<const int64_t>(seed), out(y, N), out(h, R), ptr<uint32_t>(mask)});
}

void cpu_linear_bwd(int64_t M, int64_t N, int64_t K, int64_t R, int type, int form, int threads, double scaling, uint32_t threshold, Ptr dy,
                    int64_t lddy, Ptr x, int64_t ldx, Ptr w, int64_t ldw, Ptr a, int64_t lda, int a_type, Ptr b, int64_t ldb, int b_type, Ptr h,
                    int64_t ldh, Ptr mask, Ptr g, Ptr dx, Ptr d_a, Ptr d_b) {
  const lk::Problem p{M,
                      N,
                      K,
                      dtype(type),
                      {in(a, lda), in(b, ldb), dtype(a_type), dtype(b_type), R},
                      static_cast<float>(scaling),
                      threshold,
                      threads,
                      static_cast<lk::Form>(form)};
  lk::lora_linear_bwd(p,
                      {in(dy, lddy), in(x, ldx), in(w, ldw), in(h, ldh), ptr<const uint32_t>(mask), out(g, R), out(dx, K), out(d_a, K), out(d_b, R)});
}

void cpu_dropout_mask(uint64_t seed, uint32_t threshold, int64_t M, int64_t K, Ptr mask, int threads) {
  lk::dropout_mask(seed, threshold, M, K, ptr<uint32_t>(mask), threads);
}

void cpu_batched_fwd(int64_t M, int64_t N, int64_t K, int64_t R, int64_t L, int type, int form, int threads, Ptr x, int64_t ldx, Ptr w, int64_t ldw,
                     Ptr bias, Ptr pool_a, int64_t a_stride, int64_t lda, int a_type, Ptr pool_b, int64_t b_stride, int64_t ldb, int b_type,
                     int64_t packed_slice, Ptr ids, Ptr ranks, Ptr scalings, Ptr dropout_p, Ptr mask, Ptr y, int64_t ldy, Ptr h) {
  lk::lora_batched_fwd({M,
                        N,
                        K,
                        R,
                        L,
                        dtype(type),
                        dtype(a_type),
                        dtype(b_type),
                        in(x, ldx),
                        in(w, ldw),
                        ptr(bias),
                        ptr(pool_a),
                        ptr(pool_b),
                        a_stride,
                        lda,
                        b_stride,
                        ldb,
                        packed_slice,
                        ptr<const int32_t>(ids),
                        ptr<const int32_t>(ranks),
                        ptr<const float>(scalings),
                        ptr<const float>(dropout_p),
                        ptr<const uint32_t>(mask),
                        out(y, ldy),
                        out(h, R),
                        threads,
                        static_cast<lk::Form>(form)});
}

void cpu_shrink(int64_t M, int64_t K, int64_t R, int64_t L, int type, int threads, Ptr x, int64_t ldx, Ptr pool_a, int64_t a_stride, int64_t lda,
                int a_type, int64_t packed_slice, Ptr ids, Ptr ranks, Ptr scalings, Ptr h) {
  lk::Batched b{};
  b.M = M, b.K = K, b.R = R, b.L = L, b.type = dtype(type), b.threads = threads, b.x = in(x, ldx);
  b.pool_a = ptr(pool_a), b.a_stride = a_stride, b.lda = lda, b.a_type = dtype(a_type), b.packed_slice = packed_slice;
  b.ids = ptr<const int32_t>(ids), b.ranks = ptr<const int32_t>(ranks), b.scalings = ptr<const float>(scalings);
  lk::lora_shrink(b, ptr<float>(h));
}

void cpu_expand(int64_t M, int64_t N, int64_t R, int64_t L, int type, int threads, Ptr y, int64_t ldy, Ptr h, int64_t ldh, int h_type, Ptr pool_b,
                int64_t b_stride, int64_t ldb, int b_type, Ptr ids, Ptr ranks) {
  lk::Batched b{};
  b.M = M, b.N = N, b.R = R, b.L = L, b.type = dtype(type), b.threads = threads, b.y = out(y, ldy);
  b.pool_b = ptr(pool_b), b.b_stride = b_stride, b.ldb = ldb, b.b_type = dtype(b_type);
  b.ids = ptr<const int32_t>(ids), b.ranks = ptr<const int32_t>(ranks);
  lk::lora_expand(b, in(h, ldh), dtype(h_type));
}

// N, w, ldw, pool_a, its two strides and type, pool_b, its two strides and type, ranks, scalings, h, dy, d_a, d_b
using Slice = std::tuple<int64_t, Ptr, int64_t, Ptr, int64_t, int64_t, int, Ptr, int64_t, int64_t, int, Ptr, Ptr, Ptr, Ptr, Ptr, Ptr>;
void cpu_batched_bwd(int64_t M, int64_t K, int64_t R, int64_t L, int type, int threads, Ptr x, int64_t ldx, int64_t lddy, Ptr ids, Ptr dropout_p,
                     Ptr mask, Ptr dx, const std::vector<Slice>& slices) {
  std::vector<lk::Batched> parts;
  std::vector<lk::BatchedGrads> grads;
  for (const auto& [N, w, ldw, a, a_stride, lda, a_type, b, b_stride, ldb, b_type, ranks, scalings, h, dy, d_a, d_b] : slices) {
    lk::Batched p{};
    p.M = M, p.N = N, p.K = K, p.R = R, p.L = L, p.type = dtype(type), p.threads = threads, p.x = in(x, ldx), p.w = in(w, ldw);
    p.pool_a = ptr(a), p.a_stride = a_stride, p.lda = lda, p.a_type = dtype(a_type), p.pool_b = ptr(b), p.b_stride = b_stride, p.ldb = ldb;
    p.b_type = dtype(b_type), p.ids = ptr<const int32_t>(ids), p.ranks = ptr<const int32_t>(ranks), p.scalings = ptr<const float>(scalings);
    p.dropout_p = ptr<const float>(dropout_p), p.mask = ptr<const uint32_t>(mask), p.h = out(h, R);
    parts.push_back(p);
    grads.push_back({in(dy, lddy), ptr(d_a), ptr(d_b)});
  }
  lk::lora_batched_bwd(parts, grads, out(dx, K));
}

void cpu_batched_mask(uint64_t seed, int64_t M, int64_t K, int64_t L, Ptr ids, Ptr dropout_p, Ptr mask, int threads) {
  lk::batched_mask(seed, M, K, L, ptr<const int32_t>(ids), ptr<const float>(dropout_p), ptr<uint32_t>(mask), threads);
}

std::pair<int32_t, int32_t> cpu_int_range(Ptr p, int64_t count) {
  const auto [low, high] = std::minmax_element(ptr<const int32_t>(p), ptr<const int32_t>(p) + count);
  return {*low, *high};
}

}  // namespace

bool bind_signature(PyObject* module);  // bindings_signature.cpp
#ifdef LORA_KERNELS_CUDA
void bind_cuda(py::module_& m);  // csrc/cuda
#endif

PYBIND11_MODULE(_C, m) {
  if (!bind_signature(m.ptr())) throw py::error_already_set();
  const py::call_guard<py::gil_scoped_release> no_gil;
  m.def("cpu_linear_fwd", &cpu_linear_fwd, no_gil);
  m.def("cpu_linear_bwd", &cpu_linear_bwd, no_gil);
  m.def("cpu_dropout_mask", &cpu_dropout_mask, no_gil);
  m.def("cpu_batched_fwd", &cpu_batched_fwd, no_gil);
  m.def("cpu_batched_bwd", &cpu_batched_bwd, no_gil);
  m.def("cpu_shrink", &cpu_shrink, no_gil);
  m.def("cpu_expand", &cpu_expand, no_gil);
  m.def("cpu_batched_mask", &cpu_batched_mask, no_gil);
  m.def("cpu_int_range", &cpu_int_range);
  m.def("cpu_isas", &lk::isas);
  m.def("cpu_isa", [] { return std::string(lk::kernels().name); });
  m.def("cpu_use_isa", &lk::use_isa);
  m.def("cpu_has_thread_pool", &lk::has_thread_pool);
#ifdef LORA_KERNELS_CUDA
  bind_cuda(m);
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
}
