"""The passes over x beside the GEMM: shrink, with and without dropout, and the tall-skinny dA and dB, as a share of this GPU's copy bandwidth.

Usage: python benchmarks/rank_passes.py          prints one line per pass; target 75 %

Bytes counted: x (or dy) read once, the packed mask written or read once; h, g, A and the partial sums are rank-sized and left out.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

import torch

from lora_kernels import _device, testing
from lora_kernels.bench import roofs
from lora_kernels.kernels._launch import on_device
from lora_kernels.kernels.shrink import Shrink
from lora_kernels.kernels.tall_skinny import TallSkinny
from lora_kernels.native import cuda
from lora_kernels.reference import dropout_mask

P = 0.05
SHAPES = [(8192, 4096), (8192, 14336)]  # M, K


def passes(M: int, K: int, R: int, device: str = "cuda") -> Iterator[tuple[str, bool, Callable[[], object]]]:
    """Name, whether it moves the mask, call (which returns nothing, or the CUDA kernel's h)."""
    x, a, g, h, out, turned = (torch.randn(shape, device=device).to(torch.bfloat16) for shape in ((M, K), (R, K), (M, R), (M, R), (R, K), (K, R)))
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    mask = dropout_mask(seed, M, K, P)
    for p in (0.0, P):
        name = " with dropout" if p else ""
        shrink, reduce = Shrink(x, a, p), TallSkinny(x, R, transposed=True, dropout_p=p)
        made, drawn = (mask, seed) if p else (None, None)
        yield f"triton shrink{name}", p > 0, lambda run=shrink, m=made, s=drawn: on_device(x, run, x, a, h, m, s, 1.0)
        yield f"triton dA{name}", p > 0, lambda run=reduce, m=made: on_device(x, run, x, g, m, out)
        if cuda.unusable() is None and _device.cuda_capability(0) == (9, 0):
            yield f"cuda shrink{name}", p > 0, lambda m=made, s=drawn, p=p: cuda.shrink(x, a, 1.0, False, m, s, p)
    tall = TallSkinny(x, R, transposed=False)
    yield "triton dB", False, lambda: on_device(x, tall, x, g, None, turned)


def main() -> None:
    copy = roofs.bandwidth(torch.device("cuda"))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, dropout {P:g}; copy {copy / 1e9:.0f} GB/s; median of 30, cold L2")
    print(f"{'M':>6} {'K':>6} {'R':>3}  {'pass':<26} {'us':>8} {'GB/s':>6} {'% of copy':>9}")
    for M, K in SHAPES:
        for R in (16, 64):
            found = list(passes(M, K, R))
            times = testing.time_cuda_cold({name: call for name, _, call in found}, rounds=30)
            for name, masked, _ in found:
                middle = statistics.median(times[name])
                rate = (2 * M * K + masked * M * K / 8) / middle
                print(f"{M:6} {K:6} {R:3}  {name:<26} {1e6 * middle:8.1f} {rate / 1e9:6.0f} {100 * rate / copy:9.0f}", flush=True)


if __name__ == "__main__":
    main()
