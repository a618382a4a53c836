// Many adapters in one batch, backward. The definition is reference_batched.py.
// g, dA and dB adapter by adapter over its gathered rows; dx tile by tile: the slices' bases and rank terms in one fp32 tile, rounded once.
#include <memory>

#include "batch.h"

namespace lk {
namespace {

// Rows of m [.., cols] as the columns of the result, so that a reduction over them runs along rows; rows null: 0 .. count - 1
class Columns {
 public:
  Columns(Dtype t, In m, const int32_t* rows, int64_t count, int64_t cols) : copy_(static_cast<size_t>(count * cols * size_of(t))) {
    if (t == kF32)
      fill<float>(m, rows, count, cols);
    else
      fill<uint16_t>(m, rows, count, cols);
    in = {copy_.as<char>(), count};
  }
  In in;

 private:
  template <class T>
  void fill(In m, const int32_t* rows, int64_t count, int64_t cols) {
    for (int64_t i = 0; i < count; i++)
      for (int64_t c = 0; c < cols; c++) copy_.as<T>()[c * count + i] = static_cast<const T*>(m.p)[(rows ? rows[i] : i) * m.ld + c];
  }
  Scratch copy_;
};

// The keep masks of the sorted rows.
struct SortedMask {
  int64_t words;
  Scratch copy;
  SortedMask(const Batched& b, const Order& order)
      : words(b.dropout_p ? (b.K + 31) / 32 : 0), copy(static_cast<size_t>(b.M * (b.dropout_p ? (b.K + 31) / 32 : 0)) * 4) {
    for (int64_t i = 0; words && i < order.start.back(); i++)
      std::memcpy(copy.as<uint32_t>() + i * words, b.mask + order.rows[static_cast<size_t>(i)] * words, static_cast<size_t>(words) * 4);
  }
  Mask from(const Batched& b, int64_t l, int64_t row, int64_t column) const {
    return drops(b, l) ? Mask{copy.as<uint32_t>() + row * words + column / 32, words} : Mask{};
  }
};

// g [n, r] = s dy B, dA = g^T drop(x), dB = dy^T h of one adapter
void one_adapter(const Kernels& k, const Batched& b, const BatchedGrads& grads, const Order& order, const SortedMask& mask, int64_t l,
                 const Matrices& B, bool need_g, Out g, int threads) {
  const int64_t n = order.count(l), R = rank_of(b, l);
  const int32_t* rows = order.of(l);
  const Gathered dy(b.type, grads.dy, rows, n, b.N);
  if (need_g) {
    PanelArgs p{};
    p.M = n, p.N = R, p.K = b.N, p.x = dy.in, p.w = {B.at[static_cast<size_t>(l)], B.ld}, p.alpha = scale_of(b, l), p.out = g;
    panel_products(k, b.type, &p, 1, threads);
  }
  if (grads.d_a) {
    const Columns gt(b.type, {g.p, g.ld}, nullptr, n, R);
    const Gathered x(b.type, b.x, rows, n, b.K);
    PanelArgs p{};
    p.M = R, p.N = b.K, p.K = n, p.x = gt.in, p.w = x.in, p.w_keep = mask.from(b, l, order.first(l), 0), p.alpha = keep_scale_of(b, l);
    p.out = {offset(grads.d_a, b.a_type, l * b.R * b.K), b.K}, p.out_f32 = b.a_type == kF32, p.thin = true;
    panel_products(k, b.type, &p, 1, threads);
  }
  if (grads.d_b) {
    const Columns ht(b.type, {b.h.p, b.h.ld}, rows, n, R);
    PanelArgs p{};
    p.M = R, p.N = b.N, p.K = n, p.x = ht.in, p.w = dy.in, p.alpha = 1.f;
    p.out = {offset(grads.d_b, b.b_type, l * b.N * b.R), b.R}, p.out_t = true, p.out_f32 = b.b_type == kF32, p.thin = true;
    panel_products(k, b.type, &p, 1, threads);
  }
}

}  // namespace

void lora_batched_bwd(const std::vector<Batched>& slices, const std::vector<BatchedGrads>& grads, Out dx) {
  const Kernels& k = kernels();
  const Batched& any = slices[0];
  if (any.M == 0) return;
  const Dtype type = any.type;
  const int64_t S = static_cast<int64_t>(slices.size()), M = any.M, K = any.K, R = any.R;
  const Order order(any.ids, M, any.L);
  const SortedMask mask(any, order);
  const Scratch g_copy(static_cast<size_t>(S * M * R * size_of(type)));
  const auto g = [&](int64_t i, int64_t row) { return offset(g_copy.as<void>(), type, (i * M + row) * R); };

  std::vector<std::unique_ptr<const Matrices>> A, B;
  const Order none(any.ids, 0, any.L);
  for (int64_t i = 0; i < S; i++) {
    const Batched& b = slices[static_cast<size_t>(i)];
    A.emplace_back(new Matrices(a_of(b, k, dx.p ? order : none)));
    B.emplace_back(new Matrices(b_of(b, k, dx.p || grads[0].d_a ? order : none)));
  }
  const int64_t adapters = static_cast<int64_t>(order.adapters.size());
  const bool apart = S * adapters >= 2 * any.threads;  // an adapter per thread, or all threads on each
  parallel(S * adapters, apart ? any.threads : 1, [&](int64_t u0, int64_t u1, int) {
    for (int64_t u = u0; u < u1; u++) {
      const size_t i = static_cast<size_t>(u / adapters);
      const int64_t l = order.adapters[static_cast<size_t>(u % adapters)];
      if (rank_of(slices[i], l))
        one_adapter(k, slices[i], grads[i], order, mask, l, *B[i], dx.p || grads[i].d_a, {g(u / adapters, order.first(l)), R},
                    apart ? 1 : any.threads);
    }
  });
  if (!dx.p) return;

  constexpr int64_t kRows = 512;
  PanelArgs widest{};
  widest.M = std::min(M, kRows), widest.R = R;
  for (const Batched& b : slices) widest.K = std::max(widest.K, b.N);
  const int64_t panels = (K + kPanel - 1) / kPanel, chunks = (M + kRows - 1) / kRows, tile = std::min(M, kRows) * kPanel;
  const int64_t floats = k.panel_floats(type, widest, widest.M);
  int64_t work = 0;
  for (const Batched& b : slices) work += M * K * (b.N + R);
  parallel(panels * chunks, threads_for(work, any.threads), [&](int64_t u0, int64_t u1, int) {
    const Scratch ws(static_cast<size_t>(floats + 2 * tile) * 4);
    float *sum = ws.as<float>() + floats, *term = sum + tile;
    for (int64_t u = u0; u < u1; u++) {
      const int64_t c = u / chunks * kPanel, m0 = u % chunks * kRows, m1 = std::min(M, m0 + kRows), cols = std::min(kPanel, K - c);
      for (int64_t i = 0; i < S; i++) {
        const Batched& b = slices[static_cast<size_t>(i)];
        const In dy = grads[static_cast<size_t>(i)].dy;
        PanelArgs p{};
        p.M = m1 - m0, p.N = cols, p.K = b.N, p.x = {offset(dy.p, type, m0 * dy.ld), dy.ld}, p.w = {offset(b.w.p, type, c), b.w.ld};
        p.alpha = 1.f, p.out = {i ? term : sum, kPanel}, p.out_f32 = true;
        k.panel(type, p, 0, 1, 0, p.M, ws.as<float>());
        if (i) k.add(kF32, term, sum, p.M * kPanel);
      }
      for (const int32_t l : order.adapters) {
        const int32_t *first = order.of(l), *last = first + order.count(l);
        const int32_t *from = std::lower_bound(first, last, m0), *to = std::lower_bound(from, last, m1);
        for (int64_t i = 0; i < S && from < to; i++) {
          const Batched& b = slices[static_cast<size_t>(i)];
          const Matrices& a = *A[static_cast<size_t>(i)];
          const int64_t row = order.first(l) + (from - first);
          PanelArgs p{};
          p.M = to - from, p.N = cols, p.R = rank_of(b, l), p.h = {g(i, row), R}, p.b = {offset(a.at[static_cast<size_t>(l)], type, c), a.ld};
          p.out_keep = mask.from(b, l, row, c), p.keep_scale = keep_scale_of(b, l), p.alpha = 1.f, p.out = {term, kPanel}, p.out_f32 = true;
          if (!p.R) continue;
          k.panel(type, p, 0, 1, 0, p.M, ws.as<float>());
          for (int64_t j = 0; j < p.M; j++) k.add(kF32, term + j * kPanel, sum + (from[j] - m0) * kPanel, cols);
        }
      }
      for (int64_t m = m0; m < m1; m++) k.cast(type, sum + (m - m0) * kPanel, offset(dx.p, type, m * dx.ld + c), cols);
    }
  });
}

}  // namespace lk
