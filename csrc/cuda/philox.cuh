// The dropout mask of reference.dropout_mask, bit for bit: Philox4x32-7, key = seed, counter = (k / 8, m, 0, 0), eight 16-bit lanes.
// Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC'11); 7 rounds pass BigCrush there.
#pragma once
#include "scheduler.cuh"

namespace lk::cuda {

struct Words4 {
  uint32_t w[4];
};

LK_HD Words4 philox(uint64_t seed, uint32_t c0, uint32_t c1) {
  uint32_t c2 = 0, c3 = 0, k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int round = 0; round < 7; ++round) {
    const uint64_t low = uint64_t(c0) * 0xD2511F53u, high = uint64_t(c2) * 0xCD9E8D57u;
    c0 = uint32_t(high >> 32) ^ c1 ^ k0;
    c1 = uint32_t(high);
    c2 = uint32_t(low >> 32) ^ c3 ^ k1;
    c3 = uint32_t(low);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Turns random words into lane masks (0xFFFF where the element is kept) and returns the 8 keep bits, element 0 in bit 0.
LK_HD uint32_t keep8(Words4& r, uint32_t threshold) {
  uint32_t bits = 0;
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int i = 0; i < 4; ++i) {
    const bool lo = (r.w[i] & 0xFFFFu) >= threshold, hi = (r.w[i] >> 16) >= threshold;
    bits |= uint32_t(lo) << (2 * i) | uint32_t(hi) << (2 * i + 1);
    r.w[i] = (lo ? 0xFFFFu : 0u) | (hi ? 0xFFFF0000u : 0u);
  }
  return bits;
}

}  // namespace lk::cuda
