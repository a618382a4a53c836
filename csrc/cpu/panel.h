// Many rows: 64 columns of W at a time are repacked so that one vector holds one k of many columns, then every row tile passes over the panel.
//
//   out[m, n] = alpha * (sum_k x[m, k] W(k, n) + keep_scale * keep(m, n) * sum_r h[m, r] B(r, n)) + bias[n]
//
// The rank term starts the accumulators (so that its dropout mask can be applied before the rest is added), the k loop goes on in the same
// registers, and y is stored once. Each output is summed in one order of k that no tile or thread count changes.
#pragma once
#include "micro.h"
#include "outer.h"
#include "pack.h"

namespace {
template <class T, class OT>
void store_rows(const lk::PanelArgs& a, int64_t n, int64_t cols, int64_t m, int64_t rows, Tile c) {
  const V alpha = set1(a.alpha);
  for (int64_t i = 0; i < rows; i++) {
    OT* out = static_cast<OT*>(a.out.p) + (m + i) * a.out.ld + n;
    for (int64_t j = 0; j < cols; j += L) {
      const int64_t nv = cols - j;
      const V bias = a.bias ? load(static_cast<const T*>(a.bias) + n + j, nv) : zero();
      if (nv >= L)
        store(out + j, fma(load(c.p + i * c.ld + j), alpha, bias));
      else
        store(out + j, fma(load(c.p + i * c.ld + j), alpha, bias), nv);
    }
  }
}

template <class OT>
void store_transposed(const lk::PanelArgs& a, int64_t n, int64_t cols, int64_t m0, int64_t m1, Tile c) {
  for (int64_t m = m0; m < m1; m += L) {
    for (int64_t j = 0; j < cols; j += L) {
      V r[L];
      for (int i = 0; i < L; i++) r[i] = m + i < m1 ? load(c.p + (m - m0 + i) * c.ld + j) : zero();
      transpose(r);
      for (int i = 0; i < L && j + i < cols; i++) store(static_cast<OT*>(a.out.p) + (n + j + i) * a.out.ld + m, mul(r[i], set1(a.alpha)), m1 - m);
    }
  }
}

constexpr int MAX_ROWS = MICRO_ROWS[1] > MICRO_ROWS[NV] ? MICRO_ROWS[1] : MICRO_ROWS[NV];
constexpr int64_t MOST_ROWS = 2040;

// The next block of W is fetched while this one is worked on, for x of so many rows and rows of W of up to so many bytes. A Xeon with AMX, one core,
// fp32, R 16, us with and without (benchmarks/cpu_kernels.cpp): forward 576 x 576 M 256 1044 and 1136, 2048 x 2048 M 1024 50621 and 48542; dx,
// whose blocks have four lines of each page, 2048 x 2048 M 256 17393 and 15006; dA and dB, with R rows, 2048 x 2048 M 1024 3397 and 2824.
#ifdef LK_INTEL
constexpr int64_t FETCH_FROM = 17, FETCH_TO = 512, FETCH_PITCH = 4095, FETCH_X = INT64_MAX;
#else
constexpr int64_t FETCH_FROM = 1, FETCH_TO = INT64_MAX, FETCH_PITCH = INT64_MAX, FETCH_X = 512 << 10;
#endif
// From FETCH_X bytes on, below which it may lie in the L2, x comes a tile ahead where one pass over it is all there is. A Zen 5, one core, bf16, 576
// x 576, R 16, us without and with (benchmarks/cpu_kernels.cpp ... 96 96; in brackets: x found in the caches): M 1024 forward 1535 (1479) and 1489
// (1488), backward 1676 and 1625; M 256, where it stays off, 397 (366) and 390 (374).
LK_INLINE bool fetches(const lk::PanelArgs& a, int64_t rows, int64_t row_bytes) {
  return rows >= FETCH_FROM && rows <= FETCH_TO && (a.nt || a.broad || row_bytes <= FETCH_PITCH);
}
LK_INLINE int64_t even_up(int64_t a) { return (a + 1) / 2 * 2; }

// Rows of an adapter that are worked on together: as many as the registers have sums of a whole panel for.
constexpr int RANK_ROWS = MICRO_ROWS[NV] * NV >= 2 * NP / L ? MICRO_ROWS[NV] * NV * L / NP : 1;

// c[i] [NP] += h[i] B for MR rows, wherever they lie, and a panel of packed B. A row's sums do not depend on the rows beside it.
template <class X, int MR>
void add_rank(const X* const* h, const float* packed, int64_t R, int64_t chain, float* const* c) {
  using P = PanelStep<X>;
  const int64_t steps = R / P::PAIR, depth = ceil_div(R, P::PAIR);
  for (int64_t r0 = 0; r0 < depth; r0 += chain) {
    V acc[MR][NP / L];
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 16
      for (int v = 0; v < NP / L; v++) acc[i][v] = zero();
    for (int64_t r = r0; r < min(r0 + chain, steps); r++)
#pragma GCC unroll 16
      for (int v = 0; v < NP / L; v++) {
        const V w = load(packed + (v / NV * depth + r) * SW + v % NV * L);
#pragma GCC unroll 16
        for (int i = 0; i < MR; i++) acc[i][v] = P::step(acc[i][v], w, h[i] + r * P::PAIR);
      }
    if (depth > steps && r0 + chain >= depth)
#pragma GCC unroll 16
      for (int v = 0; v < NP / L; v++) {
        const V w = load(packed + (v / NV * depth + steps) * SW + v % NV * L);
#pragma GCC unroll 16
        for (int i = 0; i < MR; i++) acc[i][v] = P::half_step(acc[i][v], w, h[i] + steps * P::PAIR);
      }
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 16
      for (int v = 0; v < NP / L; v++) store(c[i] + v * L, add(load(c[i] + v * L), acc[i][v]));
  }
}

template <class X, int MR>
LK_INLINE void add_rank_of(int rows, const X* const* h, const float* packed, int64_t R, int64_t chain, float* const* c) {
  if constexpr (MR > 0) {
    if (rows == MR)
      add_rank<X, MR>(h, packed, R, chain, c);
    else
      add_rank_of<X, MR - 1>(rows, h, packed, R, chain, c);
  }
}

// A panel's part of B comes while the base is worked on, of all adapters, where the L2 holds it; else an adapter's while the one before is worked on.
// A Zen 5, two threads, bf16, M 64 with 64 adapters of their own, over the frozen layer (`lora-kernels bench --suite batched`, two runs each), one
// adapter ahead and so: 576 x 576 1.99, 2.08 and 1.88, 2.04; 2048 x 2048 1.38, 1.40 and 1.23, 1.27.
template <class T>
LK_INLINE bool fetches_segments(const lk::PanelArgs& a) {
  constexpr int64_t MOST = 256 << 10;
  return a.segments && a.b.ld <= 2 * a.segment_R && a.segment_count * NP * a.b.ld * static_cast<int64_t>(sizeof(T)) <= MOST;
}
template <class T>
LK_INLINE void fetch_segment(const lk::PanelArgs& a, int64_t i, int64_t n, int64_t cols) {
  if (i >= a.segment_count) return;
  const int64_t row_bytes = a.b.ld * static_cast<int64_t>(sizeof(T)), used = a.segments[i].adapter.R * static_cast<int64_t>(sizeof(T));
  const int64_t rows_of_a_line = row_bytes > 0 && row_bytes < 64 ? 64 / row_bytes : 1;
  const char* next = static_cast<const char*>(a.segments[i].adapter.b) + n * row_bytes;
  for (int64_t j = 0; j < cols; j += rows_of_a_line)
    for (int64_t at = 0; at < used; at += 64) prefetch(next + j * row_bytes + at);
}

// The rank terms of many adapters, onto the finished base in C.
template <class T>
void add_segments(const lk::PanelArgs& a, int64_t n, int64_t cols, int64_t m0, int64_t m1, float* pb, float* hs, Tile C) {
  for (int64_t i = 0; i < a.segment_count; i++) {
    const lk::Segment& s = a.segments[i];
    const int64_t R = s.adapter.R;
    if (!R || s.rows[s.count - 1] < m0 || s.rows[0] >= m1) continue;
    if (!fetches_segments<T>(a)) fetch_segment<T>(a, i + 1, n, cols);
    pack_nt<T>(static_cast<const T*>(s.adapter.b) + n * a.b.ld, a.b.ld, cols, 0, ceil_div(R, PanelStep<T>::PAIR), R, pb,
               ceil_div(R, PanelStep<T>::PAIR));
    const Factor<T>* h[RANK_ROWS];
    float* c[RANK_ROWS];
    int rows = 0;
    for (int64_t j = 0; j < s.count; j++) {
      const int64_t m = s.rows[j];
      if (m >= m0 && m < m1) {
        h[rows] = Rows<T>::get(static_cast<const T*>(a.h.p) + m * a.h.ld, a.h.ld, 1, R, hs + rows * (R + L), 0);
        c[rows++] = C.p + (m - m0) * C.ld;
      }
      if (rows == RANK_ROWS || j == s.count - 1) add_rank_of<Factor<T>, RANK_ROWS>(rows, h, pb, R, CHAIN<T>, c), rows = 0;
    }
  }
}

// Lanes along k of one block: a broad block's share, else even blocks of whole chains, so that the last is no sliver.
LK_INLINE int64_t block_depth(const lk::PanelArgs& a, int64_t KD) {
  if (a.broad) return KC / lk::kBroad;
  constexpr int64_t STEP = CHAIN_F32 < KC / 4 ? CHAIN_F32 : KC / 4;  // divides MOST_DEEP
  const int64_t blocks = ceil_div(KD, MOST_DEEP);
  return blocks > 1 ? ceil_div(ceil_div(KD, blocks), STEP) * STEP : MOST_DEEP;
}
int64_t most_panels_of(const lk::PanelArgs& a) { return a.broad || a.thin ? lk::kBroad : 1; }  // of any M, as a workspace may be a larger product's
int64_t rank_floats(const lk::PanelArgs& a) { return even_up(a.R > a.segment_R ? a.R : a.segment_R) * most_panels_of(a) * NP; }

// packed base block | packed rank block | C [rows, columns] | widened x tile | widened h tile
int64_t panel_floats(lk::Dtype, const lk::PanelArgs& a, int64_t rows) {
  return MOST_DEEP * NP + rank_floats(a) + (rows + MAX_ROWS) * most_panels_of(a) * NP + MAX_ROWS * (MOST_DEEP + L + a.R + a.segment_R + L);
}

// A chunk's sums that wait for the next block of k stay within SUM_ROWS * 256 bytes.
template <class T>
int64_t rows_of(const lk::PanelArgs& a) {
  const int64_t KD = ceil_div(a.K, PanelStep<T>::PAIR);
  return KD > block_depth(a, KD) ? SUM_ROWS : MOST_ROWS;
}
lk::PanelBlock panel_block(lk::Dtype t, const lk::PanelArgs& a) {
  const int64_t rows = t == lk::kF32 ? rows_of<float>(a) : t == lk::kBF16 ? rows_of<bf16>(a) : rows_of<f16>(a);
  return {rows, a.broad || is_outer(a) ? lk::kBroad : 1, 12, 0};
}
bool shrinks(lk::Dtype, const lk::PanelArgs&, int) { return false; }
int64_t shrink_rows(lk::Dtype, bool masked) { return masked ? lk::kNever : 128; }  // x_keep is the dot form's

template <class T, class OT>
void panel_of(const lk::PanelArgs& a, int64_t p0, int64_t p1, int64_t m0, int64_t m1, float* ws) {
  using P = PanelStep<T>;
  using X = Factor<T>;
  constexpr bool in_place = same<T, X>;
  const int64_t n = p0 * NP, cols = min(a.N, p1 * NP) - n, ldc = (p1 - p0) * NP, KD = ceil_div(a.K, P::PAIR), RD = ceil_div(a.R, P::PAIR);
  const int64_t deepest = block_depth(a, KD);
  float *pa = ws, *pb = pa + MOST_DEEP * NP, *C = pb + rank_floats(a), *xs = C + (m1 - m0 + MAX_ROWS) * ldc, *hs = xs + MAX_ROWS * (MOST_DEEP + L);
  if (is_outer(a)) {
    outer_sums<T>(a, n, cols, m0, m1, {C, ldc}, xs);
    return a.out_t ? store_transposed<OT>(a, n, cols, m0, m1, {C, ldc}) : store_rows<T, OT>(a, n, cols, m0, m1 - m0, {C, ldc});
  }
  const T* w = static_cast<const T*>(a.w.p) + (a.nt ? n * a.w.ld : n);
  if (a.R) {
    const T* b = static_cast<const T*>(a.b.p) + (a.nt ? n * a.b.ld : n);
    a.nt ? pack_nt<T>(b, a.b.ld, cols, 0, RD, a.R, pb, RD) : pack_nn<T>(b, a.b.ld, cols, 0, RD, a.R, pb, RD, {}, n);
  }
  const int widest = static_cast<int>(min(ceil_div(cols, L), NV)), MR = MICRO_ROWS[widest];
  const int64_t tiles = ceil_div(m1 - m0, MR);
  const bool whole = KD > deepest || a.out_t || a.segments;
  const bool direct = same<X, OT> && (same<T, X> || !a.bias) && !a.out_t && !a.segments && cols % L == 0;  // from the registers to out
  int64_t k0 = 0;
  do {  // once even for K = 0: the rank term and the bias remain
    const int64_t k1 = min(k0 + deepest, KD), depth = k1 - k0;
    const bool last = k1 == KD, odd = last && a.K % P::PAIR != 0, rank = a.R && k0 == 0;
    a.nt ? pack_nt<T>(w, a.w.ld, cols, k0, k1, a.K, pa, depth) : pack_nn<T>(w, a.w.ld, cols, k0, k1, a.K, pa, depth, a.w_keep, n);
    NextBlock next;
    const int64_t after = last ? 0 : k1, after_end = last ? min(deepest, KD) : min(k1 + deepest, KD),
                  after_cols = last ? min(a.N - n - cols, ldc) : cols;
    if (after_cols > 0 && fetches(a, m1 - m0, a.w.ld * static_cast<int64_t>(sizeof(T)))) {
      const T* q = last ? w + (a.nt ? ldc * a.w.ld : ldc) : w;
      next.ld = a.w.ld * static_cast<int64_t>(sizeof(T));
      next.p = reinterpret_cast<const char*>(q + (a.nt ? after * P::PAIR : after * P::PAIR * a.w.ld));
      next.rows = a.nt ? after_cols : min((after_end - after) * P::PAIR, a.K - after * P::PAIR);
      next.lines = ceil_div((a.nt ? (after_end - after) * P::PAIR : after_cols) * static_cast<int64_t>(sizeof(T)), 64);
      next.per_step = ceil_div(next.rows * next.lines, tiles * ceil_div(cols, SW) * ceil_div(depth + 1, 16));
    } else if (a.N <= NP && tiles > 1 && a.M * a.K * static_cast<int64_t>(sizeof(T)) >= FETCH_X) {  // one pass over x, as of a shrink
      next.ld = a.x.ld * static_cast<int64_t>(sizeof(T));
      next.p = reinterpret_cast<const char*>(static_cast<const T*>(a.x.p) + (m0 + MR) * a.x.ld + k0 * P::PAIR);
      next.rows = m1 - m0 - MR;
      next.lines = ceil_div(min(depth * P::PAIR, a.K - k0 * P::PAIR) * static_cast<int64_t>(sizeof(T)), 64);
      next.per_step = ceil_div(MR * next.lines, ceil_div(cols, SW) * ceil_div(depth + 1, 16));
    }
    if (last && fetches_segments<T>(a)) {
      next.segment = a.segments, next.segment_end = a.segments + a.segment_count;
      next.segment_at = n * a.b.ld * static_cast<int64_t>(sizeof(T));
      next.segment_lines = ceil_div(cols * a.b.ld * static_cast<int64_t>(sizeof(T)), 64);
      next.per_step = ceil_div(next.rows * next.lines + a.segment_count * next.segment_lines, tiles * ceil_div(cols, SW) * ceil_div(depth + 1, 16));
    }
    for (int64_t i = 0, m = m0; i < tiles; i++) {
      const int rows = static_cast<int>((m1 - m0) * (i + 1) / tiles - (m - m0));  // even tiles instead of a short last one
      const int64_t K = min((k1 - k0) * P::PAIR, a.K - k0 * P::PAIR);
      const auto* x = Rows<T>::get(static_cast<const T*>(a.x.p) + m * a.x.ld + k0 * P::PAIR, a.x.ld, rows, K, xs, MOST_DEEP + L);
      const auto* h = Rows<T>::get(static_cast<const T*>(a.h.p) + m * a.h.ld, a.h.ld, rows, rank ? a.R : 0, hs, a.R + L);
      const Tile c = {whole ? C + (m - m0) * ldc : C, ldc};  // finished tiles are stored at once, so one place that stays in L1 does
      for (int64_t s = 0; s * SW < cols; s++) {
        const Strip<X> rank_strip = {h, in_place ? a.h.ld : a.R + L, rank ? pb + s * RD * SW : nullptr, a.R / P::PAIR, a.R % P::PAIR != 0};
        const Strip<X> base_strip = {x, in_place ? a.x.ld : MOST_DEEP + L, pa + s * depth * SW, depth - odd, odd};
        const int width = static_cast<int>(min(ceil_div(cols - s * SW, L), NV));
        for (int r = 0; r < rows;) {  // a narrower sub-panel takes more rows at once, a wider one fewer
          const int part = static_cast<int>(min(rows - r, MICRO_ROWS[width]));
          Strip<X> rs = rank_strip, bs = base_strip;
          rs.x += r * rs.ld, bs.x += r * bs.ld;
          micro_width<X, NV>(width, part, rs, bs, CHAIN<T>, a, m + r, n + s * SW, {c.p + r * ldc + s * SW, ldc}, k0 > 0, direct && last, next);
          r += part;
        }
      }
      if (last && !direct && !a.out_t && !a.segments) store_rows<T, OT>(a, n, cols, m, rows, c);
      m += rows;
    }
    if (last && a.segments) {
      add_segments<T>(a, n, cols, m0, m1, pb, hs, {C, ldc});
      store_rows<T, OT>(a, n, cols, m0, m1 - m0, {C, ldc});
    }
    if (last && a.out_t) store_transposed<OT>(a, n, cols, m0, m1, {C, ldc});
    k0 += deepest;
  } while (k0 < KD);
}

template <class T>
void panel_any(const lk::PanelArgs& a, int64_t p0, int64_t p1, int64_t m0, int64_t m1, float* ws) {
  if (a.out_f32)
    panel_of<T, float>(a, p0, p1, m0, m1, ws);
  else
    panel_of<T, T>(a, p0, p1, m0, m1, ws);
}

void panel(lk::Dtype t, const lk::PanelArgs& a, int64_t p0, int64_t p1, int64_t m0, int64_t m1, float* ws) {
  if (m0 >= m1) return;
  if (t == lk::kF32)
    panel_of<float, float>(a, p0, p1, m0, m1, ws);
  else if (t == lk::kBF16)
    panel_any<bf16>(a, p0, p1, m0, m1, ws);
  else
    panel_any<f16>(a, p0, p1, m0, m1, ws);
}
}  // namespace
