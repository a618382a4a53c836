"""Peak memory of one run, beyond what was allocated before it."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes a line to stderr at every start and stop otherwise


def peak(run: Callable[[], object], device: torch.device) -> int:
    """Bytes. On a GPU the allocator's own count; on a CPU the running sum of the allocations that torch's profiler saw."""
    run()  # so that what is made once (workspaces, compiled code, packed weights) does not count
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
