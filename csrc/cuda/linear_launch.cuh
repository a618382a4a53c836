// From a LinearCall to a launch of one linear_kernel instance.
#pragma once
#include "host.h"
#include "linear.cuh"

namespace lk::cuda {

template <class T>
constexpr Element element_of = std::is_same_v<T, __nv_bfloat16> ? Element::bf16 : Element::fp16;

// Ring slots and staging panels per warpgroup: as deep as 227 KB allow.
template <int BM, int BN, int RP>
constexpr int kSlotsOf = RP == 0 ? (BM + BN == 256 ? 6 : 4) : 3;
template <int BN, int RP>
constexpr int kPanelsOf = RP == 0   ? (BN == 192 ? 3 : 2)
                          : RP > 32 ? 2
                                    : 4;

template <class T, int BM, int BN, bool MN, int RP, bool MASKED>
struct LinearInstance {
  static constexpr int kSlots = kSlotsOf<BM, BN, RP>, kPanels = kPanelsOf<BN, RP>;
  using Smem = LinearSmem<BM, BN, RP, kSlots, kPanels>;
  static constexpr auto entry = &linear_kernel<T, BM, BN, MN, RP, MASKED, kSlots, kPanels>;

  static std::string name() {
    std::string form = RP > 0 ? ", column-0 R<=" + std::to_string(RP) : MASKED ? ", masked" : "";
    return std::string("linear<") + name_of(element_of<T>) + ", " + std::to_string(BM) + "x" + std::to_string(BN) + ", " + (MN ? "dx" : "forward") +
           form + ">";
  }

  static std::string describe(const LinearCall& c) {
    return name() + " M=" + std::to_string(c.M) + " N=" + std::to_string(c.N) + " K=" + std::to_string(c.K) + " R=" + std::to_string(c.R) +
           " cluster=" + std::to_string(c.cluster);
  }

  static void run(const LinearCall& c, void* stream) {
    const std::string call = describe(c);
    const int sms = sm90_multiprocessors(call);
    LinearMaps maps{};
    maps.x = tensor_map(call, "x", c.element, c.x, c.M, c.K, BM, kBlockK);
    maps.y = tensor_map(call, "y", c.element, c.y, c.M, c.N, 64, 64);
    const auto columns = [&](const char* what, const Matrix& m, int depth) {
      return MN ? tensor_map(call, what, c.element, m, depth, c.N, kBlockK / c.cluster, kChunk)
                : tensor_map(call, what, c.element, m, c.N, depth, BN / c.cluster, kBlockK);
    };
    maps.w = columns("w", c.w, c.K);
    if (c.R > 0) {
      maps.b = columns("b", c.b, c.R);
      maps.h = tensor_map(call, "h", c.element, {c.h, c.R}, c.M, c.R, BM, kBlockK);
    }
    if constexpr (RP > 0) {
      constexpr auto swizzle = !MN || RP == 64 ? MapSwizzle::b128 : RP == 32 ? MapSwizzle::b64 : MapSwizzle::b32;
      maps.a = MN ? tensor_map(call, "a", c.element, c.a, c.K, c.R, kBlockK, RP, swizzle)
                  : tensor_map(call, "a", c.element, c.a, c.R, c.K, RP, kBlockK, swizzle);
    }
    const int rows = ceil_div(ceil_div(c.M, BM), c.cluster), cols = ceil_div(c.N, BN);
    const LinearArgs args{c.M, c.N, c.K, c.R, c.cluster, c.scale, {rows, cols, c.group_m, RP > 0}, c.bias, c.h, c.mask, c.sync};
    static std::atomic<uint64_t> done{0};
    allow_shared_memory(call, reinterpret_cast<const void*>(entry), Smem::kBytes, done);
    Launch l{0, kThreads, Smem::kBytes, c.cluster, c.dependent, stream};
    // The static order deals a share to every cluster: one that has to wait for an SM would double the time.
    const int clusters = resident_clusters(reinterpret_cast<const void*>(entry), l, sms / c.cluster);
    l.grid = std::min(clusters, args.raster.units()) * c.cluster;
    launch(call, entry, l, maps, args);
  }

  static inline const Registered registered{name(), Smem::kBytes, reinterpret_cast<const void*>(entry)};
};

// The launchers of one family, by element type; each is defined in its own .cu.
using LinearRun = void (*)(const LinearCall&, void*);
LinearRun forward_update(const LinearCall&);
LinearRun forward_column0(const LinearCall&);
LinearRun dx_update(const LinearCall&);
LinearRun dx_column0(const LinearCall&);

template <class T, int BM, int BN, bool MN, int RP = 0, bool MASKED = false>
LinearRun instance() {
  (void)&LinearInstance<T, BM, BN, MN, RP, MASKED>::registered;  // instantiates the entry in the table of kernels
  return &LinearInstance<T, BM, BN, MN, RP, MASKED>::run;
}

template <class T, bool MN>
LinearRun update_instance(const LinearCall& c) {
  if (c.block_m == 256) return c.block_n == 128 ? instance<T, 256, 128, MN>() : nullptr;
  if (c.block_m != 128) return nullptr;
  return c.block_n == 256   ? instance<T, 128, 256, MN>()
         : c.block_n == 192 ? instance<T, 128, 192, MN>()
         : c.block_n == 128 ? instance<T, 128, 128, MN>()
                            : nullptr;
}

template <class T, bool MN>
LinearRun column0_instance(const LinearCall& c) {
  if (c.block_m != 128 || c.block_n != 256) return nullptr;
  if (c.R <= 16) return instance<T, 128, 256, MN, 16>();
  if (c.R <= 32) return instance<T, 128, 256, MN, 32>();
  return c.R <= 64 ? instance<T, 128, 256, MN, 64>() : nullptr;
}

}  // namespace lk::cuda
