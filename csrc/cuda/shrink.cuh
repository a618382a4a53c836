// h = scale * drop(x) A^T in one pass over x, and with dropout the packed keep mask; also g = s dy B.
//
// Shapes: x [M, K], A [R, K] (or with MN: [K, R]), h [M, R], mask int32 [M, ceil(K / 32)], seed int64 [1].
// Grid: one cluster of `split` CTAs per 128 rows; CTA r takes the r-th share of the K blocks. Bound by HBM: `split` fills the machine when M is
// small. Memory: x once; A once per CTA, from L2; h and mask written once. M (K + R) elements + M K / 8 bytes. Numerics: fp32 accumulator, h rounded
// once; the shares are added in rank order: same bits every run. Source: Philox once per 8 elements (one 16-byte chunk of a row), never in the GEMM;
// cluster reduction in place of split-K buffers.
//
// The ring's barriers are those of pipeline.cuh with a cluster of 1 (each CTA feeds itself). Dropped elements are zeroed in the slot by ordinary
// stores: each thread fences them towards the async proxy, then the warpgroup's barrier, then wgmma reads. The reduction writes fp32 partials over
// the ring, after this CTA has consumed everything that TMA wrote there; a cluster barrier stands before the reads by the other CTAs and one after.
// No flags in global memory.
#pragma once
#include "api.h"
#include "epilogue.cuh"
#include "layout.cuh"
#include "philox.cuh"
#include "pipeline.cuh"
#include "wgmma.cuh"

namespace lk::cuda {

struct ShrinkMaps {
  CUtensorMap x, a;
};

struct ShrinkArgs {
  int M, K, R, split;
  float scale;
  uint32_t threshold;
  void* h;
  uint32_t* mask;  // null: no dropout
  const int64_t* seed;
};

template <int RP>
struct ShrinkSmem {
  static constexpr int kA = RP * kRowBytes, kSlot = kTileBytes + kA, kSlots = RP <= 64 ? 7 : RP == 128 ? 6 : 4;
  using Pipe = Pipeline<kSlots, kSlot>;
  static constexpr int kBytes = 1024 + Pipe::kDataBytes + Pipe::kControlBytes;
  static_assert(kBytes <= 232448, "shared memory of one CTA on sm_90");
  static_assert(kTileM * RP * 4 <= Pipe::kDataBytes, "the partial sums lie over the ring");
};

template <class T, bool MN, int RP>
struct Shrink {
  using Smem = ShrinkSmem<RP>;
  using Pipe = typename Smem::Pipe;
  using AOperand = Operand<MN, RP>;
  static constexpr int kColumns = MN && RP > kChunk ? kChunk : RP;  // of one box of A

  const ShrinkMaps& maps;
  const ShrinkArgs& a;
  Pipe& pipe;
  int row, first, last;  // rows from `row`; blocks of 64 along K: first .. last - 1

  __device__ __forceinline__ void produce() {
    for (int k = first; k < last; ++k, pipe.ring.advance()) {
      const uint32_t bar = pipe.arm(0, Smem::kSlot), at = pipe.slot();
      ptx::tma_load(at, &maps.x, bar, k * kBlockK, row);
#pragma unroll
      for (int c = 0; c < RP / kColumns; ++c)
        ptx::tma_load(at + kTileBytes + c * kChunkBytes, &maps.a, bar, MN ? c * kChunk : k * kBlockK, MN ? k * kBlockK : 0);
    }
  }

  // Draws the keep bits of this warpgroup's 64 x 64 part of the block, zeroes what is dropped, writes the mask.
  __device__ __forceinline__ void drop(uint8_t* tile, uint64_t seed, int w, int thread, int block) {
    const int chunk = thread % 8, words = ceil_div(a.K, 32), k8 = block * 8 + chunk;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = w * 64 + i * 16 + thread / 8, m = row + r;
      Words4 keep = philox(seed, k8, m);
      uint32_t bits = 8 * k8 < a.K ? keep8(keep, a.threshold) : 0;  // past K: no bits, and x is zero there
      uint4* at = reinterpret_cast<uint4*>(tile + swizzled(r, chunk));
      uint4 v = *at;
      v.x &= keep.w[0], v.y &= keep.w[1], v.z &= keep.w[2], v.w &= keep.w[3];
      *at = v;
      bits <<= 8 * (chunk & 3);  // 4 lanes make a word, 8 lanes the row's two
      bits |= __shfl_xor_sync(0xFFFFFFFFu, bits, 1);
      bits |= __shfl_xor_sync(0xFFFFFFFFu, bits, 2);
      const int word = block * 2 + chunk / 4;
      if (chunk % 4 == 0 && m < a.M && word < words) a.mask[int64_t(m) * words + word] = bits;
    }
    ptx::fence_async_shared();
    ptx::sync_warpgroup(w + 1);
  }

  __device__ __forceinline__ void accumulate(float (&acc)[RP / 2], uint8_t* ring, int w, int thread) {
    const uint64_t seed = a.mask != nullptr ? uint64_t(*a.seed) : 0;
    for (int k = first; k < last; ++k, pipe.ring.advance()) {
      pipe.wait();
      const uint32_t at = pipe.slot();
      if (a.mask != nullptr) drop(ring + (at - pipe.data), seed, w, thread, k);
      const uint64_t x = KMajor::at(at + w * kPanelBytes), ad = AOperand::at(at + kTileBytes);
      ptx::pin(acc);
      ptx::wgmma_fence();
#pragma unroll
      for (int s = 0; s < 4; ++s) Wgmma<T, RP, MN>::mma(acc, x + s * (KMajor::step >> 4), ad + s * (AOperand::step >> 4), k > first || s > 0);
      ptx::wgmma_commit();
      ptx::pin(acc);
      ptx::wgmma_wait<1>();
      if (k > first) pipe.release(pipe.ring.before());
    }
    ptx::wgmma_wait<0>();
    ptx::pin(acc);
  }

  __device__ __forceinline__ void store(int r, int col, float v0, float v1) {
    if (r < a.M && col < a.R) *reinterpret_cast<uint32_t*>(static_cast<T*>(a.h) + int64_t(r) * a.R + col) = pack<T>(v0 * a.scale, v1 * a.scale);
  }

  __device__ __forceinline__ void store_fragments(const float (&acc)[RP / 2], int w, int thread) {
    const int r = row + w * 64 + fragment_row(thread);
#pragma unroll
    for (int j = 0; j < RP / 8; ++j) {
      const int col = 8 * j + fragment_column(thread);
      store(r, col, acc[4 * j], acc[4 * j + 1]);
      store(r + 8, col, acc[4 * j + 2], acc[4 * j + 3]);
    }
  }

  // Partials as [128][RP] fp32 over the ring.
  __device__ __forceinline__ void park(const float (&acc)[RP / 2], float* partial, int w, int thread) {
    float* at = partial + (w * 64 + fragment_row(thread)) * RP + fragment_column(thread);
#pragma unroll
    for (int j = 0; j < RP / 8; ++j) {
      *reinterpret_cast<float2*>(at + 8 * j) = make_float2(acc[4 * j], acc[4 * j + 1]);
      *reinterpret_cast<float2*>(at + 8 * RP + 8 * j) = make_float2(acc[4 * j + 2], acc[4 * j + 3]);
    }
  }

  // CTA `rank` sums its share of the 128 rows over all CTAs, rank 0 first.
  __device__ __forceinline__ void reduce(uint32_t partial, int rank) {
    const int rows = kTileM / a.split;
    for (int i = int(threadIdx.x); i < rows * RP / 2; i += kThreads) {
      const int r = rank * rows + i / (RP / 2), col = i % (RP / 2) * 2;
      float v0 = 0, v1 = 0;
      for (int c = 0; c < a.split; ++c) {
        v0 += ptx::load_at(partial + 4 * (r * RP + col), c);
        v1 += ptx::load_at(partial + 4 * (r * RP + col + 1), c);
      }
      store(row + r, col, v0, v1);
    }
  }
};

template <class T, bool MN, int RP>
__global__ void __launch_bounds__(kThreads, 1) shrink_kernel(const __grid_constant__ ShrinkMaps maps, const __grid_constant__ ShrinkArgs args) {
  using Kernel = Shrink<T, MN, RP>;
  ptx::let_next_grid_start();  // it waits by griddepcontrol.wait before it reads h
  extern __shared__ uint8_t raw[];
  const uint32_t skip = (1024 - (ptx::smem(raw) & 1023)) & 1023;
  uint8_t* ring = raw + skip;
  typename Kernel::Pipe pipe(ptx::smem(ring), ring + Kernel::Pipe::kDataBytes, 1);
  const int rank = int(pipe.rank), blocks = ceil_div(args.K, kBlockK);
  pipe.rank = 0;
  pipe.init();
  Kernel kernel{maps, args, pipe, int(blockIdx.x) / args.split * kTileM, blocks * rank / args.split, blocks * (rank + 1) / args.split};
  const int warpgroup = threadIdx.x / 128, w = warpgroup - 1, thread = threadIdx.x % 128;
  if (warpgroup == 0) {
    ptx::registers_down<kProducerRegisters>();
    if (threadIdx.x == 0) kernel.produce();
    __syncwarp();
    if (args.split > 1) {
      ptx::cluster_sync();
      kernel.reduce(pipe.data, rank);
      ptx::cluster_sync();
    }
  } else {
    ptx::registers_up<kConsumerRegisters>();
    float acc[RP / 2];
    kernel.accumulate(acc, ring, w, thread);
    if (args.split == 1) {
      kernel.store_fragments(acc, w, thread);
    } else {
      asm volatile("bar.sync 3, 256;" ::: "memory");  // both warpgroups have read the last slots before either writes over the ring
      kernel.park(acc, reinterpret_cast<float*>(ring), w, thread);
      ptx::cluster_sync();
      kernel.reduce(pipe.data, rank);
      ptx::cluster_sync();
    }
  }
}

}  // namespace lk::cuda
