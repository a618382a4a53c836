// For csrc/cpu/isa.cpp alone: a processor that has every instruction set, and a system that grants its tiles.
#pragma once
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace emulated {
inline int cpuid(unsigned, unsigned subleaf, unsigned* a, unsigned* b, unsigned* c, unsigned* d) {
  *a = subleaf == 1 ? 1u << 5 : 0, *b = *c = 0, *d = subleaf == 0 ? 1u << 22 | 1u << 24 : 0;
  return 1;
}
inline long granted(long, long, long) { return 0; }
}  // namespace emulated
#define __builtin_cpu_supports(name) 1
#define __get_cpuid_count emulated::cpuid
#define syscall emulated::granted
