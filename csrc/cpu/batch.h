// What the many-adapter ops share: the rows sorted by adapter, and the adapters in x's type.
#pragma once
#include <cmath>
#include <cstring>

#include "products.h"

namespace lk {

inline uint32_t threshold(float p) { return static_cast<uint32_t>(std::nearbyint(static_cast<double>(p) * 65536)); }
inline bool present(int32_t id, int64_t L) { return id >= 0 && id < L; }

// Rows sorted by adapter (stable), and the adapters that occur.
struct Order {
  std::vector<int32_t> start, rows, adapters;
  const int32_t* of(int64_t l) const { return rows.data() + start[static_cast<size_t>(l)]; }
  int64_t first(int64_t l) const { return start[static_cast<size_t>(l)]; }
  int64_t count(int64_t l) const { return start[static_cast<size_t>(l) + 1] - start[static_cast<size_t>(l)]; }
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

inline int64_t rank_of(const Batched& b, int64_t l) { return b.ranks ? std::clamp<int64_t>(b.ranks[l], 0, b.R) : b.R; }
inline float scale_of(const Batched& b, int64_t l) { return b.scalings ? b.scalings[l] : 1.f; }
inline bool drops(const Batched& b, int64_t l) { return b.dropout_p && b.dropout_p[l] > 0; }
inline float keep_scale_of(const Batched& b, int64_t l) {
  if (!drops(b, l)) return 1.f;
  const uint32_t t = threshold(b.dropout_p[l]);
  return t < 65536 ? 65536.f / static_cast<float>(65536 - t) : 0.f;
}

// Some rows of a matrix behind each other: in place where they are neighbours, else a copy.
class Gathered {
 public:
  Gathered(Dtype t, In m, const int32_t* rows, int64_t count, int64_t cols)
      : copy_(together(rows, count) ? 0 : static_cast<size_t>(count * cols * size_of(t))), in{copy_.as<char>(), cols} {
    if (together(rows, count)) {
      in = {count ? offset(m.p, t, rows[0] * m.ld) : m.p, m.ld};
      return;
    }
    for (int64_t i = 0; i < count; i++)
      std::memcpy(copy_.as<char>() + i * cols * size_of(t), offset(m.p, t, rows[i] * m.ld), static_cast<size_t>(cols * size_of(t)));
  }

 private:
  static bool together(const int32_t* rows, int64_t count) { return count == 0 || rows[count - 1] - rows[0] == count - 1; }  // ascending
  Scratch copy_;

 public:
  In in;
};

struct Size {
  int64_t rows, cols;
};
// The matrices of the adapters present in x's type: in place, or cast copies of `rows(l)` x `cols(l)` elements.
class Matrices {
 public:
  template <class RowsOf, class ColsOf>
  Matrices(const Kernels& k, Dtype to, Dtype from, const void* pool, int64_t stride, int64_t ld, int64_t row_cap, int64_t col_cap, const Order& order,
           int64_t L, int threads, const RowsOf& skip_of, const ColsOf& size_of_l)
      : at(static_cast<size_t>(L), nullptr),
        ld(to == from ? ld : col_cap),
        copy_(to == from ? 0 : order.adapters.size() * static_cast<size_t>(row_cap * col_cap) * 2) {
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

// The widest rank in this batch, which may be far below the pool's: the cast copies lie close together.
inline int64_t widest(const Batched& b, const Order& order) {
  int64_t R = 0;
  for (const int32_t l : order.adapters) R = std::max(R, rank_of(b, l));
  return R;
}

inline Matrices a_of(const Batched& b, const Kernels& k, const Order& order) {
  return Matrices(
      k, b.type, b.a_type, b.pool_a, b.a_stride, b.lda, widest(b, order), b.K, order, b.L, b.threads,
      [&](int64_t l) { return b.packed_slice * rank_of(b, l); }, [&](int64_t l) { return Size{rank_of(b, l), b.K}; });
}
inline Matrices b_of(const Batched& b, const Kernels& k, const Order& order) {
  return Matrices(
      k, b.type, b.b_type, b.pool_b, b.b_stride, b.ldb, b.N, widest(b, order), order, b.L, b.threads, [](int64_t) { return 0; },
      [&](int64_t l) { return Size{b.N, rank_of(b, l)}; });
}

}  // namespace lk
