// Loads, stores, atomics, fences, cp.async.
#include <algorithm>
#include <bit>

#include "machine.h"

namespace ptx {
namespace {

enum : unsigned { kCoherent = 1, kAcquire = 2, kRelease = 4 };

unsigned order(const Opcode& op) {
  unsigned flags = 0;
  if (op.has("acquire") || op.has("acq_rel")) flags |= kAcquire | kCoherent;
  if (op.has("release") || op.has("acq_rel")) flags |= kRelease;
  if (op.has("volatile") || op.has("cg") || op.has("relaxed") || op.has("cv")) flags |= kCoherent;
  return flags;
}

void acquire(Thread& t) { t.cta->l1.clear(); }

template <class T>
T* host(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

// Memory to the first operand's registers, and the second operand's to memory.
void spread(Thread& t, const Instruction& i, const uint8_t* from) {
  for (size_t k = 0; k < i.size(0); ++k) {
    uint64_t v = 0;
    std::memcpy(&v, from + k * i.bytes, i.bytes);
    t.set(i.at(0, k), v);
  }
}
void gather(const Thread& t, const Instruction& i, uint8_t* to) {
  for (size_t k = 0; k < i.size(1); ++k) {
    const auto v = t.get<uint64_t>(i.at(1, k));
    std::memcpy(to + k * i.bytes, &v, i.bytes);
  }
}

// d or {d, ...}, [address]
Step load_param(Machine&, Thread& t, const Instruction& i) {
  const auto* from = host<const uint8_t>(t.address(i.at(1)));
  spread(t, i, from);
  return Step::next;
}

Step load_shared(Machine& m, Thread& t, const Instruction& i) {
  const auto* from = m.shared(t, uint32_t(t.address(i.at(1))), i.bytes * uint32_t(i.size(0)), false);
  spread(t, i, from);
  return Step::next;
}

Step load_global(Machine& m, Thread& t, const Instruction& i) {
  const uint64_t from = t.address(i.at(1)), bytes = i.bytes * i.size(0);
  if (from % bytes) throw Error("misaligned load: " + place(t));
  if (i.flags & kAcquire) acquire(t);
  uint8_t data[32];
  m.load(t, from, data, uint32_t(bytes), i.flags & kCoherent);
  spread(t, i, data);
  return Step::next;
}

// [address], v or {v, ...}
Step store_shared(Machine& m, Thread& t, const Instruction& i) {
  auto* to = m.shared(t, uint32_t(t.address(i.at(0))), i.bytes * uint32_t(i.size(1)), true);
  gather(t, i, to);
  return Step::next;
}

Step store_global(Machine& m, Thread& t, const Instruction& i) {
  const uint64_t to = t.address(i.at(0)), bytes = i.bytes * i.size(1);
  if (to % bytes) throw Error("misaligned store: " + place(t));
  if (i.flags & kRelease) m.release(t);
  uint8_t data[32];
  gather(t, i, data);
  m.store(t, to, data, uint32_t(bytes));
  if (i.flags & (kRelease | kCoherent)) m.drain(*t.cta, to / 16);
  return Step::next;
}

// atom d, [address], value (, value); red [address], value
enum Atomic { add, exch, cas, min, max, and_, or_ };

template <class T>
struct Atom {
  static Step run(Machine& m, Thread& t, const Instruction& i) {
    const bool returns = i.count == 1;
    const uint64_t address = t.address(i.at(returns));
    T* at;
    if (i.bytes < 0) {
      at = reinterpret_cast<T*>(m.shared(t, uint32_t(address), sizeof(T), true));
    } else {
      if (address % sizeof(T)) throw Error("misaligned atomic: " + place(t));
      if (i.flags & kRelease)
        m.release(t);
      else
        m.drain(*t.cta, address / 16);
      if (i.flags & kAcquire) acquire(t);
      t.cta->l1.erase(address / 32);
      at = host<T>(address);
    }
    const T old = *at, v = t.get<T>(i.at(returns + 1));
    switch (i.shape) {
      case add:
        *at = T(old + v);
        break;
      case exch:
        *at = v;
        break;
      case cas:
        *at = old == v ? t.get<T>(i.at(returns + 2)) : old;
        break;
      case min:
        *at = std::min(old, v);
        break;
      case max:
        *at = std::max(old, v);
        break;
      case and_:
        *at = T(uint64_t(old) & uint64_t(v));
        break;
      case or_:
        *at = T(uint64_t(old) | uint64_t(v));
        break;
    }
    if (returns) t.set(i.at(0), old);
    return Step::next;
  }
};

Exec atomic(const Opcode& op, Instruction& i) {
  static const std::vector<std::string_view> names = {"add", "exch", "cas", "min", "max", "and", "or"};
  const auto found = std::find_if(names.begin(), names.end(), [&](auto n) { return op.has(n); });
  if (found == names.end()) return nullptr;
  i.shape = int(found - names.begin());
  i.count = op.base() == "atom";
  i.bytes = op.has("shared") || op.has("shared::cta") ? -1 : 0;
  const auto type = op.type();
  if (type == "u32" || type == "b32") return Atom<uint32_t>::run;
  if (type == "s32") return Atom<int32_t>::run;
  if (type == "u64" || type == "b64") return Atom<uint64_t>::run;
  return type == "f32" && i.shape <= exch ? Atom<float>::run : nullptr;
}

Step fence(Machine& m, Thread& t, const Instruction&) {
  m.release(t);
  acquire(t);
  return Step::next;
}
Step proxy_fence(Machine& m, Thread& t, const Instruction&) {
  t.fenced = m.clock;
  return Step::next;
}
Step nothing(Machine&, Thread&, const Instruction&) { return Step::next; }

// cp.async [shared], [global], bytes (, bytes to read) (, cache policy: i.count)
Step copy(Machine& m, Thread& t, const Instruction& i) {
  uint32_t to = uint32_t(t.address(i.at(0)));
  const uint64_t from = t.address(i.at(1));
  const bool partial = i.first.size() > size_t(3 + i.count);
  const uint32_t bytes = t.get<uint32_t>(i.at(2)), read = partial ? std::min(bytes, t.get<uint32_t>(i.at(3))) : bytes;
  if (to % bytes || (read && from % bytes)) throw Error("misaligned cp.async: " + place(t));
  Cta& cta = m.owner(t, to);
  m.expect_write(t, cta, to, bytes, false);
  if (!t.open_copies) t.open_copies = std::make_shared<Group>();
  auto group = t.open_copies;
  ++group->writing;
  const bool coherent = i.flags & kCoherent;
  m.later([&m, &t, &cta, to, from, bytes, read, coherent, group] {
    uint8_t data[16] = {};
    if (read) m.load(t, from, data, read, coherent);
    std::memcpy(cta.shared.data() + to, data, bytes);
    auto& granule = cta.granules[to / 16];
    granule.arriving -= bytes == 16;
    granule.written = 0;  // compilers let wgmma read what cp.async has brought without a proxy fence
    --group->writing;
    m.notify(&t);
  });
  return Step::next;
}
Step copy_commit(Machine&, Thread& t, const Instruction&) {
  t.copies.push_back(t.open_copies ? t.open_copies : std::make_shared<Group>());
  t.open_copies.reset();
  return Step::next;
}
Step copy_wait(Machine&, Thread& t, const Instruction& i) {  // wait_group n, or wait_all
  const size_t left = i.args.empty() ? 0 : t.get<uint32_t>(i.at(0));
  t.polls = true;
  if (i.args.empty() && t.open_copies && t.open_copies->writing) return Step::stay;
  for (size_t k = 0; k + left < t.copies.size(); ++k)
    if (t.copies[k]->writing) return Step::stay;
  while (t.copies.size() > left) t.copies.pop_front();
  return Step::next;
}

}  // namespace

Exec memory(const Opcode& op, Instruction& i) {
  const auto base = op.base();
  i.bytes = bytes_of(op.type());
  i.flags = order(op);
  const bool shared = op.has("shared") || op.has("shared::cta") || op.has("shared::cluster");
  if (base == "ld" && i.bytes) return op.has("param") ? load_param : shared ? load_shared : op.has("global") ? load_global : nullptr;
  if (base == "st" && i.bytes && !op.has("async")) return shared ? store_shared : op.has("global") ? store_global : nullptr;
  if (base == "atom" || base == "red") return op.has("async") ? nullptr : atomic(op, i);
  if (op.starts("fence.proxy")) return proxy_fence;
  if (op.starts("fence.mbarrier_init")) return nothing;
  if (base == "fence" || base == "membar") return fence;
  if (op.starts("cp.async.ca") || op.starts("cp.async.cg")) {
    i.count = op.has("L2::cache_hint");
    if (op.has("cg")) i.flags |= kCoherent;
    return copy;
  }
  if (op.starts("cp.async.commit_group")) return copy_commit;
  if (op.starts("cp.async.wait_group") || op.starts("cp.async.wait_all")) return copy_wait;
  return nullptr;
}

}  // namespace ptx
