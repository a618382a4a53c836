"""How the CPU engine deals units to threads (csrc/cpu/threads.h): each once, and a slow thread's share to those that are done."""

import shutil
import subprocess
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
