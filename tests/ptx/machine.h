// What the emulator knows of a running grid: threads, blocks, clusters, shared memory with its asynchronous accesses, global memory as one block sees
// it.
#pragma once
#include <sys/mman.h>

#include <array>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <unordered_map>

#include "program.h"

#ifndef MAP_32BIT
#define MAP_32BIT 0  // of x86 alone
#endif

namespace ptx {

struct Cta;
struct Cluster;
struct Grid;

// Asynchronous operations that a thread waits for together: cp.async or cp.async.bulk, by commit_group.
struct Group {
  int reading = 0, writing = 0;  // operations that have not read their source, not written their destination
};

struct Thread {
  Cta* cta = nullptr;
  uint32_t index = 0, pc = 0;
  int runnable = -1;                      // place in Machine::runnable
  bool done = false, polls = false;       // polls: waits at an instruction that looks again whenever an asynchronous operation ends
  uint64_t synced = 0;                    // time at which it last passed a barrier: what others stored before that, a release of its own covers
  uint64_t fenced = 0;                    // time of its latest proxy fence
  uint32_t committed = 0, completed = 0;  // wgmma groups
  uint32_t cluster_phase = 0;
  std::vector<uint64_t> registers;
  std::vector<uint32_t> busy;  // number of the wgmma group that writes this register; above `completed` it may still do so
  std::deque<std::shared_ptr<Group>> copies, bulk;
  std::shared_ptr<Group> open_copies, open_bulk;

  template <class T>
  T get(const Operand&) const;
  template <class T>
  void set(const Operand&, T);
  uint64_t address(const Operand& o) const {  // [register + offset], [symbol + offset], [parameter + offset]
    if (o.kind == Kind::imm) return o.value;
    if (o.kind == Kind::param) return parameter(o.value);
    return registers[o.reg] + o.value;
  }
  bool predicate(const Operand& o) const { return (get<uint64_t>(o) & 1) != o.negated; }
  uint32_t lane() const { return index % 32; }
  uint64_t special(uint64_t which) const;
  uint64_t parameter(uint64_t offset) const;  // its address
  [[noreturn]] void in_flight(uint32_t reg) const;
};

struct Barrier {  // an mbarrier
  int expected = 0, pending = 0;
  int64_t bytes = 0;
  uint32_t phase = 0;
  std::vector<Thread*> waiting;
};

struct Granule {         // 16 bytes of shared memory
  uint64_t written = 0;  // time of the latest ordinary store, 0: none
  const Thread* writer = nullptr;
  int arriving = 0;  // asynchronous writes under way
  int leaving = 0;   // asynchronous reads under way
};

// Threads that wait for each other at one instruction.
using Meeting = std::map<uint32_t, std::vector<Thread*>>;

struct Stored {
  std::array<int16_t, 16> bytes;  // -1: none
  uint64_t time = 0;
  const Thread* writer = nullptr;
};

struct Warpgroup {
  Meeting meeting;
  std::vector<uint32_t> read;                                     // granules read by the group not yet committed
  std::deque<std::pair<uint32_t, std::vector<uint32_t>>> groups;  // committed, not waited for
};

struct Cta {
  Grid* grid = nullptr;
  Cluster* cluster = nullptr;
  uint32_t id[3] = {}, rank = 0, alive = 0;
  bool started_next = false;
  std::vector<uint8_t> shared;
  std::vector<Granule> granules;
  std::unordered_map<uint32_t, Barrier> barriers;
  std::map<uint32_t, std::vector<Thread*>> named;  // bar.sync
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Meeting> warps;
  std::vector<Warpgroup> warpgroups;
  std::unordered_map<uint64_t, Stored> stores;               // what this block has written and the others do not see yet, by 16 bytes
  std::unordered_map<uint64_t, std::array<uint8_t, 32>> l1;  // sectors as first read
};

struct Cluster {
  std::vector<std::unique_ptr<Cta>> ctas;
  uint32_t arrived = 0, phase = 0, alive = 0;
  std::vector<Thread*> waiting;
};

// Memory below 4 GiB: PTX of Triton 3.9 takes the address of a parameter in 32 bits.
template <class T>
struct Low {
  using value_type = T;
  T* allocate(size_t n) {
    void* p = mmap(nullptr, n * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    return static_cast<T*>(p);
  }
  void deallocate(T* p, size_t n) { munmap(p, n * sizeof(T)); }
  bool operator==(const Low&) const { return true; }
};

struct Launch {
  std::shared_ptr<const Kernel> kernel;
  uint32_t grid[3] = {1, 1, 1}, block[3] = {1, 1, 1}, cluster = 1, dynamic_bytes = 0;
  bool dependent = false;  // may start before the grid ahead of it has ended
  std::vector<uint8_t, Low<uint8_t>> params;
};

struct Grid {
  Launch launch;
  uint32_t begun = 0, ended = 0, total = 0, released = 0;  // blocks; released: those that let the next grid start
  std::vector<std::unique_ptr<Cluster>> clusters;          // resident
  std::vector<Thread*> waiting_for_previous;
  std::unordered_map<uint64_t, std::pair<uint64_t, Thread*>> written;  // time and writer of ordinary stores to global memory, by 32 bytes
  bool done() const { return ended == total; }
};

struct Machine {
  static Machine& instance();
  uint32_t multiprocessors = 4;  // blocks resident at a time
  uint64_t step_limit = 4'000'000'000;
  std::mt19937_64 random{1};

  uint64_t clock = 1;
  std::vector<Thread*> runnable;
  std::multimap<uint64_t, std::function<void()>> pending;  // asynchronous operations under way, by the time when they are done
  std::deque<std::unique_ptr<Grid>> grids;                 // running or waiting to, oldest first; at most two

  void launch(Launch);  // runs it, or keeps it where the next launch may overlap it
  void synchronize();

  void wake(Thread*);
  void notify(Thread* t) {
    if (t->polls) wake(t);
  }
  void sleep(Thread*);
  uint64_t dice(uint64_t sides) { return random() % sides; }

  // Something the hardware does by itself, soon or much later.
  void later(std::function<void()> operation) { pending.emplace(clock + (dice(4) ? dice(1000) : dice(300000)), std::move(operation)); }

  // Meets at the current instruction; true for the last of `members`, whose threads are then in `met` (in order of their index) and awake.
  bool meet(Thread&, Meeting&, size_t members);
  std::vector<Thread*> met;

  // ---- shared memory; an address is an offset in this block, or holds a rank + 1 of the cluster above bit 24 ----
  Cta& owner(Thread&, uint32_t& address) const;
  uint8_t* shared(Thread&, uint32_t address, uint32_t bytes, bool write);  // an ordinary access, checked
  // An asynchronous write is issued by the thread: nobody may read or write there until it has landed. bulk: by the asynchronous proxy (TMA).
  void expect_write(Thread&, Cta&, uint32_t address, uint32_t bytes, bool bulk);
  // An asynchronous read is issued: ordinary stores must have been fenced, and nobody may write there until it is done.
  void expect_read(Thread&, Cta&, uint32_t granule, uint64_t fenced);

  // ---- global memory ----
  void load(Thread&, uint64_t address, void* to, uint32_t bytes, bool coherent);
  void store(Thread&, uint64_t address, const void* from, uint32_t bytes);
  void release(Thread&);               // what it has stored, or others before a barrier that it has passed, reaches everyone
  void drain(Cta&);                    // all that the block has stored
  void drain(Cta&, uint64_t granule);  // one piece of it

  // ---- mbarriers ----
  Barrier& barrier(Cta&, uint32_t address);
  void arrive(Barrier&, int arrivals, int64_t bytes);  // and ends the phase when nothing is missing

 private:
  void run(bool keep_last);  // until no grid is left, or only one that the next launch may overlap
  void admit();              // blocks to free multiprocessors
  void slice(Thread&, uint64_t steps);
  void finish(Thread&);
  [[noreturn]] void deadlock() const;
  uint64_t steps_ = 0;
};

// A kernel of a loaded module, as the stand-ins for driver and runtime hold it.
struct Function {
  std::string module, name;
  std::shared_ptr<const Kernel> kernel;  // parsed at the first launch
  uint64_t fault = 0;                    // the planted fault that it was parsed with
};
bool launch(Function&, Launch, void** arguments);  // false: last_error() says what went wrong
std::string& last_error();

std::string place(const Thread&);  // kernel, block, thread, instruction

// ---- registers ----

template <class T>
T Thread::get(const Operand& o) const {
  uint64_t v = o.value;
  if (o.kind == Kind::reg) {
    v = registers[o.reg];
    if (busy[o.reg] > completed) in_flight(o.reg);
  } else if (o.kind == Kind::param) {
    v = parameter(o.value);
  } else if (o.kind == Kind::special) {
    v = special(o.value);
  }
  T out;
  std::memcpy(&out, &v, sizeof out);
  return out;
}

template <class T>
void Thread::set(const Operand& o, T value) {
  if (o.kind == Kind::sink) return;
  uint64_t v = 0;
  std::memcpy(&v, &value, sizeof value);
  registers[o.reg] = v;
  busy[o.reg] = 0;
}

}  // namespace ptx
