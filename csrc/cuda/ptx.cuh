// One PTX instruction per function: mbarriers, TMA, wgmma fences, clusters, named barriers. No policy here.
// Source: PTX ISA 8.x, sections mbarrier, cp.async.bulk.tensor, wgmma, barrier.cluster, setmaxnreg, griddepcontrol.
#pragma once
#include <cuda.h>

#include <cstdint>

namespace lk::cuda::ptx {

__device__ __forceinline__ uint32_t smem(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// ---- mbarriers --------------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(uint32_t bar, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals));
}

// Makes the inits visible to the async proxy and to the other CTAs of the cluster; a cluster barrier must follow.
__device__ __forceinline__ void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void barrier_arrive(uint32_t bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory"); }

__device__ __forceinline__ void barrier_expect(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

// Arrives on the barrier at this CTA's offset `bar` in CTA `rank` of the cluster (rank may be this CTA's own). Default scope, as in CUTLASS: what it
// orders are async-proxy accesses that have completed; .release.cluster would put a MEMBAR.GPU into every release.
__device__ __forceinline__ void barrier_arrive_at(uint32_t bar, uint32_t rank) {
  asm volatile(
      "{.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];}" ::"r"(bar),
      "r"(rank)
      : "memory");
}

constexpr unsigned long long kTrapAfterNanoseconds = 20'000'000'000;

// Waits until the phase of this parity has completed. A wait that nothing can end is a bug of this library: the kernel then traps, so the caller sees
// a CUDA error, not a hang. One asm block: with the loop in C++ ptxas 13.0 serialised the wgmmas and spilled (C7512).
__device__ __forceinline__ void barrier_wait(uint32_t bar, uint32_t parity) {
  asm volatile(
      "{.reg .pred done, again; .reg .u64 start, now;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE_%=;\n"
      "mov.u64 start, %%globaltimer;\n"
      "WAIT_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE_%=;\n"
      "mov.u64 now, %%globaltimer;\n"
      "sub.u64 now, now, start;\n"
      "setp.lt.u64 again, now, %2;\n"
      "@again bra WAIT_%=;\n"
      "trap;\n"
      "DONE_%=:}" ::"r"(bar),
      "r"(parity), "n"(kTrapAfterNanoseconds)
      : "memory");
}

// ---- TMA --------------------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// Box at (inner, outer) of `map` to shared memory; its bytes, zero fill included, complete on `bar`.
__device__ __forceinline__ void tma_load(uint32_t dst, const CUtensorMap* map, uint32_t bar, int inner, int outer) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(dst), "l"(map),
               "r"(bar), "r"(inner), "r"(outer)
               : "memory");
}

// The same to the same offsets (dst and bar) in every CTA of `ctas`, one bit per rank.
__device__ __forceinline__ void tma_load_multicast(uint32_t dst, const CUtensorMap* map, uint32_t bar, int inner, int outer, uint16_t ctas) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(
          dst),
      "l"(map), "r"(bar), "r"(inner), "r"(outer), "h"(ctas)
      : "memory");
}

// Shared memory to the box at (inner, outer); what lies outside the tensor is not written.
__device__ __forceinline__ void tma_store(const CUtensorMap* map, uint32_t src, int inner, int outer) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(src), "r"(inner), "r"(outer)
               : "memory");
}
__device__ __forceinline__ void tma_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int N>  // at most N of this thread's groups still read shared memory
__device__ __forceinline__ void tma_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
__device__ __forceinline__ void tma_wait_all() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Orders this thread's earlier generic accesses before later accesses by the async proxy (TMA, wgmma operands). For global memory too it is a
// MEMBAR.ALL.GPU in SASS, which waits for every store of the thread: only where the async proxy reads what was stored there.
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async;" ::: "memory"); }

// ---- wgmma ------------------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
template <int N>  // keeps the compiler from moving accumulator accesses across a wgmma boundary
__device__ __forceinline__ void pin(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void stmatrix(uint32_t addr, uint32_t v0, uint32_t v1, uint32_t v2, uint32_t v3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared::cta.b16 [%0], {%1, %2, %3, %4};" ::"r"(addr), "r"(v0), "r"(v1), "r"(v2), "r"(v3) : "memory");
}

// ---- threads, clusters, grids -----------------------------------------------------------------------------------------------------

template <int R>
__device__ __forceinline__ void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(R));
}
template <int R>
__device__ __forceinline__ void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(R));
}
__device__ __forceinline__ void sync_warpgroup(int id) { asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory"); }

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Writes a word to `dst` in CTA `rank` and completes 4 bytes on its barrier `bar`.
__device__ __forceinline__ void store_at(uint32_t dst, uint32_t bar, uint32_t rank, int value) {
  asm volatile(
      "{.reg .b32 rdst, rbar;\n"
      "mapa.shared::cluster.u32 rdst, %0, %2;\n"
      "mapa.shared::cluster.u32 rbar, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [rdst], %3, [rbar];}" ::"r"(dst),
      "r"(bar), "r"(rank), "r"(value)
      : "memory");
}
__device__ __forceinline__ float load_at(uint32_t src, uint32_t rank) {
  float v;
  asm volatile(
      "{.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %1, %2;\n"
      "ld.shared::cluster.f32 %0, [remote];}"
      : "=f"(v)
      : "r"(src), "r"(rank)
      : "memory");
  return v;
}

// Programmatic dependent launch: wait for the whole grid before this one in the stream; let the grid after this one start.
__device__ __forceinline__ void wait_for_previous_grid() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next_grid_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// ---- flags in global memory -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void add_release(int* p, int v) { asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(p), "r"(v) : "memory"); }
__device__ __forceinline__ int load_acquire(const int* p) {
  int v;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ unsigned long long nanoseconds() {
  unsigned long long t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
  return t;
}
__device__ __forceinline__ int fetch_add(int* p, int v) {
  int old;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
  return old;
}

}  // namespace lk::cuda::ptx
