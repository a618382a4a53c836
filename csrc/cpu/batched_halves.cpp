// The low-rank halves of the many-adapter op, for a base that someone else computes. The definition is reference_batched.py.
// Both gather an adapter's rows, so that it is packed once for them; a row's result does not depend on the rows beside it.
#include "batch.h"

namespace lk {
namespace {

constexpr int64_t kRows = 64;  // of one adapter at once

struct Piece {  // rows first .. first + count of the sorted batch, all of adapter l
  int64_t l, first, count;
};

std::vector<Piece> pieces_of(const Batched& b, const Order& order) {
  std::vector<Piece> pieces;
  for (const int32_t l : order.adapters)
    for (int64_t i = 0; i < order.count(l) && rank_of(b, l) > 0; i += kRows)
      pieces.push_back({l, order.first(l) + i, std::min(kRows, order.count(l) - i)});
  return pieces;
}

}  // namespace

void lora_shrink(const Batched& b, float* h) {
  const Kernels& k = kernels();
  const Order order(b.ids, b.M, b.L);
  const Matrices A = a_of(b, k, order);
  const std::vector<Piece> pieces = pieces_of(b, order);
  parallel(static_cast<int64_t>(pieces.size()), threads_for(b.M * b.K * b.R, b.threads), [&](int64_t i0, int64_t i1, int) {
    const Scratch out(static_cast<size_t>(kRows * b.R) * 4);
    for (int64_t i = i0; i < i1; i++) {
      const Piece& piece = pieces[static_cast<size_t>(i)];
      const int32_t* rows = order.rows.data() + piece.first;
      const int64_t R = rank_of(b, piece.l);
      const Gathered x(b.type, b.x, rows, piece.count, b.K);
      PanelArgs p{};
      p.M = piece.count, p.N = R, p.K = b.K, p.x = x.in, p.w = {A.at[static_cast<size_t>(piece.l)], A.ld}, p.nt = true;
      p.alpha = scale_of(b, piece.l), p.out = {out.as<float>(), R}, p.out_f32 = true;
      panel_products(k, b.type, &p, 1, 1);
      for (int64_t j = 0; j < piece.count; j++) std::memcpy(h + rows[j] * b.R, out.as<float>() + j * R, static_cast<size_t>(R) * 4);
    }
  });
}

void lora_expand(const Batched& b, In h, Dtype h_type) {
  const Kernels& k = kernels();
  const Order order(b.ids, b.M, b.L);
  const Matrices B = b_of(b, k, order);
  const std::vector<Piece> pieces = pieces_of(b, order);
  const Scratch sorted(static_cast<size_t>(b.M * b.R * size_of(b.type)));
  for (const Piece& piece : pieces)
    for (int64_t j = piece.first; j < piece.first + piece.count; j++) {
      const void* from = offset(h.p, h_type, order.rows[static_cast<size_t>(j)] * h.ld);
      void* to = offset(sorted.as<void>(), b.type, j * b.R);
      const int64_t R = rank_of(b, piece.l);
      if (h_type == b.type)
        std::memcpy(to, from, static_cast<size_t>(R * size_of(b.type)));
      else
        k.cast(b.type, static_cast<const float*>(from), to, R);
    }
  PanelArgs widest{};
  widest.M = kRows, widest.R = b.R;
  const int64_t floats = k.panel_floats(b.type, widest, kRows);
  parallel((b.N + kPanel - 1) / kPanel, threads_for(b.M * b.N * b.R, b.threads), [&](int64_t p0, int64_t p1, int) {
    const Scratch ws(static_cast<size_t>(floats + kRows * kPanel) * 4);
    float* update = ws.as<float>() + floats;
    for (int64_t n = p0 * kPanel; n < std::min(b.N, p1 * kPanel); n += kPanel)
      for (const Piece& piece : pieces) {
        PanelArgs p{};
        p.M = piece.count, p.N = std::min(kPanel, b.N - n), p.R = rank_of(b, piece.l), p.nt = true, p.alpha = 1.f;
        p.h = {offset(sorted.as<void>(), b.type, piece.first * b.R), b.R};
        p.b = {offset(B.at[static_cast<size_t>(piece.l)], b.type, n * B.ld), B.ld}, p.out = {update, kPanel}, p.out_f32 = true;
        k.panel(b.type, p, 0, 1, 0, p.M, ws.as<float>());
        for (int64_t j = 0; j < p.M; j++)
          k.add(b.type, update + j * kPanel, offset(b.y.p, b.type, order.rows[static_cast<size_t>(piece.first + j)] * b.y.ld + n), p.N);
      }
  });
}

}  // namespace lk
