// What threads do together: barriers of a block, a warp, a cluster; shuffles, votes; one grid waiting for another.
#include <algorithm>

#include "machine.h"

namespace ptx {
namespace {

Step barrier_sync(Machine& m, Thread& t, const Instruction& i) {  // bar.sync name (, threads)
  const auto name = t.get<uint32_t>(i.args[0]);
  const size_t count = i.args.size() > 1 ? t.get<uint32_t>(i.args[1]) : t.cta->threads.size();
  auto& waiting = t.cta->named[name];
  waiting.push_back(&t);
  if (waiting.size() < count) return Step::stay;
  for (Thread* other : waiting) {
    other->synced = m.clock;
    if (other != &t) ++other->pc, m.wake(other);
  }
  waiting.clear();
  return Step::next;
}

bool warp(Machine& m, Thread& t, uint32_t mask) { return m.meet(t, t.cta->warps[t.index / 32], std::popcount(mask)); }

Step warp_sync(Machine& m, Thread& t, const Instruction& i) { return warp(m, t, t.get<uint32_t>(i.args[0])) ? Step::next : Step::stay; }

Step cluster_arrive(Machine& m, Thread& t, const Instruction&) {
  Cluster& c = *t.cta->cluster;
  t.cluster_phase = c.phase + 1;
  m.release(t);
  if (++c.arrived < c.alive) return Step::next;
  c.arrived = 0;
  ++c.phase;
  for (Thread* waiting : c.waiting) m.wake(waiting);
  c.waiting.clear();
  return Step::next;
}
Step cluster_wait(Machine& m, Thread& t, const Instruction&) {
  Cluster& c = *t.cta->cluster;
  if (c.phase >= t.cluster_phase) return t.synced = m.clock, t.cta->l1.clear(), Step::next;
  c.waiting.push_back(&t);
  return Step::stay;
}

// shfl.sync.mode d[|p], a, b, c, mask
Step shuffle(Machine& m, Thread& t, const Instruction& i) {
  if (!warp(m, t, t.get<uint32_t>(i.at(4)))) return Step::stay;
  uint32_t values[32] = {};
  for (Thread* one : m.met) values[one->lane()] = one->get<uint32_t>(i.at(1));
  for (Thread* one : m.met) {
    const uint32_t lane = one->lane(), b = one->get<uint32_t>(i.at(2)) & 31, c = one->get<uint32_t>(i.at(3)), segment = c >> 8 & 31;
    const uint32_t lowest = lane & segment, limit = lowest | (c & 31 & ~segment);
    const int j = i.shape == 'u'   ? int(lane) - int(b)
                  : i.shape == 'd' ? int(lane + b)
                  : i.shape == 'b' ? int(lane ^ b)
                                   : int(lowest | (b & ~segment));
    const bool inside = i.shape == 'u' ? j >= int(limit) : j <= int(limit);
    one->set(i.at(0), values[inside ? j : int(lane)]);
    if (i.size(0) > 1) one->set<uint64_t>(i.at(0, 1), inside);
  }
  return Step::next;
}

Step vote(Machine& m, Thread& t, const Instruction& i) {
  if (!warp(m, t, t.get<uint32_t>(i.at(2)))) return Step::stay;
  uint32_t ballot = 0;
  for (Thread* one : m.met) ballot |= uint32_t(one->predicate(i.at(1))) << one->lane();
  for (Thread* one : m.met)
    one->set<uint64_t>(i.at(0), i.shape == 'a' ? size_t(std::popcount(ballot)) == m.met.size() : i.shape == 'o' ? ballot != 0 : ballot);
  return Step::next;
}

template <class T>
Step reduce(Machine& m, Thread& t, const Instruction& i) {
  if (!warp(m, t, t.get<uint32_t>(i.at(2)))) return Step::stay;
  T v = m.met.front()->get<T>(i.at(1));
  for (size_t k = 1; k < m.met.size(); ++k) {
    const T w = m.met[k]->get<T>(i.at(1));
    v = i.shape == '+'   ? T(v + w)
        : i.shape == '<' ? std::min(v, w)
        : i.shape == '>' ? std::max(v, w)
        : i.shape == '&' ? T(v & w)
        : i.shape == '|' ? T(v | w)
                         : T(v ^ w);
  }
  for (Thread* one : m.met) one->set(i.at(0), v);
  return Step::next;
}

Step elect(Machine& m, Thread& t, const Instruction& i) {  // elect.sync d|p, mask
  if (!warp(m, t, t.get<uint32_t>(i.at(1)))) return Step::stay;
  for (Thread* one : m.met) {
    one->set(i.at(0), m.met.front()->lane());
    one->set<uint64_t>(i.at(0, 1), one == m.met.front());
  }
  return Step::next;
}

Step let_next_start(Machine&, Thread& t, const Instruction&) {
  if (!t.cta->started_next) ++t.cta->grid->released, t.cta->started_next = true;
  return Step::next;
}
Step wait_for_previous(Machine& m, Thread& t, const Instruction&) {
  Grid& grid = *t.cta->grid;
  if (m.grids.front().get() == &grid) return t.cta->l1.clear(), Step::next;
  grid.waiting_for_previous.push_back(&t);
  return Step::stay;
}

}  // namespace

Exec collective(const Opcode& op, Instruction& i) {
  if (op.text == "bar.sync" || op.starts("barrier.sync")) return barrier_sync;
  if (op.text == "bar.warp.sync") return warp_sync;
  if (op.starts("barrier.cluster.arrive")) return cluster_arrive;
  if (op.starts("barrier.cluster.wait")) return cluster_wait;
  if (op.starts("griddepcontrol.launch")) return let_next_start;
  if (op.starts("griddepcontrol.wait")) return wait_for_previous;
  if (op.starts("elect.sync")) return elect;
  if (op.starts("shfl.sync")) return i.shape = op.has("up") ? 'u' : op.has("down") ? 'd' : op.has("bfly") ? 'b' : 'i', shuffle;
  if (op.starts("vote.sync")) return i.shape = op.has("all") ? 'a' : op.has("any") ? 'o' : 'b', op.has("uni") ? nullptr : vote;
  if (op.starts("redux.sync")) {
    i.shape = op.has("add") ? '+' : op.has("min") ? '<' : op.has("max") ? '>' : op.has("and") ? '&' : op.has("or") ? '|' : '^';
    return op.type() == "s32" ? reduce<int32_t> : reduce<uint32_t>;
  }
  return nullptr;
}

}  // namespace ptx
