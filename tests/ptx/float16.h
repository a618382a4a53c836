// bf16 and fp16 against float, rounding to nearest even.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace ptx {

inline uint32_t bits(float v) {
  uint32_t u;
  std::memcpy(&u, &v, 4);
  return u;
}
inline float value(uint32_t u) {
  float v;
  std::memcpy(&v, &u, 4);
  return v;
}

inline float from_bf16(uint16_t h) { return value(uint32_t(h) << 16); }
inline uint16_t to_bf16(float v) {
  const uint32_t u = bits(v);
  if (v != v) return 0x7FFF;
  return uint16_t((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}

inline float from_f16(uint16_t h) {
  const int exponent = h >> 10 & 31, fraction = h & 1023;
  const float v = exponent == 31 ? (fraction ? NAN : INFINITY)
                  : exponent     ? std::ldexp(float(1024 + fraction), exponent - 25)
                                 : std::ldexp(float(fraction), -24);
  return h & 0x8000 ? -v : v;
}
inline uint16_t to_f16(float v) {
  if (v != v) return 0x7FFF;
  const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
  const float a = std::fabs(v);
  if (a >= 65520.0f) return sign | 0x7C00;
  if (a < std::ldexp(1.0f, -24) / 2) return sign;
  int exponent;
  std::frexp(a, &exponent);  // a = f 2^exponent, f in [0.5, 1)
  const int unit = std::max(exponent - 11, -24);
  const int steps = int(std::nearbyint(std::ldexp(a, -unit)));  // at most 2048, which carries into the exponent
  return uint16_t(sign | (((unit + 24) << 10) + steps));
}

}  // namespace ptx
