// Many adapters in one batch, forward. The definition is reference_batched.py.
#include <cmath>
#include <cstring>

#include "products.h"

namespace lk {
namespace {

uint32_t threshold(float p) { return static_cast<uint32_t>(std::nearbyint(static_cast<double>(p) * 65536)); }
bool present(int32_t id, int64_t L) { return id >= 0 && id < L; }

// Rows sorted by adapter (stable), and the adapters that occur.
struct Order {
  std::vector<int32_t> start, rows, adapters;
  Order(const int32_t* ids, int64_t M, int64_t L) : start(static_cast<size_t>(L) + 1, 0), rows(static_cast<size_t>(M)) {
    for (int64_t m = 0; m < M; m++)
      if (present(ids[m], L)) start[static_cast<size_t>(ids[m]) + 1]++;
    for (size_t l = 0; l < static_cast<size_t>(L); l++) {
      if (start[l + 1]) adapters.push_back(static_cast<int32_t>(l));
      start[l + 1] += start[l];
    }
    std::vector<int32_t> next(start);
    for (int64_t m = 0; m < M; m++)
      if (present(ids[m], L)) rows[static_cast<size_t>(next[static_cast<size_t>(ids[m])]++)] = static_cast<int32_t>(m);
  }
};

// The matrices of the adapters present in x's type: in place, or cast copies of `rows(l)` x `cols(l)` elements.
class Matrices {
 public:
  template <class RowsOf, class ColsOf>
  Matrices(const Kernels& k, Dtype to, Dtype from, const void* pool, int64_t stride, int64_t ld, int64_t row_cap, int64_t col_cap, const Order& order, int64_t L, int threads,
           const RowsOf& skip_of, const ColsOf& size_of_l)
      : at(static_cast<size_t>(L), nullptr), ld(to == from ? ld : col_cap), copy_(to == from ? 0 : order.adapters.size() * static_cast<size_t>(row_cap * col_cap) * 2) {
    const int64_t count = static_cast<int64_t>(order.adapters.size());
    parallel(count, to == from ? 1 : threads_for(count * row_cap * col_cap, threads), [&](int64_t i0, int64_t i1, int) {
      for (int64_t i = i0; i < i1; i++) {
        const int64_t l = order.adapters[static_cast<size_t>(i)];
        const void* source = offset(pool, from, l * stride + skip_of(l) * ld);
        if (to == from) {
          at[static_cast<size_t>(l)] = source;
          continue;
        }
        uint16_t* copy = copy_.as<uint16_t>() + i * row_cap * col_cap;
        const auto [rows, cols] = size_of_l(l);
        for (int64_t r = 0; r < rows; r++) k.cast(to, static_cast<const float*>(source) + r * ld, copy + r * col_cap, cols);
        at[static_cast<size_t>(l)] = copy;
      }
    });
  }
  std::vector<const void*> at;
  int64_t ld;

 private:
  Scratch copy_;
};

}  // namespace

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

void lora_batched_fwd(const Batched& b) {
  const Kernels& k = kernels();
  if (b.M == 0) return;
  const Order order(b.ids, b.M, b.L);
  const auto rank = [&](int64_t l) -> int64_t { return b.ranks ? std::clamp<int64_t>(b.ranks[l], 0, b.R) : b.R; };
  struct Size {
    int64_t rows, cols;
  };
  const Matrices A(k, b.type, b.a_type, b.pool_a, b.a_stride, b.lda, b.R, b.K, order, b.L, b.threads, [&](int64_t l) { return b.packed_slice * rank(l); }, [&](int64_t l) { return Size{rank(l), b.K}; });
  const Matrices B(k, b.type, b.b_type, b.pool_b, b.b_stride, b.ldb, b.N, b.R, order, b.L, b.threads, [](int64_t) { return 0; }, [&](int64_t l) { return Size{b.N, rank(l)}; });

  // shrink: runs of neighbouring rows with one adapter, in pieces of rows x 8 ranks
  struct Piece {
    int64_t m, rows, r0, r1;
  };
  constexpr int64_t kRows = 16, kRanks = 8;
  std::vector<Piece> pieces;
  int64_t work = 0;
  for (int64_t m = 0; m < b.M;) {
    int64_t end = m + 1;
    while (end < b.M && end - m < kRows && b.ids[end] == b.ids[m]) end++;
    if (present(b.ids[m], b.L)) {
      const int64_t R = rank(b.ids[m]), step = end - m >= 4 ? R : kRanks;
      for (int64_t r = 0; r < R; r += step) pieces.push_back({m, end - m, r, std::min(R, r + step)});
      work += (end - m) * R * b.K;
    }
    m = end;
  }
  parallel(static_cast<int64_t>(pieces.size()), threads_for(work, b.threads), [&](int64_t i0, int64_t i1, int) {
    for (int64_t i = i0; i < i1; i++) {
      const Piece& p = pieces[static_cast<size_t>(i)];
      const int32_t l = b.ids[p.m];
      DotArgs d{};
      d.M = p.rows, d.K = b.K, d.x = {offset(b.x.p, b.type, p.m * b.x.ld), b.x.ld}, d.w = {A.at[static_cast<size_t>(l)], A.ld};
      d.alpha = b.scalings ? b.scalings[l] : 1.f, d.out = {offset(b.h.p, b.type, p.m * b.h.ld), b.h.ld};
      if (b.dropout_p && b.dropout_p[l] > 0) {
        const uint32_t t = threshold(b.dropout_p[l]);
        d.keep = {b.mask + p.m * ((b.K + 31) / 32), (b.K + 31) / 32};
        d.alpha *= t < 65536 ? 65536.f / static_cast<float>(65536 - t) : 0.f;
      }
      k.dot(b.type, d, p.r0, p.r1);
    }
  });

  const In h = {b.h.p, b.h.ld};
  if (b.form == kInPlace) {
    std::vector<RankRow> rows(static_cast<size_t>(b.M));
    for (int64_t m = 0; m < b.M; m++)
      rows[static_cast<size_t>(m)] = present(b.ids[m], b.L) ? RankRow{B.at[static_cast<size_t>(b.ids[m])], rank(b.ids[m])} : RankRow{nullptr, 0};
    DotArgs d{};
    d.M = b.M, d.K = b.K, d.x = b.x, d.w = b.w, d.h = h, d.b.ld = B.ld, d.bias = b.bias, d.alpha = 1.f, d.out = b.y, d.rows = rows.data();
    dot_product(k, b.type, d, b.N, b.threads);
    return;
  }
  std::vector<Segment> segments;
  int64_t widest = 0;
  for (const int32_t l : order.adapters) {
    const size_t at = static_cast<size_t>(l);
    segments.push_back({{B.at[at], rank(l)}, order.rows.data() + order.start[at], order.start[at + 1] - order.start[at]});
    widest = std::max(widest, rank(l));
  }
  PanelArgs p{};
  p.M = b.M, p.N = b.N, p.K = b.K, p.x = b.x, p.w = b.w, p.h = h, p.b.ld = B.ld, p.nt = true, p.bias = b.bias, p.alpha = 1.f, p.out = b.y;
  p.segments = segments.data(), p.segment_count = static_cast<int64_t>(segments.size()), p.segment_R = widest;
  if (segments.empty()) p.segments = nullptr;
  panel_products(k, b.type, &p, 1, b.threads);
}

}  // namespace lk
