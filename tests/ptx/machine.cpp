// Grids, blocks and threads in a random interleaving.
#include "machine.h"

#include <algorithm>

namespace ptx {

Machine& Machine::instance() {
  static Machine machine;
  return machine;
}

// ---- threads ----

std::string place(const Thread& t) {
  const auto& i = t.cta->grid->launch.kernel->code[t.pc];
  std::string text = i.text;
  std::replace(text.begin(), text.end(), '\n', ' ');
  if (text.size() > 120) text = text.substr(0, 117) + "...";
  return t.cta->grid->launch.kernel->name.substr(0, 60) + " block " + std::to_string(t.cta->id[0]) + " thread " + std::to_string(t.index) + " " +
         i.where + " `" + text + "`";
}

void Thread::in_flight(uint32_t) const { throw Error("accumulator used before wgmma.wait_group: " + place(*this)); }

uint64_t Thread::parameter(uint64_t offset) const { return reinterpret_cast<uint64_t>(cta->grid->launch.params.data()) + offset; }

uint64_t Thread::special(uint64_t which) const {
  const Launch& l = cta->grid->launch;
  switch (which) {
    case tid_x:
      return index % l.block[0];
    case tid_y:
      return index / l.block[0] % l.block[1];
    case tid_z:
      return index / l.block[0] / l.block[1];
    case ntid_x:
      return l.block[0];
    case ntid_y:
      return l.block[1];
    case ntid_z:
      return l.block[2];
    case ctaid_x:
      return cta->id[0];
    case ctaid_y:
      return cta->id[1];
    case ctaid_z:
      return cta->id[2];
    case nctaid_x:
      return l.grid[0];
    case nctaid_y:
      return l.grid[1];
    case nctaid_z:
      return l.grid[2];
    case laneid:
      return index % 32;
    case warpid:
      return index / 32;
    case cluster_ctarank:
      return cta->rank;
    case cluster_nctarank:
      return l.cluster;
    default:
      return Machine::instance().clock;
  }
}

void Machine::wake(Thread* t) {
  if (t->runnable >= 0 || t->done) return;
  t->runnable = int(runnable.size());
  runnable.push_back(t);
}

void Machine::sleep(Thread* t) {
  if (t->runnable < 0) return;
  runnable[t->runnable] = runnable.back();
  runnable[t->runnable]->runnable = t->runnable;
  runnable.pop_back();
  t->runnable = -1;
}

bool Machine::meet(Thread& t, Meeting& meeting, size_t members) {
  auto& here = meeting[t.pc];
  here.push_back(&t);
  if (here.size() < members) return false;
  met = std::move(here);
  meeting.erase(t.pc);
  std::sort(met.begin(), met.end(), [](const Thread* a, const Thread* b) { return a->index < b->index; });
  for (Thread* other : met)
    if (other != &t) ++other->pc, wake(other);
  return true;
}

// ---- grids ----

void Machine::launch(Launch l) {
  auto grid = std::make_unique<Grid>();
  grid->total = l.grid[0] * l.grid[1] * l.grid[2];
  grid->launch = std::move(l);
  if (!grid->launch.dependent) synchronize();
  grids.push_back(std::move(grid));
  run(grids.back()->launch.kernel->starts_next);
}

void Machine::synchronize() { run(false); }

void Machine::admit() {
  size_t resident = 0;
  for (const auto& g : grids)
    for (const auto& c : g->clusters) resident += c->alive ? c->ctas.size() : 0;
  for (size_t n = 0; n < grids.size(); ++n) {
    Grid& g = *grids[n];
    if (n > 0 && grids[n - 1]->released < grids[n - 1]->total) return;
    while (g.begun < g.total && (resident == 0 || resident + g.launch.cluster <= multiprocessors)) {
      auto cluster = std::make_unique<Cluster>();
      for (uint32_t rank = 0; rank < g.launch.cluster; ++rank) {
        auto cta = std::make_unique<Cta>();
        const uint32_t number = g.begun++, *size = g.launch.grid, threads = g.launch.block[0] * g.launch.block[1] * g.launch.block[2];
        cta->grid = &g, cta->cluster = cluster.get(), cta->rank = rank, cta->alive = threads;
        cta->id[0] = number % size[0], cta->id[1] = number / size[0] % size[1], cta->id[2] = number / size[0] / size[1];
        cta->shared.assign(kSharedBase + g.launch.kernel->shared_bytes + g.launch.dynamic_bytes, 0xFF);  // NaN: what was never written is found
        cta->granules.resize(cta->shared.size() / 16 + 1);
        cta->warps.resize((threads + 31) / 32);
        cta->warpgroups.resize((threads + 127) / 128);
        for (uint32_t i = 0; i < threads; ++i) {
          auto t = std::make_unique<Thread>();
          t->cta = cta.get(), t->index = i;
          t->registers.resize(g.launch.kernel->registers);
          t->busy.resize(g.launch.kernel->registers);
          wake(t.get());
          cta->threads.push_back(std::move(t));
        }
        cluster->alive += threads;
        cluster->ctas.push_back(std::move(cta));
      }
      resident += g.launch.cluster;
      g.clusters.push_back(std::move(cluster));
    }
    if (g.begun < g.total) return;
  }
}

void Machine::finish(Thread& t) {
  Cta& cta = *t.cta;
  Cluster& cluster = *cta.cluster;
  Grid& grid = *cta.grid;
  for (const auto& group : t.bulk)
    if (group->reading) throw Error("a bulk store still reads the shared memory of a thread that exits: " + place(t));
  sleep(&t);
  t.done = true;
  --cluster.alive;
  if (--cta.alive == 0) {
    drain(cta);
    if (!cta.started_next) ++grid.released, cta.started_next = true;
    ++grid.ended;
    for (const auto& g : cta.granules)
      if (g.arriving) throw Error("a block has exited while an asynchronous copy writes its shared memory: " + place(t));
  }
  if (cluster.alive > 0) return;
  for (const auto& c : cluster.ctas) {  // the threads stay: who wrote what is asked until the grid ends
    c->shared = {};
    for (const auto& thread : c->threads) thread->registers = {}, thread->busy = {};
  }
}

void Machine::deadlock() const {
  std::map<std::string, int> where;
  for (const auto& g : grids)
    for (const auto& c : g->clusters)
      for (const auto& cta : c->ctas)
        for (const auto& t : cta->threads)
          if (!t->done) ++where[t->cta->grid->launch.kernel->code[t->pc].where + " " + t->cta->grid->launch.kernel->code[t->pc].text];
  std::string text = "deadlock; threads wait at";
  for (const auto& [at, count] : where) text += "\n  " + std::to_string(count) + " x " + at;
  throw Error(text);
}

void Machine::slice(Thread& t, uint64_t steps) {
  const auto& code = t.cta->grid->launch.kernel->code;
  while (steps-- > 0) {
    const Instruction& i = code[t.pc];
    ++clock;
    if (i.guard != kNone && bool(t.registers[i.guard] & 1) == i.unless) {
      ++t.pc;
      continue;
    }
    t.polls = false;
    switch (i.exec(*this, t, i)) {
      case Step::next:
        ++t.pc;
        break;
      case Step::jump:
        break;
      case Step::stay:
        return sleep(&t);
      case Step::yield:
        ++t.pc;
        return;
      case Step::exit:
        return finish(t);
    }
  }
}

void Machine::run(bool keep_last) {
  try {
    while (!grids.empty()) {
      while (!grids.empty() && grids.front()->done() && pending.empty()) {
        grids.pop_front();
        if (!grids.empty())
          for (Thread* t : grids.front()->waiting_for_previous) wake(t);
      }
      if (grids.empty()) return;
      if (keep_last && grids.size() == 1) return;  // nothing of it has run yet, or it goes on beside the next
      admit();
      if (!pending.empty() && (runnable.empty() || pending.begin()->first <= clock)) {
        const auto operation = std::move(pending.begin()->second);
        pending.erase(pending.begin());
        operation();
      } else if (!runnable.empty()) {
        const uint64_t before = clock;
        slice(*runnable[dice(runnable.size())], dice(3) == 0 ? 1 + dice(20) : 4000);
        if ((steps_ += clock - before) > step_limit) throw Error("no end after " + std::to_string(step_limit) + " instructions");
      } else {
        deadlock();
      }
    }
  } catch (...) {
    runnable.clear(), pending.clear(), grids.clear();
    steps_ = 0;
    throw;
  }
  steps_ = 0;
}

}  // namespace ptx
