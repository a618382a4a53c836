// Many adapters in one batch: base and adapters in one op. The definition is reference_batched.py.
#include "batch.h"

namespace lk {

void batched_mask(uint64_t seed, int64_t M, int64_t K, int64_t L, const int32_t* ids, const float* dropout_p, uint32_t* mask, int threads) {
  const Kernels& k = kernels();
  const int64_t words = (K + 31) / 32;
  parallel(M, threads_for(M * K, threads), [&](int64_t m0, int64_t m1, int) {
    for (int64_t m = m0; m < m1; m++) {
      if (present(ids[m], L) && dropout_p[ids[m]] > 0)
        k.mask(seed, threshold(dropout_p[ids[m]]), K, {mask, words}, m, m + 1);
      else
        std::memset(mask + m * words, 0xff, static_cast<size_t>(words) * 4);
    }
  });
}

namespace {

// h = s x A^T: the rows of one adapter together, wherever they lie, so that its A is read once for many of them
void shrink(const Kernels& k, const Batched& b, const Order& order, const Matrices& A) {
  struct Piece {
    int64_t l, first, rows, r0, r1;
  };
  constexpr int64_t kRows = 16, kPanelRows = 256, kRanks = 8;
  // for every adapter or for none, so that a row's bits do not depend on how many share its adapter
  const bool panel = b.form == kPanels && k.shrink_rows(b.type, false) <= kAnyRows;
  std::vector<Piece> pieces;
  int64_t work = 0;
  for (const int32_t l : order.adapters) {
    const int64_t R = rank_of(b, l), most = drops(b, l) ? 1 : panel ? kPanelRows : kRows;  // keep masks lie by row
    for (int64_t i = 0; i < order.count(l); i += most) {
      const int64_t rows = std::min(most, order.count(l) - i), step = panel || rows >= 4 ? R : kRanks;
      for (int64_t r = 0; r < R; r += step) pieces.push_back({l, i, rows, r, std::min(R, r + step)});
    }
    work += order.count(l) * R * b.K;
  }
  PanelArgs widest{};
  widest.M = std::min(kPanelRows, b.M), widest.K = b.K;
  const int64_t floats = panel ? panel_workspace(k, b.type, widest) : 0;
  parallel(static_cast<int64_t>(pieces.size()), threads_for(work, b.threads), [&](int64_t i0, int64_t i1, int) {
    const Scratch out(static_cast<size_t>(std::min(kPanelRows, b.M) * b.R * size_of(b.type))), ws(static_cast<size_t>(floats) * 4);
    for (int64_t i = i0; i < i1; i++) {
      const Piece& p = pieces[static_cast<size_t>(i)];
      const int32_t* rows = order.of(p.l) + p.first;
      const Gathered x(b.type, b.x, rows, p.rows, b.K);
      const bool in_place = p.rows == 1;
      const In a = {A.at[static_cast<size_t>(p.l)], A.ld};
      const Out h = in_place ? Out{offset(b.h.p, b.type, rows[0] * b.h.ld), b.h.ld} : Out{out.as<void>(), b.R};
      if (panel && !drops(b, p.l)) {
        PanelArgs d{};
        d.M = p.rows, d.N = p.r1, d.K = b.K, d.x = x.in, d.w = a, d.nt = true, d.alpha = scale_of(b, p.l), d.out = h;
        serial_panel_product(k, b.type, d, ws.as<float>());
      } else {
        DotArgs d{};
        d.M = p.rows, d.K = b.K, d.x = x.in, d.w = a, d.alpha = scale_of(b, p.l) * keep_scale_of(b, p.l), d.out = h;
        if (drops(b, p.l)) d.keep = {b.mask + rows[0] * ((b.K + 31) / 32), (b.K + 31) / 32};
        k.dot(b.type, d, p.r0, p.r1);
      }
      for (int64_t j = 0; j < p.rows && !in_place; j++)
        std::memcpy(offset(b.h.p, b.type, rows[j] * b.h.ld + p.r0), offset(out.as<void>(), b.type, j * b.R + p.r0),
                    static_cast<size_t>((p.r1 - p.r0) * size_of(b.type)));
    }
  });
}

}  // namespace

void lora_batched_fwd(const Batched& b) {
  const Kernels& k = kernels();
  if (b.M == 0) return;
  const Order order(b.ids, b.M, b.L);
  const Matrices A = a_of(b, k, order), B = b_of(b, k, order);

  shrink(k, b, order, A);
  const In h = {b.h.p, b.h.ld};
  if (b.form == kInPlace) {
    std::vector<RankRow> rows(static_cast<size_t>(b.M));
    for (int64_t m = 0; m < b.M; m++)
      rows[static_cast<size_t>(m)] =
          present(b.ids[m], b.L) ? RankRow{B.at[static_cast<size_t>(b.ids[m])], rank_of(b, b.ids[m])} : RankRow{nullptr, 0};
    DotArgs d{};
    d.M = b.M, d.K = b.K, d.x = b.x, d.w = b.w, d.h = h, d.b.ld = B.ld, d.bias = b.bias, d.alpha = 1.f, d.out = b.y, d.rows = rows.data();
    dot_product(k, b.type, d, b.N, b.threads);
    return;
  }
  std::vector<Segment> segments;
  int64_t widest = 0;
  for (const int32_t l : order.adapters) {
    const int64_t R = rank_of(b, l);
    if (R) segments.push_back({{B.at[static_cast<size_t>(l)], R}, order.of(l), order.count(l)});
    widest = std::max(widest, R);
  }
  PanelArgs p{};
  p.M = b.M, p.N = b.N, p.K = b.K, p.x = b.x, p.w = b.w, p.h = h, p.b.ld = B.ld, p.nt = true, p.bias = b.bias, p.alpha = 1.f, p.out = b.y;
  p.segments = segments.data(), p.segment_count = static_cast<int64_t>(segments.size()), p.segment_R = widest;
  if (segments.empty()) p.segments = nullptr;
  panel_products(k, b.type, &p, 1, b.threads);
}

}  // namespace lk
