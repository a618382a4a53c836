// AVX-512 without an AVX-512 processor: SIMDe's portable versions, and in plain loops what SIMDe 0.7.4 lacks of the intrinsics that
// csrc/cpu/simd_avx512.h uses. Found before the compiler's own header by tests/emulate/build.py.
#pragma once
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>
#include <stdint.h>
#include <string.h>

#include "tiles.h"

namespace emulated {
using F512 = simde__m512;
using I512 = simde__m512i;
using I256 = simde__m256i;

template <class Vector, class Element, int kLanes>
struct Lanes {
  Element at[kLanes];
  explicit Lanes(const Vector& v) { memcpy(at, &v, sizeof at); }
  Lanes() : at{} {}
  Vector vector() const {
    Vector v;
    memcpy(&v, at, sizeof at);
    return v;
  }
};
template <class Vector, class Element, int kLanes>
Vector masked_load(uint32_t mask, const void* p) {  // reads no byte of a lane that is off
  Lanes<Vector, Element, kLanes> out;
  for (int i = 0; i < kLanes; i++)
    if (mask >> i & 1) memcpy(&out.at[i], static_cast<const char*>(p) + i * sizeof(Element), sizeof(Element));
  return out.vector();
}
template <class Element, int kLanes, class Vector>
void masked_store(void* p, uint32_t mask, const Vector& v) {
  const Lanes<Vector, Element, kLanes> in(v);
  for (int i = 0; i < kLanes; i++)
    if (mask >> i & 1) memcpy(static_cast<char*>(p) + i * sizeof(Element), &in.at[i], sizeof(Element));
}
inline I256 low_halves(const I512& v) {
  const Lanes<I512, uint32_t, 16> in(v);
  Lanes<I256, uint16_t, 16> out;
  for (int i = 0; i < 16; i++) out.at[i] = static_cast<uint16_t>(in.at[i]);
  return out.vector();
}
inline I512 widened(const I256& v) {
  const Lanes<I256, uint16_t, 16> in(v);
  Lanes<I512, uint32_t, 16> out;
  for (int i = 0; i < 16; i++) out.at[i] = in.at[i];
  return out.vector();
}
inline F512 from_half(const I256& v) {
  simde__m128i half[2];
  simde__m256 wide[2];
  memcpy(half, &v, sizeof half);
  for (int i = 0; i < 2; i++) wide[i] = simde_mm256_cvtph_ps(half[i]);
  F512 out;
  memcpy(&out, wide, sizeof out);
  return out;
}
inline I256 to_half(const F512& v) {
  simde__m256 wide[2];
  simde__m128i half[2];
  memcpy(wide, &v, sizeof wide);
  for (int i = 0; i < 2; i++) half[i] = simde_mm256_cvtps_ph(wide[i], SIMDE_MM_FROUND_TO_NEAREST_INT);
  I256 out;
  memcpy(&out, half, sizeof out);
  return out;
}
inline I256 to_bf16(const F512& v) {
  const Lanes<F512, uint32_t, 16> in(v);
  Lanes<I256, uint16_t, 16> out;
  for (int i = 0; i < 16; i++) {
    const uint32_t u = bits_of(flushed(in.at[i]));
    out.at[i] = static_cast<uint16_t>((u & 0x7fffffff) > 0x7f800000 ? u >> 16 | 0x40 : (u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
  return out.vector();
}
// vdpbf16ps: the odd elements' product first, then the even ones'
template <class Pairs>
F512 dot_bf16(const F512& acc, const Pairs& a, const Pairs& b) {
  const Lanes<F512, uint32_t, 16> c(acc);
  const Lanes<Pairs, uint32_t, 16> p(a), q(b);
  Lanes<F512, float, 16> out;
  for (int i = 0; i < 16; i++) {
    const float odd = multiply_add(p.at[i] & 0xffff0000, q.at[i] & 0xffff0000, flushed(c.at[i]));
    out.at[i] = multiply_add(p.at[i] << 16, q.at[i] << 16, odd);
  }
  return out.vector();
}
}  // namespace emulated

using __mmask16 = uint16_t;
using __mmask32 = uint32_t;
#define __m512bh simde__m512i
#define _mm256_maskz_loadu_epi16(mask, p) emulated::masked_load<simde__m256i, uint16_t, 16>(mask, p)
#define _mm512_maskz_loadu_epi16(mask, p) emulated::masked_load<simde__m512i, uint16_t, 32>(mask, p)
#define _mm512_maskz_loadu_ps(mask, p) emulated::masked_load<simde__m512, float, 16>(mask, p)
#define _mm256_mask_storeu_epi16(p, mask, v) emulated::masked_store<uint16_t, 16>(p, mask, v)
#define _mm512_mask_storeu_ps(p, mask, v) emulated::masked_store<float, 16>(p, mask, v)
#define _mm512_shuffle_f32x4(a, b, imm) simde_mm512_castsi512_ps(simde_mm512_shuffle_i32x4(simde_mm512_castps_si512(a), simde_mm512_castps_si512(b), imm))
#define _mm512_cvtepi32_epi16(v) emulated::low_halves(v)
#define _mm512_cvtepu16_epi32(v) emulated::widened(v)
#define _mm512_cvtph_ps(v) emulated::from_half(v)
#define _mm512_cvtps_ph(v, rounding) emulated::to_half(v)
#define _mm512_cvtneps_pbh(v) emulated::to_bf16(v)
#undef _mm512_dpbf16_ps
#define _mm512_dpbf16_ps(acc, a, b) emulated::dot_bf16(acc, a, b)
