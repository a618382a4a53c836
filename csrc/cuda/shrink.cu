// h = s drop(x) A^T and the keep mask (forward); g = s dy B (backward).
#include <type_traits>

#include "host.h"
#include "shrink.cuh"

namespace lk::cuda {

namespace {

template <class T, bool MN, int RP>
struct ShrinkInstance {
  static constexpr auto entry = &shrink_kernel<T, MN, RP>;
  static constexpr int kBytes = ShrinkSmem<RP>::kBytes;

  static std::string name() {
    return std::string("shrink<") + (std::is_same_v<T, __nv_bfloat16> ? "bf16" : "fp16") + ", " + (MN ? "dx" : "forward") +
           ", R<=" + std::to_string(RP) + ">";
  }

  static void run(const ShrinkCall& c, void* stream) {
    const std::string call =
        name() + " M=" + std::to_string(c.M) + " K=" + std::to_string(c.K) + " R=" + std::to_string(c.R) + " split=" + std::to_string(c.split);
    sm90_multiprocessors(call);
    ShrinkMaps maps{};
    maps.x = tensor_map(call, "x", c.element, c.x, c.M, c.K, kTileM, kBlockK);
    constexpr auto swizzle = !MN || RP >= 64 ? MapSwizzle::b128 : RP == 32 ? MapSwizzle::b64 : MapSwizzle::b32;
    maps.a = MN ? tensor_map(call, "a", c.element, c.a, c.K, c.R, kBlockK, Shrink<T, MN, RP>::kColumns, swizzle)
                : tensor_map(call, "a", c.element, c.a, c.R, c.K, RP, kBlockK, swizzle);
    const ShrinkArgs args{c.M, c.K, c.R, c.split, c.scale, c.threshold, c.h, c.mask, c.seed};
    static std::atomic<uint64_t> done{0};
    allow_shared_memory(call, reinterpret_cast<const void*>(entry), kBytes, done);
    launch(call, entry, Launch{ceil_div(c.M, kTileM) * c.split, kThreads, kBytes, c.split, false, stream}, maps, args);
  }

  static inline const Registered registered{name(), kBytes, reinterpret_cast<const void*>(entry)};
};

using Run = void (*)(const ShrinkCall&, void*);

template <class T, bool MN, int RP>
Run instance() {
  (void)&ShrinkInstance<T, MN, RP>::registered;
  return &ShrinkInstance<T, MN, RP>::run;
}

template <class T, bool MN>
Run by_rank(int R) {
  return R <= 16    ? instance<T, MN, 16>()
         : R <= 32  ? instance<T, MN, 32>()
         : R <= 64  ? instance<T, MN, 64>()
         : R <= 128 ? instance<T, MN, 128>()
                    : instance<T, MN, 256>();
}

}  // namespace

void shrink(const ShrinkCall& c, void* stream) {
  const std::string call = std::string("shrink<") + name_of(c.element) + "> M=" + std::to_string(c.M) + " K=" + std::to_string(c.K) +
                           " R=" + std::to_string(c.R) + " split=" + std::to_string(c.split);
  if (c.M < 1 || c.K < 8 || c.R < 8 || c.R > 256 || c.K % 8 || c.R % 8) fail(call, "allowed: M >= 1; K, R multiples of 8; R to 256");
  if (c.split < 1 || c.split > 8 || (c.split & (c.split - 1)) || c.split > ceil_div(c.K, kBlockK))
    fail(call, "allowed: split 1, 2, 4, 8, at most K / 64 blocks");
  if (c.h == nullptr || (c.mask != nullptr && (c.seed == nullptr || c.backward)))
    fail(call, "needs h; a mask needs a seed and is made in the forward direction");
  const bool bf16 = c.element == Element::bf16;
  const Run run = bf16 ? (c.backward ? by_rank<__nv_bfloat16, true>(c.R) : by_rank<__nv_bfloat16, false>(c.R))
                       : (c.backward ? by_rank<__half, true>(c.R) : by_rank<__half, false>(c.R));
  run(c, stream);
}

}  // namespace lk::cuda
