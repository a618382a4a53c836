// Element by element: the dropout mask, casts, sums and a transpose.
#pragma once

namespace {
// Philox4x32-7 (Salmon et al., SC'11) of counters (c0 + i, c1, 0, 0) for LANES values of i; the loops over lanes become vector code.
constexpr int LANES = 16;
LK_INLINE void philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t (&out)[4][LANES]) {
  uint32_t a[LANES], b[LANES], c[LANES], d[LANES];
  for (int i = 0; i < LANES; i++) a[i] = c0 + static_cast<uint32_t>(i), b[i] = c1, c[i] = 0, d[i] = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 7; round++) {
    for (int i = 0; i < LANES; i++) {
      const uint64_t low = static_cast<uint64_t>(a[i]) * 0xD2511F53u, high = static_cast<uint64_t>(c[i]) * 0xCD9E8D57u;
      a[i] = static_cast<uint32_t>(high >> 32) ^ b[i] ^ k0;
      b[i] = static_cast<uint32_t>(high);
      c[i] = static_cast<uint32_t>(low >> 32) ^ d[i] ^ k1;
      d[i] = static_cast<uint32_t>(low);
    }
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  for (int i = 0; i < LANES; i++) out[0][i] = a[i], out[1][i] = b[i], out[2][i] = c[i], out[3][i] = d[i];
}

// Element (m, k) takes 16-bit number k % 8 of counter (k / 8, m) and is kept when it is >= threshold; bits at and past K are zero.
void mask(uint64_t seed, uint32_t threshold, int64_t K, lk::Mask keep, int64_t m0, int64_t m1) {
  const int64_t words = ceil_div(K, 32);
  for (int64_t m = m0; m < m1; m++) {
    uint32_t* row = const_cast<uint32_t*>(keep.p) + m * keep.ld;
    for (int64_t w = 0; w < words; w += LANES / 4) {
      uint32_t r[4][LANES];
      philox(seed, static_cast<uint32_t>(w * 4), static_cast<uint32_t>(m), r);
      uint32_t bits[LANES];
      for (int i = 0; i < LANES; i++) bits[i] = 0;
      for (int j = 0; j < 4; j++)
        for (int i = 0; i < LANES; i++) {
          bits[i] |= static_cast<uint32_t>((r[j][i] & 0xffff) >= threshold) << (2 * j);
          bits[i] |= static_cast<uint32_t>((r[j][i] >> 16) >= threshold) << (2 * j + 1);
        }
      for (int64_t i = 0; i < LANES / 4 && w + i < words; i++) {
        const uint32_t word = bits[4 * i] | bits[4 * i + 1] << 8 | bits[4 * i + 2] << 16 | bits[4 * i + 3] << 24;
        const int64_t left = K - (w + i) * 32;
        row[w + i] = left >= 32 ? word : word & ((1u << left) - 1);
      }
    }
  }
}

template <class T>
void cast_to(const float* from, T* to, int64_t n) {
  int64_t i = 0;
  for (; i + L <= n; i += L) store(to + i, load(from + i));
  if (i < n) store(to + i, load(from + i, n - i), n - i);
}

void cast(lk::Dtype to, const float* from, void* dst, int64_t n) {
  if (to == lk::kBF16)
    cast_to(from, static_cast<bf16*>(dst), n);
  else if (to == lk::kF16)
    cast_to(from, static_cast<f16*>(dst), n);
  else
    cast_to(from, static_cast<float*>(dst), n);
}

template <class T>
void add_to(const float* from, T* to, int64_t n) {
  int64_t i = 0;
  for (; i + L <= n; i += L) store(to + i, ::add(load(to + i), load(from + i)));
  if (i < n) store(to + i, ::add(load(to + i, n - i), load(from + i, n - i)), n - i);
}

void accumulate(lk::Dtype to, const float* from, void* dst, int64_t n) {
  if (to == lk::kBF16)
    add_to(from, static_cast<bf16*>(dst), n);
  else if (to == lk::kF16)
    add_to(from, static_cast<f16*>(dst), n);
  else
    add_to(from, static_cast<float*>(dst), n);
}

// out[r, m] = in[m, r], rows m0 .. m1. One element at a time it was an eighth of dA and dB (Zen 3, M 2048, 576 x 576, R 64: docs/measured.md).
void transpose_rows(const float* in, int64_t ld, int64_t m0, int64_t m1, int64_t R, float* out, int64_t out_ld) {
  for (int64_t r = 0; r < R; r += L)
    for (int64_t m = m0; m < m1; m += L) {
      V v[L];
      const float* p = in + m * ld + r;
      if (m1 - m >= L && R - r >= L) {
#pragma GCC unroll 16
        for (int i = 0; i < L; i++) v[i] = load(p + i * ld);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < L; i++) v[i] = m + i < m1 ? load(p + i * ld, R - r) : zero();
      }
      transpose(v);
      float* q = out + r * out_ld + m;
#pragma GCC unroll 16
      for (int i = 0; i < L; i++)
        if (r + i < R) store(q + i * out_ld, v[i], m1 - m);
    }
}
}  // namespace
