"""The CPU engine's threads (csrc/cpu/threads.h): units are dealt each once, memory that runs out does no harm, none ends to come anew."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
PROGRAM = r"""
#include <cstdio>
#include <thread>
#include "cpu/threads.h"

int main() {
  for (const int shares : {1, 2, 3, 8})
    for (const int64_t count : {1, 2, 7, 18, 1000, 100003})
      for (const int64_t grain : {1, 2, 4, 2000}) {
        for (const bool stalled : {false, true}) {  // share 0 stops after its first piece: the others must finish all but that
          lk::Units units(count, shares, grain);
          std::vector<std::atomic<int>> seen(static_cast<size_t>(count));
          const auto work = [&](int share) {
            for (int64_t u0, u1; units.take(share, u0, u1);) {
              for (int64_t u = u0; u < u1; u++) seen[static_cast<size_t>(u)]++;
              if (stalled && share == 0) return;
            }
          };
          if (stalled) work(0);
          std::vector<std::thread> threads;
          for (int s = stalled; s < shares; s++) threads.emplace_back(work, s);
          for (std::thread& t : threads) t.join();
          for (const auto& n : seen) {
            if (n == 1) continue;
            std::printf("%d shares, %ld units, grain %ld, stalled %d: one done %d times\n", shares, long(count), long(grain), stalled, n.load());
            return 1;
          }
        }
      }
}
"""


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++ here")
def test_every_unit_once_and_none_waits_for_a_stalled_thread(tmp_path):
    (tmp_path / "units.cpp").write_text(PROGRAM)
    subprocess.run(["g++", "-std=c++17", "-O1", "-pthread", f"-I{CSRC}", str(tmp_path / "units.cpp"), "-o", str(tmp_path / "units")], check=True)
    run = subprocess.run([str(tmp_path / "units")], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def run(code: str) -> str:
    pytest.importorskip("lora_kernels._C")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

SHORT_OF_MEMORY = """
import resource
import sympy.printing, torch, torch._dynamo  # nothing is left to import while memory is short
import lora_kernels as lk

torch.manual_seed(0)
torch.set_num_threads(2)
M, K, N, R, L = 20000, 256, 256, 16, 4
x, w = torch.randn(M, K), torch.randn(N, K)
pools = torch.randn(L, R, K, requires_grad=True), torch.randn(L, N, R, requires_grad=True)
ids, dy = torch.arange(M, dtype=torch.int32) % L, torch.randn(M, N)
for _ in range(8):  # every thread has its thread-local memory then, for want of which glibc ends the process
    lk.lora_batched_linear(x[:2000], w, None, *pools, ids[:2000]).sum().backward()
y = lk.lora_batched_linear(x, w, None, *pools, ids)

def grads(spare):  # with so many bytes of memory left
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + spare, -1))
    try:
        return torch.autograd.grad(y, pools, dy, retain_graph=True)
    except (MemoryError, RuntimeError):  # ours, or torch's
        return None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))

found = [grads(spare << 20) for spare in range(0, 80, 4)]
assert None in found
expected = grads(1 << 40)
assert all(torch.equal(a, b) for got in found if got for a, b in zip(got, expected))
"""


@linux
def test_memory_runs_out_in_a_parallel_region() -> None:
    """A MemoryError, and the next call is right: an exception that leaves a thread's region early would leave the others at work."""
    run(SHORT_OF_MEMORY)


THREADS = """
import os, torch, lora_kernels as lk

def newest():  # thread ids are given in order
    return max(map(int, os.listdir("/proc/self/task")))

torch.set_num_threads(6)
x, w, a, b = torch.randn(1, 2048), torch.randn(2048, 2048), torch.randn(16, 2048), torch.randn(2048, 16)
lk.lora_linear(x, w, None, a, b)
first = newest()
for _ in range(20):
    lk.lora_linear(x, w, None, a, b)
assert newest() == first
"""


@linux
def test_no_thread_ends_and_comes_anew() -> None:
    """libgomp ends the threads that a smaller team has no use for; 16 ranks make two shares here, y six."""
    run(THREADS)
