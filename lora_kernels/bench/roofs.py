"""The two ceilings of this device, measured first: memory bandwidth and matrix-product rate."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ..ops.lora_linear import lora_linear

SLOW = 4  # times below the float32 rate


def _seconds(run: Callable[[], object], device: torch.device, repeats: int = 15, patience: float = 1.0) -> float:
    """Least seconds of `run` after warm-ups: a ceiling is the best this device was seen to do. On a CPU for `patience` seconds, at least once."""
    times: list[float] = []
    if device.type == "cuda":
        run(), run()
        for _ in range(repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return min(times)
    run()
    began = now = time.perf_counter()
    while not times or now - began < patience:
        run()
        before, now = now, time.perf_counter()
        times.append(now - before)
    return min(times)


@functools.cache
def bandwidth(device: torch.device) -> float:
    """Bytes per second: the better of a large copy (read + written) and a large sum (read)."""
    count = (1 << 30 if device.type == "cuda" else 1 << 26) // 2
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    copy = 8 * count / _seconds(lambda: target.copy_(source), device)
    return max(copy, 4 * count / _seconds(lambda: torch.sum(source), device))


def _by_library(a: Tensor, b: Tensor) -> Tensor:
    """cuBLAS, oneDNN or MKL."""
    return a @ b


def _by_us(a: Tensor, b: Tensor) -> Tensor:
    return lora_linear(a, b, None, a[:1], a[:, :1])


@functools.cache
def product(device: torch.device, dtype: str, run: Callable[[Tensor, Tensor], Tensor]) -> float:
    """FLOP per second of a large square product of random numbers by `run`.

    On a CPU small ones go first, and the larger one only where it would take less than a second a call: three sizes, so that a busy moment
    of the machine, which costs a small product most, does not stand.
    """
    rate = 0.0
    for size in (8192,) if device.type == "cuda" else (256, 768, 1536):
        if rate and 2 * size**3 > rate:
            break
        a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
        rate = max(rate, 2 * size**3 / _seconds(lambda a=a, b=b: run(a, b), device, patience=1.0 if size >= 1536 else 0.2))
    return rate


@functools.cache
def flops(device: torch.device, dtype: str) -> float:
    """FLOP per second that this device was seen to reach with operands of `dtype`.

    On a CPU the best of the library's product, ours, and both in float32, to which 16-bit operands can be widened: where the CPU has AVX2
    alone, PyTorch's bfloat16 product runs at less than 1 % of its float32 product, which is no ceiling of the machine.
    """
    if device.type == "cuda":
        return product(device, dtype, _by_library)
    return max(product(device, d, run) for d in {dtype, "float32"} for run in (_by_library, _by_us))


def slow_16_bit(device: torch.device) -> bool:
    """Whether PyTorch's bfloat16 product is so slow here that nobody would train in it."""
    return device.type == "cpu" and SLOW * product(device, "bfloat16", _by_library) < product(device, "float32", _by_library)


def floor_seconds(moved: int, computed: int, device: torch.device, dtype: str) -> float:
    """The larger of bytes over bandwidth and operations over rate: no version runs much faster."""
    return max(moved / bandwidth(device), computed / flops(device, dtype))
