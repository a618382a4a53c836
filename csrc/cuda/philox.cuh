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

// Bits 15 and 31: whether the low and the high half of a word are at least the threshold, 0 to 65536. A half's lower 15 bits carry into its own top
// bit: to be kept it needs either of the two, and both where the threshold is above 0x8000.
LK_HD uint32_t kept_halves(uint32_t word, uint32_t threshold) {
  const bool above = threshold > 0x8000u;
  const uint32_t either = above ? 0u : ~0u;
  const uint32_t carry = (word & 0x7FFF7FFFu) + ((above ? 0x10000u : 0x8000u) - threshold) * 0x10001u;
  return ((carry & word) | ((carry | word) & either)) & 0x80008000u;
}

// 0xFFFF for each half whose top bit is set.
LK_HD uint32_t whole_halves(uint32_t top) {
#if defined(__CUDA_ARCH__)
  uint32_t spread;
  asm("prmt.b32 %0, %1, 0, 0xBB99;" : "=r"(spread) : "r"(top));  // the sign of byte 1 twice, of byte 3 twice
  return spread;
#else
  return (top >> 15 & 0x10001u) * 0xFFFFu;
#endif
}

// Turns random words into lane masks (0xFFFF where the element is kept) and returns the 8 keep bits, element 0 in bit 0.
LK_HD uint32_t keep8(Words4& r, uint32_t threshold) {
  uint32_t even = 0;  // bits 0, 2, 4, 6: of the low halves; the high halves' wait 15 bits above their places
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int i = 0; i < 4; ++i) {
    const uint32_t top = kept_halves(r.w[i], threshold);
    even |= top >> (15 - 2 * i);
    r.w[i] = whole_halves(top);
  }
  return (even | even >> 15) & 0xFFu;
}

}  // namespace lk::cuda
