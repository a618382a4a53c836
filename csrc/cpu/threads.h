// PyTorch's own OpenMP pool, found at run time, so that one process holds one pool whichever torch wheel is installed; and how work is dealt to it.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace lk {

// Runs body(context, share) for every share 0..shares-1, each once, on the pool's threads, and then throws what the first of them threw. Serial
// in a forked child (whose pool is gone), inside another parallel region (the pool gives one thread) and without OpenMP; the shares are the same in
// every case.
void run_shares(int shares, void (*body)(void*, int), void* context);

template <class F>
void run_shares(int shares, const F& f) {
  run_shares(shares, [](void* p, int share) { (*static_cast<const F*>(p))(share); }, const_cast<void*>(static_cast<const void*>(&f)));
}

// True when a thread pool was found.
bool has_thread_pool();

// Units 0..count dealt to shares. Each has an even part, which it takes from the front in halves of what is left; one that is done takes from the
// back of another's. So a core that is slowed down (by a neighbour on its other hyperthread, say) costs its own speed and not the others' time.
class Units {
 public:
  Units(int64_t count, int shares, int64_t grain = 1) : parts_(static_cast<size_t>(shares)), grain_(grain) {
    for (int64_t s = 0; s < shares; s++) parts_[static_cast<size_t>(s)].left = pack(count * s / shares, count * (s + 1) / shares);
  }
  // The next piece [begin, end) for this share, its own up to a multiple of `grain` while they last; false: none is left.
  bool take(int share, int64_t& begin, int64_t& end) {
    for (size_t i = 0; i < parts_.size(); i++)
      if (take_of(parts_[(static_cast<size_t>(share) + i) % parts_.size()].left, i == 0, begin, end)) return true;
    return false;
  }
  static constexpr int64_t kMost = int64_t{1} << 31;  // units that fit a part's 32 bits

 private:
  struct alignas(64) Part {
    std::atomic<uint64_t> left{0};  // begin and end in one word. Relaxed order does: it hands out numbers, the pool's join publishes results
  };
  static uint64_t pack(int64_t begin, int64_t end) { return static_cast<uint64_t>(begin) << 32 | static_cast<uint64_t>(end); }
  bool take_of(std::atomic<uint64_t>& part, bool own, int64_t& begin, int64_t& end) {
    uint64_t left = part.load(std::memory_order_relaxed);
    for (;;) {
      const int64_t b = static_cast<int64_t>(left >> 32), e = static_cast<int64_t>(left & 0xffffffffu), half = (e - b + 1) / 2;
      if (b >= e) return false;
      const int64_t in_grains = std::min(std::max((b + half) / grain_, b / grain_ + 1) * grain_, e) - b;
      const int64_t n = parts_.size() == 1 ? e - b : own ? in_grains : half;
      if (part.compare_exchange_weak(left, own ? pack(b + n, e) : pack(b, e - n), std::memory_order_relaxed)) {
        begin = own ? b : e - n, end = own ? b + n : e;
        return true;
      }
    }
  }
  std::vector<Part> parts_;
  int64_t grain_;
};

// f(begin, end, share) over consecutive pieces of 0..units; pieces of one share never overlap in time. Results must not depend on where the cuts are.
template <class F>
void parallel(int64_t units, int threads, const F& f) {
  const int shares = static_cast<int>(units < threads ? units : threads);
  if (shares <= 1 || units >= Units::kMost) {
    if (units > 0) f(int64_t{0}, units, 0);
    return;
  }
  const int64_t grain = std::max<int64_t>(units / shares / 4, 1);  // a call for each single unit would cost more than it evens out
  Units left(units, shares, grain);
  run_shares(shares, [&](int share) {
    for (int64_t begin, end; left.take(share, begin, end);) f(begin, end, share);
  });
}

}  // namespace lk
