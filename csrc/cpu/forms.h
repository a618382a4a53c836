// How an element type enters the kernels. The general case widens to fp32; simd_*.h specialises where the hardware does better.
#pragma once

namespace {
template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;

// One step along k of a row that is read in place (dot form).
template <class T>
struct DotStep {
  static constexpr int STEP = L;
  using X = V;
  LK_INLINE X load(const T* p) { return ::load(p); }
  LK_INLINE X load(const T* p, int64_t n) { return ::load(p, n); }
  LK_INLINE X keep(X v, uint32_t bits) { return ::keep(v, bits); }
  LK_INLINE V mac(V c, X a, X b) { return fma(a, b, c); }
};

// One step along k of a packed panel (panel and wide form): PAIR elements of k in every 4-byte lane.
template <class T>
struct PanelStep {
  static constexpr int PAIR = 1;
  using X = float;
  LK_INLINE V row(const T* p) { return ::load(p); }
  LK_INLINE V row(const T* p, int64_t n) { return ::load(p, n); }
  // two vectors: columns 0..2L-1 of one row
  LK_INLINE void columns(const T* p, const T*, V* out) { out[0] = ::load(p), out[1] = ::load(p + L); }
  LK_INLINE void columns(const T* p, const T*, int64_t n, uint32_t bits, uint32_t, V* out) {
    out[0] = ::keep(::load(p, n), bits);
    out[1] = n > L ? ::keep(::load(p + L, n - L), bits >> L) : zero();
  }
  LK_INLINE V step(V c, V w, const float* x) { return fma(set1(*x), w, c); }
  LK_INLINE V half_step(V c, V w, const float* x) { return step(c, w, x); }
};

constexpr uint32_t ALL = 0xffffffffu;
// The keep bits of columns c.. of one row, c a multiple of L (which divides 32); all ones without a mask.
LK_INLINE uint32_t keep_bits(const lk::Mask& mask, int64_t row, int64_t c) { return mask.p ? mask.p[row * mask.ld + (c >> 5)] >> (c & 31) : ALL; }

LK_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
LK_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
LK_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
}  // namespace
