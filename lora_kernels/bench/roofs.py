"""The two ceilings of this device, measured first: memory bandwidth and matrix-product rate."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch


def _seconds(run: Callable[[], object], device: torch.device, repeats: int = 15) -> float:
    """Least seconds of `run` after two warm-ups: a ceiling is the best this device was seen to do."""
    run()
    run()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
    return min(times)


@functools.cache
def bandwidth(device: torch.device) -> float:
    """Bytes per second: the better of a large copy (read + written) and a large sum (read)."""
    count = (1 << 30 if device.type == "cuda" else 1 << 26) // 2
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    copy = 8 * count / _seconds(lambda: target.copy_(source), device)
    return max(copy, 4 * count / _seconds(lambda: torch.sum(source), device))


@functools.cache
def flops(device: torch.device, dtype: str) -> float:
    """FLOP per second of the vendor library (cuBLAS, oneDNN or MKL) on a large square product of random numbers."""
    size = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: a @ b, device)


def floor_seconds(moved: int, computed: int, device: torch.device, dtype: str) -> float:
    """The larger of bytes over bandwidth and operations over rate: no version runs much faster."""
    return max(moved / bandwidth(device), computed / flops(device, dtype))
