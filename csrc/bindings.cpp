// Only the files bindings*.cpp know Python. Tensors come as they are (None where there is none); strides, sizes and dtypes are read from them.
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>

#include "bindings_tensor.h"
#include "cpu/scratch.h"
#include "cpu/threads.h"

namespace py = pybind11;

namespace {

using lk::Operand;
using Tensor = py::handle;
using Tensors = std::vector<py::handle>;
using NoGil = py::gil_scoped_release;

lk::Problem problem(int form, int threads, double scaling, uint32_t threshold, const Operand& x, const Operand& w, const Operand& a,
                    const Operand& b) {
  return {x.rows(),
          w.size(0),
          w.size(1),
          x.type(),
          {a.in(), b.in(), a.type(), b.type(), a.size(0)},
          static_cast<float>(scaling),
          threshold,
          threads,
          static_cast<lk::Form>(form)};
}

// h: [M, R], or None where nobody will want it.
void cpu_linear_fwd(int form, int threads, double scaling, uint32_t threshold, Tensor x_, Tensor w_, Tensor bias_, Tensor a_, Tensor b_, Tensor seed_,
                    Tensor y_, Tensor h_, Tensor mask_) {
  const Operand x(x_), w(w_), bias(bias_), a(a_), b(b_), seed(seed_), y(y_), h(h_), mask(mask_);
  const lk::Problem p = problem(form, threads, scaling, threshold, x, w, a, b);
  const NoGil release;
  const lk::Scratch own(h ? 0 : static_cast<size_t>(p.M * p.adapter.R) * sizeof(float));
  const lk::Out kept = h ? h.out() : lk::Out{own.as<void>(), p.adapter.R};
  lk::lora_linear_fwd(p, {x.in(), w.in(), bias.p<>(), seed.p<const int64_t>(), y.out(), kept, mask.p<uint32_t>()});
}

// g: [M, R], wanted by the form "torch" alone; dx, d_a, d_b: None where not needed.
void cpu_linear_bwd(int form, int threads, double scaling, uint32_t threshold, Tensor dy_, Tensor x_, Tensor w_, Tensor a_, Tensor b_, Tensor h_,
                    Tensor mask_, Tensor g_, Tensor dx_, Tensor d_a_, Tensor d_b_) {
  const Operand dy(dy_), x(x_), w(w_), a(a_), b(b_), h(h_), mask(mask_), g(g_), dx(dx_), d_a(d_a_), d_b(d_b_);
  const lk::Problem p = problem(form, threads, scaling, threshold, x, w, a, b);
  const NoGil release;
  lk::lora_linear_bwd(p, {dy.in(), x.in(), w.in(), h.in(), mask.p<const uint32_t>(), g.out(), dx.out(), d_a.out(), d_b.out()});
}

void cpu_dropout_mask(uint64_t seed, uint32_t threshold, int64_t K, Tensor mask_, int threads) {
  const Operand mask(mask_);
  const NoGil release;
  lk::dropout_mask(seed, threshold, mask.size(0), K, mask.p<uint32_t>(), threads);
}

// What the many-adapter ops share: slice number `slice` of them; with `packed` all slices lie in pool_a, behind each other at the true rank.
lk::Batched batched(int threads, int64_t slice, bool packed, const Operand& ids, const Operand& ranks, const Operand& scalings) {
  lk::Batched b{};
  b.threads = threads, b.packed_slice = packed ? slice : 0;
  b.ids = ids.p<const int32_t>(), b.ranks = ranks.row<int32_t>(slice), b.scalings = scalings.row<float>(slice);
  return b;
}

void take_x(lk::Batched& b, const Operand& x) { b.M = x.rows(), b.K = x.cols(), b.type = x.type(), b.x = x.in(); }
void take_a(lk::Batched& b, const Operand& a) {
  b.L = a.size(0), b.pool_a = a.p<>(), b.a_stride = a.stride(0), b.lda = a.stride(1), b.a_type = a.type();
}
void take_b(lk::Batched& b, const Operand& pool) {
  b.L = pool.size(0), b.N = pool.size(1), b.R = pool.size(2);
  b.pool_b = pool.p<>(), b.b_stride = pool.stride(0), b.ldb = pool.stride(1), b.b_type = pool.type();
}
// Columns of y from `column` on, and matrix `slice` of h [S, M, R or more].
lk::Out columns(const Operand& y, int64_t column) { return {y.p<char>() + column * y.item(), y.ld()}; }
lk::Out plane(const Operand& h, int64_t slice) { return {h.p<char>() + slice * h.stride(0) * h.item(), h.stride(1)}; }

// h: [S, M, R or more], or None where nobody will want it.
void cpu_batched_fwd(int form, int threads, int64_t slice, bool packed, int64_t column, Tensor x_, Tensor w_, Tensor bias_, Tensor pool_a_,
                     Tensor pool_b_, Tensor ids_, Tensor ranks_, Tensor scalings_, Tensor dropout_p_, Tensor mask_, Tensor y_, Tensor h_) {
  const Operand x(x_), w(w_), bias(bias_), pool_a(pool_a_), pool_b(pool_b_), ids(ids_), ranks(ranks_), scalings(scalings_), dropout_p(dropout_p_);
  const Operand mask(mask_), y(y_), h(h_);
  lk::Batched b = batched(threads, slice, packed, ids, ranks, scalings);
  take_x(b, x), take_a(b, pool_a), take_b(b, pool_b);
  const int64_t first = w.size(0) == b.N ? 0 : column;  // w and bias of this slice, or of all slices stacked
  b.w = {w.p<char>() + first * w.ld() * w.item(), w.ld()}, b.bias = bias ? bias.p<char>() + first * bias.item() : nullptr;
  b.dropout_p = dropout_p.p<const float>(), b.mask = mask.p<const uint32_t>();
  b.y = columns(y, column), b.form = static_cast<lk::Form>(form);
  const NoGil release;
  const lk::Scratch own(h ? 0 : static_cast<size_t>(b.M * b.R) * sizeof(float));
  b.h = h ? plane(h, slice) : lk::Out{own.as<void>(), b.R};
  lk::lora_batched_fwd(b);
}

// h: float32 [S, M, R], zero.
void cpu_shrink(int threads, int64_t slice, bool packed, Tensor x_, Tensor pool_a_, Tensor ids_, Tensor ranks_, Tensor scalings_, Tensor h_) {
  const Operand x(x_), pool_a(pool_a_), ids(ids_), ranks(ranks_), scalings(scalings_), h(h_);
  lk::Batched b = batched(threads, slice, packed, ids, ranks, scalings);
  take_x(b, x), take_a(b, pool_a);
  b.R = h.size(2);
  const NoGil release;
  lk::lora_shrink(b, static_cast<float*>(plane(h, slice).p));
}

void cpu_expand(int threads, int64_t slice, int64_t column, Tensor y_, Tensor h_, Tensor pool_b_, Tensor ids_, Tensor ranks_) {
  const Operand y(y_), h(h_), pool_b(pool_b_), ids(ids_), ranks(ranks_);
  lk::Batched b = batched(threads, slice, false, ids, ranks, Operand(py::none()));
  take_b(b, pool_b);
  b.M = y.rows(), b.type = y.type(), b.y = columns(y, column);
  const lk::Out from = plane(h, slice);
  const NoGil release;
  lk::lora_expand(b, {from.p, from.ld}, h.type());
}

// dx: None where not needed. das and dbs: one per slice, zero, or empty.
void cpu_batched_bwd(int threads, Tensor dy_, Tensor x_, const Tensors& weights, const Tensors& pools_a, const Tensors& pools_b, Tensor h_,
                     Tensor mask_, Tensor ids_, Tensor ranks_, Tensor scalings_, Tensor dropout_p_, Tensor dx_, const Tensors& das,
                     const Tensors& dbs) {
  const Operand dy(dy_), x(x_), h(h_), mask(mask_), ids(ids_), ranks(ranks_), scalings(scalings_), dropout_p(dropout_p_), dx(dx_);
  std::vector<lk::Batched> slices;
  std::vector<lk::BatchedGrads> grads;
  int64_t column = 0;
  for (size_t i = 0; i < weights.size(); i++) {
    const Operand w(weights[i]), a(pools_a[i]), pool(pools_b[i]);
    lk::Batched b = batched(threads, static_cast<int64_t>(i), false, ids, ranks, scalings);
    take_x(b, x), take_a(b, a), take_b(b, pool);
    b.w = w.in(), b.dropout_p = dropout_p.p<const float>(), b.mask = mask.p<const uint32_t>(), b.h = plane(h, static_cast<int64_t>(i));
    const lk::Out part = columns(dy, column);
    grads.push_back({{part.p, part.ld}, das.empty() ? nullptr : Operand(das[i]).p<>(), dbs.empty() ? nullptr : Operand(dbs[i]).p<>()});
    slices.push_back(b);
    column += b.N;
  }
  const NoGil release;
  lk::lora_batched_bwd(slices, grads, dx.out());
}

void cpu_batched_mask(uint64_t seed, int64_t K, Tensor ids_, Tensor dropout_p_, Tensor mask_, int threads) {
  const Operand ids(ids_), dropout_p(dropout_p_), mask(mask_);
  const NoGil release;
  lk::batched_mask(seed, ids.size(0), K, dropout_p.size(0), ids.p<const int32_t>(), dropout_p.p<const float>(), mask.p<uint32_t>(), threads);
}

// Least and largest value of contiguous int32, at least one.
std::pair<int32_t, int32_t> cpu_int_range(Tensor t_) {
  const Operand t(t_);
  const auto* p = t.p<const int32_t>();
  const auto [low, high] = std::minmax_element(p, p + t.rows() * t.cols());
  return {*low, *high};
}

// Whether contiguous fp32 are all finite.
bool cpu_all_finite(Tensor t_) {
  const Operand t(t_);
  const auto* p = t.p<const float>();
  return std::all_of(p, p + t.rows() * t.cols(), [](float v) { return std::isfinite(v); });
}

}  // namespace

#ifdef LORA_KERNELS_CUDA
void bind_cuda(py::module_& m);  // csrc/cuda
#endif

PYBIND11_MODULE(_C, m) {
  if (!bind_tensors(m.ptr()) || !bind_state(m.ptr())) throw py::error_already_set();
  m.def("cpu_linear_fwd", &cpu_linear_fwd);
  m.def("cpu_linear_bwd", &cpu_linear_bwd);
  m.def("cpu_dropout_mask", &cpu_dropout_mask);
  m.def("cpu_batched_fwd", &cpu_batched_fwd);
  m.def("cpu_batched_bwd", &cpu_batched_bwd);
  m.def("cpu_shrink", &cpu_shrink);
  m.def("cpu_expand", &cpu_expand);
  m.def("cpu_batched_mask", &cpu_batched_mask);
  m.def("cpu_int_range", &cpu_int_range);
  m.def("cpu_all_finite", &cpu_all_finite);
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
