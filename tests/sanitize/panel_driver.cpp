// Panel calls in a workspace that is exactly as large as the kernels ask for and holds NaN: what runs over its end, or is read before it was
// written and matters, is found. 16-bit results are checked too, to their type's precision.
#include "driver.h"

namespace {

struct Shape {
  int64_t M, N, K, R;
};
struct Options {
  bool nt, keep_x, keep_w, keep_out, transposed, segments;
};

double value(const Matrix& m, int64_t i, int64_t j) {
  if (m.type == lk::kF32) return m.f32(i, j);
  uint16_t half;
  std::memcpy(&half, m.data.get() + (i * m.ld + j) * 2, 2);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

Matrix among_nan(Matrix m) {  // what lies between the rows gets into no result
  const int64_t size = m.type == lk::kF32 ? 4 : 2;
  for (int64_t i = 0; i + 1 < m.rows; i++) std::memset(m.data.get() + (i * m.ld + m.cols) * size, 0xff, static_cast<size_t>((m.ld - m.cols) * size));
  return m;
}

struct Bits {
  int64_t words;
  std::unique_ptr<uint32_t[]> data;
  Bits(int64_t rows, int64_t cols, std::mt19937& rng) : words((cols + 31) / 32), data(new uint32_t[static_cast<size_t>(rows * words)]) {
    for (int64_t i = 0; i < rows * words; i++) data[static_cast<size_t>(i)] = static_cast<uint32_t>(rng());
  }
  lk::Mask mask() const { return {data.get(), words}; }
  double at(int64_t i, int64_t j) const { return data[static_cast<size_t>(i * words + j / 32)] >> (j % 32) & 1; }
};

// `room`: the workspace is sized for a product this much larger, as the drivers do that have one for many products
void run_panel(Shape s, lk::Dtype type, Options o, bool out_f32, int64_t pad, int64_t room) {
  const lk::Kernels& k = lk::kernels();
  std::mt19937 rng(static_cast<unsigned>(s.M * 131 + s.N * 17 + s.K * 3 + s.R));
  const auto matrix = [&](int64_t rows, int64_t cols) { return among_nan(Matrix(rows, cols, type, pad, rng)); };
  const Matrix x = matrix(s.M, s.K), w = o.nt ? matrix(s.N, s.K) : matrix(s.K, s.N), h = matrix(s.M, s.R),
               b = o.nt ? matrix(s.N, s.R) : matrix(s.R, s.N);
  const Matrix bias(1, s.N, type, 0, rng);
  const Bits keep_x(s.M, s.K, rng), keep_w(s.K, s.N, rng), keep_out(s.M, s.N, rng);
  const lk::Dtype out_type = out_f32 ? lk::kF32 : type;
  Matrix out = o.transposed ? Matrix(s.N, s.M, out_type, pad, rng) : Matrix(s.M, s.N, out_type, pad, rng);

  lk::PanelArgs a{};
  a.M = s.M, a.N = s.N, a.K = s.K, a.R = o.segments ? 0 : s.R, a.x = x.in(), a.w = w.in(), a.h = h.in(), a.b = b.in(), a.nt = o.nt;
  a.bias = o.transposed ? nullptr : bias.data.get(), a.alpha = 0.75f, a.keep_scale = 1.5f, a.out = out.out();
  a.x_keep = o.keep_x ? keep_x.mask() : lk::Mask{}, a.w_keep = o.keep_w ? keep_w.mask() : lk::Mask{};
  a.out_keep = o.keep_out ? keep_out.mask() : lk::Mask{}, a.out_t = o.transposed, a.out_f32 = out_f32;
  a.thin = !o.nt && s.R == 0;
  std::vector<int32_t> odd, even;  // rows of two adapters; every third row has none
  for (int32_t m = 0; m < s.M; m++)
    if (m % 3) (m % 3 == 1 ? odd : even).push_back(m);
  std::vector<lk::Segment> segments;
  for (const auto* rows : {&odd, &even})
    if (!rows->empty()) segments.push_back({{b.data.get(), s.R}, rows->data(), static_cast<int64_t>(rows->size())});
  if (o.segments && !segments.empty()) a.segments = segments.data(), a.segment_count = static_cast<int64_t>(segments.size()), a.segment_R = s.R;

  lk::PanelArgs widest = a;
  widest.M += room, widest.K += room / 8, widest.R += room / 8;
  const lk::PanelBlock block = k.panel_block(type, a);
  const int64_t most_rows = std::min(block.rows, s.M), panels = (s.N + lk::kPanel - 1) / lk::kPanel;
  const size_t floats = static_cast<size_t>(k.panel_floats(type, widest, most_rows + room));
  const std::unique_ptr<float[]> ws(new float[floats]);
  for (int64_t p = 0; p < panels; p += block.panels)
    for (int64_t m = 0; m < s.M; m += most_rows) {
      std::memset(ws.get(), 0xff, floats * 4);
      k.panel(type, a, p, std::min(panels, p + block.panels), m, std::min(s.M, m + most_rows), ws.get());
    }
  if (type == lk::kF16) return;

  const double precision = out_type == lk::kF32 ? 2e-6 : 1e-2;
  for (int64_t m = 0; m < s.M; m++)
    for (int64_t n = 0; n < s.N; n++) {
      double sum = 0, rank = 0, most = 1;
      for (int64_t i = 0; i < s.K; i++) {
        const double term =
            value(x, m, i) * (o.nt ? value(w, n, i) : value(w, i, n)) * (o.keep_x ? keep_x.at(m, i) : 1) * (o.keep_w ? keep_w.at(i, n) : 1);
        sum += term, most += std::fabs(term);
      }
      for (int64_t r = 0; r < s.R && !(o.segments && m % 3 == 0); r++) rank += value(h, m, r) * (o.nt ? value(b, n, r) : value(b, r, n)), most++;
      if (o.keep_out) rank *= 1.5 * keep_out.at(m, n);
      const double expected = 0.75 * (sum + rank) + (o.transposed ? 0 : value(bias, 0, n)), got = o.transposed ? value(out, n, m) : value(out, m, n);
      expect(std::fabs(got - expected) <= precision * most, k.name, "panel", s.M, s.N, s.K, s.R);
    }
}

}  // namespace

int run_panels() {
  constexpr Shape shapes[] = {{1, 1, 1, 1},     {1, 64, 0, 3},   {7, 33, 2, 1},     {15, 48, 65, 5}, {16, 130, 32, 32},
                              {17, 17, 31, 16}, {31, 95, 64, 8}, {32, 64, 96, 2},   {33, 65, 33, 9}, {64, 64, 63, 7},
                              {65, 300, 40, 8}, {48, 70, 7, 33}, {120, 9, 5, 3},    {130, 9, 12, 4}, {2, 3, 3, 64},
                              {1, 64, 0, 0},    {5, 70, 129, 0}, {12, 300, 257, 0}, {16, 31, 400, 0}};
  constexpr Shape deep[] = {{3, 70, 2581, 4}, {35, 40, 2562, 3}, {130, 20, 1300, 0}, {20, 330, 1281, 5}, {800, 3, 2600, 2},
                            {2100, 2, 3, 1},  {520, 1100, 9, 5}, {600, 90, 33, 40},  {515, 5, 1290, 3}};
  int runs = 0;
  const auto all = [&](Shape s, int64_t room) {
    const bool masks_x = lk::kernels().shrink_rows(lk::kBF16, true) != lk::kNever;
    for (const lk::Dtype type : {lk::kF32, lk::kBF16, lk::kF16})
      for (const Options o : {Options{true, false, false, false, false, false}, Options{true, false, false, false, false, true},
                              Options{true, true, false, false, false, false}, Options{false, false, false, false, false, false},
                              Options{false, false, true, true, false, false}, Options{false, false, false, false, true, false}}) {
        if (o.keep_x && !(masks_x && type == lk::kBF16)) continue;
        run_panel(s, type, o, runs % 2, runs % 3 ? 0 : 3, room), runs++;
      }
  };
  for (const Shape& s : shapes) all(s, 0), all(s, 37);
  for (const Shape& s : deep) all(s, 0);
  return runs;
}
