// For csrc/cpu/isa.cpp alone: this processor, and the tiles of tiles.h.
#pragma once
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace emulated {
inline int cpuid(unsigned leaf, unsigned subleaf, unsigned* a, unsigned* b, unsigned* c, unsigned* d) {
  if (leaf != 7 || subleaf != 0) return __get_cpuid_count(leaf, subleaf, a, b, c, d);
  *a = *b = *c = 0, *d = 1u << 22 | 1u << 24;
  return 1;
}
inline long granted(long, long, long) { return 0; }
}  // namespace emulated
#define __get_cpuid_count emulated::cpuid
#define syscall emulated::granted
