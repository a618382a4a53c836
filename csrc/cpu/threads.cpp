#include "threads.h"

#include <exception>
#include <initializer_list>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#define LK_HAS_DLFCN 1
#endif

namespace lk {
namespace {

// libgomp's entry, also exported by libiomp5 and libomp. Linking a libgomp of our own would start a second pool that fights torch's for the cores.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

std::atomic<bool> forked{false};
#ifdef LK_HAS_DLFCN
// From the load on, for a parent may have used torch's pool and never ours.
[[maybe_unused]] const int watching = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

Parallel find_pool() {
#ifdef LK_HAS_DLFCN
  for (const char* name : {"libtorch_cpu.so", "libtorch_cpu.dylib"}) {
    if (void* torch = dlopen(name, RTLD_LAZY | RTLD_NOLOAD)) {  // finds a symbol in the library's own dependencies: the pool that torch uses
      if (void* f = dlsym(torch, "GOMP_parallel")) return reinterpret_cast<Parallel>(f);
    }
  }
  return reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
  return nullptr;
#endif
}

Parallel pool() {
  static const Parallel found = find_pool();
  return found;
}

struct Job {
  void (*body)(void*, int);
  void* context;
  int shares;
  std::atomic<int> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr failure{};  // the first one's, of memory that could not be had
};

void work(void* p) {  // a thread takes shares until none is left, so any number of threads does
  Job& job = *static_cast<Job*>(p);
  for (int share = job.next++; share < job.shares; share = job.next++) {
    try {
      job.body(job.context, share);
    } catch (...) {  // past the pool's join the other threads would work on what has been unwound
      if (!job.failed.exchange(true)) job.failure = std::current_exception();
    }
  }
}

}  // namespace

bool has_thread_pool() { return pool() != nullptr; }

void run_shares(int shares, void (*body)(void*, int), void* context) {
  Job job{body, context, shares};
  if (shares > 1 && pool() && !forked)
    pool()(work, &job, 0, 0);  // all threads, as torch does: libgomp ends those that a smaller team does without, and the next team makes them anew
  else
    work(&job);
  if (job.failure) std::rethrow_exception(job.failure);
}

}  // namespace lk
