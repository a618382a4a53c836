// The CPU engine: what the bindings call. Raw pointers, sizes and strides; nothing of Python or torch.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace lk {

// Instruction sets of this build that this CPU runs, best first.
std::vector<std::string> isas();
// The one in use: LORA_KERNELS_CPU_ISA, else the best. Throws std::invalid_argument for a value that isas() lacks.
const Kernels& kernels();
// Switches it, for tests and tuning.
void use_isa(const std::string& name);

// Forms of the large product. Few rows: kInPlace streams W once, as dot products (forward) or along its rows (backward). Many rows: kPanels.
enum Form : int { kInPlace = 0, kPanels = 1, kRankOnly = 2 };  // kRankOnly: everything but the large product, which PyTorch computes

struct Adapter {  // a [R, K], b [N, R], each in the type of x or in fp32
  In a, b;
  Dtype a_type, b_type;
  int64_t R;
};

struct Problem {
  int64_t M, N, K;
  Dtype type;  // of x, W, bias, y, h, dy, dx
  Adapter adapter;
  float scaling;
  uint32_t drop_threshold;  // dropout_p * 65536; 0: no dropout
  int threads;
  Form form;
};

struct Forward {
  In x, w;
  const void* bias;
  const int64_t* seed;
  Out y, h;
  uint32_t* mask;  // [M, ceil(K / 32)], written
};

struct Backward {
  In dy, x, w, h;
  const uint32_t* mask;
  Out g;             // [M, R] in x's type, wanted by kRankOnly; else null
  Out dx, d_a, d_b;  // null where not needed; d_a [R, K] and d_b [N, R] in the adapters' types
};

void lora_linear_fwd(const Problem& problem, const Forward& f);
void lora_linear_bwd(const Problem& problem, const Backward& b);
// One output slice of the many-adapter forward: row m uses adapter ids[m] (none outside 0..L-1) of rank ranks[l] and scale scalings[l].
struct Batched {
  int64_t M, N, K, R, L;
  Dtype type, a_type, b_type;
  In x, w;
  const void* bias;
  const void *pool_a, *pool_b;  // [L, >= R rows, K] and [L, N, R] with the strides below, in elements
  int64_t a_stride, lda, b_stride, ldb;
  int64_t packed_slice;        // slice i of a pool whose slices lie behind each other at the true rank: A is rows i r .. (i + 1) r; else 0
  const int32_t *ids, *ranks;  // ranks null: all R
  const float* scalings;       // null: all 1
  const float* dropout_p;      // [L]; null: none
  const uint32_t* mask;        // with dropout_p: as batched_mask wrote it
  Out y, h;
  int threads;
  Form form;
};
void lora_batched_fwd(const Batched& b);
// h [M, R] in fp32, zeroed by the caller: the rows with an adapter are written up to its rank.
void lora_shrink(const Batched& b, float* h);
// y += h B^T in place; h in y's type or fp32.
void lora_expand(const Batched& b, In h, Dtype h_type);
// The backward of several slices that share x: Batched::h is read; dx is null where not needed.
struct BatchedGrads {
  In dy;
  void *d_a, *d_b;  // [L, R, K] and [L, N, R] in the pools' types, zeroed by the caller; null where not needed
};
void lora_batched_bwd(const std::vector<Batched>& slices, const std::vector<BatchedGrads>& grads, Out dx);
void batched_mask(uint64_t seed, int64_t M, int64_t K, int64_t L, const int32_t* ids, const float* dropout_p, uint32_t* mask, int threads);

void dropout_mask(uint64_t seed, uint32_t threshold, int64_t M, int64_t K, uint32_t* mask, int threads);

}  // namespace lk
