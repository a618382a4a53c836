// AVX-512 (F, BW, VL, DQ): 16 fp32 lanes, masked loads and stores.
#pragma once
#include <immintrin.h>

#include "kernels.h"
#define LK_INLINE static inline __attribute__((always_inline))

namespace {
using lk::bf16;
using lk::f16;

using V = __m512;
constexpr int L = 16;
constexpr int DOT_MR = 4, DOT_NR = 6, DOT_NR1 = 8, DOT_NR23 = 8;  // dot tiles: rows x columns; columns for 1 row, for 2 and 3 rows
constexpr int NV = 4;                                             // vectors across one micro tile
constexpr int MICRO_ROWS[NV + 1] = {0, 14, 12, 8, 6};             // rows of a micro tile that is 1..NV vectors wide: 24 accumulators
constexpr int WIDE_STEPS = 8;                                     // steps of k that a wide pass keeps in registers, two vectors each
constexpr int64_t KC = 1024;                                      // lanes along k of one packed panel block: 256 KiB
constexpr int64_t CHAIN_F32 = 128;
constexpr int64_t SUM_ROWS = 2040;  // 510 KiB of sums, in 1 MiB of L2

LK_INLINE __mmask16 first(int64_t n) { return n >= L ? 0xffff : n <= 0 ? 0 : static_cast<__mmask16>((1u << n) - 1); }
LK_INLINE __mmask32 first32(int64_t n) { return n >= 32 ? 0xffffffffu : n <= 0 ? 0 : (1u << n) - 1; }

LK_INLINE V zero() { return _mm512_setzero_ps(); }
LK_INLINE V set1(float v) { return _mm512_set1_ps(v); }
LK_INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
LK_INLINE V mul(V a, V b) { return _mm512_mul_ps(a, b); }
LK_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
LK_INLINE V keep(V v, uint32_t bits) { return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), v); }

LK_INLINE V widen(const bf16*, __m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
LK_INLINE V widen(const f16*, __m256i v) { return _mm512_cvtph_ps(v); }
LK_INLINE __m256i narrow(const f16*, V v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#ifdef LK_BF16_PAIRS  // both bf16 instructions flush denormals (below 1.2e-38), as they do in PyTorch's own kernels
LK_INLINE __m256i narrow(const bf16*, V v) { return (__m256i)_mm512_cvtneps_pbh(v); }
#else
LK_INLINE __m256i narrow(const bf16*, V v) {  // to nearest even, NaN stays NaN
  const __m512i i = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(i, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(i, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  r = _mm512_mask_or_epi32(r, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), i, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
}
#endif

LK_INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
LK_INLINE V load(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
LK_INLINE void store(float* p, V v) { _mm512_storeu_ps(p, v); }
LK_INLINE void store(float* p, V v, int64_t n) { _mm512_mask_storeu_ps(p, first(n), v); }
template <class T>
LK_INLINE V load(const T* p) {
  return widen(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
template <class T>
LK_INLINE V load(const T* p, int64_t n) {
  return widen(p, _mm256_maskz_loadu_epi16(first(n), p));
}
template <class T>
LK_INLINE void store(T* p, V v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(p, v));
}
template <class T>
LK_INLINE void store(T* p, V v, int64_t n) {
  _mm256_mask_storeu_epi16(p, first(n), narrow(p, v));
}

LK_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

LK_INLINE V sums(const V* v) {  // lane i = sum of v[i], by the same tree for every i
  V t[8], u[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) t[i] = add(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const __m512d a = _mm512_castps_pd(t[2 * i]), b = _mm512_castps_pd(t[2 * i + 1]);
    u[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const V w0 = add(_mm512_shuffle_f32x4(u[0], u[1], 0x88), _mm512_shuffle_f32x4(u[0], u[1], 0xdd));
  const V w1 = add(_mm512_shuffle_f32x4(u[2], u[3], 0x88), _mm512_shuffle_f32x4(u[2], u[3], 0xdd));
  return add(_mm512_shuffle_f32x4(w0, w1, 0x88), _mm512_shuffle_f32x4(w0, w1, 0xdd));
}

LK_INLINE void transpose(V* rows) {  // 16 x 16 dwords
  __m512i r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) r[i] = _mm512_castps_si512(rows[i]);
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    rows[i] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(t[i], t[8 + i], 0x88));
    rows[8 + i] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd));
    rows[4 + i] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88));
    rows[12 + i] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd));
  }
}

// out[j], lane i = dword j of the 16 bytes at row i, 16 rows: for short rows, with fewer shuffles than a whole transpose
constexpr bool HAS_QUADS = true;
LK_INLINE void quads(const void* p, int64_t ld_bytes, V* out) {
  const auto row = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const char*>(p) + i * ld_bytes)); };
  __m512i z[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    z[i] = _mm512_inserti32x4(_mm512_castsi128_si512(row(i)), row(i + 4), 1);
    z[i] = _mm512_inserti32x4(_mm512_inserti32x4(z[i], row(i + 8), 2), row(i + 12), 3);
  }
  const __m512i a = _mm512_unpacklo_epi32(z[0], z[1]), b = _mm512_unpackhi_epi32(z[0], z[1]);
  const __m512i c = _mm512_unpacklo_epi32(z[2], z[3]), d = _mm512_unpackhi_epi32(z[2], z[3]);
  out[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi64(a, c)), out[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi64(a, c));
  out[2] = _mm512_castsi512_ps(_mm512_unpacklo_epi64(b, d)), out[3] = _mm512_castsi512_ps(_mm512_unpackhi_epi64(b, d));
}
}  // namespace

#include "forms.h"

#ifdef LK_BF16_PAIRS  // vdpbf16ps: two bf16 products per lane, summed in fp32
namespace {
template <>
struct DotStep<bf16> {
  static constexpr int STEP = 32;
  using X = __m512i;
  LK_INLINE X load(const bf16* p) { return _mm512_loadu_si512(p); }
  LK_INLINE X load(const bf16* p, int64_t n) { return _mm512_maskz_loadu_epi16(first32(n), p); }
  LK_INLINE X keep(X v, uint32_t bits) { return _mm512_maskz_mov_epi16(bits, v); }
  LK_INLINE V mac(V c, X a, X b) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
};

template <>
struct PanelStep<bf16> {
  static constexpr int PAIR = 2;  // k steps in one lane
  using X = bf16;                 // what the micro kernel broadcasts from
  LK_INLINE V row(const bf16* p, int64_t n) { return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(first32(n), p)); }
  LK_INLINE V row(const bf16* p) { return _mm512_castsi512_ps(_mm512_loadu_si512(p)); }
  // two vectors: columns 0..31 of rows p and q (null: zeros), paired
  LK_INLINE void columns(const bf16* p, const bf16* q, V* out) { paired(_mm512_loadu_si512(p), _mm512_loadu_si512(q), out); }
  LK_INLINE void columns(const bf16* p, const bf16* q, int64_t n, uint32_t p_bits, uint32_t q_bits, V* out) {
    paired(_mm512_maskz_loadu_epi16(first32(n) & p_bits, p), _mm512_maskz_loadu_epi16(q ? first32(n) & q_bits : 0, q ? q : p), out);
  }
  LK_INLINE void paired(__m512i a, __m512i b, V* out) {
    const __m512i low =
        _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    out[0] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, low, b));
    out[1] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, high, b));
  }
  LK_INLINE V mac(V c, V w, uint32_t pair) {
    return _mm512_dpbf16_ps(c, (__m512bh)_mm512_castps_si512(w), (__m512bh)_mm512_set1_epi32(static_cast<int>(pair)));
  }
  LK_INLINE V step(V c, V w, const bf16* x) {
    uint32_t pair;
    __builtin_memcpy(&pair, x, 4);
    return mac(c, w, pair);
  }
  LK_INLINE V half_step(V c, V w, const bf16* x) { return mac(c, w, x->bits); }  // the last of an odd K: nothing past it is read
};
}  // namespace
#endif
