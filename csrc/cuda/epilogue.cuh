// From accumulator fragments to memory: rounding, bias, the keep mask, swizzled panels of 64 x 64 in shared memory, TMA store.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "layout.cuh"
#include "ptx.cuh"

namespace lk::cuda {

template <class T>
struct Pair;
template <>
struct Pair<__nv_bfloat16> {
  using type = __nv_bfloat162;
  __device__ static __forceinline__ type round(float a, float b) { return __floats2bfloat162_rn(a, b); }
  __device__ static __forceinline__ float2 widen(type v) { return __bfloat1622float2(v); }
};
template <>
struct Pair<__half> {
  using type = __half2;
  __device__ static __forceinline__ type round(float a, float b) { return __floats2half2_rn(a, b); }
  __device__ static __forceinline__ float2 widen(type v) { return __half22float2(v); }
};

template <class T>
__device__ __forceinline__ uint32_t pack(float a, float b) {
  const auto v = Pair<T>::round(a, b);
  return *reinterpret_cast<const uint32_t*>(&v);
}

template <class T>
__device__ __forceinline__ float2 load_pair(const T* p) {
  return Pair<T>::widen(*reinterpret_cast<const typename Pair<T>::type*>(p));
}

// 16 columns (d[0..7]) of this warp's 16 rows into the swizzled panel at `panel`, as columns 16 j ..
template <class T>
__device__ __forceinline__ void store_columns(uint32_t panel, int thread, int j, const float* d, float2 lo = {0, 0}, float2 hi = {0, 0}) {
  ptx::stmatrix(panel + swizzled(stmatrix_row(thread), stmatrix_chunk(thread, j)), pack<T>(d[0] + lo.x, d[1] + lo.y),
                pack<T>(d[2] + lo.x, d[3] + lo.y), pack<T>(d[4] + hi.x, d[5] + hi.y), pack<T>(d[6] + hi.x, d[7] + hi.y));
}

// 64 rows x BN of y through PANELS buffers of its own. Before a buffer is written again, thread 0 has seen all but the latest
// PANELS - 1 of its stores finish reading; the barrier tells the others. Writes by stmatrix reach TMA through fence + barrier.
template <class T, int BN, int PANELS>
__device__ __forceinline__ void store_tile(const CUtensorMap* y, const T* bias, int N, const float (&acc)[BN / 2], uint32_t panels, int warpgroup,
                                           int thread, int row, int col) {
  static_assert(BN / 64 % PANELS == 0, "a whole tile leaves the buffers in turn");
#pragma unroll
  for (int p = 0; p < BN / 64; ++p) {
    if (col + 64 * p >= N) {
      if (thread == 0) ptx::tma_wait_read<0>();  // the next tile starts with buffer 0 again, out of turn
      break;
    }
    const uint32_t panel = panels + p % PANELS * kPanelBytes;
    if (thread == 0) ptx::tma_wait_read<PANELS - 1>();
    ptx::sync_warpgroup(warpgroup);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int c = col + 64 * p + 16 * j + fragment_column(thread);
      float2 lo{0, 0}, hi{0, 0};
      if (bias != nullptr) {  // N is a multiple of 8 and c is even, so c < N says that c + 1 is inside too
        if (c < N) lo = load_pair(bias + c);
        if (c + 8 < N) hi = load_pair(bias + c + 8);
      }
      store_columns<T>(panel, thread, j, acc + 32 * p + 8 * j, lo, hi);
    }
    ptx::fence_async_shared();
    ptx::sync_warpgroup(warpgroup);
    if (thread == 0) {
      ptx::tma_store(y, panel, col + 64 * p, row);
      ptx::tma_commit();
    }
  }
}

// acc = keep * acc / (1 - p) by the packed mask [M, ceil(N / 32)]; `scale` is 1 / (1 - p).
template <int BN>
__device__ __forceinline__ void apply_mask(float (&acc)[BN / 2], const uint32_t* mask, int M, int N, float scale, int thread, int row, int col) {
  const int words = ceil_div(N, 32), r = row + fragment_row(thread);
  const uint32_t* first = mask + int64_t(r) * words;
  const uint32_t* second = first + 8 * int64_t(words);
#pragma unroll
  for (int w = 0; w < BN / 32; ++w) {
    const int word = col / 32 + w;
    const uint32_t top = r < M && word < words ? first[word] : 0u, bottom = r + 8 < M && word < words ? second[word] : 0u;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float* d = acc + 16 * w + 4 * j;
      const int bit = 8 * j + fragment_column(thread);
      d[0] = top >> bit & 1 ? d[0] * scale : 0.f;
      d[1] = top >> (bit + 1) & 1 ? d[1] * scale : 0.f;
      d[2] = bottom >> bit & 1 ? d[2] * scale : 0.f;
      d[3] = bottom >> (bit + 1) & 1 ? d[3] * scale : 0.f;
    }
  }
}

}  // namespace lk::cuda
