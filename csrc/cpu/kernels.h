// The interface between the drivers and the kernels of one instruction set: plain structs in, nothing inline, no std, no torch.
//
// Every isa_*.cpp compiles the same kernel sources (dot.h, panel.h, wide.h, elements.h) over another simd_*.h and exports one table.
// Those files see only this header and intrinsics: an inline std:: function compiled with -mavx512* could be the copy that the linker keeps for all.
#pragma once
#include <cstdint>

namespace lk {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
enum Dtype : int { kF32 = 0, kBF16 = 1, kF16 = 2 };

// Row-major matrices with unit inner stride; leading dimensions are in elements and may be anything, 0 and odd included.
struct In {
  const void* p;
  int64_t ld;
};
struct Out {
  void* p;
  int64_t ld;
};
// Packed keep mask: bit c % 32 of word c / 32 of a row; p null: keep all.
struct Mask {
  const uint32_t* p;
  int64_t ld;
};

// Many adapters: one row's b [N, R] (leading dimension DotArgs::b.ld); R = 0: no adapter.
struct RankRow {
  const void* b;
  int64_t R;
};
// The same for the rows of one adapter, ascending.
struct Segment {
  RankRow adapter;
  const int32_t* rows;
  int64_t count;
};

// out[m, n] = alpha * sum_k keep(m, k) x[m, k] w[n, k] + sum_r h[m, r] b[n, r] + bias[n]          few rows: both operands read in place
struct DotArgs {
  int64_t M, K, R;
  In x, w, h, b;
  const void* bias;
  Mask keep;
  float alpha;
  Out out;
  const RankRow* rows;  // instead of b and R, one per row; or null
};

// h made while x passes, instead of given: h[m, r] = alpha * sum_k keep(m, k) x[m, k] A(k, r), A as W: a[r, k], or a[k, r]
struct Shrink {
  In a;
  Mask keep;
  float alpha;
  Out h;
};

// out[m, n] = alpha * (sum_k x_keep(m, k) x[m, k] W(k, n) + keep_scale * keep(m, n) * sum_r h[m, r] B(r, n)) + bias[n]   many rows: W repacked
// W(k, n) = w[n, k] (and B(r, n) = b[n, r]) when nt, else w[k, n] * w_keep(k, n) (and b[r, n]).
struct PanelArgs {
  int64_t M, N, K, R;
  In x, w, h, b;
  bool nt;
  const void* bias;
  Mask x_keep, w_keep, out_keep;  // x_keep: see shrink_rows
  float alpha, keep_scale;
  Out out;
  bool out_t;               // store transposed: out[n, m]
  bool out_f32;             // store fp32 instead of the operands' type
  bool broad;               // blocks of up to kBroad panels and a kBroad-th of the depth, for few rows: whole pages of W at a time
  bool thin;                // few rows against a long K, as of dA and dB: w may be read in place instead of repacked
  const Segment* segments;  // instead of b and R (b.ld is theirs), added after the base; or null
  int64_t segment_count, segment_R;
  Shrink shrink;  // instead of h, where Kernels::shrinks says so; a.p null: none
};

// out[m, c] = alpha * (sum_n x[m, n] w[n, c] + keep_scale * keep(m, c) * sum_r h[m, r] b[r, c])            few rows: w read in place, streamed once
struct WideArgs {
  int64_t M, N, R;
  In x, w, h, b;
  Mask out_keep;
  float alpha, keep_scale;
  Out out;
  bool out_f32;  // store fp32 instead of the operands' type
};

constexpr int64_t kPanel = 64;  // columns of one panel
constexpr int64_t kBroad = 4;   // panels of one broad block
// How much of a product one panel call takes well.
struct PanelBlock {
  int64_t rows;         // most rows, so that their fp32 sums stay in the cache
  int64_t panels;       // most panels, all rows of them
  int64_t row_tile;     // what the rows of a call should be a multiple of
  int64_t shared_rows;  // from so many a thread on threads take rows of `panels` panels instead of panels; 0: never
};
constexpr int64_t kAnyRows = 4, kNever = int64_t{1} << 62;  // of shrink_rows: panels for every adapter of a batch; never
constexpr int64_t kWideRows = 32;                           // most rows of the wide form
constexpr int64_t kWideBlock = 4096;                        // accumulators of one wide block: 16 KiB
constexpr int64_t kWideFloats = 2 * kWideBlock;

struct Kernels {
  const char* name;
  void (*dot)(Dtype t, const DotArgs& a, int64_t n0, int64_t n1);
  // workspace of panel calls over up to `rows` rows, of products with these M, K, R and segment_R or smaller ones
  int64_t (*panel_floats)(Dtype t, const PanelArgs& a, int64_t rows);
  PanelBlock (*panel_block)(Dtype t, const PanelArgs& a);
  bool (*shrinks)(Dtype t, const PanelArgs& a, int threads);  // whether it gains to leave h to `a` (PanelArgs::shrink)
  int64_t (*shrink_rows)(Dtype t, bool masked);               // from so many rows on x A^T does better in panel form; `masked`: with dropout
  void (*panel)(Dtype t, const PanelArgs& a, int64_t p0, int64_t p1, int64_t m0, int64_t m1, float* ws);  // panels p0 .. p1 of rows m0 .. m1
  void (*wide)(Dtype t, const WideArgs& a, int64_t c0, int64_t c1, float* ws);                            // ws: kWideFloats; c0 a multiple of 32
  void (*mask)(uint64_t seed, uint32_t threshold, int64_t K, Mask keep, int64_t m0, int64_t m1);
  void (*cast)(Dtype to, const float* from, void* dst, int64_t n);
  void (*add)(Dtype to, const float* from, void* dst, int64_t n);                                                 // dst += from, rounded once
  void (*transpose)(const float* in, int64_t ld, int64_t m0, int64_t m1, int64_t R, float* out, int64_t out_ld);  // out[r, m] = in[m, r]
};

extern const Kernels kPortable;
#if defined(__x86_64__) || defined(_M_X64)
extern const Kernels kAvx2, kAvx512, kAvx512Bf16, kAmxBf16;
#endif

}  // namespace lk
