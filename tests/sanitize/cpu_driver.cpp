// Runs the CPU engine over odd sizes on exactly sized heap blocks, so that a sanitizer or valgrind sees every byte out of place, and checks fp32
// results against plain loops. Exit status 1 on a wrong result.
#include "driver.h"

namespace {

void run(int64_t M, int64_t N, int64_t K, int64_t R, lk::Dtype type, lk::Dtype adapter, lk::Form form, uint32_t threshold, int64_t pad) {
  std::mt19937 rng(static_cast<unsigned>(M * 131 + N * 17 + K * 3 + R));
  Matrix x(M, K, type, pad, rng), w(N, K, type, pad, rng), bias(1, N, type, 0, rng), a(R, K, adapter, pad, rng), b(N, R, adapter, pad, rng),
      dy(M, N, type, pad, rng);
  Matrix y(M, N, type, 0, rng), h(M, R, type, 0, rng), dx(M, K, type, 0, rng), d_a(R, K, adapter, 0, rng), d_b(N, R, adapter, 0, rng);
  std::unique_ptr<uint32_t[]> mask(new uint32_t[static_cast<size_t>(M * ((K + 31) / 32))]);
  const int64_t seed = 77;
  const lk::Problem p{M, N, K, type, {a.in(), b.in(), adapter, adapter, R}, 0.5f, threshold, M == 520 ? 1 : 2, form};
  lk::lora_linear_fwd(p, {x.in(), w.in(), bias.data.get(), &seed, y.out(), h.out(), mask.get()});
  lk::lora_linear_bwd(p, {dy.in(), x.in(), w.in(), h.in(), mask.get(), {nullptr, R}, dx.out(), d_a.out(), d_b.out()});
  if (type != lk::kF32 || form == lk::kRankOnly) return;
  const char* isa = lk::kernels().name;
  const double scale = threshold ? 65536.0 / (65536 - threshold) : 1;
  const auto keep = [&](int64_t m, int64_t k) {
    return threshold ? scale * (mask[static_cast<size_t>(m * ((K + 31) / 32) + k / 32)] >> (k % 32) & 1) : 1.0;
  };
  for (int64_t m = 0; m < M; m++) {
    std::unique_ptr<double[]> g(new double[static_cast<size_t>(R)]());
    for (int64_t r = 0; r < R; r++) {
      double sum = 0;
      for (int64_t k = 0; k < K; k++) sum += keep(m, k) * x.f32(m, k) * a.f32(r, k);
      expect(std::fabs(0.5 * sum - h.f32(m, r)) < 1e-4 * K, isa, "h", M, N, K, R);
      for (int64_t n = 0; n < N; n++) g[static_cast<size_t>(r)] += 0.5 * dy.f32(m, n) * b.f32(n, r);
    }
    for (int64_t n = 0; n < N; n++) {
      double sum = bias.f32(0, n);
      for (int64_t k = 0; k < K; k++) sum += x.f32(m, k) * w.f32(n, k);
      for (int64_t r = 0; r < R; r++) sum += h.f32(m, r) * b.f32(n, r);
      expect(std::fabs(sum - y.f32(m, n)) < 1e-5 * (K + R), isa, "y", M, N, K, R);
    }
    for (int64_t k = 0; k < K; k++) {
      double base = 0, rank = 0;
      for (int64_t n = 0; n < N; n++) base += dy.f32(m, n) * w.f32(n, k);
      for (int64_t r = 0; r < R; r++) rank += g[static_cast<size_t>(r)] * a.f32(r, k);
      expect(std::fabs(base + keep(m, k) * rank - dx.f32(m, k)) < 1e-4 * (N + R), isa, "dx", M, N, K, R);
    }
  }
}

}  // namespace

// "small": a few odd sizes, for valgrind
int main(int argc, char** argv) {
  const bool small = argc > 1 && std::strcmp(argv[1], "small") == 0;
  const int64_t all[][4] = {{0, 5, 7, 3},     {1, 1, 1, 1},    {1, 33, 65, 4},   {2, 65, 33, 3},   {3, 17, 31, 5},
                            {5, 63, 129, 17}, {7, 100, 95, 8}, {13, 66, 63, 24}, {33, 31, 47, 9},  {50, 7, 70, 65},
                            {61, 130, 2, 2},  {2, 3, 2101, 1}, {3, 277, 70, 5},  {520, 33, 70, 5}, {1030, 9, 33, 3}};
  int runs = 0;
  for (const std::string& isa : lk::isas()) {
    lk::use_isa(isa);
    for (const auto& s : all) {
      if (small && s[0] * s[1] * s[2] > 32000) continue;
      for (const lk::Dtype type : {lk::kF32, lk::kBF16, lk::kF16})
        for (const lk::Dtype adapter : {type, lk::kF32})
          for (const uint32_t threshold : {0u, 20000u})
            for (const int64_t pad : {0, 3}) {
              if (small && (pad > 0) != (threshold > 0)) continue;
              for (const lk::Form form : {lk::kInPlace, lk::kPanels, lk::kRankOnly})
                run(s[0], s[1], s[2], s[3], type, adapter, form, threshold, pad), runs++;
              for (const lk::Form form : {lk::kInPlace, lk::kPanels})
                run_batched(s[0], s[1], s[2], s[3], type, adapter, form, threshold > 0, pad), runs++;
            }
    }
    if (!small) runs += run_panels();
    std::printf("%-12s done\n", isa.c_str());
  }
  std::printf("%d runs, %d failures\n", runs, failures);
  return failures != 0;
}
