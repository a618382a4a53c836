// For csrc/cpu/isa.cpp alone: a processor that has every instruction set, and a system that grants its tiles.
#pragma once
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#define __builtin_cpu_supports(name) 1
#define __get_cpuid_count(leaf, subleaf, a, b, c, d) (*(a) = 1u << 5, *(d) = 1u << 22 | 1u << 24, 1)
#define syscall(...) 0
