// What this emulator's driver keeps in the 128 opaque bytes of a CUtensorMap.
#pragma once
#include <cstdint>

namespace ptx {

struct TensorMap {
  static constexpr uint32_t kMagic = 0x4C4B544D;
  uint32_t magic;
  uint8_t element, rank;  // bytes of an element; dimensions
  int16_t swizzle;        // bytes of a row of the pattern, 0: none
  uint64_t base;
  uint64_t size[5];    // elements, innermost first
  uint64_t stride[4];  // bytes, of the dimensions above the innermost
  uint16_t box[5];     // elements
};
static_assert(sizeof(TensorMap) <= 128);

// Where the hardware puts the byte of `address` under a swizzle of 32, 64 or 128 bytes: 16-byte chunks exchanged by the address's own bits.
uint32_t swizzled(uint32_t address, int bytes);

}  // namespace ptx
