// Many rows: 64 columns of W at a time are repacked so that one vector holds one k of many columns, then every row tile passes over the panel.
//
//   out[m, n] = alpha * (sum_k x[m, k] W(k, n) + keep_scale * keep(m, n) * sum_r h[m, r] B(r, n)) + bias[n]
//
// The rank term starts the accumulators (so that its dropout mask can be applied before the rest is added), the k loop goes on in the same
// registers, and y is stored once. Each output is summed in one order of k that no tile or thread count changes.
#pragma once

namespace {
constexpr int64_t NP = lk::kPanel, SW = NV * L, SUBS = NP / SW;  // a panel is SUBS sub-panels of SW columns

// Walks the lines of the next block of W, a few every 16 steps, so that memory is read while the arithmetic runs.
struct NextBlock {
  const char* p = nullptr;
  int64_t ld = 0, rows = 0, lines = 0, per_step = 0, r = 0, l = 0;
  LK_INLINE void step(NextBlock& f) {
    for (int64_t i = 0; i < f.per_step && f.r < f.rows; i++) {
      prefetch(f.p + f.r * f.ld + f.l * 64);
      if (++f.l == f.lines) f.l = 0, f.r++;
    }
  }
};

// dst[sub][k - k0][SW] <- w[n, k], lanes k0..k1 of K elements
template <class T>
void pack_nt(const T* w, int64_t ld, int64_t cols, int64_t k0, int64_t k1, int64_t K, float* dst, int64_t depth) {
  using P = PanelStep<T>;
  constexpr int STEP = L * P::PAIR;
  for (int64_t g = 0; g * L < cols; g++) {
    float* d = dst + g / NV * depth * SW + g % NV * L;
    const int64_t valid = min(cols - g * L, L);
    for (int64_t k = k0; k < k1; k += L) {
      V r[L];
      const int64_t left = K - k * P::PAIR;
      const T* p = w + g * L * ld + k * P::PAIR;
      if (valid == L && left >= STEP) {
#pragma GCC unroll 16
        for (int i = 0; i < L; i++) r[i] = P::row(p + i * ld);
      } else {
        for (int i = 0; i < L; i++) r[i] = i < valid ? P::row(p + i * ld, min(left, STEP)) : zero();
      }
      transpose(r);
      float* q = d + (k - k0) * SW;
      if (k1 - k >= L) {
#pragma GCC unroll 16
        for (int i = 0; i < L; i++) store(q + i * SW, r[i]);
      } else {
        for (int i = 0; i < k1 - k; i++) store(q + i * SW, r[i]);
      }
    }
  }
}

// dst[sub][k - k0][SW] <- keep(k, n) w[k, n]; n is the panel's first column, for the mask
template <class T>
void pack_nn(const T* w, int64_t ld, int64_t cols, int64_t k0, int64_t k1, int64_t K, float* dst, int64_t depth, lk::Mask keep, int64_t n) {
  using P = PanelStep<T>;
  for (int64_t k = k0; k < k1; k++) {
    const int64_t row = k * P::PAIR;
    const bool second = P::PAIR == 2 && row + 1 < K;
    const T* p = w + row * ld;
#pragma GCC unroll 4
    for (int64_t c = 0; c < NP; c += 2 * L) {
      if (c >= cols) break;
      V v[2];
      const uint32_t p_bits = keep.p ? keep_bits(keep, row, n + c) : ALL, q_bits = keep.p && second ? keep_bits(keep, row + 1, n + c) : ALL;
      P::columns(p + c, second ? p + ld + c : nullptr, cols - c, p_bits, q_bits, v);
      float* d = dst + c / SW * depth * SW + (k - k0) * SW + c % SW;
      store(d, v[0]);
      store(d + L, v[1]);
    }
  }
}

template <class T>
struct Strip {  // rows of x and a packed panel along k: `steps` whole lanes and, for an odd K, half of one more
  const typename PanelStep<T>::X* x;
  int64_t ld;
  const float* panel;
  int64_t steps;
  bool half;
};

// steps k0..k1 of a strip
template <class T, int MR, int W>
LK_INLINE void run_strip(V (&acc)[MR][W], const Strip<T>& s, int64_t k0, int64_t k1, NextBlock& next) {
  using P = PanelStep<T>;
  constexpr int POINTERS = MR <= 8 ? MR : 1;  // one per row while the registers last: computed addresses cost 7 % on Zen 5
  const typename P::X* rows[POINTERS];
#pragma GCC unroll 8
  for (int i = 0; i < POINTERS; i++) rows[i] = s.x + i * s.ld;
  for (int64_t k = k0; k < k1;) {
    NextBlock::step(next);
    for (const int64_t end = min(k + 16, k1); k < end; k++) {
      V w[W];
#pragma GCC unroll 4
      for (int v = 0; v < W; v++) w[v] = load(s.panel + k * SW + v * L);
#pragma GCC unroll 16
      for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
        for (int v = 0; v < W; v++) acc[i][v] = P::step(acc[i][v], w[v], (POINTERS > 1 ? rows[i % POINTERS] : s.x + i * s.ld) + k * P::PAIR);
    }
  }
  if (s.half && k1 == s.steps) {
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
      for (int v = 0; v < W; v++) acc[i][v] = P::half_step(acc[i][v], load(s.panel + k1 * SW + v * L), s.x + i * s.ld + k1 * P::PAIR);
  }
}

// c [MR, NP] takes the accumulators, added to what it holds when `more`; they start anew
template <int MR, int W>
LK_INLINE void put(V (&acc)[MR][W], float* c, bool more) {
  if (more) {
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
      for (int v = 0; v < W; v++) acc[i][v] = add(load(c + i * NP + v * L), acc[i][v]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int v = 0; v < W; v++) store(c + i * NP + v * L, acc[i][v]), acc[i][v] = zero();
}

// fp32 results need shorter chains than K: partial sums of CHAIN_F32 terms are added up. The rounding of 16-bit results hides a chain's error.
template <class T>
constexpr int64_t CHAIN = same<T, float> ? CHAIN_F32 : KC;

// One micro tile: MR rows by W vectors, added to what c [MR, NP] holds of earlier k.
// Every loop over acc is unrolled whole: one index known only at run time and the compiler keeps all of it in memory.
template <class T, int MR, int W>
void micro(const Strip<T>& rank, const Strip<T>& base, const lk::PanelArgs& a, int64_t m, int64_t n, float* c, bool more, NextBlock& next) {
  V acc[MR][W];
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int v = 0; v < W; v++) acc[i][v] = zero();
  if (rank.panel) {
    run_strip<T, MR, W>(acc, rank, 0, rank.steps, next);
    if (a.out_keep.p) {
      const V scale = set1(a.keep_scale);
#pragma GCC unroll 16
      for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
        for (int v = 0; v < W; v++) acc[i][v] = keep(mul(acc[i][v], scale), keep_bits(a.out_keep, m + i, n + v * L));
    }
    if (same<T, float>) put(acc, c, more), more = true;
  }
  int64_t k = 0;
  do {
    const int64_t k1 = min(k + CHAIN<T>, base.steps);
    run_strip<T, MR, W>(acc, base, k, k1, next);
    put(acc, c, more);
    more = true;
    k = k1;
  } while (k < base.steps);
}

template <class T, int MR, int W>
LK_INLINE void micro_rows(int rows, const Strip<T>& rank, const Strip<T>& base, const lk::PanelArgs& a, int64_t m, int64_t n, float* c, bool more,
                          NextBlock& next) {
  if constexpr (MR > 0) {
    if (rows == MR)
      micro<T, MR, W>(rank, base, a, m, n, c, more, next);
    else
      micro_rows<T, MR - 1, W>(rows, rank, base, a, m, n, c, more, next);
  }
}

template <class T, int W>
LK_INLINE void micro_width(int width, int rows, const Strip<T>& rank, const Strip<T>& base, const lk::PanelArgs& a, int64_t m, int64_t n, float* c,
                           bool more, NextBlock& next) {
  if constexpr (W > 0) {
    if (width == W)
      micro_rows<T, MICRO_ROWS[W], W>(rows, rank, base, a, m, n, c, more, next);
    else
      micro_width<T, W - 1>(width, rows, rank, base, a, m, n, c, more, next);
  }
}

template <class T, class OT>
void store_rows(const lk::PanelArgs& a, int64_t n, int64_t cols, int64_t m, int rows, const float* c) {
  const V alpha = set1(a.alpha);
  for (int64_t j = 0; j < cols; j += L) {
    const int64_t nv = cols - j;
    const V bias = a.bias ? load(static_cast<const T*>(a.bias) + n + j, nv) : zero();
    for (int i = 0; i < rows; i++) {
      OT* out = static_cast<OT*>(a.out.p) + (m + i) * a.out.ld + n + j;
      if (nv >= L)
        store(out, fma(load(c + i * NP + j), alpha, bias));
      else
        store(out, fma(load(c + i * NP + j), alpha, bias), nv);
    }
  }
}

template <class OT>
void store_transposed(const lk::PanelArgs& a, int64_t n, int64_t cols, int64_t m0, int64_t m1, const float* c) {
  for (int64_t m = m0; m < m1; m += L) {
    for (int64_t j = 0; j < cols; j += L) {
      V r[L];
      for (int i = 0; i < L; i++) r[i] = m + i < m1 ? load(c + (m - m0 + i) * NP + j) : zero();
      transpose(r);
      for (int i = 0; i < L && j + i < cols; i++) store(static_cast<OT*>(a.out.p) + (n + j + i) * a.out.ld + m, mul(r[i], set1(a.alpha)), m1 - m);
    }
  }
}

template <class T>
struct Rows {  // the row tile's operand as the micro kernel wants it: in place, or widened to fp32 into `to`
  using X = typename PanelStep<T>::X;
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
constexpr int MAX_ROWS = MICRO_ROWS[1] > MICRO_ROWS[NV] ? MICRO_ROWS[1] : MICRO_ROWS[NV];
LK_INLINE int64_t even_up(int64_t a) { return (a + 1) / 2 * 2; }

// The rank terms of many adapters, onto the finished base in C: each row alone, so that its bits do not depend on its neighbours.
template <class T>
void add_segments(const lk::PanelArgs& a, int64_t n, int64_t cols, int64_t m0, int64_t m1, float* pb, float* hs, float* C) {
  using P = PanelStep<T>;
  NextBlock none;
  for (int64_t i = 0; i < a.segment_count; i++) {
    const lk::Segment& s = a.segments[i];
    const int64_t R = s.adapter.R, RD = ceil_div(R, P::PAIR);
    if (!R || s.rows[s.count - 1] < m0 || s.rows[0] >= m1) continue;
    pack_nt<T>(static_cast<const T*>(s.adapter.b) + n * a.b.ld, a.b.ld, cols, 0, RD, R, pb, RD);
    for (int64_t j = 0; j < s.count; j++) {
      const int64_t m = s.rows[j];
      if (m < m0 || m >= m1) continue;
      const auto* h = Rows<T>::get(static_cast<const T*>(a.h.p) + m * a.h.ld, a.h.ld, 1, R, hs, 0);
      for (int64_t sub = 0; sub * SW < cols; sub++) {
        const Strip<T> strip = {h, 0, pb + sub * RD * SW, R / P::PAIR, R % P::PAIR != 0};
        micro_width<T, NV>(static_cast<int>(min(ceil_div(cols - sub * SW, L), NV)), 1, {}, strip, a, m, n, C + (m - m0) * NP + sub * SW, true, none);
      }
    }
  }
}

// packed base block | packed rank block | C [rows, NP] | widened x tile | widened h tile
int64_t panel_floats(const lk::PanelArgs& a, int64_t rows) {
  const int64_t R = a.R > a.segment_R ? a.R : a.segment_R;
  return KC * NP + even_up(R) * NP + (rows + MAX_ROWS) * NP + MAX_ROWS * (KC + L + R + L);
}

template <class T, class OT>
void panel_of(const lk::PanelArgs& a, int64_t p, int64_t m0, int64_t m1, float* ws) {
  using P = PanelStep<T>;
  constexpr bool in_place = same<T, typename P::X>;
  const int64_t n = p * NP, cols = min(a.N - n, NP), KD = ceil_div(a.K, P::PAIR), RD = ceil_div(a.R, P::PAIR);
  float *pa = ws, *pb = pa + KC * NP, *C = pb + even_up(a.R > a.segment_R ? a.R : a.segment_R) * NP, *xs = C + (m1 - m0 + MAX_ROWS) * NP,
        *hs = xs + MAX_ROWS * (KC + L);
  const T* w = static_cast<const T*>(a.w.p) + (a.nt ? n * a.w.ld : n);
  if (a.R) {
    const T* b = static_cast<const T*>(a.b.p) + (a.nt ? n * a.b.ld : n);
    a.nt ? pack_nt<T>(b, a.b.ld, cols, 0, RD, a.R, pb, RD) : pack_nn<T>(b, a.b.ld, cols, 0, RD, a.R, pb, RD, {}, n);
  }
  const int widest = static_cast<int>(min(ceil_div(cols, L), NV)), MR = MICRO_ROWS[widest];
  const int64_t tiles = ceil_div(m1 - m0, MR);
  const bool whole = KD > KC || a.out_t || a.segments;
  int64_t k0 = 0;
  do {  // once even for K = 0: the rank term and the bias remain
    const int64_t k1 = min(k0 + KC, KD), depth = k1 - k0;
    const bool last = k1 == KD, odd = last && a.K % P::PAIR != 0, rank = a.R && k0 == 0;
    a.nt ? pack_nt<T>(w, a.w.ld, cols, k0, k1, a.K, pa, depth) : pack_nn<T>(w, a.w.ld, cols, k0, k1, a.K, pa, depth, a.w_keep, n);
    NextBlock next;
    const int64_t after = last ? 0 : k1, after_end = last ? min(KC, KD) : min(k1 + KC, KD), after_cols = last ? min(a.N - n - NP, NP) : cols;
    if (after_cols > 0) {
      const T* q = last ? w + (a.nt ? NP * a.w.ld : NP) : w;
      next.ld = a.w.ld * static_cast<int64_t>(sizeof(T));
      next.p = reinterpret_cast<const char*>(q + (a.nt ? after * P::PAIR : after * P::PAIR * a.w.ld));
      next.rows = a.nt ? after_cols : min((after_end - after) * P::PAIR, a.K - after * P::PAIR);
      next.lines = ceil_div((a.nt ? (after_end - after) * P::PAIR : after_cols) * static_cast<int64_t>(sizeof(T)), 64);
      next.per_step = ceil_div(next.rows * next.lines, tiles * SUBS * ceil_div(depth + 1, 16));
    }
    for (int64_t i = 0, m = m0; i < tiles; i++) {
      const int rows = static_cast<int>((m1 - m0) * (i + 1) / tiles - (m - m0));  // even tiles instead of a short last one
      const int64_t K = min((k1 - k0) * P::PAIR, a.K - k0 * P::PAIR);
      const auto* x = Rows<T>::get(static_cast<const T*>(a.x.p) + m * a.x.ld + k0 * P::PAIR, a.x.ld, rows, K, xs, KC + L);
      const auto* h = Rows<T>::get(static_cast<const T*>(a.h.p) + m * a.h.ld, a.h.ld, rows, rank ? a.R : 0, hs, a.R + L);
      float* c = whole ? C + (m - m0) * NP : C;  // finished tiles are stored at once, so one place that stays in L1 does
      for (int64_t s = 0; s * SW < cols; s++) {
        const Strip<T> rank_strip = {h, in_place ? a.h.ld : a.R + L, rank ? pb + s * RD * SW : nullptr, a.R / P::PAIR, a.R % P::PAIR != 0};
        const Strip<T> base_strip = {x, in_place ? a.x.ld : KC + L, pa + s * depth * SW, depth - odd, odd};
        const int width = static_cast<int>(min(ceil_div(cols - s * SW, L), NV));
        for (int r = 0; r < rows;) {  // a narrower sub-panel takes more rows at once, a wider one fewer
          const int part = static_cast<int>(min(rows - r, MICRO_ROWS[width]));
          Strip<T> rs = rank_strip, bs = base_strip;
          rs.x += r * rs.ld, bs.x += r * bs.ld;
          micro_width<T, NV>(width, part, rs, bs, a, m + r, n + s * SW, c + r * NP + s * SW, k0 > 0, next);
          r += part;
        }
      }
      if (last && !a.out_t && !a.segments) store_rows<T, OT>(a, n, cols, m, rows, c);
      m += rows;
    }
    if (last && a.segments) {
      add_segments<T>(a, n, cols, m0, m1, pb, hs, C);
      store_rows<T, OT>(a, n, cols, m0, static_cast<int>(m1 - m0), C);
    }
    if (last && a.out_t) store_transposed<OT>(a, n, cols, m0, m1, C);
    k0 += KC;
  } while (k0 < KD);
}

template <class T>
void panel_any(const lk::PanelArgs& a, int64_t p, int64_t m0, int64_t m1, float* ws) {
  if (a.out_f32)
    panel_of<T, float>(a, p, m0, m1, ws);
  else
    panel_of<T, T>(a, p, m0, m1, ws);
}

void panel(lk::Dtype t, const lk::PanelArgs& a, int64_t p, int64_t m0, int64_t m1, float* ws) {
  if (m0 >= m1) return;
  if (t == lk::kF32)
    panel_of<float, float>(a, p, m0, m1, ws);
  else if (t == lk::kBF16)
    panel_any<bf16>(a, p, m0, m1, ws);
  else
    panel_any<f16>(a, p, m0, m1, ws);
}
}  // namespace
