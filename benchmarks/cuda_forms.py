"""Every form of the CUDA GEMM against cuBLAS on the base product alone, interleaved in one run with a cold L2: what a plan should name.

Usage: python benchmarks/cuda_forms.py [--seconds 40]          prints one line per shape and form, as it goes
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from lora_kernels import testing
from lora_kernels.native import cuda
from lora_kernels.native.cuda import Form
from lora_kernels.tuning.plan import CUDA_TILES

# M, N, K: Llama-3-8B and 70B projections, training and smaller batches
SHAPES = [(8192, 4096, 4096), (8192, 14336, 4096), (8192, 4096, 14336), (8192, 8192, 8192), (8192, 1024, 4096), (2048, 4096, 4096), (512, 4096, 4096)]


def forms(M: int, N: int, K: int, device: str = "cuda") -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call: the main loop alone, forward and dx with h in column 0, the two-launch forms, dx with dropout, the shrink."""
    x = torch.randn(M, K, device=device, dtype=torch.bfloat16)
    w, wt = (torch.randn(*s, device=device, dtype=torch.bfloat16) * K**-0.5 for s in ((N, K), (K, N)))
    yield "cublas", lambda: F.linear(x, w)
    yield "cublas dx", lambda: x @ wt
    for tile in CUDA_TILES:
        for cluster in (1, 2):
            how, name = Form(False, *tile, cluster), "{}x{} cluster {}".format(*tile, cluster)
            yield f"base {name}", lambda how=how: cuda.linear(x, w, None, None, None, None, 1.0, False, how=how)
            yield f"base dx {name}", lambda how=how: cuda.linear(x, wt, None, None, None, None, 1.0, True, how=how)
    for R in (16, 64):
        a, b = (torch.randn(*s, device=device, dtype=torch.bfloat16) * 0.05 for s in ((R, K), (N, R)))
        at, bt, h = a.t().contiguous(), b.t().contiguous(), torch.randn(M, R, device=device, dtype=torch.bfloat16)
        mask = torch.randint(-(2**31), 2**31, (M, -(-N // 32)), device=device, dtype=torch.int32)
        for cluster in (1, 2):
            column0, update = Form(True, 128, 256, cluster), Form(False, 128, 256, cluster)
            yield f"column0 R{R} cluster {cluster}", lambda a=a, b=b, how=column0: cuda.linear(x, w, None, a, b, None, 1.0, False, how=how)
            yield f"dx column0 R{R} cluster {cluster}", lambda a=at, b=bt, how=column0: cuda.linear(x, wt, None, a, b, None, 1.0, True, how=how)
            yield (
                f"dx masked R{R} cluster {cluster}",
                lambda b=bt, h=h, mask=mask, how=update: cuda.linear(x, wt, None, None, b, h, 1.1, True, mask, how=how),
            )
        yield f"shrink + update R{R}", lambda a=a, b=b: cuda.linear(x, w, None, None, b, cuda.shrink(x, a, 1.0, False), 1.0, False, dependent=True)
        yield f"shrink R{R}", lambda a=a: cuda.shrink(x, a, 1.0, False)
        seed, keep = torch.zeros(1, dtype=torch.int64, device=device), torch.empty((M, -(-K // 32)), dtype=torch.int32, device=device)
        yield f"shrink with dropout R{R}", lambda a=a, keep=keep, seed=seed: cuda.shrink(x, a, 1.0, False, keep, seed, 0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=40, help="start no further shape after this long")
    end = time.monotonic() + parser.parse_args().seconds
    if reason := cuda.unusable():
        sys.exit(f"cuda_forms: {reason}")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16; x cuBLAS: median of the ratios of one round to cuBLAS of that direction")
    print(f"{'M':>6} {'N':>6} {'K':>6}  {'form':<26} {'us':>9} {'TFLOP/s':>8} {'GB/s of x':>9} {'x cuBLAS':>8}")
    for M, N, K in SHAPES:
        if time.monotonic() > end:
            sys.exit(f"cuda_forms: out of time before M = {M}, N = {N}, K = {K}")
        times = testing.time_cuda_cold(dict(forms(M, N, K)), rounds=15, warmup=2)
        for name, seconds in times.items():
            middle = statistics.median(seconds)
            against = times["cublas dx" if "dx" in name else "cublas"]
            line = f"{M:6} {N:6} {K:6}  {name:<26} {1e6 * middle:9.1f} {2e-12 * M * N * K / middle:8.0f} {2e-9 * M * K / middle:9.0f}"
            print(f"{line} {testing.ratio(seconds, against):8.3f}", flush=True)


if __name__ == "__main__":
    main()
