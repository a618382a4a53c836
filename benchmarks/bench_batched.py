"""Many adapters in one batch: `lora_batched_linear` against the base layer alone and against what people use today.

    python benchmarks/bench_batched.py                     CPU: PEFT's mixed batch, a loop over adapters, gather + bmm
    python benchmarks/bench_batched.py --device cuda       GPU: decode and prefill in CUDA graphs, weights rotated so that L2 holds none
    --backend NAME --json FILE --rounds N --seconds S --quick          most wanted shapes first; the file is written after each

Every contender's result is checked against float64 first. Then all contenders run in interleaved rounds (`lora_kernels.testing`);
printed are the medians over rounds of the time and of its ratio to the base layer's in the same round.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from lora_kernels import testing
from lora_kernels.ops.batch_meta import BatchMeta
from lora_kernels.ops.lora_batched import lora_batched_linear
from lora_kernels.ops.lora_expand import lora_expand
from lora_kernels.ops.lora_shrink import lora_shrink

ROTATE_BYTES = {"cpu": 96 << 20, "cuda": 256 << 20}  # beyond the last cache: L3 of this class of machine, 60 MB L2 of an H200
ALLOWED = {torch.bfloat16: 1.5e-2, torch.float32: 1e-5}


def problem(M, N, K, L, R, dtype, device, present, none_share=0.125, sorted_rows=False):
    """ids over `present` adapters with a share of rows without one, and enough copies of the weights to keep the caches cold."""
    g = torch.Generator().manual_seed(M * 100 + L)
    ids = torch.randint(0, present, (M,), generator=g, dtype=torch.int32)
    ids[torch.rand(M, generator=g) < none_share] = -1
    if sorted_rows:
        ids = torch.arange(M, dtype=torch.int32) * present // M
    if M == 1:
        ids[0] = 0
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


def turning(call: Callable[[int], torch.Tensor]) -> Callable[[], object]:
    """`call` on the next weight copy each time."""
    turn = itertools.count()
    return lambda: call(next(turn))


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


def shapes(device: str, quick: bool):
    """(M, N, K, adapters in the pool, R, sorted rows)."""
    if device == "cpu":
        sizes = (576,) if quick else (576, 2048, 4096)
        return [(M, size, size, L, 16, False) for size in sizes for L in (8, 64) for M in (1, 8, 64)]
    layers = [(4096, 4096)] if quick else [(4096, 4096), (14336, 4096), (4096, 14336), (6144, 4096)]
    cases = [(M, N, K, L, R, False) for N, K in layers for R in (16, 64) for M in (16, 64, 1, 256) for L in sorted({1, min(8, M), M})]
    cases += [(8192, N, K, 8, R, True) for N, K in layers for R in (16, 64)]
    return sorted(cases, key=lambda c: (layers.index(c[1:3]) + 2 * (c[4] == 64), c[3] != 8))  # most wanted first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--none", action="store_true", help="all rows without an adapter")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no further shape after this time")
    parser.add_argument("--json")
    args = parser.parse_args()
    dtype, rows = getattr(torch, args.dtype), []
    torch.set_grad_enabled(False)
    end = time.monotonic() + args.seconds
    for M, N, K, L, R, sorted_rows in shapes(args.device, args.quick):
        if time.monotonic() > end:
            sys.exit(f"bench_batched: out of time before M {M} N {N} K {K} L {L} R {R}")
        x, ids, scalings, copies = problem(M, N, K, L, R, dtype, args.device, L, 1.0 if args.none else 0.125, sorted_rows and not args.none)
        if args.none:
            ids.fill_(-1)
        calls = contenders(x, ids, scalings, copies, args.backend, args.device == "cpu")
        exact = truth(x, ids, scalings, copies[0])
        for name, call in calls.items():
            error = ((call(0).double() - exact).norm() / exact.norm()).item()
            assert name == "base" or error < ALLOWED[dtype], f"{name}: relative RMSE {error:.1e} at M {M} N {N} K {K} L {L}"
        n = len(copies) if args.device == "cuda" else 1
        calls = {name: graphed(call, n) if args.device == "cuda" else turning(call) for name, call in calls.items()}
        times = testing.timer(args.device)(calls, rounds=args.rounds)
        found = {name: (statistics.median(t) / n * 1e6, testing.ratio(t, times["base"])) for name, t in times.items()}
        text = "  ".join(f"{name} {us:8.1f} us x{ratio:5.2f}" for name, (us, ratio) in found.items())
        print(f"{args.dtype} M {M:4d} N {N:5d} K {K:5d} L {L:3d} R {R:2d} | {text}", flush=True)
        rows.append(dict(M=M, N=N, K=K, L=L, R=R, dtype=args.dtype, none=args.none, us_and_ratio=found))
        if args.json:
            with open(args.json, "w") as file:
                json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
