// Any CPU: 4 fp32 lanes by the compiler's vector extension (SSE2, NEON or plain scalar code, whatever the target has).
#pragma once
#include "kernels.h"
#define LK_INLINE static inline __attribute__((always_inline))

namespace {
using lk::bf16;
using lk::f16;

typedef float V __attribute__((vector_size(16)));
typedef uint32_t U __attribute__((vector_size(16)));
constexpr int L = 4;
constexpr int DOT_MR = 2, DOT_NR = 4, DOT_NR1 = 4, DOT_NR23 = 4;
constexpr int NV = 2;
constexpr int MICRO_ROWS[NV + 1] = {0, 4, 4};
constexpr int WIDE_STEPS = 2;  // steps of k that a wide pass keeps in registers, two vectors each
constexpr int64_t KC = 512;    // lanes along k of one packed panel block: 128 KiB
constexpr int64_t CHAIN_F32 = 128;
constexpr int64_t SUM_ROWS = 516;

LK_INLINE V set1(float v) { return V{v, v, v, v}; }
LK_INLINE V zero() { return set1(0.f); }
LK_INLINE V add(V a, V b) { return a + b; }
LK_INLINE V mul(V a, V b) { return a * b; }
LK_INLINE V fma(V a, V b, V c) { return a * b + c; }
LK_INLINE V keep(V v, uint32_t bits) {
  U u;
  __builtin_memcpy(&u, &v, sizeof u);
  u &= U{-(bits & 1), -((bits >> 1) & 1), -((bits >> 2) & 1), -((bits >> 3) & 1)};
  __builtin_memcpy(&v, &u, sizeof v);
  return v;
}

LK_INLINE float as_float(uint32_t u) {
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
LK_INLINE uint32_t as_bits(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return u;
}
LK_INLINE float widen(float v) { return v; }
LK_INLINE float widen(bf16 v) { return as_float(static_cast<uint32_t>(v.bits) << 16); }
LK_INLINE float widen(f16 v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000) << 16, rest = v.bits & 0x7fff;
  if (rest >= 0x7c00) return as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13 | (rest > 0x7c00 ? 0x400000 : 0));
  const float magnitude = as_float(rest << 13) * 0x1p112f;  // moves the exponent's bias; exact, subnormals included
  return as_float(sign | as_bits(magnitude));
}
LK_INLINE void narrow(float v, float* out) { *out = v; }
LK_INLINE void narrow(float v, bf16* out) {
  const uint32_t u = as_bits(v);
  out->bits = static_cast<uint16_t>((v != v ? u | 0x400000 : u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
LK_INLINE void narrow(float v, f16* out) {
  const uint32_t u = as_bits(v), sign = (u >> 16) & 0x8000, rest = u & 0x7fffffff;
  uint32_t r;
  if (rest > 0x7f800000)
    r = 0x7e00 | ((rest >> 13) & 0x3ff);
  else if (rest >= 0x477ff000)  // rounds to 2^16 or more
    r = 0x7c00;
  else if (rest >= 0x38800000)  // normal
    r = (rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13;
  else  // subnormal: adding 0.5 puts its bits, rounded to nearest even, at the end of the mantissa
    r = as_bits(as_float(rest) + 0.5f) - 0x3f000000;
  out->bits = static_cast<uint16_t>(sign | r);
}

template <class T>
LK_INLINE V load(const T* p) {
  return V{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
}
template <class T>
LK_INLINE V load(const T* p, int64_t n) {
  V v = zero();
  for (int i = 0; i < L && i < n; i++) v[i] = widen(p[i]);
  return v;
}
template <class T>
LK_INLINE void store(T* p, V v, int64_t n) {
  for (int i = 0; i < L && i < n; i++) narrow(v[i], p + i);
}
template <class T>
LK_INLINE void store(T* p, V v) {
  store(p, v, L);
}

LK_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
LK_INLINE V sums(const V* v) {
  V s;
  for (int i = 0; i < L; i++) s[i] = (v[i][0] + v[i][1]) + (v[i][2] + v[i][3]);
  return s;
}
LK_INLINE void transpose(V* r) {
  V t[L];
  for (int i = 0; i < L; i++) t[i] = V{r[0][i], r[1][i], r[2][i], r[3][i]};
  for (int i = 0; i < L; i++) r[i] = t[i];
}

constexpr bool HAS_QUADS = false;
LK_INLINE void quads(const void*, int64_t, V*) {}
}  // namespace

#include "forms.h"
