// The kernels' own scheduler, layout and Philox headers, compiled for the host: tests/test_cuda_scheduler.py calls these through ctypes.
#include "../../csrc/cuda/layout.cuh"
#include "../../csrc/cuda/philox.cuh"
#include "../../csrc/cuda/scheduler.cuh"

using namespace lk::cuda;

namespace {
template <int SLOTS>
int ring(int pushes) {
  Ring<SLOTS> r;
  for (int i = 0; i < pushes; ++i) r.advance();
  return r.slot | r.before() << 8 | int(r.phase) << 16;
}
}  // namespace

extern "C" {
void raster_at(int rows, int cols, int group_m, int column0, int u, int* out) {
  const Unit unit = Raster{rows, cols, group_m, column0}.at(u);
  out[0] = unit.m, out[1] = unit.n;
}
int host_static_unit(int round, int cluster, int clusters, int units) { return static_unit(round, cluster, clusters, units); }
int host_ticket_unit(int ticket, int units) { return ticket_unit(ticket, units); }
int host_last_ticket(int ticket, int units, int clusters) { return last_ticket(ticket, units, clusters); }
int host_last_taker(int before, int cols) { return last_taker(before, cols); }
int host_ring(int slots, int pushes) {
  return slots == 3 ? ring<3>(pushes) : slots == 4 ? ring<4>(pushes) : slots == 6 ? ring<6>(pushes) : ring<8>(pushes);
}
int host_steps_of(int block, int extent) { return steps_of(block, extent); }

uint32_t host_swizzled(int row, int chunk) { return swizzled(row, chunk); }
uint64_t k_major(uint32_t address) { return KMajor::at(address); }
uint64_t mn_major(int cols, uint32_t address) {
  return cols == 16 ? MnMajor<16>::at(address) : cols == 32 ? MnMajor<32>::at(address) : MnMajor<256>::at(address);
}
uint32_t k_major_step() { return KMajor::step; }
uint32_t mn_major_step(int cols) { return cols == 16 ? MnMajor<16>::step : cols == 32 ? MnMajor<32>::step : MnMajor<256>::step; }
int host_part_of(int w, int parts, int i) { return part_of(w, parts, i); }
int host_fragment_row(int thread) { return fragment_row(thread); }
int host_fragment_column(int thread) { return fragment_column(thread); }
int host_stmatrix_row(int thread) { return stmatrix_row(thread); }
int host_stmatrix_chunk(int thread, int j) { return stmatrix_chunk(thread, j); }

// The mask as shrink.cuh makes it: one call per 8 elements, bytes of a row in order.
void keep_mask(uint64_t seed, int M, int K, uint32_t threshold, uint8_t* mask) {
  const int bytes = ceil_div(K, 32) * 4;
  for (int m = 0; m < M; ++m)
    for (int k8 = 0; k8 < bytes; ++k8) {
      Words4 words = philox(seed, k8, m);
      mask[m * bytes + k8] = 8 * k8 < K ? uint8_t(keep8(words, threshold)) : 0;
    }
}
uint32_t lane_masks(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t threshold, uint32_t* words) {
  Words4 w = philox(seed, c0, c1);
  const uint32_t bits = keep8(w, threshold);
  for (int i = 0; i < 4; ++i) words[i] = w.w[i];
  return bits;
}
}
