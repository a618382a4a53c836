// Few rows against a long K, as of dA = g^T drop(x) and dB^T = h^T dy: an element of w meets R products alone, so that repacking it would take as
// long as they do. Two vectors of columns of w, paired in registers, meet all rows; w is read in blocks of whole lines.
#pragma once
#include "micro.h"
#include "pack.h"

namespace {
constexpr int64_t OUTER_ROWS = 16;   // more rows pay for packing
constexpr int64_t OUTER_LANES = 64;  // along k of one block: 128 rows of a bf16 w, which the L2 holds at any pitch

LK_INLINE bool is_outer(const lk::PanelArgs& a) { return a.thin && a.M <= OUTER_ROWS; }

// One lane of w, two vectors of columns, and MR rows of x `ahead` of a place.
template <class T, int MR>
LK_INLINE void outer_step(V (&acc)[MR][2], const V* w, const Place<Factor<T>, MR>& at, int64_t ldx, int ahead) {
  using P = PanelStep<T>;
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++) {
    const Factor<T>* x = at.rows[i / 3] + i % 3 * ldx + ahead * P::PAIR;
    acc[i][0] = P::step(acc[i][0], w[0], x);
    acc[i][1] = P::step(acc[i][1], w[1], x);
  }
}

// c [MR, 2 L] += x [MR, lanes] w [lanes, 2 L]: columns c0 and on of `cols`, lanes k0 .. k1 of K elements
template <class T, int MR>
void outer_tile(const lk::PanelArgs& a, const Factor<T>* x, int64_t ldx, const T* w, int64_t n, int64_t cols, int64_t c0, int64_t k0, int64_t k1,
                Tile c, NextBlock& next) {
  using P = PanelStep<T>;
  constexpr int64_t PAIR = P::PAIR;
  V acc[MR][2], v[2];
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++) acc[i][0] = zero(), acc[i][1] = zero();
  Place<Factor<T>, MR> at;
#pragma GCC unroll 8
  for (int i = 0; i < at.GROUPS; i++) at.rows[i] = x + 3 * i * ldx;
  const int64_t ld = a.w.ld, whole = min(a.K / PAIR, k1);
  const bool plain = !a.w_keep.p && c0 + 2 * L <= cols;
  int64_t k = k0;
  while (k < whole) {
    NextBlock::step(next);
    const int64_t end = min(k + 16, whole);
    if (plain) {
      const T* p = w + k * PAIR * ld + c0;
#pragma GCC unroll 1
      for (; k + 2 <= end; k += 2, p += 2 * PAIR * ld) {
        P::columns(p, p + ld, v);
        outer_step<T, MR>(acc, v, at, ldx, 0);
        P::columns(p + PAIR * ld, p + (2 * PAIR - 1) * ld, v);
        outer_step<T, MR>(acc, v, at, ldx, 1);
        Place<Factor<T>, MR>::advance(at, 2);
      }
    }
    for (; k < end; k++) {
      lane_of_rows(w, ld, cols, k, a.K, c0, a.w_keep, n, v);
      outer_step<T, MR>(acc, v, at, ldx, 0);
      Place<Factor<T>, MR>::advance(at, 1);
    }
  }
  if (whole < k1) {  // half a pair
    lane_of_rows(w, ld, cols, whole, a.K, c0, a.w_keep, n, v);
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) {
      acc[i][0] = P::half_step(acc[i][0], v[0], at.rows[i / 3] + i % 3 * ldx);
      acc[i][1] = P::half_step(acc[i][1], v[1], at.rows[i / 3] + i % 3 * ldx);
    }
  }
  put(acc, c, k0 > 0);
}

template <class T, int MR>
LK_INLINE void outer_tile_of(int rows, const lk::PanelArgs& a, const Factor<T>* x, int64_t ldx, const T* w, int64_t n, int64_t cols, int64_t c0,
                             int64_t k0, int64_t k1, Tile c, NextBlock& next) {
  if constexpr (MR > 0) {
    if (rows == MR)
      outer_tile<T, MR>(a, x, ldx, w, n, cols, c0, k0, k1, c, next);
    else
      outer_tile_of<T, MR - 1>(rows, a, x, ldx, w, n, cols, c0, k0, k1, c, next);
  }
}

// C [m0 .. m1, n .. n + cols] = x w, without alpha; xs: room for OUTER_ROWS rows of a block of x, widened
template <class T>
void outer_sums(const lk::PanelArgs& a, int64_t n, int64_t cols, int64_t m0, int64_t m1, Tile C, float* xs) {
  using P = PanelStep<T>;
  constexpr int64_t SIZE = sizeof(T), LD = OUTER_LANES + L;
  const T* w = static_cast<const T*>(a.w.p) + n;
  const int64_t KD = ceil_div(a.K, P::PAIR), tiles = ceil_div(m1 - m0, MICRO_ROWS[2]);
  int64_t k0 = 0;
  do {  // once even for K = 0: the sums are zero
    const int64_t k1 = min(k0 + OUTER_LANES, KD), K = min(k1 * P::PAIR, a.K) - k0 * P::PAIR;
    const auto* x = Rows<T>::get(static_cast<const T*>(a.x.p) + m0 * a.x.ld + k0 * P::PAIR, a.x.ld, static_cast<int>(m1 - m0), K, xs, LD);
    const int64_t ldx = same<T, Factor<T>> ? a.x.ld : LD;
    NextBlock next;
    const int64_t after = k1 < KD ? k1 * P::PAIR : 0, after_cols = k1 < KD ? cols : min(a.N - n - cols, C.ld);
    if (after_cols > 0 && KD > 0) {
      next.p = reinterpret_cast<const char*>(w + (k1 < KD ? 0 : cols) + after * a.w.ld);
      next.ld = a.w.ld * SIZE;
      next.rows = min(OUTER_LANES * P::PAIR, a.K - after);
      next.lines = ceil_div(after_cols * SIZE, 64);
      next.per_step = ceil_div(next.rows * next.lines, tiles * ceil_div(cols, 2 * L) * ceil_div(k1 - k0, 16));
    }
    for (int64_t c = 0; c < cols; c += 2 * L)
      for (int64_t i = 0, m = 0; i < tiles; i++) {
        const int rows = static_cast<int>((m1 - m0) * (i + 1) / tiles - m);
        outer_tile_of<T, MICRO_ROWS[2]>(rows, a, x + m * ldx, ldx, w, n, cols, c, k0, k1, {C.p + m * C.ld + c, C.ld}, next);
        m += rows;
      }
    k0 = k1;
  } while (k0 < KD);
}
}  // namespace
