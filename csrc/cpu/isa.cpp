// Which instruction set runs: cpuid at the first call, LORA_KERNELS_CPU_ISA overrides.
#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif
#include <atomic>
#include <cctype>
#include <cstdlib>
#include <stdexcept>

#include "engine.h"

namespace lk {
namespace {

#if defined(__x86_64__)
// by hand: clang 14's __builtin_cpu_supports does not know these names
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & 1u << 29);
}
bool has_avx512_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 5);
}
// AMX's registers are the operating system's to grant: Linux does from 5.16 on, once for all threads of the process that come after.
bool has_amx_bf16() {
#if defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBf16 | kTile)) != (kBf16 | kTile)) return false;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}
#endif

std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (avx512 && has_avx512_bf16() && has_amx_bf16()) found.push_back(&kAmxBf16);
  if (avx512 && has_avx512_bf16()) found.push_back(&kAvx512Bf16);
  if (avx512) found.push_back(&kAvx512);
  if (avx2) found.push_back(&kAvx2);
#endif
  found.push_back(&kPortable);
  return found;
}

const Kernels* find(const std::string& name, const char* asked_by) {
  std::string known;
  for (const Kernels* k : supported()) {
    if (name == k->name) return k;
    known += (known.empty() ? "" : ", ") + std::string(k->name);
  }
  throw std::invalid_argument(std::string(asked_by) + " names no instruction set of this build and CPU; got '" + name + "'; allowed: " + known +
                              "; fix: unset it or name one of these");
}

// LORA_KERNELS_CPU_ISA without blanks around it and in lower case, as LORA_KERNELS_BACKEND is read.
std::string asked() {
  const char* value = std::getenv("LORA_KERNELS_CPU_ISA");
  std::string name = value ? value : "";
  for (char& c : name) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  const auto blank = " \t\r\n";
  const size_t first = name.find_first_not_of(blank);
  return first == std::string::npos ? "" : name.substr(first, name.find_last_not_of(blank) + 1 - first);
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Kernels* k : supported()) names.emplace_back(k->name);
  return names;
}

const Kernels& kernels() {
  const Kernels* k = chosen.load(std::memory_order_acquire);
  if (!k) {
    const std::string name = asked();
    k = name.empty() ? supported().front() : find(name, "LORA_KERNELS_CPU_ISA");
    chosen.store(k, std::memory_order_release);
  }
  return *k;
}

void use_isa(const std::string& name) { chosen.store(find(name, "use_isa"), std::memory_order_release); }

}  // namespace lk
