// lora_linear, forward and backward, from the kernels' products. The definition is reference.py.
#include "products.h"

namespace lk {
namespace {

// The adapter in x's type: a cast copy where it comes in fp32.
class Cast {
 public:
  Cast(const Kernels& k, Dtype type, Dtype from, In m, int64_t rows, int64_t cols)
      : in(m), copy_(type == from ? 0 : static_cast<size_t>(rows * cols) * 2) {
    if (type == from) return;
    in = {copy_.as<char>(), cols};
    for (int64_t r = 0; r < rows; r++) k.cast(type, static_cast<const float*>(m.p) + r * m.ld, copy_.as<uint16_t>() + r * cols, cols);
  }
  In in;

 private:
  Scratch copy_;
};

// [M, R] -> [R, M], so that a reduction over M runs along rows
class Transposed {
 public:
  Transposed(const Kernels& k, Dtype t, In m, int64_t M, int64_t R, int threads)
      : copy_(static_cast<size_t>(M * R * size_of(t))), in{copy_.as<char>(), M} {
    constexpr int64_t kBlock = 64;
    parallel((M + kBlock - 1) / kBlock, threads_for(M * R, threads), [&](int64_t u0, int64_t u1, int) {
      for (int64_t m0 = u0 * kBlock; m0 < std::min(M, u1 * kBlock); m0 += kBlock) {
        const int64_t m1 = std::min(M, m0 + kBlock);
        if (t == kF32)
          k.transpose(static_cast<const float*>(m.p), m.ld, m0, m1, R, copy_.as<float>(), M);
        else
          for (int64_t r = 0; r < R; r++)
            for (int64_t i = m0; i < m1; i++) copy_.as<uint16_t>()[r * M + i] = static_cast<const uint16_t*>(m.p)[i * m.ld + r];
      }
    });
  }

 private:
  Scratch copy_;

 public:
  In in;
};

float keep_scale(const Problem& p) { return p.drop_threshold < 65536 ? 65536.f / static_cast<float>(65536 - p.drop_threshold) : 0.f; }
int64_t mask_words(const Problem& p) { return (p.K + 31) / 32; }

constexpr int64_t kBroadRows = 128;  // with more rows packing W hardly counts, and the sums of a broad block outgrow the L2

// out [M, C] = alpha * (x W + keep(h b)), W [N, C]; R = 0: no rank term
PanelArgs rows_product(const Problem& p, int64_t N, int64_t C, In x, In w, int64_t R, In h, In b, Mask keep, float alpha, Out out) {
  PanelArgs a{};
  a.M = p.M, a.N = C, a.K = N, a.R = R, a.x = x, a.w = w, a.h = h, a.b = b;
  a.out_keep = keep, a.alpha = alpha, a.keep_scale = keep_scale(p), a.out = out;
  a.broad = p.M <= kBroadRows && C > kPanel;
  return a;
}

// the same, computed; in panel form it is left to the caller, in `products`
void rows_times(const Kernels& k, const Problem& p, bool in_place, const PanelArgs& a, PanelArgs* products, int& count) {
  if (in_place && p.M <= kWideRows) {
    WideArgs wide{a.M, a.K, a.R, a.x, a.w, a.h, a.b, a.out_keep, a.alpha, a.keep_scale, a.out, false};
    wide_product(k, p.type, wide, a.N, p.threads);
  } else {
    products[count++] = a;
  }
}

}  // namespace

void dropout_mask(uint64_t seed, uint32_t threshold, int64_t M, int64_t K, uint32_t* mask, int threads) {
  const Kernels& k = kernels();
  parallel(M, threads_for(M * K, threads), [&](int64_t m0, int64_t m1, int) { k.mask(seed, threshold, K, {mask, (K + 31) / 32}, m0, m1); });
}

void lora_linear_fwd(const Problem& p, const Forward& f) {
  const Kernels& k = kernels();
  if (p.M == 0) return;
  const bool drop = p.drop_threshold > 0;
  if (drop) dropout_mask(static_cast<uint64_t>(*f.seed), p.drop_threshold, p.M, p.K, f.mask, p.threads);
  const Adapter& ad = p.adapter;
  const Cast a(k, p.type, ad.a_type, ad.a, ad.R, p.K);

  const float alpha = p.scaling * (drop ? keep_scale(p) : 1.f);
  const Mask keep = drop ? Mask{f.mask, mask_words(p)} : Mask{};
  PanelArgs y{};
  y.M = p.M, y.N = p.N, y.K = p.K, y.R = ad.R, y.x = f.x, y.w = f.w, y.h = {f.h.p, f.h.ld}, y.nt = true, y.bias = f.bias, y.alpha = 1.f, y.out = f.y;
  if (p.form == kPanels && k.shrinks(p.type, y, p.threads)) {
    y.shrink = {a.in, keep, alpha, f.h};
  } else if (p.M >= k.shrink_rows(p.type, drop)) {
    PanelArgs shrink{};
    shrink.M = p.M, shrink.N = ad.R, shrink.K = p.K, shrink.x = f.x, shrink.w = a.in, shrink.nt = true, shrink.x_keep = keep, shrink.alpha = alpha;
    shrink.out = f.h;
    panel_products(k, p.type, &shrink, 1, p.threads);
  } else {
    DotArgs shrink{};
    shrink.M = p.M, shrink.K = p.K, shrink.x = f.x, shrink.w = a.in, shrink.keep = keep, shrink.alpha = alpha, shrink.out = f.h;
    dot_product(k, p.type, shrink, ad.R, p.threads);
  }
  if (p.form == kRankOnly) return;

  const Cast b(k, p.type, ad.b_type, ad.b, p.N, ad.R);
  if (p.form == kInPlace) {
    DotArgs d{};
    d.M = p.M, d.K = p.K, d.R = ad.R, d.x = f.x, d.w = f.w, d.h = y.h, d.b = b.in, d.bias = f.bias, d.alpha = 1.f, d.out = f.y;
    dot_product(k, p.type, d, p.N, p.threads);
  } else {
    y.b = b.in;
    panel_products(k, p.type, &y, 1, p.threads);
  }
}

void lora_linear_bwd(const Problem& p, const Backward& b) {
  const Kernels& k = kernels();
  const Adapter& ad = p.adapter;
  const bool drop = p.drop_threshold > 0;
  const Mask keep = drop ? Mask{b.mask, mask_words(p)} : Mask{};
  const bool need_g = b.dx.p || b.d_a.p || b.g.p;

  const Scratch g_copy(b.g.p || !need_g ? 0 : static_cast<size_t>(p.M * ad.R * size_of(p.type)));
  const Out g = b.g.p ? b.g : Out{g_copy.as<char>(), ad.R};
  const In g_in = {g.p, g.ld};
  const bool need_dx = b.dx.p && p.M > 0;
  const Cast lora_a(k, p.type, need_dx ? ad.a_type : p.type, ad.a, ad.R, p.K), lora_b(k, p.type, need_g ? ad.b_type : p.type, ad.b, p.N, ad.R);

  PanelArgs products[3];  // dx, dA, dB
  int count = 0;
  PanelArgs dx = rows_product(p, p.N, p.K, b.dy, b.w, ad.R, g_in, lora_a.in, keep, 1.f, b.dx);
  if (need_dx && k.shrinks(p.type, dx, p.threads)) {
    dx.shrink = {lora_b.in, {}, p.scaling, g};
    panel_products(k, p.type, &dx, 1, p.threads);
  } else {
    if (need_g && p.M > 0) rows_times(k, p, p.M <= 8, rows_product(p, p.N, ad.R, b.dy, lora_b.in, 0, {}, {}, {}, p.scaling, g), products, count);
    if (count) panel_products(k, p.type, products, count, p.threads);
    count = 0;
    if (need_dx) rows_times(k, p, p.form == kInPlace, dx, products, count);
  }

  // dA = g^T drop(x) and dB = dy^T h: the rank is the short side, the long reduction runs over M
  const Transposed gt(k, p.type, g_in, b.d_a.p ? p.M : 0, ad.R, p.threads), ht(k, p.type, b.h, b.d_b.p ? p.M : 0, ad.R, p.threads);
  if (b.d_a.p) {
    PanelArgs a{};
    a.M = ad.R, a.N = p.K, a.K = p.M, a.x = gt.in, a.w = b.x, a.w_keep = keep, a.alpha = drop ? keep_scale(p) : 1.f;
    a.out = b.d_a, a.out_f32 = ad.a_type == kF32, a.thin = true;
    products[count++] = a;
  }
  if (b.d_b.p) {
    PanelArgs a{};
    a.M = ad.R, a.N = p.N, a.K = p.M, a.x = ht.in, a.w = b.dy, a.alpha = 1.f;
    a.out = b.d_b, a.out_t = true, a.out_f32 = ad.b_type == kF32, a.thin = true;
    products[count++] = a;
  }
  if (count) panel_products(k, p.type, products, count, p.threads);
}

}  // namespace lk
