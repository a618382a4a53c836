// What the sanitizer drivers share: matrices on exactly sized heap blocks, and the count of wrong results.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>

#include "cpu/engine.h"

inline int failures = 0;

struct Matrix {  // rows x cols in the type's bytes, row stride ld, not a byte more than its last element
  int64_t rows, cols, ld;
  lk::Dtype type;
  std::unique_ptr<char[]> data;
  Matrix(int64_t r, int64_t c, lk::Dtype t, int64_t pad, std::mt19937& rng) : rows(r), cols(c), ld(c + pad), type(t), data(new char[bytes()]) {
    std::uniform_real_distribution<float> uniform(-1, 1);
    for (int64_t i = 0; i < r; i++)
      for (int64_t j = 0; j < c; j++) set(i, j, uniform(rng));
  }
  size_t bytes() const { return rows ? static_cast<size_t>(((rows - 1) * ld + cols) * (type == lk::kF32 ? 4 : 2)) : 0; }
  void set(int64_t i, int64_t j, float v) {
    uint32_t u;
    std::memcpy(&u, &v, 4);
    const uint16_t half = type == lk::kBF16 ? static_cast<uint16_t>(u >> 16) : static_cast<uint16_t>((u >> 16 & 0x8000) | 0x3800 | (u >> 13 & 0x3ff));
    if (type == lk::kF32)
      std::memcpy(data.get() + (i * ld + j) * 4, &v, 4);
    else
      std::memcpy(data.get() + (i * ld + j) * 2, &half, 2);
  }
  float f32(int64_t i, int64_t j) const {
    float v;
    std::memcpy(&v, data.get() + (i * ld + j) * 4, 4);
    return v;
  }
  lk::In in(int64_t row = 0) const { return {data.get() + row * ld * (type == lk::kF32 ? 4 : 2), ld}; }
  lk::Out out() { return {data.get(), ld}; }
};

inline void expect(bool ok, const char* isa, const char* what, int64_t M, int64_t N, int64_t K, int64_t R) {
  if (ok) return;
  failures++;
  std::printf("%s: wrong %s at M %ld N %ld K %ld R %ld\n", isa, what, static_cast<long>(M), static_cast<long>(N), static_cast<long>(K),
              static_cast<long>(R));
}

void run_batched(int64_t M, int64_t N, int64_t K, int64_t R, lk::Dtype type, lk::Dtype adapter, lk::Form form, bool drop, int64_t pad);
int run_panels();  // how many
