// The CUDA engine's C face: pointers, sizes, row pitches in elements, a stream. No torch, no Python. Errors are lk::cuda::CudaError, naming kernel,
// shape and CUDA error. The caller has made the stream's device current.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace lk::cuda {

struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Element : int { bf16 = 0, fp16 = 1 };

// One matrix [rows, cols], columns contiguous.
struct Matrix {
  const void* data = nullptr;
  int64_t pitch = 0;
};

// y [M, N] = x [M, K] . W + bias + h [M, R] . B.
// backward false: W [N, K], B [N, R], A [R, K] (forward); true: W [K, N], B [R, N], A [K, R] (dx: x = dy, h = g, B = lora_a, A = lora_b).
struct LinearCall {
  Element element = Element::bf16;
  bool backward = false;
  bool column0 = false;    // make h = scale * x A^T here (R <= 64); else h is given
  bool masked = false;     // backward only: the rank product is masked and scaled by `scale` = 1 / (1 - p)
  bool dependent = false;  // launched right behind the kernel that makes h: start early, wait before h (programmatic dependent launch)
  int block_m = 128, block_n = 256, cluster = 1, group_m = 8;  // tile: 128 x 256, 128 x 192, 128 x 128, 256 x 128
  int M = 0, N = 0, K = 0, R = 0;
  float scale = 1;
  Matrix x, w, a, b, y;
  const void* bias = nullptr;
  void* h = nullptr;               // [M, R] contiguous; written in column-0 form
  const uint32_t* mask = nullptr;  // [M, ceil(N / 32)]
  int* sync = nullptr;             // column-0 form: linear_sync_ints() ints, zero, left zero
};
void linear(const LinearCall&, void* stream);
int linear_sync_ints(int M);

// h [M, R] = scale * keep * x [M, K] . A with A [R, K], or with backward A [K, R] (g = s dy B). With mask: keep is drawn from `seed`, written to
// `mask` [M, ceil(K / 32)]; `scale` carries 1 / (1 - p).
struct ShrinkCall {
  Element element = Element::bf16;
  bool backward = false;
  int M = 0, K = 0, R = 0, split = 1;  // split: CTAs (one cluster) that share the K loop of 128 rows
  float scale = 1;
  uint32_t threshold = 0;
  Matrix x, a;
  void* h = nullptr;
  uint32_t* mask = nullptr;
  const int64_t* seed = nullptr;
};
void shrink(const ShrinkCall&, void* stream);

struct KernelInfo {
  std::string name;
  int shared_bytes;
  const void* entry;  // for cudaFuncGetAttributes
};
const std::vector<KernelInfo>& kernels();

}  // namespace lk::cuda
