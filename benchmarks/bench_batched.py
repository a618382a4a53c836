"""Many adapters in one batch: `lora_batched_linear` against the base layer alone and against what people use today.

    python benchmarks/bench_batched.py                     CPU: PEFT's mixed batch, a loop over adapters, gather + bmm
    python benchmarks/bench_batched.py --device cuda       GPU: decode and prefill in CUDA graphs, weights rotated so that L2 holds none
    --backend NAME --json FILE --seconds N --quick

Every contender's result is checked against float64 first, and who is wrong is left out. Then all run in interleaved rounds, on a CPU by the
protocol of `lora-kernels bench`: no call takes weights that the last few took. Printed are the medians over rounds of the time and of its ratio to
the base layer's in the same round; on a GPU, for few rows, also what share of the copy bandwidth measured at the start the call's fewest bytes make.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from lora_kernels import testing
from lora_kernels.bench import roofs
from lora_kernels.bench.timing import time_cpu
from lora_kernels.ops.batch_meta import BatchMeta
from lora_kernels.ops.lora_batched import lora_batched_linear
from lora_kernels.ops.lora_expand import lora_expand
from lora_kernels.ops.lora_shrink import lora_shrink

BUDGET, ROUNDS = 1.0, 20  # seconds of timing per case on a CPU, rounds on a GPU
ROTATE_BYTES = {"cpu": 96 << 20, "cuda": 256 << 20}  # beyond the last cache: L3 of this class of machine, 60 MB L2 of an H200
ALLOWED = {torch.bfloat16: 1.5e-2, torch.float32: 1e-5}


@dataclass(frozen=True)
class Case:
    """One line: L adapters of rank R in the pool and, but for `none`, in the batch."""

    M: int
    N: int
    K: int
    L: int
    R: int
    segments: bool = False  # rows sorted by adapter
    none: bool = False  # no row has an adapter


def problem(case: Case, dtype, device, none_share=0.125):
    """Operands, ids with a share of rows without an adapter, and enough copies of the weights to keep the caches cold."""
    M, N, K, L, R = case.M, case.N, case.K, case.L, case.R
    g = torch.Generator().manual_seed(M * 100 + L)
    ids = torch.randint(0, L, (M,), generator=g, dtype=torch.int32)
    ids[torch.rand(M, generator=g) < none_share] = -1
    if L == M and device == "cuda":  # each row its own
        ids = torch.randperm(M, generator=g).to(torch.int32)
    if case.segments:
        ids = torch.arange(M, dtype=torch.int32) * L // M
    if M == 1:
        ids[0] = 0
    if case.none:
        ids.fill_(-1)
    size = torch.empty((), dtype=dtype).element_size() * (K * N + L * R * (K + N))

    def make(*shape):
        return (torch.randn(*shape, device=device) * shape[-1] ** -0.5).to(dtype)

    copies = [(make(N, K), make(L, R, K), make(L, N, R)) for _ in range(max(1, -(-ROTATE_BYTES[device] // size)))]
    scalings = torch.full((L,), 2.0, device=device)
    return torch.randn(M, K, device=device).to(dtype), ids.to(device), scalings, copies


def truth(x, ids, scalings, weights):
    w, a, b = (t.double() for t in weights)
    y = F.linear(x.double(), w)
    for slot in ids.unique().tolist():
        if slot >= 0:
            rows = ids == slot
            y[rows] += scalings[slot].double() * F.linear(F.linear(x[rows].double(), a[slot]), b[slot])
    return y


def peft_layers(copies, L, R):
    """PEFT's own Linear with L adapters over each copy's weights."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    layers, config = [], LoraConfig(r=R, lora_alpha=2 * R, target_modules=["x"])
    for w, a, b in copies:
        with torch.device("meta"):
            base = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
        base.weight = torch.nn.Parameter(w, requires_grad=False)
        layer = Linear(base, "a0", config, r=R, lora_alpha=2 * R)
        for slot in range(L):
            if slot:
                layer.update_layer(f"a{slot}", R, lora_alpha=2 * R, config=config)
            layer.lora_A[f"a{slot}"].weight = torch.nn.Parameter(a[slot], requires_grad=False)
            layer.lora_B[f"a{slot}"].weight = torch.nn.Parameter(b[slot], requires_grad=False)
        layers.append(layer.eval())
    return layers


def contenders(x, ids, scalings, copies, backend, with_peft) -> dict[str, Callable[[int], torch.Tensor]]:
    n, L, R = len(copies), copies[0][1].shape[0], copies[0][1].shape[1]
    slots = [(s, (ids == s).nonzero().flatten()) for s in ids.unique().tolist() if s >= 0]
    active = (ids >= 0).nonzero().flatten()
    active_ids, xs = ids[active].long(), x
    meta = BatchMeta(ids, L)

    def ours(i):
        w, a, b = copies[i % n]
        return lora_batched_linear(xs, w, None, a, b, meta, None, scalings, backend=backend)

    def two_kernels(i):
        w, a, b = copies[i % n]
        y = F.linear(xs, w)
        return lora_expand(y, lora_shrink(xs, a, meta, None, scalings, backend=backend), b, meta, backend=backend)

    def loop(i):
        w, a, b = copies[i % n]
        y = F.linear(xs, w)
        for slot, rows in slots:
            y.index_add_(0, rows, F.linear(F.linear(xs.index_select(0, rows), a[slot]), b[slot]), alpha=2.0)
        return y

    def gather_bmm(i):
        w, a, b = copies[i % n]
        h = torch.bmm(a[active_ids], xs[active].unsqueeze(2))
        return F.linear(xs, w).index_add_(0, active, torch.bmm(b[active_ids], h).squeeze(2), alpha=2.0)

    found = {"base": lambda i: F.linear(xs, copies[i % n][0]), "ours": ours, "base+shrink+expand": two_kernels}
    if x.device.type == "cpu":
        found |= {"loop": loop, "gather+bmm": gather_bmm}
    if with_peft:
        layers = peft_layers(copies, L, R)
        names = ["__base__" if s < 0 else f"a{s}" for s in ids.tolist()]
        found["peft"] = lambda i: layers[i % n](xs, adapter_names=names)
    return found


def refusal(call: Callable[[int], torch.Tensor], exact: torch.Tensor, allowed: float) -> str | None:
    """Why a contender is not timed, or None: its error, or what it raised."""
    try:
        error = ((call(0).double() - exact).norm() / exact.norm()).item()
    except Exception as why:
        return f"{type(why).__name__}: {str(why)[:200]}"
    return None if error < allowed else f"relative RMSE {error:.1e}"


def graphed(call: Callable[[int], torch.Tensor], n: int) -> Callable[[], object]:
    """All n weight copies in one CUDA graph; one replay is n calls."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(n):
            call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(n):
            call(i)
    return graph.replay


def timed(calls: dict[str, Callable[[int], torch.Tensor]], n: int, device: str) -> dict[str, list[float]]:
    """Seconds per call over n weight copies, a figure per contender and round."""
    if device == "cpu":
        return time_cpu(calls, n, BUDGET)
    times = testing.time_cuda_cold({name: graphed(call, n) for name, call in calls.items()}, ROUNDS)
    return {name: [t / n for t in per_round] for name, per_round in times.items()}


def cases(device: str, quick: bool) -> list[Case]:
    """On a GPU the layers of Llama-3-8B, those that the targets name first, so that a run cut short has them."""
    if device == "cpu":
        sizes = (576,) if quick else (576, 2048, 4096)
        return [Case(M, size, size, L, 16) for size in sizes for L in (8, 64) for M in (1, 8, 64)]
    named = [Case(M, N, 4096, min(8, M), 16) for N in (4096, 14336) for M in (1, 16, 64)]
    named += [Case(8192, 4096, 4096, 8, R, segments=True) for R in (16, 64)]
    named += [Case(M, 4096, 4096, 8, 16, none=True) for M in (1, 64, 256, 8192)]
    if quick:
        return named
    layers = [(4096, 4096), (6144, 4096), (14336, 4096), (4096, 14336)]
    grid = [Case(M, N, K, L, R) for R in (16, 64) for N, K in layers for M in (1, 16, 64, 256) for L in sorted({1, min(8, M), M})]
    grid += [Case(8192, N, K, 8, R, segments=True) for N, K in layers[1:] for R in (16, 64)]
    # Prompts of 128 tokens; and scattered rows, the worst for tiles of rows as they lie: 500 adapters are too many for those here, rows are gathered.
    grid += [Case(8192, 4096, 4096, 64, 16, segments=True)]
    grid += [Case(8192, 4096, 4096, L, 16) for L in (8, 16, 64, 500)]
    return [*named, *(case for case in grid if case not in named)]


def moved(case: Case, ids: torch.Tensor, itemsize: int) -> int:
    """The fewest bytes: W, x, y, and A and B of the adapters present."""
    present = len({slot for slot in ids.tolist() if slot >= 0})
    return itemsize * (case.N * case.K + case.M * (case.N + case.K) + present * case.R * (case.N + case.K))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no case starts after this")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--none", action="store_true", help="all rows without an adapter")
    parser.add_argument("--json", type=Path, help="rewritten after every case")
    args = parser.parse_args()
    dtype, rows, wrong, start = getattr(torch, args.dtype), [], [], time.monotonic()
    torch.set_grad_enabled(False)
    roof = roofs.bandwidth(torch.device("cuda")) if args.device == "cuda" else None
    for case in cases(args.device, args.quick):
        if time.monotonic() - start > args.seconds:
            print("out of time: the cases that follow were not run")
            break
        case = replace(case, none=case.none or args.none)
        x, ids, scalings, copies = problem(case, dtype, args.device)
        calls = contenders(x, ids, scalings, copies, args.backend, args.device == "cpu")
        exact = truth(x, ids, scalings, copies[0])
        for name, call in list(calls.items()):
            why = None if name == "base" else refusal(call, exact, ALLOWED[dtype])
            if why:
                wrong.append(name)
                print(f"left out: {name}, {why}, at {case}", flush=True)
                del calls[name]
        times = timed(calls, len(copies), args.device)
        found = {name: (statistics.median(t) * 1e6, testing.ratio(t, times["base"])) for name, t in times.items()}
        row = asdict(case) | {"dtype": args.dtype, "us_and_ratio": found}
        text = "  ".join(f"{name} {us:8.1f} us x{ratio:5.2f}" for name, (us, ratio) in found.items())
        if roof and case.M <= 256 and "ours" in found:
            row["share_of_copy_bandwidth"] = moved(case, ids, x.element_size()) / (found["ours"][0] * 1e-6) / roof
            text += f"  {row['share_of_copy_bandwidth']:4.0%} of copy"
        mix = "none" if case.none else "segments" if case.segments else "mixed"
        print(f"{args.dtype} M {case.M:4d} N {case.N:5d} K {case.K:5d} L {case.L:3d} R {case.R:2d} {mix:8} | {text}", flush=True)
        rows.append(row)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps({"bytes_per_s": roof, "rows": rows}, indent=1) + "\n")
    if wrong:
        sys.exit(f"bench_batched: {len(wrong)} times a contender was left out, see above")


if __name__ == "__main__":
    main()
