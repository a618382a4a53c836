// Which tile next, which ring slot next, who resets the counters. Plain functions for host and device: tests/test_cuda_scheduler.py compiles this
// very header for the host and checks it over random sizes and SM counts.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define LK_HD __host__ __device__ __forceinline__
#else
#define LK_HD inline
#endif

namespace lk::cuda {

LK_HD int ceil_div(int a, int b) { return (a + b - 1) / b; }

constexpr int kNoMore = -1;

// A unit is what one cluster computes at a time: `cluster` tiles, one above the other, in one column of tiles.
struct Unit {
  int m, n;  // m counts units: CTA `rank` of the cluster has tile row m * cluster + rank. That row may lie past M: TMA then reads zeros and drops
             // stores.
};

// The order of the units. Columns run fastest inside a group of `group_m` rows, so that a wave of CTAs shares rows of x and columns of W in L2.
// column0: all units of column 0 come first. They make h and wait for nobody, so whoever holds a later unit waits only for units claimed before.
struct Raster {
  int rows, cols, group_m, column0;

  LK_HD int units() const { return rows * cols; }

  LK_HD Unit at(int u) const {
    int first_col = 0;
    if (column0) {
      if (u < rows) return {u, 0};
      u -= rows;
      first_col = 1;
    }
    const int width = cols - first_col, per_group = group_m * width, group = u / per_group, top = group * group_m;
    const int height = rows - top < group_m ? rows - top : group_m, rest = u - group * per_group;
    return {top + rest % height, first_col + rest / height};
  }
};

// Static order: cluster c of C takes units c, c + C, ... No state in memory. Right where no unit waits for another.
LK_HD int static_unit(int round, int cluster, int clusters, int units) {
  const int u = cluster + round * clusters;
  return u < units ? u : kNoMore;
}

// Ticket order: each claim takes the next number, so numbers are handed out in order to clusters that are running.
// Every cluster stops at its first number past the units; so exactly units + clusters numbers are drawn, and who draws the last one resets the
// counter: nobody draws after that in this launch, and the next launch in the stream starts after this one has ended.
LK_HD int ticket_unit(int ticket, int units) { return ticket < units ? ticket : kNoMore; }
LK_HD bool last_ticket(int ticket, int units, int clusters) { return ticket == units + clusters - 1; }

// Every tile (m, n > 0) takes the flag of row m once; the last one resets it.
LK_HD bool last_taker(int taken_before, int cols) { return taken_before == cols - 2; }

// Position in a ring of slots. A consumer waits for `full` with parity `phase`; a producer for `empty` with parity `phase ^ 1`, which a fresh barrier
// passes at once.
template <int SLOTS>
struct Ring {
  int slot = 0;
  uint32_t phase = 0;

  LK_HD void advance() {
    if (++slot == SLOTS) {
      slot = 0;
      phase ^= 1;
    }
  }
  LK_HD int before() const { return slot == 0 ? SLOTS - 1 : slot - 1; }
};

// wgmma steps (16 along the contraction) that hold data in the block of 64 starting at 64 * block; the rest of the block is zero.
LK_HD int steps_of(int block, int extent) {
  const int left = extent - 64 * block;
  return left >= 64 ? 4 : ceil_div(left, 16);
}

}  // namespace lk::cuda
