// Packing for the panel form: a block of W repacked so that one vector holds one k of many columns.
#pragma once

namespace {
constexpr int64_t NP = lk::kPanel, SW = NV * L, SUBS = NP / SW;  // a panel is SUBS sub-panels of SW columns
constexpr int64_t MOST_DEEP = KC + KC / 4;                       // lanes along k of one block

// Walks the lines of the next block of W, and then those of B of the adapters whose turn comes after this block, a few every 16 steps, so that
// memory is read while the arithmetic runs.
struct NextBlock {
  const char* p = nullptr;  // the next line
  int64_t ld = 0, rows = 0, lines = 0, per_step = 0, l = 0;
  const lk::Segment *segment = nullptr, *segment_end = nullptr;  // of whose B the bytes segment_at .. + 64 segment_lines are fetched
  int64_t segment_at = 0, segment_lines = 0;
  LK_INLINE void step(NextBlock& f) {
    for (int64_t i = 0; i < f.per_step && (f.rows || next_segment(f)); i++) {
      prefetch(f.p);
      f.p += 64;
      if (++f.l >= f.lines) f.l = 0, f.rows--, f.p += f.ld - 64 * f.lines;
    }
  }
  static bool next_segment(NextBlock& f) {
    if (f.segment == f.segment_end) return false;
    f.p = static_cast<const char*>(f.segment++->adapter.b) + f.segment_at;
    f.rows = 1, f.lines = f.segment_lines;
    return true;
  }
};

struct NoBlock {};  // nothing to walk

// dst[sub][k - k0][VECTORS * L] <- w[n, k], lanes k0..k1 of K elements
template <class T, int VECTORS = NV>
void pack_nt(const T* w, int64_t ld, int64_t cols, int64_t k0, int64_t k1, int64_t K, float* dst, int64_t depth) {
  using P = PanelStep<T>;
  constexpr int STEP = L * P::PAIR;
  for (int64_t g = 0; g * L < cols; g++) {
    constexpr int64_t WIDTH = VECTORS * L;
    float* d = dst + g / VECTORS * depth * WIDTH + g % VECTORS * L;
    const int64_t valid = min(cols - g * L, L);
    int64_t k = k0;
    if constexpr (HAS_QUADS && sizeof(T) * P::PAIR == 4) {
      // of few lanes alone: W, from memory to two threads, came 4 % slower by quads (Zen 4, docs/measured.md)
      for (; k1 - k0 < L && valid == L && k + 4 <= k1 && (k + 4) * P::PAIR <= K; k += 4) {
        V q[4];
        quads(w + g * L * ld + k * P::PAIR, ld * static_cast<int64_t>(sizeof(T)), q);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) store(d + (k - k0 + i) * WIDTH, q[i]);
      }
    }
    for (; k < k1; k += L) {
      V r[L];
      const int64_t left = K - k * P::PAIR;
      const T* p = w + g * L * ld + k * P::PAIR;
      // every loop over r is unrolled whole, also for few ranks: an index known only at run time keeps r in memory
      if (valid == L && left >= STEP) {
#pragma GCC unroll 16
        for (int i = 0; i < L; i++) r[i] = P::row(p + i * ld);
      } else if (valid == L) {
#pragma GCC unroll 16
        for (int i = 0; i < L; i++) r[i] = P::row(p + i * ld, left);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < L; i++) r[i] = i < valid ? P::row(p + i * ld, min(left, STEP)) : zero();
      }
      transpose(r);
      float* q = d + (k - k0) * WIDTH;
#pragma GCC unroll 16
      for (int i = 0; i < L; i++)
        if (i < k1 - k) store(q + i * WIDTH, r[i]);
    }
  }
}

// Columns c and on, two vectors of them, of lane k of keep(k, n) w[k, n]; n is the block's first column, for the mask.
template <class T>
LK_INLINE void lane_of_rows(const T* w, int64_t ld, int64_t cols, int64_t k, int64_t K, int64_t c, lk::Mask keep, int64_t n, V* v) {
  using P = PanelStep<T>;
  const int64_t row = k * P::PAIR;
  const bool second = P::PAIR == 2 && row + 1 < K;
  const T* p = w + row * ld + c;
  if (!keep.p && (second || P::PAIR == 1) && c + 2 * L <= cols) return P::columns(p, p + ld, v);
  const uint32_t p_bits = keep.p ? keep_bits(keep, row, n + c) : ALL, q_bits = keep.p && second ? keep_bits(keep, row + 1, n + c) : ALL;
  P::columns(p, second ? p + ld : nullptr, cols - c, p_bits, q_bits, v);
}

// dst[sub][k - k0][SW] <- keep(k, n) w[k, n]
template <class T>
void pack_nn(const T* w, int64_t ld, int64_t cols, int64_t k0, int64_t k1, int64_t K, float* dst, int64_t depth, lk::Mask keep, int64_t n) {
  for (int64_t k = k0; k < k1; k++)
    for (int64_t c = 0; c < cols; c += 2 * L) {
      V v[2];
      lane_of_rows(w, ld, cols, k, K, c, keep, n, v);
      float* d = dst + c / SW * depth * SW + (k - k0) * SW + c % SW;
      store(d, v[0]);
      store(d + L, v[1]);
    }
}
}  // namespace
