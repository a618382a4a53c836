"""`lora-kernels tune --device cpu`: measures every form on a grid of shapes and writes the table that `tuning.cpu` reads.

Needs the op's implementation, which lies in a layer above; the caller hands it in: `tune(native.cpu, ...)`.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from . import cpu as plan

SHAPES = ((576, 576), (1536, 576), (576, 1536), (2048, 2048), (8192, 2048), (4096, 4096))  # (N, K)
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 1024)
CACHE_BYTES = 96 << 20  # weights in rotation, so that they come from memory as they do in a model
CLOSE = 1.03  # PyTorch is chosen only when it is faster by more than noise


def interleaved(
    calls: dict[str, Callable[[int], object]], budget_s: float, rounds: int = 5, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each call, the calls taking turns; call i may use its number to rotate its operands."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(0)
    start, i = clock(), 1
    while len(times[next(iter(calls))]) < rounds or (clock() - start < budget_s and len(times[next(iter(calls))]) < 50):
        for name, call in calls.items():
            begin = clock()
            call(i)
            times[name].append(clock() - begin)
        i += 1
    return {name: statistics.median(t) for name, t in times.items()}


def _problem(engine, op: str, dtype: torch.dtype, M: int, N: int, K: int, R: int) -> Callable[[int], object]:
    copies = max(1, -(-CACHE_BYTES // (N * K * dtype.itemsize)))
    weights = [torch.randn(N, K).to(dtype) for _ in range(copies)]
    x, dy, a, b, h = (torch.randn(*s).to(dtype) for s in ((M, K), (M, N), (R, K), (N, R), (M, R)))
    mask = torch.empty(0, dtype=torch.int32)
    if op == "fwd":
        return lambda i: engine.lora_linear_fwd(x, weights[i % copies], None, a, b, 1.0, 0.0, None)
    return lambda i: engine.lora_linear_bwd(dy, x, weights[i % copies], a, b, h, mask, 1.0, 0.0, True, True, True)


def tune(
    engine,
    path: Path | None = None,
    shapes: Iterable[tuple[int, int]] = SHAPES,
    tokens: Iterable[int] = TOKENS,
    dtypes: Iterable[str] = ("float32", "bfloat16"),
    rank: int = 16,
    budget_s: float = 0.05,
    report: Callable[[str], None] = print,
    clock: Callable[[], float] = time.perf_counter,
) -> Path:
    """Measure with `engine` (`lora_kernels.native.cpu`), write the table to `path` (default: the user's cache) and use it from now on.

    About 10 minutes on 2 cores for the default grid. Returns the path.
    """
    isa = engine.isa()
    rows = []
    for dtype in dtypes:
        for N, K in shapes:
            for op in ("fwd", "bwd"):
                forms = []
                for M in tokens:
                    call = _problem(engine, op, getattr(torch, dtype), M, N, K, rank)
                    calls = {name: _with_form(name, call) for name in plan.FORMS if name != "in_place" or (128 if op == "fwd" else 32) >= M}
                    seconds = interleaved(calls, budget_s, clock=clock)
                    ours = min((name for name in seconds if name != "torch"), key=seconds.__getitem__)
                    best = "torch" if seconds["torch"] * CLOSE < seconds[ours] else ours
                    forms.append([M, best])
                    report(f"{op} {dtype} N {N} K {K} M {M}: {best}  " + "  ".join(f"{n} {s * 1e6:.0f} us" for n, s in seconds.items()))
                rows.append({"op": op, "dtype": dtype, "N": N, "K": K, "forms": forms})
    path = path or plan.user_table(isa)
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"isa": isa, "threads": torch.get_num_threads(), "torch": torch.__version__, "rank": rank}
    body = ",\n".join("  " + json.dumps(row) for row in rows)
    path.write_text(json.dumps(head)[:-1] + ', "rows": [\n' + body + "\n]}\n")
    plan.reset(isa)
    return path


def _with_form(name: str, call: Callable[[int], object]) -> Callable[[int], object]:
    def run(i: int) -> object:
        with plan.forced(name):
            return call(i)

    return run
