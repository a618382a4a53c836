// One C++ entry of the CPU engine in CPU time of one thread, without Python: for perf, and for a change against its parent commit.
//
//   LORA_KERNELS_CUDA=0 python csrc/native_build.py
//   g++ -std=c++17 -O2 -Icsrc benchmarks/cpu_kernels.cpp build/native-*/{isa*,threads,linear,batched*}.o -ldl -o build/cpu_kernels
//   build/cpu_kernels fwd|dx|dab|bwd|many M N K R f32|bf16|f16 in_place|panels [MiB [MiB of the rest [adapters]]]
//
// `many` is the forward with that many adapters, or 64, by turns of the rows. Weights, with their adapters there, turn through 96 MiB, or those asked
// for, so that they come from memory as in a model. Inputs and results are the same in every call, unless they shall turn too. Operands lie at whole
// lines, as PyTorch's do. Least and median of nine samples of 50 ms.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu/engine.h"

namespace {

double seconds() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
}

using Matrix = std::unique_ptr<char, decltype(&std::free)>;

Matrix matrix(lk::Dtype type, int64_t n, std::mt19937& rng) {
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<float> values(static_cast<size_t>(n));
  for (float& v : values) v = uniform(rng);
  const size_t bytes = values.size() * (type == lk::kF32 ? 4 : 2);
  Matrix made(static_cast<char*>(std::aligned_alloc(64, bytes / 64 * 64 + 64)), std::free);
  if (type == lk::kF32)
    std::memcpy(made.get(), values.data(), bytes);
  else
    lk::kernels().cast(type, values.data(), made.get(), n);
  return made;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 8)
    return std::fprintf(stderr, "usage: %s fwd|dx|dab|bwd|many M N K R f32|bf16|f16 in_place|panels [MiB [MiB [adapters]]]\n", argv[0]), 2;
  const std::string mode = argv[1], type_name = argv[6];
  const int64_t M = std::atoll(argv[2]), N = std::atoll(argv[3]), K = std::atoll(argv[4]), R = std::atoll(argv[5]), seed = 1;
  const lk::Dtype type = type_name == "f32" ? lk::kF32 : type_name == "bf16" ? lk::kBF16 : lk::kF16;
  const lk::Form form = std::string(argv[7]) == "panels" ? lk::kPanels : lk::kInPlace;
  std::mt19937 rng(1);
  struct Weights {
    Matrix w, pool_a, pool_b;
  };
  std::vector<Weights> weights;
  const int64_t turn_bytes = (argc > 8 ? std::atoll(argv[8]) : 96) << 20, L = mode != "many" ? 0 : argc > 10 ? std::atoll(argv[10]) : 64;
  for (int64_t bytes = 0; bytes < turn_bytes || weights.empty(); bytes += (N * K + L * R * (N + K)) * (type == lk::kF32 ? 4 : 2))
    weights.push_back({matrix(type, N * K, rng), matrix(type, L * R * K, rng), matrix(type, L * N * R, rng)});
  std::vector<int32_t> ids;
  for (int64_t m = 0; m < M; m++) ids.push_back(L ? static_cast<int32_t>(m % L) : -1);
  auto a = matrix(type, R * K, rng), b = matrix(type, N * R, rng), h = matrix(type, M * R, rng), d_a = matrix(type, R * K, rng),
       d_b = matrix(type, N * R, rng);
  struct Rows {
    Matrix x, dy, y, dx;
  };
  std::vector<Rows> rows;
  const int64_t rows_bytes = (argc > 9 ? std::atoll(argv[9]) : 0) << 20;
  for (int64_t bytes = 0; bytes < rows_bytes || rows.empty(); bytes += 2 * M * (N + K) * (type == lk::kF32 ? 4 : 2))
    rows.push_back({matrix(type, M * K, rng), matrix(type, M * N, rng), matrix(type, M * N, rng), matrix(type, M * K, rng)});
  const lk::Problem p{M, N, K, type, {{a.get(), K}, {b.get(), R}, type, type, R}, 2.f, 0, 1, form};
  size_t turn = 0;
  const auto run = [&] {
    const Rows& at = rows[turn % rows.size()];
    const Weights& of = weights[turn++ % weights.size()];
    const lk::In w = {of.w.get(), K};
    if (mode == "many") {
      lk::Batched many{};
      many.M = M, many.N = N, many.K = K, many.R = R, many.L = L, many.type = many.a_type = many.b_type = type, many.x = {at.x.get(), K}, many.w = w;
      many.pool_a = of.pool_a.get(), many.a_stride = R * K, many.lda = K, many.pool_b = of.pool_b.get(), many.b_stride = N * R, many.ldb = R;
      many.ids = ids.data(), many.y = {at.y.get(), N}, many.h = {h.get(), R}, many.threads = 1, many.form = form;
      return lk::lora_batched_fwd(many);
    }
    if (mode == "fwd") return lk::lora_linear_fwd(p, {{at.x.get(), K}, w, nullptr, &seed, {at.y.get(), N}, {h.get(), R}, nullptr});
    const lk::Out none = {nullptr, 0};
    lk::lora_linear_bwd(p, {{at.dy.get(), N},
                            {at.x.get(), K},
                            w,
                            {h.get(), R},
                            nullptr,
                            none,
                            mode == "dab" ? none : lk::Out{at.dx.get(), K},
                            mode == "dx" ? none : lk::Out{d_a.get(), K},
                            mode == "dx" ? none : lk::Out{d_b.get(), R}});
  };
  for (int i = 0; i < 3; i++) run();
  double start = seconds();
  run();
  const int repeats = std::max(3, static_cast<int>(0.05 / (seconds() - start)));
  std::vector<double> samples;
  for (int s = 0; s < 9; s++) {
    start = seconds();
    for (int i = 0; i < repeats; i++) run();
    samples.push_back((seconds() - start) / repeats);
  }
  std::sort(samples.begin(), samples.end());
  std::printf("%s %s %s M %ld %ldx%ld R %ld %s: %.1f us, median %.1f, %.1f GFLOP/s of the base\n", lk::kernels().name, mode.c_str(), argv[6],
              static_cast<long>(M), static_cast<long>(N), static_cast<long>(K), static_cast<long>(R), argv[7], samples[0] * 1e6, samples[4] * 1e6,
              2e-9 * static_cast<double>(M * N * K) / samples[0]);
}
