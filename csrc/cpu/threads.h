// PyTorch's own OpenMP pool, found at run time, so that one process holds one pool whichever torch wheel is installed.
#pragma once
#include <atomic>
#include <cstdint>

namespace lk {

// Runs body(context, share) for every share 0..shares-1, each once, on at most `shares` threads. Serial in a forked child (whose pool is gone),
// inside another parallel region (the pool gives one thread) and without OpenMP; the shares are the same in every case.
void run_shares(int shares, void (*body)(void*, int), void* context);

// True when a thread pool was found.
bool has_thread_pool();

// f(begin, end, share) over consecutive pieces of 0..units, at most `threads` of them. Results must not depend on where the cuts are.
template <class F>
void parallel(int64_t units, int threads, const F& f) {
  const int shares = static_cast<int>(units < threads ? units : threads);
  if (shares <= 1) {
    if (units > 0) f(int64_t{0}, units, 0);
    return;
  }
  struct Context {
    const F& f;
    int64_t units;
    int shares;
  } context{f, units, shares};
  run_shares(
      shares,
      [](void* p, int share) {
        const Context& c = *static_cast<Context*>(p);
        c.f(c.units * share / c.shares, c.units * (share + 1) / c.shares, share);
      },
      &context);
}

}  // namespace lk
