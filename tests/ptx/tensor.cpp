// mbarriers and the tensor memory accelerator: boxes of a tensor between global and shared memory, zero outside, swizzled by address.
#include "tensor.h"

#include <algorithm>

#include "machine.h"

namespace ptx {

uint32_t swizzled(uint32_t address, int bytes) {
  const uint32_t chunks = uint32_t(bytes) / 16;  // 2, 4, 8 for 32, 64, 128; 0 or 1: none
  return chunks < 2 ? address : address ^ ((address >> 7 & (chunks - 1)) << 4);
}

namespace {

// ---- mbarriers ----

Step init(Machine& m, Thread& t, const Instruction& i) {
  uint32_t at = uint32_t(t.address(i.at(0)));
  m.shared(t, at, 8, true);
  const int count = int(t.get<uint32_t>(i.at(1)));
  t.cta->barriers[at] = {count, count, 0, 0, {}};
  return Step::next;
}
Step invalidate(Machine& m, Thread& t, const Instruction& i) {
  const uint32_t at = uint32_t(t.address(i.at(0)));
  if (!m.barrier(*t.cta, at).waiting.empty()) throw Error("an mbarrier that threads wait on is invalidated: " + place(t));
  t.cta->barriers.erase(at);
  return Step::next;
}
Step arrive(Machine& m, Thread& t, const Instruction& i) {  // _, [barrier] (, bytes or arrivals)
  uint32_t at = uint32_t(t.address(i.at(1)));
  Cta& cta = m.owner(t, at);
  Barrier& b = m.barrier(cta, at);
  const uint32_t extra = i.first.size() > 2 ? t.get<uint32_t>(i.at(2)) : 0;
  m.arrive(b, i.shape == 'e' || i.first.size() <= 2 ? 1 : int(extra), i.shape == 'e' ? extra : 0);
  return Step::next;
}
Step expect(Machine& m, Thread& t, const Instruction& i) {  // [barrier], bytes
  uint32_t at = uint32_t(t.address(i.at(0)));
  Cta& cta = m.owner(t, at);
  m.barrier(cta, at).bytes += t.get<uint32_t>(i.at(1));
  return Step::next;
}
Step wait(Machine& m, Thread& t, const Instruction& i) {  // p, [barrier], parity; may say no for no reason, as the hardware's time limit does
  const uint32_t at = uint32_t(t.address(i.at(1)));
  Barrier& b = m.barrier(*t.cta, at);
  const bool done = (b.phase & 1) != (t.get<uint32_t>(i.at(2)) & 1);
  if (!done && i.shape == 't' && m.dice(8)) {
    b.waiting.push_back(&t);
    return Step::stay;
  }
  if (done) t.synced = m.clock;
  t.set<uint64_t>(i.at(0), done);
  return done ? Step::next : Step::yield;
}

Step map_rank(Machine&, Thread& t, const Instruction& i) {
  t.set(i.at(0), uint32_t((t.get<uint32_t>(i.at(1)) & 0xFFFFFF) | (t.get<uint32_t>(i.at(2)) + 1) << 24));
  return Step::next;
}

Step store_async(Machine& m, Thread& t, const Instruction& i) {  // [address], value, [barrier]
  uint32_t at = uint32_t(t.address(i.at(0))), bar = uint32_t(t.address(i.at(2)));
  Cta& cta = m.owner(t, at);
  if (&m.owner(t, bar) != &cta) throw Error("data and mbarrier in different blocks: " + place(t));
  const int bytes = i.bytes;
  const auto value = t.get<uint64_t>(i.at(1));
  m.expect_write(t, cta, at, bytes, false);
  m.later([&m, &cta, at, bar, bytes, value] {
    std::memcpy(cta.shared.data() + at, &value, bytes);
    m.arrive(m.barrier(cta, bar), 0, -bytes);
  });
  return Step::next;
}

// ---- tensors ----

const TensorMap& map_of(const Thread& t, const Operand& o) {
  const auto& map = *reinterpret_cast<const TensorMap*>(t.address(o));
  if (map.magic != TensorMap::kMagic) throw Error("no tensor map: " + place(t));
  return map;
}

// Calls f(offset in the box, address in the tensor, bytes of it inside) for every 16 bytes of the box.
template <class F>
void each_chunk(const TensorMap& map, const int32_t* at, F f) {
  const uint32_t inner = map.box[0] * map.element;
  uint32_t rows = 1;
  for (int d = 1; d < map.rank; ++d) rows *= map.box[d];
  const int64_t first = int64_t(at[0]) * map.element, end = int64_t(map.size[0]) * map.element;
  if (first < 0) throw Error("the emulator has no boxes that start left of the tensor");
  for (uint32_t r = 0; r < rows; ++r) {
    uint64_t address = map.base;
    bool inside = true;
    uint32_t rest = r;
    for (int d = 1; d < map.rank; ++d) {
      const int64_t c = int64_t(at[d]) + rest % map.box[d];
      rest /= map.box[d];
      inside &= c >= 0 && uint64_t(c) < map.size[d];
      address += uint64_t(c) * map.stride[d - 1];
    }
    for (uint32_t k = 0; k < inner; k += 16) {
      const int64_t left = inside ? std::clamp<int64_t>(end - first - k, 0, 16) : 0;
      f(r * inner + k, address + uint64_t(first) + k, uint32_t(left));
    }
  }
}

uint32_t box_bytes(const TensorMap& map) {
  uint32_t bytes = map.element;
  for (int d = 0; d < map.rank; ++d) bytes *= map.box[d];
  return bytes;
}

void coordinates(const Thread& t, const Instruction& i, size_t operand, const TensorMap& map, int32_t* at) {
  if (i.size(operand) != size_t(map.rank) + 1) throw Error("a tensor map of another rank: " + place(t));
  for (int d = 0; d < map.rank; ++d) at[d] = t.get<int32_t>(i.at(operand, d + 1));
}

void check_place(const Thread& t, uint32_t address, const TensorMap& map) {
  if (address % 128) throw Error("a tensor box at shared memory " + std::to_string(address) + ", not a multiple of 128: " + place(t));
  if (map.swizzle > 1 && address % (8 * map.swizzle) && box_bytes(map) > uint32_t(8 * map.swizzle))
    throw Error("a swizzled box that does not start where its pattern does: " + place(t));
}

// Ordinary stores of this grid to what the box reads must have been fenced by their writer or by this thread.
void check_written(const Thread& t, uint64_t address) {
  if (t.cta->grid->written.empty()) return;
  const auto found = t.cta->grid->written.find(address / 32);
  if (found == t.cta->grid->written.end()) return;
  const auto [time, writer] = found->second;
  if (time > std::max(writer->fenced, t.fenced))
    throw Error("TMA reads an ordinary store to global memory without fence.proxy.async between: " + place(t));
}

// [shared], [map, {coordinates}], [barrier] (, blocks of the cluster)
Step load(Machine& m, Thread& t, const Instruction& i) {
  const TensorMap map = map_of(t, i.at(1));
  std::array<int32_t, 5> at;
  coordinates(t, i, 1, map, at.data());
  uint32_t to = uint32_t(t.address(i.at(0))), bar = uint32_t(t.address(i.at(2)));
  check_place(t, to & 0xFFFFFF, map);
  const uint32_t bytes = box_bytes(map), blocks = i.shape == 'm' ? t.get<uint16_t>(i.at(3)) : 0;
  std::vector<Cta*> targets;
  if (i.shape == 'm') {
    for (const auto& c : t.cta->cluster->ctas)
      if (blocks >> c->rank & 1) targets.push_back(c.get());
    if (int(targets.size()) != std::popcount(blocks)) throw Error("a multicast to blocks outside the cluster: " + place(t));
  } else {
    targets.push_back(&m.owner(t, to));
    if (&m.owner(t, bar) != targets[0]) throw Error("data and mbarrier in different blocks: " + place(t));
  }
  for (Cta* cta : targets) {
    if (cta->alive == 0) throw Error("a multicast into a block that has exited: " + place(t));
    m.barrier(*cta, bar);
    m.expect_write(t, *cta, to, bytes, true);
    m.later([&m, &t, cta, map, at, to, bar, bytes] {
      each_chunk(map, at.data(), [&](uint32_t offset, uint64_t from, uint32_t inside) {
        uint8_t* out = cta->shared.data() + swizzled(to + offset, map.swizzle);
        std::memset(out, 0, 16);
        if (inside == 0) return;
        check_written(t, from);
        std::memcpy(out, reinterpret_cast<const void*>(from), inside);
      });
      for (uint32_t g = to / 16; g < (to + bytes + 15) / 16; ++g) --cta->granules[g].arriving;
      m.arrive(m.barrier(*cta, bar), 0, -int64_t(bytes));
    });
  }
  return Step::next;
}

// [map, {coordinates}], [shared]
Step store(Machine& m, Thread& t, const Instruction& i) {
  const TensorMap map = map_of(t, i.at(0));
  std::array<int32_t, 5> at;
  coordinates(t, i, 0, map, at.data());
  uint32_t from = uint32_t(t.address(i.at(1)));
  check_place(t, from, map);
  Cta& cta = m.owner(t, from);
  const uint32_t bytes = box_bytes(map);
  for (uint32_t g = from / 16; g < (from + bytes + 15) / 16; ++g) m.expect_read(t, cta, g, t.fenced);
  if (!t.open_bulk) t.open_bulk = std::make_shared<Group>();
  auto group = t.open_bulk;
  ++group->reading, ++group->writing;
  m.later([&m, &t, &cta, map, at, from, bytes, group] {
    std::vector<uint8_t> data(bytes);
    for (uint32_t k = 0; k < bytes; k += 16) std::memcpy(data.data() + k, cta.shared.data() + swizzled(from + k, map.swizzle), 16);
    for (uint32_t g = from / 16; g < (from + bytes + 15) / 16; ++g) --cta.granules[g].leaving;
    --group->reading;
    m.notify(&t);
    m.later([&m, &t, map, at, data = std::move(data), group] {
      each_chunk(map, at.data(),
                 [&](uint32_t offset, uint64_t to, uint32_t inside) { std::memcpy(reinterpret_cast<void*>(to), data.data() + offset, inside); });
      --group->writing;
      m.notify(&t);
    });
  });
  return Step::next;
}
Step commit(Machine&, Thread& t, const Instruction&) {
  t.bulk.push_back(t.open_bulk ? t.open_bulk : std::make_shared<Group>());
  t.open_bulk.reset();
  return Step::next;
}
Step wait_group(Machine&, Thread& t, const Instruction& i) {
  const size_t left = t.get<uint32_t>(i.at(0));
  t.polls = true;
  for (size_t k = 0; k + left < t.bulk.size(); ++k)
    if (i.shape == 'r' ? t.bulk[k]->reading : t.bulk[k]->writing) return Step::stay;
  while (!t.bulk.empty() && !t.bulk.front()->writing) t.bulk.pop_front();
  return Step::next;
}
Step prefetch_bytes(Machine&, Thread& t, const Instruction& i) {  // [address], bytes: of the second-level cache, so nothing to do
  if (t.address(i.at(0)) % 16 || t.get<uint32_t>(i.at(1)) % 16) throw Error("misaligned cp.async.bulk.prefetch: " + place(t));
  return Step::next;
}
Step prefetch(Machine&, Thread& t, const Instruction& i) {
  map_of(t, i.at(0));
  return Step::next;
}

}  // namespace

Exec tensor(const Opcode& op, Instruction& i) {
  i.bytes = bytes_of(op.type());
  if (op.starts("mbarrier.init")) return init;
  if (op.starts("mbarrier.inval")) return invalidate;
  if (op.starts("mbarrier.arrive")) return i.shape = op.has("expect_tx") ? 'e' : 0, arrive;
  if (op.starts("mbarrier.expect_tx")) return expect;
  if (op.starts("mbarrier.try_wait.parity") || op.starts("mbarrier.test_wait.parity")) return i.shape = op.has("try_wait") ? 't' : 0, wait;
  if (op.base() == "mapa") return map_rank;
  if (op.starts("st.async")) return store_async;
  if (op.starts("cp.async.bulk.tensor") && op.parts[5].starts_with("shared")) return i.shape = op.has("multicast::cluster") ? 'm' : 0, load;
  if (op.starts("cp.async.bulk.tensor") && op.parts[5] == "global") return store;
  if (op.starts("cp.async.bulk.commit_group")) return commit;
  if (op.starts("cp.async.bulk.wait_group")) return i.shape = op.has("read") ? 'r' : 0, wait_group;
  if (op.starts("cp.async.bulk.prefetch.L2.global")) return prefetch_bytes;
  if (op.starts("prefetch.tensormap")) return prefetch;
  return nullptr;
}

}  // namespace ptx
