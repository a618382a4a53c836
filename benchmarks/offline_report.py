"""Tables of docs/measured.md, "Triton kernels" and "Batched op": `python benchmarks/offline_report.py`, no GPU needed (3 minutes on 2 cores).

Registers, spills, shared memory and opcodes are read from offline compiles with Triton's own ptxas. The predictions are a cost model:
time = max(FLOPs / 790e12, bytes / 4.3e12) per launch, launches one after the other; both rates were measured on one H200 with other code.
They are what the measured times are to be held against, and no measurement.
"""

from __future__ import annotations

import sys

from lora_kernels.tuning import offline
from lora_kernels.tuning.plan import BYTES, FLOPS

OPCODES = ("HGMMA", "HMMA", "UTMALDG", "UTMASTG", "LDGSTS")


def compiled() -> str:
    """One row per kernel and configuration, one column per architecture: registers / bytes of shared memory, the most of its variants."""
    rows: dict[tuple, dict[int, offline.Report]] = {}
    spills = 0
    for arch in offline.ARCHS:
        for layer in offline.gate(arch):
            dtype = str(layer.dtype).removeprefix("torch.")
            for r in offline.reports(layer):
                spills += r.spills + len(r.warnings) + r.register_a
                cell = rows.setdefault((r.kernel.removesuffix("_kernel"), f"{dtype} {r.config}".replace("num_", "")), {})
                if arch not in cell or r.registers > cell[arch].registers:
                    cell[arch] = r
        print(f"sm_{arch} done", file=sys.stderr, flush=True)
    lines = ["| kernel | configuration | " + " | ".join(f"sm_{arch}" for arch in offline.ARCHS) + " | opcodes on sm_90 |"]
    lines.append("|---" * (3 + len(offline.ARCHS)) + "|")
    for (kernel, config), cell in sorted(rows.items()):
        figures = [f"{cell[arch].registers} / {cell[arch].shared}" if arch in cell else "" for arch in offline.ARCHS]
        opcodes = cell[90].opcodes if 90 in cell else {}
        shown = " ".join(f"{name} {opcodes[name]}" for name in OPCODES if opcodes.get(name))
        lines.append(f"| {kernel} | {config} | {' | '.join(figures)} | {shown} |")
    lines.append(f"\n{len(rows)} configurations; bytes spilled + C75xx warnings + wgmma with A in registers, all together: {spills}.")
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


SMS, LAUNCH, PRODUCT = 132, 2.5, 0.5  # of an H200; us: assumed for a launch, and for one rank product from L2 to registers
UNIT_BYTES = 60e9  # per second, of one program reading x for h: 4 steps of 16 kB in flight, assumed 1 us from memory


def prefill(M: int, N: int, K: int, R: int, L: int, met: float) -> tuple[float, float, float]:
    """cuBLAS alone; ours with h in a launch of its own, and as launched: h by the programs with one tile less (batched_tma), where there are enough.

    us; `met`: adapters that a tile of 128 rows meets. A GEMM's time is that of its fullest programs, so theirs that have one tile less is free.
    """
    gemm = floor(2 * M * N * K, 2 * (M * K + N * K + M * N))
    tiles = -(-M // 128) * -(-N // 256)
    waves, spare = -(-tiles // SMS), -tiles % SMS
    products = waves * 2 * met * -(-R // 64) * PRODUCT  # the two halves of a tile, one after the other; nothing hides them
    ours = gemm + 2 * M * N * max(R, 16) * met / FLOPS * 1e6 + products + LAUNCH
    apart = ours + shrink(M, K, R) + LAUNCH
    late = max(0.0, 1e6 * 2 * M * K / UNIT_BYTES / spare - gemm / waves) if spare else 0.0  # the others wait at their first tile
    return gemm + LAUNCH, apart, ours + late if 3 * spare * 256 >= 2 * (M + 64 * L) else apart


def gathered(M: int, N: int, K: int, R: int, L: int) -> float:
    """Floor of the gather form with all L adapters in sorted rows, us: a main loop at cuBLAS's rate, which its pointer loads are not known to reach.

    Tiles of 128 x 128, one per SM at a time (registers); A and B of every adapter come from memory once.
    """
    met = min(L, 1 + (L - 1) * 128 / M)
    gemm = floor(2 * M * N * K, 2 * (M * K + N * K + M * N))
    products = -(-(-(-M // 128) * -(-N // 128)) // SMS) * met * -(-R // 64) * PRODUCT
    pools = 2 * L * R * (N + K) / BYTES * 1e6
    return gemm + 2 * M * N * max(R, 16) * met / FLOPS * 1e6 + products + pools + shrink(M, K, R) + 2 * LAUNCH


def decode(M: int, N: int, K: int, R: int, L: int) -> tuple[float, float]:
    """cuBLAS alone and one launch that touches every byte once, us."""
    base = floor(2 * M * N * K, 2 * (N * K + M * (N + K))) + LAUNCH
    return base, base + 2 * L * R * (N + K) / BYTES * 1e6


def many_adapters() -> str:
    lines = ["| M x N x K | adapters | R | base, us | ours, us (ratio) | h in a launch of its own |", "|---|---|---|---|---|---|"]
    for M, N, K, R, L in ((64, 4096, 4096, 8, 8), (64, 4096, 4096, 16, 8), (64, 4096, 4096, 16, 64), (64, 14336, 4096, 16, 8)):
        base, ours = decode(M, N, K, R, L)
        lines.append(f"| {M} x {N} x {K} | {L}, floor of one launch | {R} | {base:.1f} | {ours:.1f} ({ours / base:.3f}) | |")
    rows = [(4096, 4096, 8, 8, "segments", 1)]
    rows += [(N, K, R, 8, "segments", 1) for N, K in ((4096, 4096), (14336, 4096), (4096, 14336)) for R in (16, 64)]
    rows += [(4096, 4096, 16, *mix) for mix in ((64, "segments", 2), (448, "segments", 8), (8, "scattered", 8), (16, "scattered", 16))]
    for N, K, R, L, mix, met in [*rows, (4096, 4096, 16, 64, "scattered", 56)]:
        base, apart, ours = prefill(8192, N, K, R, L, met)
        lines.append(f"| 8192 x {N} x {K} | {L}, {mix} | {R} | {base:.1f} | {ours:.1f} ({ours / base:.3f}) | {apart:.1f} ({apart / base:.3f}) |")
    for R, L in ((8, 512), (16, 512), (8, 1000), (16, 1000)):
        base, least = prefill(8192, 4096, 4096, R, L, 1)[0], gathered(8192, 4096, 4096, R, L)
        lines.append(f"| 8192 x 4096 x 4096 | {L}, gathered, floor | {R} | {base:.1f} | | {least:.1f} ({least / base:.3f}) |")
    return "\n".join(lines)


def decode_waves() -> str:
    """What of the decode kernel an H200 holds at once: in one wave, and with enough of W on its way (4.3 TB/s at 0.8 us take 26 KiB an SM)."""
    lines = [
        "| M | N, K 4096 | tile of W, parts of K | programs (per SM) | waves | W on its way, KiB an SM | x through L2, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for M in (1, 16, 32, 64, 128, 256):
        for Ns in ((4096,), (14336,), (4096, 1024, 1024)):
            ((launcher, args),) = offline.record(90, offline.ManyAdapters("forward", M, Ns, bare=True, arch=90).call)
            c, options, grid = launcher.constants, launcher.warps_stages, launcher.grid[0] * launcher.grid[1]
            fit = offline.resident(offline.compile_launch(launcher, args, 90), options["num_warps"])
            on_its_way = (options["num_stages"] - 1) * c["BN"] * c["BK"] * 2 * min(fit, grid / SMS) / 1024
            tile, width = f"{c['BN']} x {c['BK']}, {c['SPLIT_K']}", "+".join(map(str, Ns))
            through = launcher.grid[0] * M * 4096 * 2 / 1e6
            lines.append(f"| {M} | {width} | {tile} | {grid} ({fit}) | {grid / fit / SMS:.2f} | {on_its_way:.0f} | {through:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(predictions())
    print()
    print(many_adapters())
    print()
    print(decode_waves())
    print()
    print(compiled())
