// The panel form in bf16 on tiles (tiles.h). Many rows: W is packed, as in panel.h. Few: x is, and W's rows are loaded in place, streamed once.
//
//   out[m, n] = alpha * (sum_k x[m, k] W(k, n) + keep_scale * keep(m, n) * sum_r h[m, r] B(r, n)) + bias[n]
//
// Either way an output is the same sum: its rank term, then k in ascending steps of STEP_K. Nothing is prefetched where W's
// rows are tiles in place: the hardware does better alone.
#pragma once
#include "panel.h"
#include "tiles.h"

namespace {
constexpr int64_t TILE_KC = 1280;    // lanes along k of one packed block
constexpr int64_t TILE_STRIP = 320;  // the part of them whose rows stay in the L1 while all columns pass
constexpr int64_t TILE_PANELS = 4;   // panels packed together: 1.25 MiB of L2
// Of a K that goes in one block more of them, up to 1 MiB, so that x passes once for all of them. With this, sums that leave beside the next products
// and h made on the way 576 x 576, M 2048 takes 0.94 and 1.00 of the frozen layer instead of 1.28 and 1.32 (two threads, `lora-kernels bench`).
constexpr int64_t MOST_PANELS = 16, PACKED_LANES = 4096;
constexpr int64_t FEW = 64, MORE = 256;  // most rows for which x is packed instead of W
constexpr int64_t FEW_PANELS = 16;       // panels of one call then: x is packed once for 1024 rows of W
constexpr int64_t FEW_OF_ONE = 4;        // rows of one adapter that take its B in place
// Up to so many rows packing W is a matter of fetching it: longer pieces of its rows, in shallower blocks. dx of M 8, 2048 x 2048 takes 1537 us
// instead of 1592 (benchmarks/cpu_kernels.cpp).
constexpr int64_t STREAM_ROWS = 128, STREAM_KC = 128, STREAM_PANELS = 8;
constexpr int64_t SHARED_ROWS = 512;    // so many rows pay for packing panels that another thread has packed, too
constexpr int64_t SHRINK_RANKS = 64;    // most ranks of an h that is made while x passes
constexpr int64_t TILE_ROWS = 2016;     // rows of one call
constexpr int64_t TILE_SUM_ROWS = 768;  // the same where the sums of all rows wait for the next block of k

// What packing costs: x M K, W N K. Sums of W's rows are turned before they are stored, which pays for more rows only where W is much larger.
LK_INLINE bool few_rows(const lk::PanelArgs& a) {
  const bool fewer = a.M <= FEW ? a.M <= a.N : a.M <= MORE && a.M * 8 <= a.N;
  return a.nt && fewer && !a.x_keep.p && !a.out_keep.p && !a.out_t;
}

LK_INLINE int64_t most_lanes(const lk::PanelArgs& a, bool few) { return !few && a.M <= STREAM_ROWS ? STREAM_KC : TILE_KC; }

// Even blocks, so that the last is no sliver.
LK_INLINE int64_t tile_depth(const lk::PanelArgs& a, bool few) {
  const int64_t KD = ceil_div(a.K, 2), blocks = ceil_div(KD, most_lanes(a, few));
  return blocks > 1 ? tile_up(ceil_div(KD, blocks)) : tile_up(KD);
}

// Panels packed together, even shares of all.
LK_INLINE int64_t most_panels(const lk::PanelArgs& a, bool few) {
  if (!few && a.M <= STREAM_ROWS) return STREAM_PANELS;
  const int64_t all = ceil_div(a.N, NP), lanes = tile_depth(a, few) + tile_up(ceil_div(a.R, 2));  // no lanes: of a batch without rows dA has none
  const bool more = !few && a.M >= SHARED_ROWS && ceil_div(a.K, 2) <= TILE_KC && !a.out_t && !a.segments;
  const int64_t most = more ? max(min(PACKED_LANES / max(lanes, 1), MOST_PANELS), TILE_PANELS) : TILE_PANELS;
  return all > most ? ceil_div(all, ceil_div(all, most)) : most;
}

lk::PanelBlock tile_panel_block(const lk::PanelArgs& a) {
  const bool few = few_rows(a), once = ceil_div(a.K, 2) <= most_lanes(a, few);
  return {once ? TILE_ROWS : TILE_SUM_ROWS, few && once ? FEW_PANELS : most_panels(a, few), BLOCK, few ? 0 : SHARED_ROWS};
}

// A call's workspace: sized and laid out by one function.
struct TileSpace {
  float *packed, *rank, *sums, *turned, *segment, *segment_sums, *shrink, *shrink_sums;
  bf16 *rows, *rank_rows, *segment_h;
  int64_t few_columns, floats = 0;
  TileSpace(const lk::PanelArgs& a, bool few, int64_t m_rows, float* ws) : few_columns(ceil_div(min(m_rows, MORE), BLOCK) * BLOCK) {
    const int64_t KD = tile_up(ceil_div(a.K, 2)), most = most_lanes(a, few), depth = min(KD, most), RD = tile_up(ceil_div(a.R, 2));
    const int64_t waiting = (a.M <= STREAM_ROWS ? STREAM_PANELS : TILE_PANELS) * NP, at_once = MOST_PANELS * NP * BLOCK;
    const auto take = [&](int64_t n) {
      float* p = ws ? ws + floats : nullptr;
      floats += (n + TILE - 1) / TILE * TILE;
      return p;
    };
    packed = take(few ? depth * few_columns : min(depth * MOST_PANELS, TILE_KC * TILE_PANELS) * NP);  // no less for a larger K
    rank = take(RD * (few ? few_columns : MOST_PANELS * NP));
    const bool wait = KD > most || a.out_t || a.segments || a.segment_R;
    sums = take(few ? (KD > most ? TILE_PANELS : 1) * NP * few_columns : wait ? max((m_rows + BLOCK) * waiting, at_once) : at_once);
    static_assert(FEW * FEW_PANELS >= MORE);
    turned = take(few ? (a.segment_R ? FEW * FEW_PANELS : few_columns) * NP : 0);
    segment = take(tile_up(ceil_div(a.segment_R, 2)) * NP);
    segment_sums = take(a.segment_R ? BLOCK * NP : 0);
    segment_h = reinterpret_cast<bf16*>(take(tile_up(ceil_div(a.segment_R, 2)) * BLOCK));
    shrink = take(a.shrink.a.p ? depth * ceil_div(a.R, BLOCK) * BLOCK : 0);
    shrink_sums = take(a.shrink.a.p ? BLOCK * BLOCK : 0);
    rows = reinterpret_cast<bf16*>(take(depth * BLOCK));
    rank_rows = reinterpret_cast<bf16*>(take(RD * BLOCK));
  }
};

// Up to FEW_OF_ONE rows of a segment: B's rows are tiles' rows in place, h is packed, and a row of the result is a column of the sums.
LK_INLINE void add_few(const lk::PanelArgs& a, int64_t at, int64_t first, int64_t last, int64_t n0, int64_t cols, int64_t m0, const TileSpace& space,
                       Tile C) {
  const lk::Segment& s = a.segments[at];
  const bf16* b = static_cast<const bf16*>(s.adapter.b) + n0 * a.b.ld;
  const int64_t R = s.adapter.R, depth = tile_up(ceil_div(R, 2));
  for (int64_t k = 0; k < depth; k++) store(space.segment + k * TILE, zero());
  for (int64_t i = first; i < last; i++) {
    const bf16* h = static_cast<const bf16*>(a.h.p) + s.rows[i] * a.h.ld;
    bf16* to = reinterpret_cast<bf16*>(space.segment) + (i - first) * 2;
    for (int64_t r = 0; r < R; r++) to[r / 2 * 2 * TILE + r % 2] = h[r];
  }
  const __m512i down = _mm512_mullo_epi32(_mm512_set1_epi32(TILE), _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
  for (int64_t j = 0; j < cols; j += BLOCK) {
    const int64_t width = min(cols - j, BLOCK);
    fetch_segment<bf16>(a, at + 1, n0 + j, width);
    const TileRows rows = tile_rows(b + j * a.b.ld, a.b.ld, width, R, space.segment_h);
    tile_block_of(width, TILE, {}, {rows, space.segment, depth, depth / TILE}, {}, {space.segment_sums, TILE}, false);
    for (int64_t i = first; i < last; i++)
      for (int64_t n = 0; n < width; n += L) {
        float* c = C.p + (s.rows[i] - m0) * C.ld + j + n;
        store(c, add(load(c), _mm512_i32gather_ps(down, space.segment_sums + n * TILE + (i - first), 4)));
      }
  }
}

// Rows `first` .. `last` of a segment, up to BLOCK: their h gathered, C's rows += h B.
LK_INLINE void add_block(const lk::PanelArgs& a, const lk::Segment& s, int64_t first, int64_t last, int64_t cols, int64_t m0, const TileSpace& space,
                         Tile C) {
  const int64_t R = s.adapter.R, depth = tile_up(ceil_div(R, 2));
  for (int64_t i = first; i < last; i++) {
    const bf16* h = static_cast<const bf16*>(a.h.p) + s.rows[i] * a.h.ld;
    for (int64_t r = 0; r < R; r += STEP_K)
      _mm512_storeu_si512(space.segment_h + r * BLOCK + (i - first) * STEP_K, _mm512_maskz_loadu_epi16(first32(R - r), h + r));
  }
  const TileRows rows = {space.segment_h, STEP_K, COPIED_STEP};
  for (int64_t j = 0; j < cols; j += BLOCK)
    tile_block_of(last - first, min(cols - j, BLOCK), {}, {rows, space.segment + j * depth, depth, depth / TILE}, {}, {space.segment_sums + j, NP},
                  false);
  for (int64_t i = first; i < last; i++) {
    float* c = C.p + (s.rows[i] - m0) * C.ld;
    for (int64_t j = 0; j < cols; j += L) store(c + j, add(load(c + j), load(space.segment_sums + (i - first) * NP + j)));
  }
}

// The rank terms of many adapters, onto the finished base in C: an adapter's B is read along all columns of the call.
LK_INLINE void add_tile_segments(const lk::PanelArgs& a, int64_t n, int64_t cols, int64_t m0, int64_t m1, const TileSpace& space, Tile C) {
  for (int64_t i = 0; i < a.segment_count; i++) {
    const lk::Segment& s = a.segments[i];
    const int64_t R = s.adapter.R, depth = tile_up(ceil_div(R, 2));
    int64_t first = 0, last = s.count;
    while (first < last && s.rows[first] < m0) first++;
    while (first < last && s.rows[last - 1] >= m1) last--;
    if (!R || first == last) continue;
    const bf16* b = static_cast<const bf16*>(s.adapter.b) + n * a.b.ld;
    if (last - first <= FEW_OF_ONE) {
      add_few(a, i, first, last, n, cols, m0, space, C);
      continue;
    }
    for (int64_t j = 0; j < cols; j += NP) {
      const int64_t width = min(cols - j, NP);
      fetch_segment<bf16>(a, i + 1, n + j, width);
      pack_nt<bf16, 1>(b + j * a.b.ld, a.b.ld, width, 0, ceil_div(R, 2), R, space.segment, depth);
      pad_lanes(space.segment, width, ceil_div(R, 2), depth);
      for (int64_t r = first; r < last; r += BLOCK) add_block(a, s, r, min(r + BLOCK, last), width, m0, space, {C.p + j, C.ld});
    }
  }
}

// A block's finished sums on their way to out: some rows with every step of the next block's products, for whose end the unit would wait otherwise.
template <class OT>
struct Leaving {
  const lk::PanelArgs* a;
  int64_t n, cols, m, rows, share;  // what is left of a block; rows of a step
  Tile c;
  LK_INLINE void step(Leaving& l) {
    if (l.rows > 0) l.store(min(l.share, l.rows));
  }
  void all() {
    if (rows > 0) store(rows);
  }
  void spread(int64_t steps) { share = steps ? ceil_div(rows, steps) : (all(), 0); }
  void store(int64_t count) {
    store_rows<bf16, OT>(*a, n, cols, m, count, c);
    m += count, rows -= count, c.p += count * c.ld;
  }
};

// W or one like it, [columns, K] or, not `nt`, [K, columns], as the columns' operand: lanes k0 .. k1.
LK_INLINE void pack_columns(bool nt, lk::In w, int64_t cols, int64_t k0, int64_t k1, int64_t K, float* dst, int64_t depth, lk::Mask keep = {},
                            int64_t n = 0) {
  const bf16* p = static_cast<const bf16*>(w.p);
  nt ? pack_nt<bf16, 1>(p, w.ld, cols, k0, k1, K, dst, depth) : pack_tile_rows(p, w.ld, cols, k0, k1, K, dst, depth, keep, n);
  pad_lanes(dst, cols, k1 - k0, depth);
}

// h of some rows from m on: copied, as the rows' operand of the rank term, and, when `kept`, to where it shall lie.
LK_INLINE TileRows shrink_block(const lk::PanelArgs& a, int64_t m, int64_t rows, int64_t depth, const TileSpace& s, bool kept) {
  const lk::Shrink& to = a.shrink;
  const TileRows x = tile_rows(static_cast<const bf16*>(a.x.p) + m * a.x.ld, a.x.ld, rows, a.K, s.rows, to.keep, m, 0);
  const V alpha = set1(to.alpha);
  for (int64_t r = 0; r < a.R; r += BLOCK) {
    const int64_t cols = min(a.R - r, BLOCK);
    tile_block_of(rows, cols, {}, {x, s.shrink + r * depth, depth, depth / TILE}, {}, {s.shrink_sums, BLOCK}, false);
    for (int64_t i = 0; i < rows; i++) {
      const float* c = s.shrink_sums + i * BLOCK;
      const V low = fma(load(c), alpha, zero()), high = cols > L ? fma(load(c + L), alpha, zero()) : zero();
      const __m512i h = _mm512_maskz_mov_epi16(first32(cols), (__m512i)_mm512_cvtne2ps_pbh(high, low));
      _mm512_storeu_si512(s.rank_rows + r * BLOCK + i * STEP_K, h);
      if (kept) _mm512_mask_storeu_epi16(static_cast<bf16*>(to.h.p) + (m + i) * to.h.ld + r, first32(cols), h);
    }
  }
  return {s.rank_rows, STEP_K, COPIED_STEP};
}

template <class OT>
void tile_panel_many(const lk::PanelArgs& a, int64_t p0, int64_t p1, int64_t m0, int64_t m1, float* ws) {
  const TileSpace s(a, false, m1 - m0, ws);
  const int64_t n = p0 * NP, cols = min(a.N, p1 * NP) - n, ldc = (p1 - p0) * NP, KD = ceil_div(a.K, 2), RD = ceil_div(a.R, 2);
  const int64_t deepest = tile_depth(a, false), rank_depth = tile_up(RD);
  const auto from = [&](lk::In w) { return lk::In{static_cast<const bf16*>(w.p) + (a.nt ? n * w.ld : n), w.ld}; };
  if (a.R) pack_columns(a.nt, from(a.b), cols, 0, RD, a.R, s.rank, rank_depth);
  const bool shrinks = a.R && a.shrink.a.p;
  if (shrinks) pack_columns(a.nt, a.shrink.a, a.R, 0, KD, a.K, s.shrink, tile_up(KD));
  const bool whole = KD > deepest || a.out_t || a.segments;
  Leaving<OT> leaving{&a, 0, 0, 0, 0, 0, {}};
  int64_t k0 = 0;
  do {  // once even for K = 0: the rank term and the bias remain
    const int64_t k1 = min(k0 + deepest, KD), depth = tile_up(k1 - k0), K = min((k1 - k0) * 2, a.K - k0 * 2);
    const bool last = k1 == KD, rank = a.R && k0 == 0;
    pack_columns(a.nt, from(a.w), cols, k0, k1, a.K, s.packed, depth, a.w_keep, n);
    const int64_t strips = ceil_div(depth, TILE_STRIP), strip = strips > 1 ? tile_up(ceil_div(depth, strips)) : depth;
    for (int64_t m = m0; m < m1; m += BLOCK) {
      const int64_t rows = min(m1 - m, BLOCK);
      TileRows h{};
      if (rank && shrinks)
        h = shrink_block(a, m, rows, depth, s, p0 == 0);
      else if (rank)
        h = tile_rows(static_cast<const bf16*>(a.h.p) + m * a.h.ld, a.h.ld, rows, a.R, s.rank_rows);
      int64_t s0 = 0;
      do {
        const int64_t s1 = min(s0 + strip, depth), k = (k0 + s0) * 2;
        const TileRows x =
            tile_rows(static_cast<const bf16*>(a.x.p) + m * a.x.ld + k, a.x.ld, rows, min((s1 - s0) * 2, K - s0 * 2), s.rows, a.x_keep, m, k);
        for (int64_t j = 0; j < cols; j += BLOCK) {
          // finished sums leave soon, so one place that stays in the cache does
          const Tile c = whole ? Tile{s.sums + (m - m0) * ldc + j, ldc} : Tile{s.sums + (strips > 1 ? j * BLOCK : 0), BLOCK};
          const TileStrip rank_strip = {h, s.rank + j * rank_depth, rank_depth, rank && s0 == 0 ? rank_depth / TILE : 0};
          const TileStrip base_strip = {x, s.packed + j * depth + s0 * TILE, depth, (s1 - s0) / TILE};
          leaving.spread(rank_strip.steps && a.out_keep.p ? 0 : base_strip.steps);  // for the mask sums are put where these are
          tile_block_of(rows, min(cols - j, BLOCK), rank_strip, base_strip, {a.out_keep, a.keep_scale, m, n + j, rows}, c, k > 0, leaving);
          if (last && s1 == depth && !a.out_t && !a.segments) leaving = {&a, n + j, min(cols - j, BLOCK), m, rows, 0, c};
        }
        s0 += strip;
      } while (s0 < depth);
    }
    if (last && a.segments) {
      add_tile_segments(a, n, cols, m0, m1, s, {s.sums, ldc});
      store_rows<bf16, OT>(a, n, cols, m0, m1 - m0, {s.sums, ldc});
    }
    if (last && a.out_t) store_transposed<OT>(a, n, cols, m0, m1, {s.sums, ldc});
    k0 += deepest;
  } while (k0 < KD);
  leaving.all();
}

// to [rows, columns] <- from [columns, ld], whole tiles
LK_INLINE void turn(const float* from, int64_t ld, int64_t rows, int64_t cols, Tile to) {
  for (int64_t m = 0; m < rows; m += L)
    for (int64_t j = 0; j < cols; j += L) {
      V r[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; i++) r[i] = load(from + (j + i) * ld + m);
      transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < L; i++) store(to.p + (m + i) * to.ld + j, r[i]);
    }
}

template <class OT>
void tile_panel_few(const lk::PanelArgs& a, int64_t p0, int64_t p1, int64_t m0, int64_t m1, float* ws) {
  const TileSpace s(a, true, m1 - m0, ws);
  const int64_t n0 = p0 * NP, n1 = min(a.N, p1 * NP), M = m1 - m0, KD = ceil_div(a.K, 2), RD = ceil_div(a.R, 2);
  const int64_t deepest = tile_depth(a, true), rank_depth = tile_up(RD), ldc = s.few_columns;
  // Sums of all columns wait for their adapters, so that a B is read in one go: 64 rows of 64 adapters of R 64, 576 x 576, take 686 us instead of 782
  // (benchmarks/cpu_kernels.cpp many). Of more rows they would not fit the L2.
  const bool wait = a.segment_R && a.M <= FEW;
  const int64_t ldt = wait ? (p1 - p0) * NP : NP;
  const auto finish_columns = [&](int64_t n, int64_t cols, Tile c) {
    add_tile_segments(a, n, cols, m0, m1, s, c);
    store_rows<bf16, OT>(a, n, cols, m0, M, c);
  };
  if (a.R) {
    pack_nt<bf16, 1>(static_cast<const bf16*>(a.h.p) + m0 * a.h.ld, a.h.ld, M, 0, RD, a.R, s.rank, rank_depth);
    pad_lanes(s.rank, M, RD, rank_depth);
  }
  int64_t k0 = 0;
  do {
    const int64_t k1 = min(k0 + deepest, KD), depth = tile_up(k1 - k0), K = min((k1 - k0) * 2, a.K - k0 * 2);
    const bool last = k1 == KD, rank = a.R && k0 == 0;
    pack_few(static_cast<const bf16*>(a.x.p) + m0 * a.x.ld, a.x.ld, M, k0, k1, a.K, s.packed, depth);
    pad_lanes(s.packed, M, k1 - k0, depth);
    for (int64_t n = n0; n < n1; n += BLOCK) {
      const int64_t rows = min(n1 - n, BLOCK), panel = n / NP * NP, done = min(n1 - panel, NP);
      const bf16* w = static_cast<const bf16*>(a.w.p) + n * a.w.ld + k0 * 2;
      const TileRows weights = tile_rows(w, a.w.ld, rows, K, s.rows);
      TileRows b{};
      if (rank) b = tile_rows(static_cast<const bf16*>(a.b.p) + n * a.b.ld, a.b.ld, rows, a.R, s.rank_rows);
      float* sums = s.sums + (KD > deepest ? panel - n0 : 0) * ldc;
      for (int64_t j = 0; j < M; j += BLOCK) {
        const TileStrip rank_strip = {b, s.rank + j * rank_depth, rank_depth, rank ? rank_depth / TILE : 0},
                        base_strip = {weights, s.packed + j * depth, depth, depth / TILE};
        tile_block_of(rows, min(M - j, BLOCK), rank_strip, base_strip, {}, {sums + (n - panel) * ldc + j, ldc}, k0 > 0);
      }
      if (last && n + rows == panel + done) {
        const Tile turned = {s.turned + (wait ? panel - n0 : 0), ldt};
        turn(sums, ldc, M, done, turned);
        if (!wait) finish_columns(panel, done, turned);
      }
    }
    if (last && wait) finish_columns(n0, n1 - n0, {s.turned, ldt});
    k0 += deepest;
  } while (k0 < KD);
}

template <class OT>
void tile_panel(const lk::PanelArgs& a, int64_t p0, int64_t p1, int64_t m0, int64_t m1, float* ws) {
  const Tiles unit;
  few_rows(a) ? tile_panel_few<OT>(a, p0, p1, m0, m1, ws) : tile_panel_many<OT>(a, p0, p1, m0, m1, ws);
}

// The engine's entries: bf16 by tiles, the other types as everywhere.
int64_t panel_floats_tiles(lk::Dtype t, const lk::PanelArgs& a, int64_t rows) {
  if (t != lk::kBF16) return panel_floats(t, a, rows);
  lk::PanelArgs streamed = a;  // a product of fewer rows takes more panels at once
  streamed.M = min(a.M, STREAM_ROWS);
  const int64_t few = TileSpace(a, true, rows, nullptr).floats, many = TileSpace(a, false, rows, nullptr).floats;
  return max(max(few, many), TileSpace(streamed, false, min(rows, STREAM_ROWS), nullptr).floats);
}
// In one block of k, and where few calls share a row: each makes its h anew.
bool shrinks_tiles(lk::Dtype t, const lk::PanelArgs& a, int threads) {
  if (t != lk::kBF16) return shrinks(t, a, threads);
  return a.M >= SHARED_ROWS * threads && ceil_div(a.K, 2) <= TILE_KC && a.R <= SHRINK_RANKS && a.N <= 2 * most_panels(a, false) * NP;
}
int64_t shrink_rows_tiles(lk::Dtype t, bool masked) { return t == lk::kBF16 ? lk::kAnyRows : shrink_rows(t, masked); }
lk::PanelBlock panel_block_tiles(lk::Dtype t, const lk::PanelArgs& a) { return t == lk::kBF16 ? tile_panel_block(a) : panel_block(t, a); }
void panel_tiles(lk::Dtype t, const lk::PanelArgs& a, int64_t p0, int64_t p1, int64_t m0, int64_t m1, float* ws) {
  if (t != lk::kBF16) return panel(t, a, p0, p1, m0, m1, ws);
  if (m0 >= m1) return;
  a.out_f32 ? tile_panel<float>(a, p0, p1, m0, m1, ws) : tile_panel<bf16>(a, p0, p1, m0, m1, ws);
}
}  // namespace
