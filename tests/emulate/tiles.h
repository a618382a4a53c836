// The tile unit (AMX) without one: its registers as memory, its instructions in plain loops, so that AddressSanitizer sees every byte that a tile
// load or store touches. Comes after <immintrin.h>, whose intrinsics it replaces.
#pragma once
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace emulated {
inline float flushed(uint32_t bits) {  // the bf16 instructions take denormals as zero, and give none
  if ((bits & 0x7f800000) == 0) bits &= 0x80000000;
  float v;
  memcpy(&v, &bits, 4);
  return v;
}
inline uint32_t bits_of(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  return bits;
}
// a product of two bf16 is exact in float32, so fused or not is one
inline float multiply_add(uint32_t a, uint32_t b, float sum) { return flushed(bits_of(__builtin_fmaf(flushed(a), flushed(b), sum))); }

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;  // of the one shape that csrc/cpu/tiles.h configures
struct TileUnit {
  bool configured = false;
  uint32_t at[kTiles][kRows][kRowBytes / 4];
};
inline thread_local TileUnit tile_unit;

inline void check(bool ok, const char* what) {  // where the processor would raise a fault
  if (ok) return;
  fprintf(stderr, "emulated tiles: %s\n", what);
  abort();
}
inline auto& tile(int t) {
  check(tile_unit.configured, "used while no configuration is loaded");
  return tile_unit.at[t];
}
inline void tile_loadconfig(const void* p) {
  uint8_t bytes[64];
  memcpy(bytes, p, sizeof bytes);
  check(bytes[0] == 1 && bytes[1] == 0, "palette 1 from row 0 on is what is emulated");
  for (int t = 0; t < kTiles; t++)
    check(bytes[48 + t] == kRows && bytes[16 + 2 * t] == kRowBytes && bytes[17 + 2 * t] == 0, "whole tiles are what is emulated");
  memset(tile_unit.at, 0, sizeof tile_unit.at);
  tile_unit.configured = true;
}
inline void tile_release() { tile_unit.configured = false; }
inline void tile_zero(int t) { memset(tile(t), 0, sizeof tile(t)); }
inline void tile_loadd(int t, const void* p, int64_t stride) {
  for (int i = 0; i < kRows; i++) memcpy(tile(t)[i], static_cast<const char*>(p) + i * stride, kRowBytes);
}
inline void tile_stored(int t, void* p, int64_t stride) {
  for (int i = 0; i < kRows; i++) memcpy(static_cast<char*>(p) + i * stride, tile(t)[i], kRowBytes);
}
// tdpbf16ps: the even elements' products and the odd ones' are summed apart from each other, each from zero; their sum is added to c. The bits are
// those of a Xeon (Sapphire Rapids).
inline void tile_dpbf16ps(int c, int a, int b) {
  for (int m = 0; m < kRows; m++)
    for (int n = 0; n < kRowBytes / 4; n++) {
      float even = 0, odd = 0;
      for (int k = 0; k < kRowBytes / 4; k++) {
        const uint32_t x = tile(a)[m][k], w = tile(b)[k][n];
        even = multiply_add(x << 16, w << 16, even);
        odd = multiply_add(x & 0xffff0000, w & 0xffff0000, odd);
      }
      tile(c)[m][n] = bits_of(flushed(bits_of(flushed(tile(c)[m][n]) + flushed(bits_of(even + odd)))));
    }
}
}  // namespace emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(p) emulated::tile_loadconfig(p)
#define _tile_release() emulated::tile_release()
#define _tile_zero(t) emulated::tile_zero(t)
#define _tile_loadd(t, p, stride) emulated::tile_loadd(t, p, stride)
#define _tile_stream_loadd(t, p, stride) emulated::tile_loadd(t, p, stride)
#define _tile_stored(t, p, stride) emulated::tile_stored(t, p, stride)
#define _tile_dpbf16ps(c, a, b) emulated::tile_dpbf16ps(c, a, b)
