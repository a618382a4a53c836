// y = x W^T + b + h B^T, and dx = dy W + drop'(g A), in one pass over the output: the K loop goes on over (h, B) in the same fp32 accumulator.
//
// Shapes: x [M, K], h [M, R], y [M, N] rows contiguous; W and B K-major ([N, K], [N, R]: forward) or, with MN, MN-major ([K, N], [R, N]: dx).
// Tile: BM x BN; each of the two consumer warpgroups computes BM / 2 rows, in parts of 64 rows (one wgmma each).
// Grid: one CTA per SM, persistent, clusters of 1 or 2. In a cluster of 2 the CTAs take tiles one above the other and each loads half of the W tile
//   for both (TMA multicast): 32 instead of 48 KB of L2 reads per block of 128 x 256 x 64, 40 instead of 48 of 256 x 128 x 64.
// Memory: x once per column of tiles and W once per row of tiles from L2; y written once; with RP > 0 h written once.
// Numerics: fp32 accumulator, one rounding; h rounded once, as an operand. Every sum in a fixed order: same bits every run.
// Source: warp-specialised persistent GEMM after DeepGEMM and fast.cu; the rank step after LoRAFusion (arXiv 2510.00206), column-0 form our own.
//
// Forms:
//   RP = 0          h is given, by an earlier kernel (programmatic dependent launch: the producer waits just before it loads h).
//   RP = 0, MASKED  the rank product comes first and is masked, then the K loop adds to it (dx with dropout).
//   RP > 0          column-0 form: the tiles of column 0 also accumulate h = s x A^T from the x tile in shared memory and publish it; the others take
//   it at
//                   the end of their K loop. For dx the same with (x, A) -> (dy, B^T).
//
// Flags of the column-0 form, all in `sync`, all zero between launches:
//   ticket      drawn by leaders' producer threads (atomicAdd). See scheduler.cuh for why the last one drawn can reset it.
//   ready[m]    written by the two consumer warpgroups of tile (m, 0), one red.release.gpu each: every thread of the warpgroup stores its part of h
//               (generic), fences it towards the async proxy, warpgroup barrier, thread 0 releases. Read by the producer thread of each tile (m, n >
//               0): ld.acquire.gpu until 2, fence.proxy.async, then TMA loads of h. Nobody waits for ever: units are claimed in order, so tile (m, 0)
//               is held by a running cluster; every unit that this cluster claimed before is of column 0 too, and tiles of column 0 wait for no flag.
//   taken[m]    incremented by each tile (m, n > 0) after its acquire (acq_rel); the one that sees cols - 2 is the last: no one polls ready[m] again
//   in this
//               launch, so it zeroes both. With one column of tiles nobody takes and nothing is published.
//   After a launch that never started (the launcher throws) nothing was written. A launch that was aborted on the device (trap, fault) leaves a
//   sticky error: the context and with it the buffer are gone. The launcher's Python side drops the buffer on every error.
#pragma once
#include "api.h"
#include "epilogue.cuh"
#include "layout.cuh"
#include "pipeline.cuh"
#include "scheduler.cuh"
#include "wgmma.cuh"

namespace lk::cuda {

struct LinearMaps {
  CUtensorMap x, w, a, b, h, y;
};

struct LinearArgs {
  int M, N, K, R, cluster;
  float scale;  // of h (column-0 form), or 1 / (1 - p) of the mask
  Raster raster;
  const void* bias;
  void* h;               // column-0 form: written here, [M, R]
  const uint32_t* mask;  // MASKED: [M, ceil(N / 32)]
  int* sync;             // column-0 form: ticket, ready[rows * cluster], taken[rows * cluster]
};

template <int BM, int BN, int RP, int SLOTS, int PANELS>
struct LinearSmem {
  static constexpr int kX = BM * kRowBytes, kW = BN * kRowBytes, kA = RP * kRowBytes, kSlot = kX + kW + kA, kStaging = 2 * PANELS * kPanelBytes;
  using Pipe = Pipeline<SLOTS, kSlot>;
  static constexpr int kBytes = 1024 + Pipe::kDataBytes + kStaging + Pipe::kControlBytes;
  static_assert(kBytes <= 232448, "shared memory of one CTA on sm_90");
};

template <class T, int BM, int BN, bool MN, int RP, bool MASKED, int SLOTS, int PANELS>
struct Linear {
  using Smem = LinearSmem<BM, BN, RP, SLOTS, PANELS>;
  using Pipe = typename Smem::Pipe;
  using WOperand = Operand<MN, BN>;
  using AOperand = Operand<MN, RP == 0 ? 64 : RP>;
  static constexpr bool kColumn0 = RP > 0;
  static constexpr int kParts = BM / 128;  // of 64 rows per consumer warpgroup
  static_assert(kParts == 1 || !kColumn0, "flags are per 128 rows, and h has no registers beside two parts");
  using Tile = float[kParts][BN / 2];

  const LinearMaps& maps;
  const LinearArgs& a;
  Pipe& pipe;
  uint32_t panels;

  // ---- producer ---------------------------------------------------------------------------------------------------------------------

  // BN columns of W or B, 64 deep from `k`, into `dst` of every CTA of the cluster: this CTA loads its share for all.
  __device__ __forceinline__ void load_columns(uint32_t dst, const CUtensorMap* map, uint32_t bar, int k, int col) {
    const int share = (MN ? kBlockK : BN) / int(a.cluster), first = share * int(pipe.rank);
    const uint16_t all = uint16_t((1u << a.cluster) - 1);
    if (MN) {
#pragma unroll
      for (int c = 0; c < BN / kChunk; ++c) {
        const uint32_t to = dst + c * kChunkBytes + first * kRowBytes;
        if (a.cluster == 1)
          ptx::tma_load(to, map, bar, col + c * kChunk, k + first);
        else
          ptx::tma_load_multicast(to, map, bar, col + c * kChunk, k + first, all);
      }
    } else if (a.cluster == 1) {
      ptx::tma_load(dst, map, bar, k, col);
    } else {
      ptx::tma_load_multicast(dst + first * kRowBytes, map, bar, k, col + first, all);
    }
  }

  __device__ __forceinline__ void push_base(int u, int m, int n, bool make_h) {
    for (int k = 0; k < a.K; k += kBlockK, pipe.ring.advance()) {
      const uint32_t bar = pipe.arm(u, Smem::kX + Smem::kW + (make_h ? Smem::kA : 0)), at = pipe.slot();
      ptx::tma_load(at, &maps.x, bar, k, m * BM);
      load_columns(at + Smem::kX, &maps.w, bar, k, n * BN);
      if (make_h) ptx::tma_load(at + Smem::kX + Smem::kW, &maps.a, bar, MN ? 0 : k, MN ? k : 0);
    }
  }

  __device__ __forceinline__ void push_rank(int u, int m, int n, bool own_h) {
    for (int r = 0; r < a.R; r += kBlockK, pipe.ring.advance()) {
      const uint32_t bar = pipe.arm(u, Smem::kW + (own_h ? 0 : Smem::kX)), at = pipe.slot();
      load_columns(at + Smem::kX, &maps.b, bar, r, n * BN);
      if (!own_h) {
        if (kColumn0) wait_for_h(m);
        ptx::tma_load(at, &maps.h, bar, r, m * BM);
        if (kColumn0) took_h(m);
      }
    }
  }

  __device__ __forceinline__ void wait_for_h(int m) {
    const int* ready = a.sync + 1 + m;
    for (const auto start = ptx::nanoseconds(); ptx::load_acquire(ready) < 2; __nanosleep(64))
      if (ptx::nanoseconds() - start > ptx::kTrapAfterNanoseconds) __trap();
    ptx::fence_async();
  }
  // After the load has been started: the counter's round trip would hold it up.
  __device__ __forceinline__ void took_h(int m) {
    int *ready = a.sync + 1 + m, *taken = ready + a.raster.rows * a.cluster;
    if (last_taker(ptx::fetch_add(taken, 1), a.raster.cols)) *ready = *taken = 0;
  }

  __device__ __forceinline__ void produce() {
    const int clusters = int(gridDim.x) / a.cluster, units = a.raster.units();
    bool waited = kColumn0;
    for (int round = 0;; ++round) {
      const int u = kColumn0 ? pipe.claim(a.sync, units, clusters) : static_unit(round, int(blockIdx.x) / a.cluster, clusters, units);
      if (u == kNoMore) break;
      const Unit unit = a.raster.at(u);
      const int m = unit.m * a.cluster + int(pipe.rank);
      const bool make_h = kColumn0 && unit.n == 0;
      if (!MASKED) push_base(u, m, unit.n, make_h);
      if (!waited) {
        ptx::wait_for_previous_grid();
        ptx::fence_async();  // h was written by ordinary stores, TMA reads it
        waited = true;
      }
      push_rank(u, m, unit.n, make_h);
      if (MASKED) push_base(u, m, unit.n, false);
    }
    if (!waited) ptx::wait_for_previous_grid();  // this grid must not end before the one it depends on
    pipe.finish();
  }

  // ---- consumers --------------------------------------------------------------------------------------------------------------------

  template <class Op, int COLS>
  __device__ __forceinline__ static void mma(float (&acc)[COLS / 2], uint64_t x, uint64_t w, int step, bool accumulate) {
    Wgmma<T, COLS, MN>::mma(acc, x + step * (KMajor::step >> 4), w + step * (Op::step >> 4), accumulate);
  }

  // Every part of this warpgroup's rows, `x` being the first: they lie one panel below the other.
  __device__ __forceinline__ static void mma_parts(Tile& acc, uint64_t x, uint64_t w, int step, bool accumulate) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) mma<WOperand, BN>(acc[i], x + i * (kPanelBytes >> 4), w, step, accumulate);
  }
  __device__ __forceinline__ static void pin(Tile& acc) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) ptx::pin(acc[i]);
  }

  // The base product of one tile; with MAKE_H, h beside it from the same x tile.
  template <bool MAKE_H, int HR>
  __device__ __forceinline__ void base(Tile& acc, float (&hacc)[HR], int w, bool waited, bool accumulate) {
    const int blocks = ceil_div(a.K, kBlockK);
    int k = 0;
    do {
      pipe.wait();
      const uint32_t at = pipe.slot();
      const uint64_t x = KMajor::at(at + part_of(w, kParts, 0) * kPanelBytes), wd = WOperand::at(at + Smem::kX),
                     ad = AOperand::at(at + Smem::kX + Smem::kW);
      pin(acc);
      if (MAKE_H) ptx::pin(hacc);
      ptx::wgmma_fence();
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        mma_parts(acc, x, wd, s, accumulate || k > 0 || s > 0);
        if constexpr (MAKE_H) mma<AOperand, 2 * HR>(hacc, x, ad, s, true);
      }
      ptx::wgmma_commit();
      pin(acc);
      if (MAKE_H) ptx::pin(hacc);
      ptx::wgmma_wait<1>();
      if (k > 0) pipe.release(pipe.ring.before());
      pipe.ring.advance();
    } while (++k < blocks);
    ptx::wgmma_wait<0>();
    pin(acc);
    if (MAKE_H) ptx::pin(hacc);
    pipe.release(pipe.ring.before());
  }

  template <int STEPS>
  __device__ __forceinline__ static void rank_steps(Tile& acc, uint64_t x, uint64_t b, bool add) {
    pin(acc);
    ptx::wgmma_fence();
#pragma unroll
    for (int s = 0; s < STEPS; ++s) mma_parts(acc, x, b, s, add || s > 0);
    ptx::wgmma_commit();
    pin(acc);
  }

  // The rank product: A operand from the slot (h by TMA), or for a tile that made h itself from its own panel.
  __device__ __forceinline__ void rank(Tile& acc, uint32_t own_h, int w, bool waited, bool accumulate) {
    for (int r = 0; r * kBlockK < a.R; ++r, pipe.ring.advance()) {
      if (r > 0 || !waited) pipe.wait();
      const uint32_t at = pipe.slot();
      const uint64_t x = KMajor::at(own_h != 0 ? own_h : at + part_of(w, kParts, 0) * kPanelBytes), b = WOperand::at(at + Smem::kX);
      // One straight line per number of steps: around a wgmma under a condition ptxas would serialise all of them (C7520).
      const int steps = kColumn0 ? RP / 16 : steps_of(r, a.R);
      const bool add = accumulate || r > 0;
      if (steps == 1)
        rank_steps<1>(acc, x, b, add);
      else if (steps == 2)
        rank_steps<2>(acc, x, b, add);
      else if (steps == 3)
        rank_steps<3>(acc, x, b, add);
      else
        rank_steps<4>(acc, x, b, add);
      ptx::wgmma_wait<0>();
      pin(acc);
      pipe.release(pipe.ring.slot);
    }
  }

  // h = scale * hacc: to the panel, as an operand of this warpgroup's own rank product, and to memory for the other tiles and the backward pass.
  template <int HR>
  __device__ __forceinline__ void publish(float (&hacc)[HR], uint32_t panel, int w, int thread, int m) {
    T* h = static_cast<T*>(a.h) + int64_t(m * kTileM + w * 64 + fragment_row(thread)) * a.R + fragment_column(thread);
    const int rows = a.M - (m * kTileM + w * 64 + fragment_row(thread)),
              cols = a.R - fragment_column(thread);  // left from this thread's first element
    uint32_t packed[HR / 2];
#pragma unroll
    for (int i = 0; i < HR / 2; ++i) packed[i] = pack<T>(hacc[2 * i] * a.scale, hacc[2 * i + 1] * a.scale);
    if (thread == 0) ptx::tma_wait_read<0>();
    ptx::sync_warpgroup(w + 1);  // the panel's last store has left it
#pragma unroll
    for (int j = 0; j < HR / 8; ++j) {
      uint32_t v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // fragment i: 8 rows down for odd i, 8 columns on for i >= 2
        const bool inside = 16 * j + i / 2 * 8 < cols;
        v[i] = inside ? packed[4 * j + i] : 0;  // past R: x times zero, which is no zero where x is not finite
        if (inside && i % 2 * 8 < rows) *reinterpret_cast<uint32_t*>(h + i % 2 * 8 * a.R + 16 * j + i / 2 * 8) = v[i];
      }
      ptx::stmatrix(panel + swizzled(stmatrix_row(thread), stmatrix_chunk(thread, j)), v[0], v[1], v[2], v[3]);
    }
    ptx::fence_async();  // shared memory towards this warpgroup's wgmma, global memory towards the others' TMA
    ptx::sync_warpgroup(w + 1);
    if (thread == 0 && a.raster.cols > 1) ptx::add_release(a.sync + 1 + m, 1);
  }

  __device__ __forceinline__ void consume(int w, int thread) {
    const uint32_t panel = panels + w * PANELS * kPanelBytes;
    for (;;) {
      pipe.wait();
      const int u = pipe.unit();
      if (u == kNoMore) break;
      const Unit unit = a.raster.at(u);
      const int m = unit.m * a.cluster + int(pipe.rank), row = m * BM + part_of(w, kParts, 0) * 64, col = unit.n * BN;
      Tile acc;
      if constexpr (MASKED) {
        rank(acc, 0, w, true, false);
#pragma unroll
        for (int i = 0; i < kParts; ++i) apply_mask<BN>(acc[i], a.mask, a.M, a.N, a.scale, thread, row + 64 * i, col);
        float none[1];
        base<false>(acc, none, w, false, true);
      } else {
        uint32_t own_h = 0;
        if (kColumn0 && unit.n == 0) {
          float hacc[RP == 0 ? 1 : RP / 2] =
              {};  // set here: a wgmma that ignores its old value would keep 32 registers alive round the whole loop, and spill
          if constexpr (kColumn0) {
            base<true>(acc, hacc, w, true, false);
            publish(hacc, panel, w, thread, m);
          }
          own_h = panel;
        } else {
          float none[1];
          base<false>(acc, none, w, true, false);
        }
        rank(acc, own_h, w, false, true);
      }
      const auto store = [&](const float (&part)[BN / 2], int first) {
        store_tile<T, BN, PANELS>(&maps.y, static_cast<const T*>(a.bias), a.N, part, panel, w + 1, thread, first, col);
      };
      store(acc[0], row);  // no loop: around the break in store_tile nvcc 13.0 left one rolled, with the accumulators in local memory
      if constexpr (kParts == 2) store(acc[1], row + 64);
    }
    if (thread == 0) ptx::tma_wait_all();
  }
};

template <class T, int BM, int BN, bool MN, int RP, bool MASKED, int SLOTS, int PANELS>
__global__ void __launch_bounds__(kThreads, 1) linear_kernel(const __grid_constant__ LinearMaps maps, const __grid_constant__ LinearArgs args) {
  using Kernel = Linear<T, BM, BN, MN, RP, MASKED, SLOTS, PANELS>;
  extern __shared__ uint8_t raw[];
  const uint32_t skip = (1024 - (ptx::smem(raw) & 1023)) & 1023, data = ptx::smem(raw) + skip, staging = data + Kernel::Pipe::kDataBytes;
  typename Kernel::Pipe pipe(data, raw + skip + Kernel::Pipe::kDataBytes + Kernel::Smem::kStaging, args.cluster);
  if (threadIdx.x == 0) {
    ptx::prefetch_map(&maps.x);
    ptx::prefetch_map(&maps.w);
    ptx::prefetch_map(&maps.y);
  }
  pipe.init();
  Kernel kernel{maps, args, pipe, staging};
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    ptx::registers_down<kProducerRegisters>();
    if (threadIdx.x == 0) kernel.produce();
    pipe.leave();
  } else {
    ptx::registers_up<kConsumerRegisters>();
    kernel.consume(warpgroup - 1, threadIdx.x % 128);
    pipe.leave();
  }
}

}  // namespace lk::cuda
