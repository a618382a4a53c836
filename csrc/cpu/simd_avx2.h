// AVX2 + FMA + F16C: 8 fp32 lanes. bf16 and fp16 are widened to fp32 (exact).
#pragma once
#include <immintrin.h>

#include "kernels.h"
#define LK_INLINE static inline __attribute__((always_inline))

namespace {
using lk::bf16;
using lk::f16;

using V = __m256;
constexpr int L = 8;
constexpr int DOT_MR = 3, DOT_NR = 4, DOT_NR1 = 8, DOT_NR23 = 4;
constexpr int NV = 2;
constexpr int MICRO_ROWS[NV + 1] = {0, 12, 6};
constexpr int WIDE_STEPS = 4;       // steps of k that a wide pass keeps in registers, two vectors each
constexpr int64_t KC = 512;         // lanes along k of one packed panel block: 128 KiB
constexpr int64_t CHAIN_F32 = 256;  // longer chains load and store the sums less often
constexpr int64_t SUM_ROWS = 516;   // 129 KiB of sums beside the panel block, in 512 KiB of L2

LK_INLINE __m256i first(int64_t n) {
  alignas(32) static const int32_t table[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(table + 8 - (n > 8 ? 8 : n < 0 ? 0 : n)));
}

LK_INLINE V zero() { return _mm256_setzero_ps(); }
LK_INLINE V set1(float v) { return _mm256_set1_ps(v); }
LK_INLINE V add(V a, V b) { return _mm256_add_ps(a, b); }
LK_INLINE V mul(V a, V b) { return _mm256_mul_ps(a, b); }
LK_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
LK_INLINE V keep(V v, uint32_t bits) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i hit = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane), lane);
  return _mm256_and_ps(v, _mm256_castsi256_ps(hit));
}

LK_INLINE V widen(const bf16*, __m128i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)); }
LK_INLINE V widen(const f16*, __m128i v) { return _mm256_cvtph_ps(v); }
LK_INLINE __m128i narrow(const f16*, V v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
LK_INLINE __m128i narrow(const bf16*, V v) {  // to nearest even, NaN stays NaN
  const __m256i i = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(i, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(i, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(i, _mm256_set1_epi32(0x400000));
  const V r = _mm256_blendv_ps(_mm256_castsi256_ps(up), _mm256_castsi256_ps(quiet), _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i s = _mm256_srli_epi32(_mm256_castps_si256(r), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
}

LK_INLINE V load(const float* p) { return _mm256_loadu_ps(p); }
LK_INLINE V load(const float* p, int64_t n) { return _mm256_maskload_ps(p, first(n)); }
LK_INLINE void store(float* p, V v) { _mm256_storeu_ps(p, v); }
LK_INLINE void store(float* p, V v, int64_t n) {
  if (n >= L)
    store(p, v);
  else
    _mm256_maskstore_ps(p, first(n), v);
}
template <class T>
LK_INLINE V load(const T* p) {
  return widen(p, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
template <class T>
LK_INLINE V load(const T* p, int64_t n) {  // AVX2 has no masked 16-bit load
  if (n >= L) return load(p);
  alignas(16) T part[L] = {};
  for (int i = 0; i < n; i++) part[i] = p[i];
  return load(static_cast<const T*>(part));
}
template <class T>
LK_INLINE void store(T* p, V v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(p, v));
}
template <class T>
LK_INLINE void store(T* p, V v, int64_t n) {
  if (n >= L) return store(p, v);
  alignas(16) T part[L];
  store(static_cast<T*>(part), v);
  for (int i = 0; i < n; i++) p[i] = part[i];
}

LK_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

LK_INLINE V sums(const V* v) {  // lane i = sum of v[i]
  const V a = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  const V b = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
  return add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

LK_INLINE void transpose(V* r) {  // 8 x 8
  V t[8], u[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[i] = _mm256_permute2f128_ps(u[i], u[4 + i], 0x20);
    r[4 + i] = _mm256_permute2f128_ps(u[i], u[4 + i], 0x31);
  }
}

constexpr bool HAS_QUADS = false;
LK_INLINE void quads(const void*, int64_t, V*) {}
}  // namespace

#include "forms.h"

namespace {
template <>
struct DotStep<bf16> {  // 16 elements as their even and odd halves: a shift and an and instead of a shuffle
  static constexpr int STEP = 16;
  struct X {
    V even, odd;
  };
  LK_INLINE X split(__m256i v) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(v, 16)), _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(static_cast<int>(0xffff0000))))};
  }
  LK_INLINE X load(const bf16* p) { return split(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  LK_INLINE X load(const bf16* p, int64_t n) {
    alignas(32) bf16 part[STEP] = {};
    for (int i = 0; i < n; i++) part[i] = p[i];
    return load(part);
  }
  LK_INLINE X keep(X v, uint32_t bits) {
    const __m256i b = _mm256_set1_epi32(static_cast<int>(bits)), even = _mm256_setr_epi32(1, 4, 16, 64, 256, 1024, 4096, 16384);
    const __m256i odd = _mm256_slli_epi32(even, 1);
    return {_mm256_and_ps(v.even, _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(b, even), even))),
            _mm256_and_ps(v.odd, _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(b, odd), odd)))};
  }
  LK_INLINE V mac(V c, X a, X b) { return fma(a.odd, b.odd, fma(a.even, b.even, c)); }
};
}  // namespace
