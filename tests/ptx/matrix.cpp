// Tensor core instructions: wgmma from shared memory, mma.sync, ldmatrix and stmatrix.
#include <algorithm>
#include <array>

#include "float16.h"
#include "machine.h"
#include "tensor.h"

namespace ptx {
namespace {

enum { kBf16 = 1, kTf32 = 2 };
float widen(uint16_t v, unsigned flags) { return flags & kBf16 ? from_bf16(v) : from_f16(v); }
float tf32(uint32_t v) { return value(v & 0xFFFFE000); }  // the lower 13 bits do not count

float element(const uint8_t* at, uint32_t bytes, unsigned flags) {
  uint32_t v = 0;
  std::memcpy(&v, at, bytes);
  return bytes == 4 ? tf32(v) : widen(uint16_t(v), flags);
}

// ---- ldmatrix, stmatrix: 8 x 8 matrices of 16-bit elements; lane l names row l % 8 of matrix l / 8 ----

bool warp(Machine& m, Thread& t) { return m.meet(t, t.cta->warps[t.index / 32], 32); }

Step load_matrix(Machine& m, Thread& t, const Instruction& i) {  // {d, ...}, [row]
  if (!warp(m, t)) return Step::stay;
  const auto met = m.met;
  uint16_t rows[32][8];
  for (uint32_t l = 0; l < 8 * i.size(0); ++l) std::memcpy(rows[l], m.shared(*met[l], uint32_t(met[l]->address(i.at(1))), 16, false), 16);
  for (uint32_t l = 0; l < 32; ++l)
    for (uint32_t k = 0; k < i.size(0); ++k) {
      const uint32_t r = l / 4, c = l % 4 * 2;
      const uint32_t low = i.shape == 't' ? rows[8 * k + c][r] : rows[8 * k + r][c],
                     high = i.shape == 't' ? rows[8 * k + c + 1][r] : rows[8 * k + r][c + 1];
      met[l]->set(i.at(0, k), low | high << 16);
    }
  return Step::next;
}

Step store_matrix(Machine& m, Thread& t, const Instruction& i) {  // [row], {v, ...}
  if (!warp(m, t)) return Step::stay;
  const auto met = m.met;
  uint16_t rows[32][8];
  for (uint32_t l = 0; l < 32; ++l)
    for (uint32_t k = 0; k < i.size(1); ++k) {
      const uint32_t r = l / 4, c = l % 4 * 2, v = met[l]->get<uint32_t>(i.at(1, k));
      (i.shape == 't' ? rows[8 * k + c][r] : rows[8 * k + r][c]) = uint16_t(v);
      (i.shape == 't' ? rows[8 * k + c + 1][r] : rows[8 * k + r][c + 1]) = uint16_t(v >> 16);
    }
  for (uint32_t l = 0; l < 8 * i.size(1); ++l) std::memcpy(m.shared(*met[l], uint32_t(met[l]->address(i.at(0))), 16, true), rows[l], 16);
  return Step::next;
}

// ---- mma.sync: d, a, b, c ----

struct MmaTile {
  float a[16][16], b[16][8];

  void multiply(const std::vector<Thread*>& met, const Instruction& i, uint32_t depth) const {
    for (uint32_t l = 0; l < 32; ++l)
      for (uint32_t k = 0; k < 4; ++k) {
        const uint32_t row = l / 4 + k / 2 * 8, col = l % 4 * 2 + k % 2;
        float sum = met[l]->get<float>(i.at(3, k));
        for (uint32_t x = 0; x < depth; ++x) sum += a[row][x] * b[x][col];
        met[l]->set(i.at(0, k), sum);
      }
  }
};

Step mma_16n8k16(Machine& m, Thread& t, const Instruction& i) {  // 16-bit
  if (!warp(m, t)) return Step::stay;
  MmaTile tile;
  for (uint32_t l = 0; l < 32; ++l) {
    const uint32_t g = l / 4, c = l % 4 * 2;
    for (uint32_t k = 0; k < 4; ++k) {
      const auto v = m.met[l]->get<uint32_t>(i.at(1, k));
      for (uint32_t h = 0; h < 2; ++h) tile.a[g + k % 2 * 8][c + k / 2 * 8 + h] = widen(uint16_t(v >> 16 * h), i.flags);
    }
    for (uint32_t k = 0; k < 2; ++k) {
      const auto v = m.met[l]->get<uint32_t>(i.at(2, k));
      for (uint32_t h = 0; h < 2; ++h) tile.b[c + 8 * k + h][g] = widen(uint16_t(v >> 16 * h), i.flags);
    }
  }
  tile.multiply(m.met, i, 16);
  return Step::next;
}

Step mma_16n8k8(Machine& m, Thread& t, const Instruction& i) {  // tf32
  if (!warp(m, t)) return Step::stay;
  MmaTile tile;
  for (uint32_t l = 0; l < 32; ++l) {
    const uint32_t g = l / 4, c = l % 4;
    for (uint32_t k = 0; k < 4; ++k) tile.a[g + k % 2 * 8][c + k / 2 * 4] = tf32(m.met[l]->get<uint32_t>(i.at(1, k)));
    for (uint32_t k = 0; k < 2; ++k) tile.b[c + 4 * k][g] = tf32(m.met[l]->get<uint32_t>(i.at(2, k)));
  }
  tile.multiply(m.met, i, 8);
  return Step::next;
}

// ---- wgmma ----

// A shared memory operand of 16-bit elements, or of tf32 (K-major alone). Byte address of element (row along M or N, k): PTX ISA, "Strides" and
// "Canonical layouts" of wgmma.
struct SharedOperand {
  uint32_t start, leading, stride, element;
  int swizzle;
  bool major_mn;

  SharedOperand(uint64_t d, bool mn, uint32_t bytes)
      : start(uint32_t(d & 0x3FFF) << 4),
        leading(uint32_t(d >> 16 & 0x3FFF) << 4),
        stride(uint32_t(d >> 32 & 0x3FFF) << 4),
        element(bytes),
        major_mn(mn) {
    constexpr int modes[] = {0, 128, 64, 32};
    swizzle = modes[d >> 62];
    if (d >> 49 & 7) throw Error("a matrix descriptor with a base offset");
  }
  uint32_t at(uint32_t row, uint32_t k) const {
    const uint32_t pitch = swizzle ? uint32_t(swizzle) : 16, x = (major_mn ? row : k) * element, y = major_mn ? k : row;
    uint32_t address = start + y % 8 * pitch + x % pitch;
    if (!major_mn)  // 8 rows, then `stride`; a row of the pattern holds every k of one instruction, except without a swizzle
      address += y / 8 * stride + x / pitch * leading;
    else  // without a swizzle the two change places
      address += swizzle ? y / 8 * stride + x / pitch * leading : y / 8 * leading + x / pitch * stride;
    return swizzled(address, swizzle);
  }
};

bool warpgroup(Machine& m, Thread& t) { return m.meet(t, t.cta->warpgroups[t.index / 128].meeting, 128); }

// A or B tile of `rows` x 16 (tf32: 8) from shared memory; what is read must stay as it is until the group is waited for.
void fetch(Machine& m, Thread& t, Warpgroup& group, const SharedOperand& from, uint32_t rows, unsigned flags, float* out) {
  uint64_t fenced = 0;
  for (const Thread* one : m.met) fenced = std::max(fenced, one->fenced);
  Cta& cta = *t.cta;
  const uint32_t chunk = 16 / from.element, depth = 32 / from.element;  // elements in a row, along M or N or along k
  const uint32_t run = from.major_mn ? chunk : 1, deep = from.major_mn ? 1 : chunk;
  for (uint32_t k = 0; k < depth; k += deep)
    for (uint32_t r = 0; r < rows; r += run) {
      const uint32_t at = from.at(r, k);
      m.expect_read(t, cta, at / 16, fenced);
      group.read.push_back(at / 16);
      uint8_t v[16];
      std::memcpy(v, cta.shared.data() + at / 16 * 16, 16);
      for (uint32_t e = 0; e < chunk; ++e)
        out[(from.major_mn ? k : k + e) * rows + (from.major_mn ? r + e : r)] = element(v + e * from.element, from.element, flags);
    }
}

// d, a, b, scale-d, imm-scale-a, imm-scale-b (, transpose-a), transpose-b
Step mma_async(Machine& m, Thread& t, const Instruction& i) {
  if (!warpgroup(m, t)) return Step::stay;
  const auto met = m.met;
  Warpgroup& group = t.cta->warpgroups[t.index / 128];
  const uint32_t N = uint32_t(i.shape), first_flag = 6;
  const bool a_registers = i.size(1) > 1;
  const uint32_t bytes = i.flags & kTf32 ? 4 : 2, depth = 32 / bytes;
  const auto flag = [&](size_t operand) { return i.first.size() > operand && t.get<uint32_t>(i.at(operand)) != 0; };
  if (t.get<int32_t>(i.at(4)) != 1 || t.get<int32_t>(i.at(5)) != 1) throw Error("a wgmma that negates: " + place(t));
  std::vector<float> a(64 * 16), b(N * 16);
  if (a_registers && bytes == 4) throw Error("a wgmma with tf32 registers: " + place(t));
  if (a_registers) {
    for (const Thread* one : met)
      for (uint32_t k = 0; k < 4; ++k) {
        const uint32_t l = one->lane(), row = one->index % 128 / 32 * 16 + l / 4 + k % 2 * 8, v = one->get<uint32_t>(i.at(1, k));
        for (uint32_t h = 0; h < 2; ++h) a[(l % 4 * 2 + k / 2 * 8 + h) * 64 + row] = widen(uint16_t(v >> 16 * h), i.flags);
      }
  } else {
    fetch(m, t, group, SharedOperand(t.get<uint64_t>(i.at(1)), flag(first_flag), bytes), 64, i.flags, a.data());
  }
  fetch(m, t, group, SharedOperand(t.get<uint64_t>(i.at(2)), flag(first_flag + !a_registers), bytes), N, i.flags, b.data());
  const bool accumulate = t.predicate(i.at(3));
  std::vector<float> sum(64 * N);
  for (uint32_t row = 0; row < 64; ++row) {
    float* out = sum.data() + row * N;
    for (uint32_t k = 0; k < depth; ++k) {
      const float x = a[k * 64 + row], *line = b.data() + k * N;
      for (uint32_t n = 0; n < N; ++n) out[n] += x * line[n];
    }
  }
  for (Thread* one : met) {
    const uint32_t number = one->committed + 1;  // the group that this instruction will belong to
    for (uint32_t k = 0; k < N / 2; ++k) {
      const uint32_t row = one->index % 128 / 32 * 16 + one->lane() / 4 + k / 2 % 2 * 8, col = k / 4 * 8 + one->lane() % 4 * 2 + k % 2,
                     reg = i.at(0, k).reg;
      one->registers[reg] = bits((accumulate ? value(uint32_t(one->registers[reg])) : 0.0f) + sum[row * N + col]);
      one->busy[reg] = number;
    }
  }
  return Step::next;
}

Step fence(Machine& m, Thread& t, const Instruction&) { return warpgroup(m, t) ? Step::next : Step::stay; }

Step commit(Machine& m, Thread& t, const Instruction&) {
  if (!warpgroup(m, t)) return Step::stay;
  Warpgroup& group = t.cta->warpgroups[t.index / 128];
  for (Thread* one : m.met) ++one->committed;
  group.groups.emplace_back(t.committed, std::move(group.read));
  group.read.clear();
  return Step::next;
}

Step wait(Machine& m, Thread& t, const Instruction& i) {
  if (!warpgroup(m, t)) return Step::stay;
  Warpgroup& group = t.cta->warpgroups[t.index / 128];
  const uint32_t left = t.get<uint32_t>(i.at(0)), done = t.committed > left ? t.committed - left : 0;
  while (!group.groups.empty() && group.groups.front().first <= done) {
    for (const uint32_t g : group.groups.front().second) --t.cta->granules[g].leaving;
    group.groups.pop_front();
  }
  for (Thread* one : m.met) one->completed = std::max(one->completed, done);
  return Step::next;
}

}  // namespace

Exec matrix(const Opcode& op, Instruction& i) {
  if (op.starts("ldmatrix.sync.aligned.m8n8")) return i.shape = op.has("trans") ? 't' : 0, load_matrix;
  if (op.starts("stmatrix.sync.aligned.m8n8")) return i.shape = op.has("trans") ? 't' : 0, store_matrix;
  if (op.starts("wgmma.fence")) return fence;
  if (op.starts("wgmma.commit_group")) return commit;
  if (op.starts("wgmma.wait_group")) return wait;
  i.flags = op.has("bf16") ? kBf16 : op.has("tf32") ? kTf32 : 0;
  if (op.starts("mma.sync.aligned.m16n8k16.row.col.f32.") && (op.has("bf16") || op.has("f16"))) return mma_16n8k16;
  if (op.starts("mma.sync.aligned.m16n8k8.row.col.f32.tf32")) return mma_16n8k8;
  if (op.starts("wgmma.mma_async.sync.aligned.m64n") && op.parts[4].ends_with(op.has("tf32") ? "k8" : "k16") && op.parts[5] == "f32") {
    i.shape = std::stoi(std::string(op.parts[4].substr(4)));
    return mma_async;
  }
  return nullptr;
}

}  // namespace ptx
