// The many-adapter ops: two slices, four adapters of ranks R, 0, R / 2 and R (one of them without rows), rows without an adapter.
#include "driver.h"

namespace {

constexpr int64_t kAdapters = 4;

struct Slice {
  Matrix w, bias, a, b, y, h, d_a, d_b;
  Slice(int64_t M, int64_t N, int64_t K, int64_t R, lk::Dtype type, lk::Dtype adapter, int64_t pad, std::mt19937& rng)
      : w(N, K, type, pad, rng),
        bias(1, N, type, 0, rng),
        a(kAdapters * R, K, adapter, pad, rng),
        b(kAdapters * N, R, adapter, pad, rng),
        y(M, N, type, 0, rng),
        h(M, R, type, 0, rng),
        d_a(kAdapters * R, K, adapter, 0, rng),
        d_b(kAdapters * N, R, adapter, 0, rng) {}
};

}  // namespace

void run_batched(int64_t M, int64_t N0, int64_t K, int64_t R, lk::Dtype type, lk::Dtype adapter, lk::Form form, bool drop, int64_t pad) {
  std::mt19937 rng(static_cast<unsigned>(M * 131 + N0 * 17 + K * 3 + R));
  const int64_t Ns[2] = {N0, N0 / 2 + 1}, words = (K + 31) / 32;
  Matrix x(M, K, type, pad, rng), dy(M, Ns[0] + Ns[1], type, pad, rng), dx(M, K, type, 0, rng);
  std::unique_ptr<int32_t[]> ids(new int32_t[static_cast<size_t>(M)]), ranks(new int32_t[kAdapters]);
  for (int64_t m = 0; m < M; m++) ids[static_cast<size_t>(m)] = static_cast<int32_t>((m * 7 / 2) % 4) - 1;
  for (int32_t l = 0; l < kAdapters; l++) ranks[static_cast<size_t>(l)] = static_cast<int32_t>(l == 1 ? 0 : l == 2 ? (R + 1) / 2 : R);
  std::unique_ptr<float[]> scalings(new float[kAdapters]{0.5f, 2.f, 1.5f, 1.f}), p(new float[kAdapters]{0.25f, 0.5f, 0.f, 0.f});
  std::unique_ptr<uint32_t[]> mask(new uint32_t[static_cast<size_t>(M * words)]);
  std::unique_ptr<float[]> wide(new float[static_cast<size_t>(M * R)]());
  if (drop) lk::batched_mask(77, M, K, kAdapters, ids.get(), p.get(), mask.get(), 2);

  std::unique_ptr<Slice> slices[2];
  std::vector<lk::Batched> parts;
  std::vector<lk::BatchedGrads> grads;
  for (int i = 0; i < 2; i++) {
    slices[i].reset(new Slice(M, Ns[i], K, R, type, adapter, pad, rng));
    Slice& s = *slices[i];
    lk::Batched b{};
    b.M = M, b.N = Ns[i], b.K = K, b.R = R, b.L = kAdapters, b.type = type, b.a_type = b.b_type = adapter, b.x = x.in(), b.w = s.w.in();
    b.bias = s.bias.data.get(), b.pool_a = s.a.data.get(), b.a_stride = R * s.a.ld, b.lda = s.a.ld, b.pool_b = s.b.data.get();
    b.b_stride = Ns[i] * s.b.ld, b.ldb = s.b.ld, b.ids = ids.get(), b.ranks = ranks.get(), b.scalings = scalings.get();
    b.dropout_p = drop ? p.get() : nullptr, b.mask = mask.get(), b.y = s.y.out(), b.h = s.h.out(), b.threads = 2, b.form = form;
    lk::lora_batched_fwd(b);
    parts.push_back(b);
    std::memset(s.d_a.data.get(), 0, s.d_a.bytes());
    std::memset(s.d_b.data.get(), 0, s.d_b.bytes());
    const int64_t column = i ? Ns[0] : 0;
    grads.push_back({{dy.data.get() + column * (type == lk::kF32 ? 4 : 2), dy.ld}, s.d_a.data.get(), s.d_b.data.get()});
  }
  lk::lora_batched_bwd(parts, grads, dx.out());
  Slice& s = *slices[0];
  std::unique_ptr<float[]> base(new float[static_cast<size_t>(M * N0)]);
  for (int64_t i = 0; type == lk::kF32 && i < M * N0; i++) base[static_cast<size_t>(i)] = s.y.f32(i / N0, i % N0);
  lk::lora_shrink(parts[0], wide.get());
  lk::lora_expand(parts[0], {wide.get(), R}, lk::kF32);
  if (type != lk::kF32) return;

  const char* isa = lk::kernels().name;
  const auto keep = [&](int64_t m, int64_t k) {
    const float q = drop && ids[static_cast<size_t>(m)] >= 0 ? p[static_cast<size_t>(ids[static_cast<size_t>(m)])] : 0.f;
    return q > 0 ? (mask[static_cast<size_t>(m * words + k / 32)] >> (k % 32) & 1) / (1.0 - q) : 1.0;
  };
  for (int64_t m = 0; m < M; m++) {
    const int64_t l = ids[static_cast<size_t>(m)], r1 = l < 0 ? 0 : ranks[static_cast<size_t>(l)];
    const double scale = l < 0 ? 0 : scalings[static_cast<size_t>(l)];
    std::unique_ptr<double[]> grad(new double[static_cast<size_t>(K)]());
    for (int i = 0; i < 2; i++) {
      const Slice& t = *slices[i];
      const int64_t column = i ? Ns[0] : 0;
      for (int64_t r = 0; r < r1; r++) {
        double h = 0, plain = 0, g = 0;
        for (int64_t k = 0; k < K; k++) h += keep(m, k) * x.f32(m, k) * t.a.f32(l * R + r, k), plain += x.f32(m, k) * t.a.f32(l * R + r, k);
        for (int64_t n = 0; n < Ns[i]; n++) g += scale * dy.f32(m, column + n) * t.b.f32(l * Ns[i] + n, r);
        for (int64_t k = 0; k < K; k++) grad[static_cast<size_t>(k)] += keep(m, k) * g * t.a.f32(l * R + r, k);
        expect(std::fabs(scale * h - t.h.f32(m, r)) < 1e-4 * K, isa, "batched h", M, Ns[i], K, R);
        if (i == 0) expect(std::fabs(scale * plain - wide[static_cast<size_t>(m * R + r)]) < 1e-4 * K, isa, "shrink", M, N0, K, R);
      }
      for (int64_t n = 0; n < Ns[i]; n++) {
        double y = t.bias.f32(0, n), more = 0;
        for (int64_t k = 0; k < K; k++) {
          y += x.f32(m, k) * t.w.f32(n, k);
          grad[static_cast<size_t>(k)] += dy.f32(m, column + n) * t.w.f32(n, k);
        }
        for (int64_t r = 0; r < r1; r++) {
          y += t.h.f32(m, r) * t.b.f32(l * Ns[i] + n, r);
          if (i == 0) more += wide[static_cast<size_t>(m * R + r)] * t.b.f32(l * N0 + n, r);
        }
        const double found = i ? t.y.f32(m, n) : base[static_cast<size_t>(m * N0 + n)];
        expect(std::fabs(y - found) < 1e-4 * (K + R), isa, "batched y", M, Ns[i], K, R);
        if (i == 0) expect(std::fabs(found + more - t.y.f32(m, n)) < 1e-4 * (K + R), isa, "expand", M, N0, K, R);
      }
    }
    for (int64_t k = 0; k < K; k++) expect(std::fabs(grad[static_cast<size_t>(k)] - dx.f32(m, k)) < 1e-3 * (N0 + R), isa, "batched dx", M, N0, K, R);
  }
  for (int64_t l = 0; l < kAdapters; l++)
    for (int64_t r = 0; r < R; r++)
      for (int64_t n = 0; n < N0; n++) {
        double sum = 0;
        for (int64_t m = 0; m < M; m++)
          if (ids[static_cast<size_t>(m)] == l && r < ranks[static_cast<size_t>(l)]) sum += dy.f32(m, n) * s.h.f32(m, r);
        expect(std::fabs(sum - s.d_b.f32(l * N0 + n, r)) < 1e-3 * (K + M), isa, "batched dB", M, N0, K, R);
      }
}
