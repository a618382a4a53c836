// The micro tile of the panel form: a few rows of x against a packed sub-panel, sums in registers.
#pragma once
#include "pack.h"

namespace {
// What x is multiplied as: pairs of bf16, or fp32, which the other 16-bit types are widened to. Types that share it share the micro kernels.
template <class T>
using Factor = typename PanelStep<T>::X;

template <class T>
struct Rows {  // the row tile's operand as the micro kernel wants it: in place, or widened to fp32 into `to`
  using X = Factor<T>;
  template <class S>
  static const X* get(const S* p, int64_t ld, int rows, int64_t k, float* to, int64_t to_ld) {
    for (int i = 0; i < rows; i++) {
      int64_t j = 0;
      for (; j + L <= k; j += L) store(to + i * to_ld + j, load(p + i * ld + j));
      if (j < k) store(to + i * to_ld + j, load(p + i * ld + j, k - j));
    }
    return to;
  }
  static const X* get(const X* p, int64_t, int, int64_t, float*, int64_t) { return p; }
};

template <class X>
struct Strip {  // rows of x and a packed panel along k: `steps` whole lanes and, for an odd K, half of one more
  const X* x;
  int64_t ld;
  const float* panel;
  int64_t steps;
  bool half;
};

struct Tile {  // fp32 sums
  float* p;
  int64_t ld;
};

// A place along a strip. Three rows of x share a pointer: x86 addresses p, p + ld and p + 2 ld itself, so that no step computes or spills one (4 %
// on a Xeon with AMX).
template <class X, int MR>
struct Place {
  static constexpr int GROUPS = (MR + 2) / 3;
  const float* panel = nullptr;
  const X* rows[GROUPS];
  LK_INLINE void advance(Place& at, int64_t steps) {
    at.panel += steps * SW;
#pragma GCC unroll 8
    for (int i = 0; i < GROUPS; i++) at.rows[i] += steps * PanelStep<X>::PAIR;
  }
};

// one step, `ahead` of a place
template <class X, int MR, int W>
LK_INLINE void strip_step(V (&acc)[MR][W], const Place<X, MR>& at, int64_t ld, int ahead) {
  using P = PanelStep<X>;
  V w[W];
#pragma GCC unroll 4
  for (int v = 0; v < W; v++) w[v] = load(at.panel + ahead * SW + v * L);
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int v = 0; v < W; v++) acc[i][v] = P::step(acc[i][v], w[v], at.rows[i / 3] + i % 3 * ld + ahead * P::PAIR);
}

// Steps k0..k1 of a strip, two in each turn of the inner loop. While the next block is fetched, that loop has eight turns: one of 16 turns of one
// step takes 9 % longer on a Xeon with AMX (fp32, M 1024, 576 x 576), where the end of so long a loop is mispredicted.
template <class X, int MR, int W, class Next>
LK_INLINE void run_strip(V (&acc)[MR][W], const Strip<X>& s, int64_t k0, int64_t k1, Next& next) {
  using P = PanelStep<X>;
  const int64_t ld = s.ld;
  Place<X, MR> at;
  at.panel = s.panel + k0 * SW;
#pragma GCC unroll 8
  for (int i = 0; i < Place<X, MR>::GROUPS; i++) at.rows[i] = s.x + 3 * i * ld + k0 * P::PAIR;
  int64_t k = k0;
  if constexpr (!same<Next, NoBlock>) {
    for (; k + 16 <= k1; k += 16) {
      Next::step(next);
#pragma GCC unroll 1
      for (int i = 0; i < 8; i++) {
        strip_step<X, MR, W>(acc, at, ld, 0);
        strip_step<X, MR, W>(acc, at, ld, 1);
        Place<X, MR>::advance(at, 2);
      }
    }
    if (k < k1) Next::step(next);
  }
#pragma GCC unroll 1
  for (; k + 2 <= k1; k += 2) {
    strip_step<X, MR, W>(acc, at, ld, 0);
    strip_step<X, MR, W>(acc, at, ld, 1);
    Place<X, MR>::advance(at, 2);
  }
  if (k < k1) strip_step<X, MR, W>(acc, at, ld, 0);
  if (s.half && k1 == s.steps) {
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
      for (int v = 0; v < W; v++) acc[i][v] = P::half_step(acc[i][v], load(s.panel + k1 * SW + v * L), s.x + i * s.ld + k1 * P::PAIR);
  }
}

// what c holds of earlier k, onto the accumulators
template <int MR, int W>
LK_INLINE void add_earlier(V (&acc)[MR][W], Tile c) {
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int v = 0; v < W; v++) acc[i][v] = add(load(c.p + i * c.ld + v * L), acc[i][v]);
}

// c takes the accumulators, added to what it holds when `more`; they start anew
template <int MR, int W>
LK_INLINE void put(V (&acc)[MR][W], Tile c, bool more) {
  if (more) add_earlier(acc, c);
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int v = 0; v < W; v++) store(c.p + i * c.ld + v * L, acc[i][v]), acc[i][v] = zero();
}

// The finished sums, with those of earlier k in c when `more`, to out in X itself: at the M and N of the tile, whole vectors of columns.
template <class X, int MR, int W>
LK_INLINE void finish(V (&acc)[MR][W], const lk::PanelArgs& a, int64_t m, int64_t n, Tile c, bool more) {
  if (more) add_earlier(acc, c);
  const V alpha = set1(a.alpha);
  V bias[W];
#pragma GCC unroll 4
  for (int v = 0; v < W; v++) bias[v] = a.bias ? load(static_cast<const X*>(a.bias) + n + v * L) : zero();
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int v = 0; v < W; v++) store(static_cast<X*>(a.out.p) + (m + i) * a.out.ld + n + v * L, fma(acc[i][v], alpha, bias[v]));
}

// fp32 results need shorter chains than K: partial sums of CHAIN_F32 terms are added up. The rounding of 16-bit results hides a chain's error.
template <class T>
constexpr int64_t CHAIN = same<T, float> ? CHAIN_F32 : MOST_DEEP;

// One micro tile: MR rows by W vectors, added in chains to what c holds of earlier k; `direct`: the last goes to out (finish).
// Every loop over acc is unrolled whole: one index known only at run time and the compiler keeps all of it in memory.
template <class X, int MR, int W, class Next>
void micro(const Strip<X>& rank, const Strip<X>& base, int64_t chain, const lk::PanelArgs& a, int64_t m, int64_t n, Tile c, bool more, bool direct,
           Next& next) {
  V acc[MR][W];
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int v = 0; v < W; v++) acc[i][v] = zero();
  if (rank.panel) {
    run_strip<X, MR, W>(acc, rank, 0, rank.steps, next);
    if (a.out_keep.p) {
      const V scale = set1(a.keep_scale);
#pragma GCC unroll 16
      for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
        for (int v = 0; v < W; v++) acc[i][v] = keep(mul(acc[i][v], scale), keep_bits(a.out_keep, m + i, n + v * L));
    }
    if (chain < MOST_DEEP) put(acc, c, more), more = true;
  }
  int64_t k = 0;
  do {
    const int64_t k1 = min(k + chain, base.steps);
    run_strip<X, MR, W>(acc, base, k, k1, next);
    k = k1;
    if (direct && k == base.steps) return finish<X>(acc, a, m, n, c, more);
    put(acc, c, more);
    more = true;
  } while (k < base.steps);
}

template <class X, int MR, int W>
LK_INLINE void micro_rows(int rows, const Strip<X>& rank, const Strip<X>& base, int64_t chain, const lk::PanelArgs& a, int64_t m, int64_t n, Tile c,
                          bool more, bool direct, NextBlock& next) {
  if constexpr (MR > 0) {
    NoBlock none;
    if (MR == MICRO_ROWS[W] && rows == MR && !next.per_step)
      micro<X, MR, W>(rank, base, chain, a, m, n, c, more, direct, none);
    else if (rows == MR)
      micro<X, MR, W>(rank, base, chain, a, m, n, c, more, direct, next);
    else
      micro_rows<X, MR - 1, W>(rows, rank, base, chain, a, m, n, c, more, direct, next);
  }
}

template <class X, int W>
LK_INLINE void micro_width(int width, int rows, const Strip<X>& rank, const Strip<X>& base, int64_t chain, const lk::PanelArgs& a, int64_t m,
                           int64_t n, Tile c, bool more, bool direct, NextBlock& next) {
  if constexpr (W > 0) {
    if (width == W)
      micro_rows<X, MICRO_ROWS[W], W>(rows, rank, base, chain, a, m, n, c, more, direct, next);
    else
      micro_width<X, W - 1>(width, rows, rank, base, chain, a, m, n, c, more, direct, next);
  }
}
}  // namespace
