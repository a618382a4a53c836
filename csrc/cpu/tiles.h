// Tiles of the AMX unit, 16 rows of 64 bytes: up to two by two products at a time, summed in fp32 in the unit's own registers.
//
//   c[i][j] [16, 16] += a[i] [16, 32] b[j] [32, 16]      a: rows of 32 bf16; b: 16 lanes of 16 columns, a pair of k in each, as pack.h lays them
//
// The unit sums a step's even and its odd products apart, from zero, and adds both to c; denormals are zeros to it, as to vdpbf16ps.
//
// One tile lets 2 KiB of operands make 16384 multiply-adds in 16 cycles; two by two are loaded in half the time in which they are multiplied.
#pragma once
#include "micro.h"

namespace {
constexpr int64_t TILE = 16;                     // rows and columns of sums; lanes of one step along k
constexpr int64_t STEP_K = 32;                   // elements of one step
constexpr int64_t BLOCK = 2 * TILE;              // rows and columns of one block of sums
constexpr int64_t COPIED_STEP = BLOCK * STEP_K;  // elements of one step of a copied operand

constexpr int64_t AHEAD_LANES = 3 * TILE;

LK_INLINE int64_t tile_up(int64_t a) { return (a + TILE - 1) / TILE * TILE; }

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, zero[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// The unit is ours while this lives. Released at the end: a context switch would save 8 KiB of it.
struct Tiles {
  Tiles() {
    static constexpr TileShapes shapes;  // static: gcc takes the load for one of 8 bytes and drops what is stored behind them
    _tile_loadconfig(&shapes);
  }
  ~Tiles() { _tile_release(); }
};
// gcc's tile loads are assembly that does not tell which memory it reads: what was stored before must be there.
LK_INLINE void stored() { asm volatile("" ::: "memory"); }

// The rows' operand of a product: in place, or copied to [step][BLOCK][STEP_K] with zeros past K.
struct TileRows {
  const bf16* p;
  int64_t ld, step;  // elements
};

// keep: of row m and element k on; one of its words is one step's bits.
LK_INLINE TileRows tile_rows(const bf16* p, int64_t ld, int64_t rows, int64_t K, bf16* to, lk::Mask keep = {}, int64_t m = 0, int64_t k0 = 0) {
  if (!keep.p && rows % TILE == 0 && K % STEP_K == 0) return {p, ld, STEP_K};
  for (int64_t k = 0; k < K; k += STEP_K) {
    const __mmask32 there = first32(K - k);
    const bf16* from = p + k;
    bf16* copy = to + k * BLOCK;
    for (int64_t i = 0; i < rows; i++, from += ld, copy += STEP_K)
      _mm512_storeu_si512(copy, _mm512_maskz_loadu_epi16(keep.p ? there & keep_bits(keep, m + i, k0 + k) : there, from));
  }
  return {to, STEP_K, COPIED_STEP};
}

// The columns' operand of a product, packed tile by tile along k: [columns / TILE][depth][TILE], depth whole tiles with zeros past `lanes`.
LK_INLINE void pad_lanes(float* packed, int64_t cols, int64_t lanes, int64_t depth) {
  for (int64_t c = 0; c * TILE < cols; c++)
    for (int64_t k = lanes; k < depth; k++) store(packed + (c * depth + k) * TILE, zero());
}

// Rows as columns: [rows, k] by pack_nt; a single one without its transpose of 15 rows of zeros.
LK_INLINE void pack_few(const bf16* x, int64_t ld, int64_t rows, int64_t k0, int64_t k1, int64_t K, float* dst, int64_t depth) {
  if (rows > 1) return pack_nt<bf16, 1>(x, ld, rows, k0, k1, K, dst, depth);
  for (int64_t k = k0; k < k1; k += TILE) {
    const __m512i v = _mm512_maskz_loadu_epi16(first32(K - k * 2), x + k * 2);
    float* d = dst + (k - k0) * TILE;
    for (int i = 0; i < min(k1 - k, TILE); i++) _mm512_storeu_si512(d + i * TILE, _mm512_maskz_permutexvar_epi32(1, _mm512_set1_epi32(i), v));
  }
}

// The same from w[k, n] along its rows, tile by tile: lane by lane every column's tiles, multiples of 4 KiB apart, would share a few lines of the L1.
// Rows that come from memory are asked for in time: dx of M 64, 576 x 576 takes 108 us instead of 131 (benchmarks/cpu_kernels.cpp).
LK_INLINE void pack_tile_rows(const bf16* w, int64_t ld, int64_t cols, int64_t k0, int64_t k1, int64_t K, float* dst, int64_t depth,
                              lk::Mask keep = {}, int64_t n = 0) {
  for (int64_t t = k0; t < k1; t += TILE)
    for (int64_t c = 0; c < cols; c += BLOCK)
      for (int64_t k = t; k < min(t + TILE, k1); k++) {
        prefetch(w + (k + AHEAD_LANES) * 2 * ld + c);
        prefetch(w + ((k + AHEAD_LANES) * 2 + 1) * ld + c);
        V v[2];
        lane_of_rows(w, ld, cols, k, K, c, keep, n, v);
        store(dst + (c / TILE * depth + k - k0) * TILE, v[0]);
        store(dst + ((c / TILE + 1) * depth + k - k0) * TILE, v[1]);
      }
}

// One strip of k of a block of sums: `steps` tiles of the rows' operand and of the packed columns.
struct TileStrip {
  TileRows rows;
  const float* cols;
  int64_t depth, steps;  // lanes of the packed columns; tiles of this strip
};

struct Nothing {  // to do beside the products
  LK_INLINE void step(Nothing&) {}
};

// The packed columns go past the L1, where the rows stay for the columns to come: 576 x 576, M 1024 takes 572 us instead of 746
// (benchmarks/cpu_kernels.cpp, warm). A step of `beside` goes with every step of k.
template <int MT, int NT, class Beside>
LK_INLINE void multiply(const TileStrip& s, Beside& beside) {
  const int64_t ld = s.rows.ld * 2, step = s.rows.step * 2, below = TILE * ld;
  const char *a = reinterpret_cast<const char*>(s.rows.p), *b = reinterpret_cast<const char*>(s.cols), *right = b + s.depth * 64;
  for (int64_t k = 0; k < s.steps; k++, a += step, b += 1024, right += 1024) {
    _tile_loadd(4, a, ld);
    _tile_stream_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (NT == 2) {
      _tile_stream_loadd(7, right, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    Beside::step(beside);
    if constexpr (MT == 2) {
      _tile_loadd(5, a + below, ld);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (NT == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
}

template <int MT, int NT>
LK_INLINE void clear_sums() {
  _tile_zero(0);
  if constexpr (NT == 2) _tile_zero(1);
  if constexpr (MT == 2) _tile_zero(2);
  if constexpr (MT == 2 && NT == 2) _tile_zero(3);
}
template <int MT, int NT>
LK_INLINE void get_sums(Tile c) {
  stored();
  _tile_loadd(0, c.p, c.ld * 4);
  if constexpr (NT == 2) _tile_loadd(1, c.p + TILE, c.ld * 4);
  if constexpr (MT == 2) _tile_loadd(2, c.p + TILE * c.ld, c.ld * 4);
  if constexpr (MT == 2 && NT == 2) _tile_loadd(3, c.p + TILE * c.ld + TILE, c.ld * 4);
}
template <int MT, int NT>
LK_INLINE void put_sums(Tile c) {
  _tile_stored(0, c.p, c.ld * 4);
  if constexpr (NT == 2) _tile_stored(1, c.p + TILE, c.ld * 4);
  if constexpr (MT == 2) _tile_stored(2, c.p + TILE * c.ld, c.ld * 4);
  if constexpr (MT == 2 && NT == 2) _tile_stored(3, c.p + TILE * c.ld + TILE, c.ld * 4);
}

// The rank term's dropout mask: on sums of rows m.. and columns n.. before the base joins them.
struct TileKeep {
  lk::Mask keep;
  float scale;
  int64_t m, n, rows;
};

template <int MT, int NT, class Beside>
void tile_block(const TileStrip& rank, const TileStrip& base, const TileKeep& keep, Tile c, bool more, Beside& beside) {
  Nothing nothing;
  stored();
  if (more)
    get_sums<MT, NT>(c);
  else
    clear_sums<MT, NT>();
  if (rank.steps) {
    multiply<MT, NT>(rank, nothing);
    if (keep.keep.p) {
      put_sums<MT, NT>(c);
      for (int64_t i = 0; i < keep.rows; i++)
        for (int64_t j = 0; j < NT * TILE; j += L)
          store(c.p + i * c.ld + j, ::keep(mul(load(c.p + i * c.ld + j), set1(keep.scale)), keep_bits(keep.keep, keep.m + i, keep.n + j)));
      get_sums<MT, NT>(c);
    }
  }
  multiply<MT, NT>(base, beside);
  put_sums<MT, NT>(c);
}

// `rows` and `cols` up to BLOCK: what they lack of a tile is computed and not used
template <class Beside>
LK_INLINE void tile_block_of(int64_t rows, int64_t cols, const TileStrip& rank, const TileStrip& base, const TileKeep& keep, Tile c, bool more,
                             Beside& beside) {
  if (rows > TILE)
    cols > TILE ? tile_block<2, 2>(rank, base, keep, c, more, beside) : tile_block<2, 1>(rank, base, keep, c, more, beside);
  else
    cols > TILE ? tile_block<1, 2>(rank, base, keep, c, more, beside) : tile_block<1, 1>(rank, base, keep, c, more, beside);
}
LK_INLINE void tile_block_of(int64_t rows, int64_t cols, const TileStrip& rank, const TileStrip& base, const TileKeep& keep, Tile c, bool more) {
  Nothing nothing;
  tile_block_of(rows, cols, rank, base, keep, c, more, nothing);
}
}  // namespace
