// The products of the ops, cut into units for the threads. No cut changes a result.
#pragma once
#include <algorithm>

#include "engine.h"
#include "scratch.h"
#include "threads.h"

namespace lk {

inline int64_t size_of(Dtype t) { return t == kF32 ? 4 : 2; }
inline const void* offset(const void* p, Dtype t, int64_t n) { return static_cast<const char*>(p) + n * size_of(t); }
inline void* offset(void* p, Dtype t, int64_t n) { return static_cast<char*>(p) + n * size_of(t); }

constexpr int64_t kSerialWork = 32768;  // multiply-adds below which waking the pool costs more than it gives
inline int threads_for(int64_t work, int threads) { return work < kSerialWork ? 1 : threads; }

// out[:, 0:N] in dot form
inline void dot_product(const Kernels& k, Dtype t, const DotArgs& a, int64_t N, int threads) {
  threads = threads_for(a.M * N * (a.K + a.R), threads);
  if (a.M <= 32 || a.M * 8 < N) {  // over columns
    const int64_t unit = N >= 96 * threads ? 24 : 8;
    parallel((N + unit - 1) / unit, threads, [&](int64_t u0, int64_t u1, int) { k.dot(t, a, u0 * unit, std::min(u1 * unit, N)); });
    return;
  }
  constexpr int64_t kRows = 16;  // over rows: x is streamed, W (a thin matrix) stays in cache
  parallel((a.M + kRows - 1) / kRows, threads, [&](int64_t u0, int64_t u1, int) {
    for (int64_t m = u0 * kRows; m < std::min(u1 * kRows, a.M); m += kRows) {
      DotArgs part = a;
      part.M = std::min(kRows, a.M - m);
      part.x.p = offset(a.x.p, t, m * a.x.ld);
      part.h.p = a.h.p ? offset(a.h.p, t, m * a.h.ld) : nullptr;
      part.rows = a.rows ? a.rows + m : nullptr;
      part.keep.p = a.keep.p ? a.keep.p + m * a.keep.ld : nullptr;
      part.out.p = offset(a.out.p, t, m * a.out.ld);
      k.dot(t, part, 0, N);
    }
  });
}

// How panels are dealt: groups of `width` panels times `chunks` blocks of `rows` rows.
struct Deal {
  int64_t width, groups, chunks, rows;
  Deal(const PanelArgs& a, const PanelBlock& block, int threads) {
    constexpr int64_t kFewestRows = 24;  // fewer rows do not pay for packing
    const int64_t panels = (a.N + kPanel - 1) / kPanel;
    width = block.shared_rows && threads > 1 && a.M >= block.shared_rows * threads ? block.panels : 1;
    groups = (panels + width - 1) / width;
    chunks = (a.M + block.rows - 1) / block.rows;
    const int64_t shares = threads == 2 ? 2 : std::max<int64_t>(8, threads / groups);
    if (width > 1 && panels % (width * threads)) chunks = (std::max<int64_t>(chunks, threads) + threads - 1) / threads * threads;
    if (width == 1 && threads > 1 && panels % threads) chunks = std::max(chunks, std::min<int64_t>(shares, a.M / kFewestRows));
    chunks = std::max<int64_t>(chunks, 1);
    rows = ((a.M + chunks - 1) / chunks + block.row_tile - 1) / block.row_tile * block.row_tile;
    chunks = std::max<int64_t>((a.M + rows - 1) / rows, 1);
  }
  int64_t units() const { return groups * chunks; }
  // units that a thread takes together
  int64_t grain(const PanelBlock& block) const { return width > 1 ? 1 : chunks * block.panels; }
};

// units u0..u1 of one product: whole panels together where a call takes several, else neighbouring chunks of one panel, so that it is packed once
inline void panel_units(const Kernels& k, Dtype t, const PanelArgs& a, const PanelBlock& block, const Deal& d, int64_t u0, int64_t u1, float* ws) {
  for (; d.width > 1 && u0 < u1; u0++) {  // a chunk's groups follow each other
    const int64_t p = u0 % d.groups * d.width, m = u0 / d.groups * d.rows;
    k.panel(t, a, p, p + d.width, m, std::min(a.M, m + d.rows), ws);
  }
  while (u0 < u1) {
    const int64_t p = u0 / d.chunks, c0 = u0 % d.chunks, panels = block.panels > 1 && c0 == 0 ? std::min(block.panels, (u1 - u0) / d.chunks) : 0;
    if (panels > 0) {
      for (int64_t m = 0; m < a.M; m += block.rows) k.panel(t, a, p, p + panels, m, std::min(a.M, m + block.rows), ws);
      u0 += panels * d.chunks;
      continue;
    }
    int64_t c1 = std::min(d.chunks, c0 + (u1 - u0));
    c1 = std::min(c1, c0 + std::max<int64_t>(1, block.rows / d.rows));
    k.panel(t, a, p, p + 1, c0 * d.rows, std::min(a.M, c1 * d.rows), ws);
    u0 += c1 - c0;
  }
}

inline int64_t panel_workspace(const Kernels& k, Dtype t, const PanelArgs& a) {
  return (k.panel_floats(t, a, std::min<int64_t>(a.M, 2064)) + 1023) / 1024 * 1024;
}

// The same on this thread alone, in a workspace of panel_workspace floats.
inline void serial_panel_product(const Kernels& k, Dtype t, const PanelArgs& a, float* ws) {
  const PanelBlock block = k.panel_block(t, a);
  const Deal deal(a, block, 1);
  panel_units(k, t, a, block, deal, 0, deal.units(), ws);
}

// Products in panel form that need nothing of each other, in one pass over the pool.
inline void panel_products(const Kernels& k, Dtype t, const PanelArgs* a, int count, int threads) {
  int64_t floats = 0, most = 0, work = 0;
  std::vector<PanelBlock> blocks;
  std::vector<Deal> deals;
  for (int i = 0; i < count; i++) {
    blocks.push_back(k.panel_block(t, a[i]));
    deals.emplace_back(a[i], blocks.back(), threads);
    floats = std::max(floats, panel_workspace(k, t, a[i]));
    most = std::max(most, deals[i].units());
    work += a[i].M * a[i].N * (a[i].K + a[i].R);
  }
  const int shares = static_cast<int>(std::min<int64_t>(threads_for(work, threads), most));
  std::vector<Units> units;
  for (int i = 0; i < count; i++) units.emplace_back(deals[i].units(), shares, deals[i].grain(blocks[static_cast<size_t>(i)]));
  const Scratch ws(static_cast<size_t>(floats * 4 * shares));
  run_shares(shares, [&](int share) {
    for (int i = 0; i < count; i++)
      for (int64_t u0, u1; units[i].take(share, u0, u1);) panel_units(k, t, a[i], blocks[i], deals[i], u0, u1, ws.as<float>() + share * floats);
  });
}

// out[:, 0:C] in wide form. A few rows are a matter of fetching W: its rows are cut into kParts (always: the cut decides the order of the sum), so
// that a thread reads whole pages, those that it read in the forward.
inline void wide_product(const Kernels& k, Dtype t, const WideArgs& a, int64_t C, int threads) {
  constexpr int64_t kUnit = 32, kParts = 4, kPartRows = 64, kMostRows = 4;
  const int64_t parts = a.M <= kMostRows && a.N >= kParts * kPartRows && a.M * C * a.N >= kSerialWork ? kParts : 1;
  const int64_t across = (C + kUnit - 1) / kUnit, rows = ((a.N + parts - 1) / parts + 15) / 16 * 16;
  threads = threads_for(a.M * C * (a.N + a.R), threads);
  Scratch ws(static_cast<size_t>(kWideFloats) * 4 * static_cast<size_t>(threads)), sums(parts > 1 ? static_cast<size_t>(parts * a.M * C) * 4 : 0);
  parallel(parts * across, threads, [&](int64_t u0, int64_t u1, int share) {
    while (u0 < u1) {
      const int64_t i = u0 / across, first = u0 % across, last = std::min(across, first + u1 - u0), n = i * rows;
      WideArgs part = a;
      if (parts > 1) {
        part.N = std::max<int64_t>(0, std::min(rows, a.N - n)), part.R = i ? 0 : a.R;
        part.x.p = offset(a.x.p, t, n), part.w.p = offset(a.w.p, t, n * a.w.ld);
        part.out = {sums.as<float>() + i * a.M * C, C}, part.out_f32 = true;
      }
      k.wide(t, part, first * kUnit, std::min(last * kUnit, C), ws.as<float>() + share * kWideFloats);
      u0 += last - first;
    }
  });
  if (parts == 1) return;
  for (int64_t i = 1; i < parts; i++) k.add(kF32, sums.as<float>() + i * a.M * C, sums.as<float>(), a.M * C);
  for (int64_t m = 0; m < a.M; m++) k.cast(t, sums.as<float>() + m * C, offset(a.out.p, t, m * a.out.ld), C);
}

}  // namespace lk
