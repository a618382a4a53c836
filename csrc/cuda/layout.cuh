// Where things lie: swizzle, wgmma descriptors, accumulator fragments. Host and device; tests/test_cuda_scheduler.py checks them against an
// emulation of TMA's and wgmma's documented layouts.
// Source: PTX ISA, "Shared Memory Matrix Layout", "Matrix Descriptor Format", "Register Fragments for wgmma"; TMA swizzle modes.
#pragma once
#include <cstdint>

#include "scheduler.cuh"

namespace lk::cuda {

constexpr int kTileM = 128;               // rows of x per CTA: two consumer warpgroups of 64; GEMM tiles may have twice as many
constexpr int kBlockK = 64;               // one 128-byte row of 16-bit elements: the widest swizzle
constexpr int kRowBytes = kBlockK * 2;    // of a K-major tile
constexpr int kChunk = 64;                // columns of one MN-major box
constexpr int kChunkBytes = 64 * 64 * 2;  // 64 (contraction) x 64 (columns)
constexpr int kTileBytes = kTileM * kRowBytes;
constexpr int kPanelBytes = 64 * kRowBytes;  // 64 x 64 staging of the output

// Byte offset of 16-byte chunk `chunk` (0..7) of row `row` in a tile of 128-byte rows under the 128-byte swizzle: chunk index XOR row % 8.
LK_HD uint32_t swizzled(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

enum class Swizzle : uint64_t { B128 = 1, B64 = 2, B32 = 3 };  // bits 62 and 63 of the descriptor

// address, leading and stride offsets in bytes
LK_HD uint64_t descriptor(uint32_t address, uint32_t leading, uint32_t stride, Swizzle swizzle) {
  return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 | uint64_t(swizzle) << 62;
}

// K-major operand (contraction contiguous): rows of 128 bytes, groups of 8 rows 1024 bytes apart; the leading offset is not used by swizzled K-major.
struct KMajor {
  static constexpr uint32_t step = 32;  // bytes from one k16 step to the next: inside the swizzled row
  LK_HD static uint64_t at(uint32_t address) { return descriptor(address, 16, 1024, Swizzle::B128); }
};

// MN-major operand of COLS columns (columns contiguous): boxes of 64 columns (or COLS, when fewer) x 64 contraction rows, the swizzle as wide as a
// box row. Leading offset: from one box to the next; stride offset: from one group of 8 contraction rows to the next.
template <int COLS>
struct MnMajor {
  static constexpr uint32_t row = (COLS < kChunk ? COLS : kChunk) * 2;
  static constexpr Swizzle swizzle = row == 128 ? Swizzle::B128 : row == 64 ? Swizzle::B64 : Swizzle::B32;
  static constexpr uint32_t step = 16 * row;
  static_assert(row == 128 || row == 64 || row == 32, "a box row is one swizzle width");
  LK_HD static uint64_t at(uint32_t address) { return descriptor(address, kBlockK * row, 8 * row, swizzle); }
};

template <bool MN, int COLS>
struct OperandOf {
  using type = KMajor;
};
template <int COLS>
struct OperandOf<true, COLS> {
  using type = MnMajor<COLS>;
};
template <bool MN, int COLS>
using Operand = typename OperandOf<MN, COLS>::type;

// Accumulator of m64nNk16: thread t of the warpgroup holds rows row(t) and row(t) + 8; d[4 j + {0, 1}] are columns column(t) + 8 j + {0, 1} of the
// first row, d[4 j + {2, 3}] of the second.
LK_HD int fragment_row(int thread) { return thread / 32 * 16 + thread % 32 / 4; }
LK_HD int fragment_column(int thread) { return thread % 4 * 2; }

// Part `i` (64 rows, one wgmma) of the `parts` that warpgroup `w` computes: counted from the top of the tile.
LK_HD int part_of(int w, int parts, int i) { return w * parts + i; }

// stmatrix.x4 of columns 16 j .. 16 j + 15 of a warp's 16 rows (d[8 j .. 8 j + 7]): the row and 16-byte chunk whose address lane t gives.
LK_HD int stmatrix_row(int thread) { return thread / 32 * 16 + (thread & 15); }
LK_HD int stmatrix_chunk(int thread, int j) { return 2 * j + (thread % 32 >> 4); }

}  // namespace lk::cuda
