// Few rows: every output is a dot product of two rows read in place, W streamed once from memory.
//
//   out[m, n] = alpha * sum_k keep(m, k) x[m, k] w[n, k] + sum_r h[m, r] b[n, r] + bias[n]
//
// A tile is MR x NR outputs, each a vector accumulator of partial sums over k; the rank dimension is a little more k. A row's bits depend
// neither on the tile nor on its neighbours: lanes are summed by one fixed tree, and long chains of fp32 additions are cut at fixed k.
#pragma once

namespace {
#ifdef LK_INTEL
constexpr int64_t PREFETCH_AHEAD = 1024;  // bytes along a row of W, at its end into the same row of the next tile
constexpr int64_t SHORT_ROW = 0;          // steps along k of a row that is read from its start to its end before the next
#else
constexpr int64_t PREFETCH_AHEAD = 256, SHORT_ROW = 256;
#endif
constexpr int64_t SHORT_X = 24576;  // bytes of x that stay in the L1 meanwhile
constexpr int64_t CHAIN_DOT = 256;  // terms of one chain of a lane: uncut, K 28672 has 2.8 times eager's error (tests/test_native_cpu.py)

// Spreads the loads of the next tile's W rows over the row tiles of this one, so that memory is read while the arithmetic runs.
struct NextRows {
  const char* p = nullptr;
  int64_t ld = 0, rows = 0, lines = 0, per_step = 0, r = 0, l = 0;
  int64_t skip = 0;  // elements from a row to the one whose place is asked for: the same row of the next tile (ABREAST), or a few on (BY_ROW)
  LK_INLINE void step(NextRows& f) {
    for (int64_t i = 0; i < f.per_step && f.r < f.rows; i++) {
      prefetch(f.p + f.r * f.ld + f.l * 64);
      if (++f.l == f.lines) f.l = 0, f.r++;
    }
  }
};

// How a tile walks its rows of W. Few rows of x are a matter of fetching W. Zen does that best for a row read from start to end while the same place
// of one a few rows on is asked for; longer ones, each a chain of additions, are read abreast. One core of Zen 5, us, abreast or with only the first
// lines of the next row asked for, and so (benchmarks/cpu_kernels.cpp fwd M N K 16 TYPE in_place 300): one row of x, bf16 576 x 576 26 and 20, 2048 x
// 2048 272 and 237, 4096 x 4096 1120 and 922, 4096 x 8192 2400 and 2162; fp32 2048 x 2048 565 and 480; three rows, bf16 4096 x 4096 1342 and 980.
// With AVX2 forced there: bf16 576 x 576 34.9 and 27.6, fp32 55.0 and 41.4; bf16 4096 x 4096, of 512 additions, 1278 abreast and 1801. A Xeon, whose
// memory is further away, wants them abreast and asked for earlier (LK_INTEL): bf16 2048 x 2048 532 and 792, fp32 937 and 1325.
enum Walk { TILES, ABREAST, BY_ROW };

// Elements k..end of rows of K; end is K or a multiple of the step.
template <class T, int MR, int NR, bool DROP, Walk WALK>
LK_INLINE void dot_rows(V* acc, const T* x, int64_t ldx, const T* const* w, int64_t k, int64_t end, int64_t K, lk::Mask keep, int64_t m,
                        NextRows& next) {
  using D = DotStep<T>;
  constexpr int S = D::STEP;
  constexpr int64_t AHEAD = PREFETCH_AHEAD / static_cast<int64_t>(sizeof(T));
  if constexpr (WALK == BY_ROW) {
    const int64_t whole = k + (end - k) / S * S;
#pragma GCC unroll 8
    for (int j = 0; j < NR; j++) {
      const T* then = w[j] + next.skip;
      for (int64_t i = k; i < whole; i += S) {
        const typename D::X wv = D::load(w[j] + i);
        __builtin_prefetch(then + i);
#pragma GCC unroll 8
        for (int r = 0; r < MR; r++) {
          typename D::X xv = D::load(x + r * ldx + i);
          if constexpr (DROP) xv = D::keep(xv, keep_bits(keep, m + r, i));
          acc[r * NR + j] = D::mac(acc[r * NR + j], xv, wv);
        }
      }
    }
    k = whole;
  }
  for (; k + S <= end; k += S) {
    typename D::X xv[MR];
    const int64_t ahead = k + (k + AHEAD < K ? AHEAD : AHEAD - K + next.skip);
    if constexpr (WALK == TILES) NextRows::step(next);
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
      xv[i] = D::load(x + i * ldx + k);
      if constexpr (DROP) xv[i] = D::keep(xv[i], keep_bits(keep, m + i, k));
    }
#pragma GCC unroll 8
    for (int j = 0; j < NR; j++) {
      const typename D::X wv = D::load(w[j] + k);
      if constexpr (WALK == ABREAST) __builtin_prefetch(w[j] + ahead);
#pragma GCC unroll 8
      for (int i = 0; i < MR; i++) acc[i * NR + j] = D::mac(acc[i * NR + j], xv[i], wv);
    }
  }
  if (k < end) {
    typename D::X xv[MR];
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
      xv[i] = D::load(x + i * ldx + k, end - k);
      if constexpr (DROP) xv[i] = D::keep(xv[i], keep_bits(keep, m + i, k));
    }
#pragma GCC unroll 8
    for (int j = 0; j < NR; j++) {
      const typename D::X wv = D::load(w[j] + k, end - k);
#pragma GCC unroll 8
      for (int i = 0; i < MR; i++) acc[i * NR + j] = D::mac(acc[i * NR + j], xv[i], wv);
    }
  }
}

// The same from 0 to K in chains of CHAIN_DOT, added up in order. Apart, so that short rows keep their accumulators in registers.
template <class T, int MR, int NR, bool DROP, Walk WALK>
__attribute__((noinline)) void dot_chains(V* sums, const T* x, int64_t ldx, const T* const* w, int64_t K, lk::Mask keep, int64_t m, NextRows& next) {
  constexpr int64_t CHAIN = CHAIN_DOT * DotStep<T>::STEP;
  for (int64_t k = 0; k < K; k += CHAIN) {
    V acc[MR * NR];
#pragma GCC unroll 32
    for (int i = 0; i < MR * NR; i++) acc[i] = zero();
    dot_rows<T, MR, NR, DROP, WALK>(acc, x, ldx, w, k, min(k + CHAIN, K), K, keep, m, next);
#pragma GCC unroll 32
    for (int i = 0; i < MR * NR; i++) sums[i] = k ? add(sums[i], acc[i]) : acc[i];
  }
}

template <class T, int MR, int NR, bool DROP, Walk WALK>
LK_INLINE void dot_tile(const lk::DotArgs& a, int64_t m, int64_t n, int64_t n1, NextRows& next) {
  constexpr int NA = (MR * NR + L - 1) / L * L;
  static_assert(NR <= L, "a tile's row of outputs is stored as one vector");
  V acc[NA];
#pragma GCC unroll 32
  for (int i = 0; i < NA; i++) acc[i] = zero();
  const T *w[NR], *b[NR];
  const int64_t nv = min(n1 - n, NR);
#pragma GCC unroll 8
  for (int j = 0; j < NR; j++) w[j] = static_cast<const T*>(a.w.p) + (n + min(j, nv - 1)) * a.w.ld;
  const T* x = static_cast<const T*>(a.x.p) + m * a.x.ld;
  if (same<T, float> && a.K > CHAIN_DOT * DotStep<T>::STEP) {  // the rounding of 16-bit results hides a chain's error
    V chains[NA];
    dot_chains<T, MR, NR, DROP, WALK>(chains, x, a.x.ld, w, a.K, a.keep, m, next);
#pragma GCC unroll 32
    for (int i = 0; i < MR * NR; i++) acc[i] = chains[i];
  } else {
    dot_rows<T, MR, NR, DROP, WALK>(acc, x, a.x.ld, w, 0, a.K, a.K, a.keep, m, next);
  }
  if (a.alpha != 1.f) {
#pragma GCC unroll 32
    for (int i = 0; i < MR * NR; i++) acc[i] = mul(acc[i], set1(a.alpha));
  }
  if (a.R) {
    NextRows none;
#pragma GCC unroll 8
    for (int j = 0; j < NR; j++) b[j] = static_cast<const T*>(a.b.p) + (n + min(j, nv - 1)) * a.b.ld;
    dot_rows<T, MR, NR, false, TILES>(acc, static_cast<const T*>(a.h.p) + m * a.h.ld, a.h.ld, b, 0, a.R, a.R, {}, m, none);
  }
  if (a.rows) {
    NextRows none;
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
      const lk::RankRow& own = a.rows[m + i];
      if (!own.R) continue;
#pragma GCC unroll 8
      for (int j = 0; j < NR; j++) b[j] = static_cast<const T*>(own.b) + (n + min(j, nv - 1)) * a.b.ld;
      dot_rows<T, 1, NR, false, TILES>(acc + i * NR, static_cast<const T*>(a.h.p) + (m + i) * a.h.ld, 0, b, 0, own.R, own.R, {}, m, none);
    }
  }
  alignas(64) float s[NA + L];
#pragma GCC unroll 8
  for (int i = 0; i < NA; i += L) store(s + i, sums(acc + i));
  const V bias = a.bias ? load(static_cast<const T*>(a.bias) + n, nv) : zero();
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++) store(static_cast<T*>(a.out.p) + (m + i) * a.out.ld + n, add(load(s + i * NR), bias), nv);
}

// 1 to 3 rows: wide tiles keep enough accumulators in flight. A function for each way, or gcc's registers do not last.
template <class T, int MR, int NR, bool DROP, Walk WALK>
__attribute__((noinline)) void dot_walk(const lk::DotArgs& a, int64_t n0, int64_t n1) {
  const int64_t row_bytes = a.K * static_cast<int64_t>(sizeof(T)), rows_ahead = row_bytes < 2048 ? 3 : row_bytes <= 4096 ? 2 : 1;
  NextRows next;
  next.skip = (WALK == BY_ROW ? rows_ahead : NR) * a.w.ld;
  for (int64_t n = n0; n < n1; n += NR) dot_tile<T, MR, NR, DROP, WALK>(a, 0, n, n1, next);
}
template <class T, int MR, int NR, bool DROP>
void dot_few(const lk::DotArgs& a, int64_t n0, int64_t n1) {
  constexpr int64_t CHAINED = L == 8 && sizeof(T) == 2 ? 2 : 1;  // AVX2 reads 16 bits a lane no faster than it adds: 2048 x 2048 f16 380 and 443
  if (a.K * CHAINED <= SHORT_ROW * DotStep<T>::STEP && MR * a.K * static_cast<int64_t>(sizeof(T)) <= SHORT_X)
    dot_walk<T, MR, NR, DROP, BY_ROW>(a, n0, n1);
  else
    dot_walk<T, MR, NR, DROP, ABREAST>(a, n0, n1);
}

template <class T, bool DROP>
void dot_block(const lk::DotArgs& a, int64_t n0, int64_t n1) {
  NextRows none;
  const int64_t tiles = a.M / DOT_MR, lines = ceil_div(a.K * static_cast<int64_t>(sizeof(T)), 64);
  for (int64_t n = n0; n < n1; n += DOT_NR) {
    NextRows next;
    if (tiles > 0 && tiles <= 8 && n + DOT_NR < n1) {
      next = {reinterpret_cast<const char*>(static_cast<const T*>(a.w.p) + (n + DOT_NR) * a.w.ld),
              a.w.ld * static_cast<int64_t>(sizeof(T)),
              min(n1 - n - DOT_NR, DOT_NR),
              lines,
              0,
              0,
              0,
              0};
      next.per_step = ceil_div(next.rows * lines, tiles * (a.K / DotStep<T>::STEP) + 1);
    }
    int64_t m = 0;
    for (; m + DOT_MR <= a.M; m += DOT_MR) dot_tile<T, DOT_MR, DOT_NR, DROP, TILES>(a, m, n, n1, next);
    if (DOT_MR > 3 && a.M - m == 3)
      dot_tile<T, 3, DOT_NR, DROP, TILES>(a, m, n, n1, none);
    else if (DOT_MR > 2 && a.M - m == 2)
      dot_tile<T, 2, DOT_NR, DROP, TILES>(a, m, n, n1, none);
    else if (a.M - m == 1)
      dot_tile<T, 1, DOT_NR, DROP, TILES>(a, m, n, n1, none);
  }
}

template <class T>
void dot_of(const lk::DotArgs& a, int64_t n0, int64_t n1) {
  if (a.M == 1 && a.keep.p)
    dot_few<T, 1, DOT_NR1, true>(a, n0, n1);
  else if (a.keep.p)
    dot_block<T, true>(a, n0, n1);
  else if (a.M == 1)
    dot_few<T, 1, DOT_NR1, false>(a, n0, n1);
  else if (a.M == 2)
    dot_few<T, 2, DOT_NR23, false>(a, n0, n1);
  else if (DOT_MR > 3 && a.M == 3)
    dot_few<T, 3, DOT_NR23, false>(a, n0, n1);
  else
    dot_block<T, false>(a, n0, n1);
}

void dot(lk::Dtype t, const lk::DotArgs& a, int64_t n0, int64_t n1) {
  if (n0 >= n1 || a.M <= 0) return;
  if (t == lk::kF32)
    dot_of<float>(a, n0, n1);
  else if (t == lk::kBF16)
    dot_of<bf16>(a, n0, n1);
  else
    dot_of<f16>(a, n0, n1);
}
}  // namespace
