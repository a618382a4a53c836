"""The CPU's plans: which form of the large product the native engine runs, each checked against float64 before it is timed."""

from __future__ import annotations

import dataclasses
import time
from unittest import mock

import torch

from .. import _device, testing
from ..ops import _registry
from ..tuning import cpu as plan
from .problem import SCALING, count_sets, exact, operands
from .shapes import Case
from .timing import quantile, time_cpu
from .tune_gpu import best

_ROW = ("op", "dtype", "N", "K")
CHECKED_ROWS = 16  # spread over x, held against float64 before timing
HOPELESS = 20  # times the fastest form, or 5 ms: not worth timing. PyTorch's bfloat16 on AVX2 takes up to 300 times ours, a minute a call


class CpuTarget:
    device = torch.device("cpu")
    tokens = (1, 4, 8, 16, 32, 64, 128, 256, 1024)
    rank = 16

    def __init__(self) -> None:
        self.hopeless: set[tuple[str, str, str]] = set()  # op, dtype, form; found at CHECKED_ROWS or more, not even tried at as many again

    def missing(self) -> str | None:
        found = _registry.provider("cpu")
        return found if isinstance(found, str) else None

    def head(self) -> dict[str, str]:
        return {"isa": _registry.provider("cpu").isa()}

    def file_name(self) -> str:
        return plan.table_name(self.head()["isa"], _device.cpu_core())

    def pack(self, entries: list[dict]) -> dict:
        """One row per (op, dtype, N, K) with its forms by ascending M, as `tuning.cpu` reads it."""
        rows: dict[tuple, list] = {}
        for entry in entries:
            rows.setdefault(tuple(entry[key] for key in _ROW), []).append([entry["M"], entry["chosen"]])
        return {
            "threads": torch.get_num_threads(),
            "rows": [dict(zip(_ROW, key, strict=True)) | {"forms": sorted(forms)} for key, forms in rows.items()],
        }

    def unpack(self, data: dict) -> list[dict]:
        return [{**{key: row[key] for key in _ROW}, "M": M, "chosen": form} for row in plan.checked(data["rows"]) for M, form in row["forms"]]

    def jobs(self, sizes: list[tuple[int, int]], tokens: tuple[int, ...], ranks: tuple[int, ...]) -> list[dict]:
        """The forms hardly depend on the rank: the lowest asked for stands for all."""
        self.rank = min(ranks)
        return [
            {"op": op, "dtype": dtype, "N": N, "K": K, "M": M}
            for K, N in sizes
            for dtype in ("bfloat16", "float32")
            for op in ("fwd", "bwd")
            for M in tokens
        ]

    def measure(self, job: dict) -> dict:
        forward = job["op"] == "fwd"
        case = Case("tune", job["op"], job["M"], job["K"], job["N"], self.rank, mode="forward" if forward else "forward+backward", dtype=job["dtype"])
        sets = [operands(case, self.device, seed) for seed in range(count_sets(case, self.device))]
        name, dtype = ("y" if forward else "dx"), getattr(torch, job["dtype"])
        checked = torch.linspace(0, case.M - 1, min(case.M, CHECKED_ROWS)).long()
        few = dataclasses.replace(sets[0], x=sets[0].x.detach()[checked], dy=sets[0].dy if forward else sets[0].dy[checked])
        truth, eager = exact(case, few)[name], exact(case, few, dtype=dtype)[name]
        provider = _registry.provider("cpu")
        run = provider.OPS["lora_linear_fwd" if forward else "lora_linear_bwd"][0]
        h = eager.new_zeros(case.M, case.R)
        mask = torch.empty(0, dtype=torch.int32)

        forced = [0]

        def forced_form(*_: object) -> int:
            return forced[0]

        def call(form: int, i: int):
            ops, forced[0] = sets[i % len(sets)], form
            x, w, a, b = ops.x.detach(), ops.weight, ops.lora_a, ops.lora_b
            if forward:
                return run(x, w, None, a, b, SCALING, 0.0, None)[0]
            return run(ops.dy, x, w, a, b, h, mask, SCALING, 0.0, True, False, False)[0]

        heuristic = plan.form(job["op"], provider.DTYPES[dtype], job["M"], job["N"], job["K"])
        rows = 128 if forward else 32  # above, reading the weights in place again for every row block cannot win
        forms = [i for i, form in enumerate(plan.FORMS) if form != "in_place" or rows >= case.M]
        forms.sort(key=lambda form: form != heuristic)  # the heuristic's first
        calls, skipped, took = {}, {}, {}
        with mock.patch.object(plan, "form", forced_form):
            for form in forms:
                known = (job["op"], job["dtype"], plan.FORMS[form])
                if known in self.hopeless and case.M >= CHECKED_ROWS:
                    skipped[known[2]] = "hopeless with fewer rows"
                    continue
                start = time.perf_counter()
                got = call(form, 0)
                took[form] = time.perf_counter() - start
                ratio = testing.error_ratio(got[checked], eager, truth)
                if ratio > testing.ALLOWED_RATIO:
                    skipped[known[2]] = f"wrong: {ratio:.1f} times plain PyTorch's error"
                elif took[form] > HOPELESS * max(min(took.values()), 5e-3):
                    skipped[known[2]] = f"hopeless: {took[form] / min(took.values()):.0f} times the fastest"
                    if case.M >= CHECKED_ROWS:
                        self.hopeless.add(known)
                else:
                    calls[known[2]] = lambda i, form=form: call(form, i)
            times = time_cpu(calls, len(sets), budget=0.3)
        return {"chosen": best(times), "us": {name: 1e6 * quantile(t, 0.5) for name, t in times.items()}, "skipped": skipped}
