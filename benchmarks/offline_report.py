"""The tables of docs/measured.md "Triton kernels": `python benchmarks/offline_report.py`, no GPU needed (about 3 minutes on 2 cores).

Registers, spills, shared memory and opcodes are read from offline compiles with Triton's own ptxas. The predictions are a cost model:
time = max(FLOPs / 790e12, bytes / 4.3e12) per launch, launches one after the other; both rates were measured on one H200 with other code.
They are what the measured times are to be held against, and no measurement.
"""

from __future__ import annotations

import sys

from lora_kernels.tuning import offline
from lora_kernels.tuning.plan import BYTES, FLOPS

OPCODES = ("HGMMA", "UTCHMMA", "HMMA", "UTMALDG", "UTMASTG", "LDGSTS")


def compiled() -> str:
    """One row per kernel and configuration."""
    lines = ["| arch | kernel | configuration | registers | spills | shared memory, B | opcodes |", "|---|---|---|---|---|---|---|"]
    seen = set()
    for arch in offline.ARCHS:
        for layer in offline.gate(arch):
            dtype = str(layer.dtype).removeprefix("torch.")
            for r in offline.reports(layer):
                row = (arch, r.kernel, r.config, dtype, r.registers)
                if row not in seen:
                    seen.add(row)
                    opcodes = " ".join(f"{name} {r.opcodes[name]}" for name in OPCODES if r.opcodes.get(name))
                    config = f"{dtype} {r.config}".replace("num_", "")
                    lines.append(
                        f"| sm_{arch} | {r.kernel.removesuffix('_kernel')} | {config} | {r.registers} | {r.spills} | {r.shared} | {opcodes} |"
                    )
        print(f"sm_{arch} done", file=sys.stderr, flush=True)
    return "\n".join(lines)


def floor(flops: float, moved: float) -> float:
    """Microseconds."""
    return 1e6 * max(flops / FLOPS, moved / BYTES)


def shrink(M: int, columns: int, R: int) -> float:
    """h or g: x or dy read once."""
    return floor(2 * M * columns * R, 2 * (M * columns + M * R))


def reduction(M: int, columns: int, R: int) -> float:
    """dA or dB: x or dy read once, 8 splits of fp32 partials written and read."""
    return floor(2 * M * columns * R, 2 * (M * columns + M * R) + 2 * 8 * columns * R * 4)


def predicted(M: int, N: int, K: int, R: int, dropout: bool) -> tuple[float, float, float]:
    """cuBLAS alone, forward and forward + backward of this design, in us (16-bit operands)."""
    gemm = floor(2 * M * N * K, 2 * (M * K + N * K + M * N))
    rank = 2 * M * N * R / FLOPS * 1e6  # the rank-R product rides on the base GEMM, in y and in dx
    # wgmma takes at least 16 of its 128 clocks for a narrow product; only tiles of output column 0 pay it
    column0 = gemm * max(16, R / 2) / 128 / -(-N // 256)
    bits = M * K / 8 if dropout else 0
    masked = bits / BYTES * 1e6
    fused = R <= 64 and not dropout
    forward = gemm + rank + (column0 if fused else shrink(M, K, R) + masked)
    dx = gemm + rank + (gemm * max(16, R / 2) / 128 / -(-K // 256) if fused else shrink(M, N, R) + masked)
    backward = dx + reduction(M, K, R) + masked + reduction(M, N, R)
    return gemm, forward, forward + backward


def predictions() -> str:
    lines = ["| M x N x K | R | dropout | base GEMM, us | forward, us (ratio) | forward + backward, us (ratio) |", "|---|---|---|---|---|---|"]
    for M, N, K in ((8192, 4096, 4096), (8192, 14336, 4096), (8192, 4096, 14336)):
        for R in (16, 64):
            for dropout in (False, True):
                gemm, forward, both = predicted(M, N, K, R, dropout)
                ratios = f"{forward:.0f} ({forward / gemm:.3f}) | {both:.0f} ({both / (2 * gemm):.3f})"
                lines.append(f"| {M} x {N} x {K} | {R} | {'0.05' if dropout else '0'} | {gemm:.0f} | {ratios} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(predictions())
    print()
    print(compiled())
