// Few rows against a matrix that lies along the columns of the result: W's rows are streamed once, in place, into accumulators held in L1.
//
//   out[m, c] = alpha * (sum_n x[m, n] w[n, c] + keep_scale * keep(m, c) * sum_r h[m, r] b[r, c])
//
// Each output is a sum of short partial sums over n, in order, after the rank term.
#pragma once

namespace {
template <class T, bool FULL>
LK_INLINE void wide_group(int64_t M, const T* x, int64_t ldx, const T* w, int64_t ldw, int64_t left, int64_t cols, float* acc, int64_t ld) {
  using P = PanelStep<T>;
  using X = typename P::X;
  constexpr int G = WIDE_STEPS, PAIR = P::PAIR, LINE = 64 / sizeof(T);
  alignas(64) float widened[lk::kWideRows * (G * PAIR + L)];
  const X* xs;
  int64_t xs_ld = ldx;
  if constexpr (same<T, X>) {
    xs = x;
  } else {
    xs_ld = G * PAIR;
    for (int64_t m = 0; m < M; m++)
      for (int64_t k = 0; k < G * PAIR && k < left; k += L) store(widened + m * xs_ld + k, load(x + m * ldx + k, left - k), G * PAIR - k);
    xs = widened;
  }
  for (int64_t c = 0; c < cols; c += 2 * L) {
    V p[G][2];
#pragma GCC unroll 8
    for (int g = 0; g < G; g++) {
      const T* row = w + g * PAIR * ldw + c;
      if (FULL)  // the next group's rows come while this one's arithmetic runs; dx takes half the time on Zen 3 (docs/measured.md)
        for (int i = 0; i < PAIR; i++)
          for (int j = 0; j < 2 * L; j += LINE) prefetch(row + (G * PAIR + i) * ldw + j);
      if (FULL && cols - c >= 2 * L)
        P::columns(row, row + ldw, p[g]);
      else if (FULL || g * PAIR + PAIR <= left)
        P::columns(row, row + ldw, cols - c, ALL, ALL, p[g]);
      else if (g * PAIR < left)
        P::columns(row, nullptr, cols - c, ALL, ALL, p[g]);
      else
        p[g][0] = p[g][1] = zero();
    }
    for (int64_t m = 0; m < M; m++) {
      float* a = acc + m * ld + c;
      V a0 = zero(), a1 = zero();
#pragma GCC unroll 8
      for (int g = 0; g < G; g++) {
        const X* xm = xs + m * xs_ld + g * PAIR;
        if (FULL || g * PAIR + PAIR <= left)
          a0 = P::step(a0, p[g][0], xm), a1 = P::step(a1, p[g][1], xm);
        else if (g * PAIR < left)
          a0 = P::half_step(a0, p[g][0], xm), a1 = P::half_step(a1, p[g][1], xm);
      }
      store(a, add(load(a), a0)), store(a + L, add(load(a + L), a1));
    }
  }
}

template <class T>
void wide_product(int64_t M, const T* x, int64_t ldx, const T* w, int64_t ldw, int64_t N, int64_t cols, float* acc, int64_t ld) {
  constexpr int64_t GROUP = WIDE_STEPS * PanelStep<T>::PAIR;
  int64_t n = 0;
  for (; n + GROUP <= N; n += GROUP) wide_group<T, true>(M, x + n, ldx, w + n * ldw, ldw, GROUP, cols, acc, ld);
  if (n < N) wide_group<T, false>(M, x + n, ldx, w + n * ldw, ldw, N - n, cols, acc, ld);
}

// Adds `acc` to `total` and clears it: long sums are made of sums of FLUSH terms, for their rounding error.
constexpr int64_t FLUSH = 256;
LK_INLINE void flush(int64_t M, int64_t cols, float* acc, float* total, int64_t ld) {
  for (int64_t m = 0; m < M; m++)
    for (int64_t j = 0; j < cols; j += L) {
      store(total + m * ld + j, add(load(total + m * ld + j), load(acc + m * ld + j)));
      store(acc + m * ld + j, zero());
    }
}

template <class OT>
LK_INLINE void wide_store(const lk::WideArgs& a, int64_t c, int64_t cols, const float* total, int64_t ld) {
  for (int64_t m = 0; m < a.M; m++)
    for (int64_t j = 0; j < cols; j += L)
      store(static_cast<OT*>(a.out.p) + m * a.out.ld + c + j, mul(load(total + m * ld + j), set1(a.alpha)), cols - j);
}

template <class T>
void wide_of(const lk::WideArgs& a, int64_t c0, int64_t c1, float* ws) {
  const int64_t block = lk::kWideBlock / a.M / 32 * 32;  // columns
  for (int64_t c = c0; c < c1; c += block) {
    const int64_t cols = min(c1 - c, block);
    float* total = ws + lk::kWideBlock;
    for (int64_t i = 0; i < a.M * block; i += L) store(ws + i, zero()), store(total + i, zero());
    if (a.R) {
      wide_product(a.M, static_cast<const T*>(a.h.p), a.h.ld, static_cast<const T*>(a.b.p) + c, a.b.ld, a.R, cols, ws, block);
      if (a.out_keep.p) {
        for (int64_t m = 0; m < a.M; m++)
          for (int64_t j = 0; j < cols; j += L)
            store(ws + m * block + j, keep(mul(load(ws + m * block + j), set1(a.keep_scale)), keep_bits(a.out_keep, m, c + j)));
      }
    }
    for (int64_t n = 0; n < a.N; n += FLUSH) {
      const T* w = static_cast<const T*>(a.w.p) + n * a.w.ld + c;
      wide_product(a.M, static_cast<const T*>(a.x.p) + n, a.x.ld, w, a.w.ld, min(a.N - n, FLUSH), cols, ws, block);
      flush(a.M, cols, ws, total, block);
    }
    if (a.out_f32)
      wide_store<float>(a, c, cols, total, block);
    else
      wide_store<T>(a, c, cols, total, block);
  }
}

void wide(lk::Dtype t, const lk::WideArgs& a, int64_t c0, int64_t c1, float* ws) {
  if (c0 >= c1 || a.M <= 0) return;
  if (t == lk::kF32)
    wide_of<float>(a, c0, c1, ws);
  else if (t == lk::kBF16)
    wide_of<bf16>(a, c0, c1, ws);
  else
    wide_of<f16>(a, c0, c1, ws);
}
}  // namespace
