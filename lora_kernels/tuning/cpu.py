"""The CPU plan: which form of the large product runs a (op, dtype, M, N, K).

From the measured table of this instruction set (`configs/cpu_<isa>.json`, exact shape first, then the nearest in log space), else a rule of
thumb. `lora-kernels tune --device cpu` measures a table for the user's machine; the search is `search_cpu`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

FORMS = ("in_place", "panels", "torch")  # lk::Form; torch: PyTorch computes the large product, the kernels the rank-R parts
DTYPES = ("float32", "bfloat16", "float16")  # lk::Dtype
CONFIGS = Path(__file__).parent / "configs"
NEAR = math.log(4)  # a table row speaks for shapes whose N * K is within this factor

_isa = ""
_forced: str | None = None


def user_table(isa: str) -> Path:
    """Where `lora-kernels tune` writes: `$XDG_CACHE_HOME/lora_kernels`, by default under ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "lora_kernels" / f"cpu_{isa}.json"


def reset(isa: str = "") -> None:
    """Use the tables of `isa`."""
    global _isa
    _isa = isa
    form.cache_clear()
    _rows.cache_clear()


@contextlib.contextmanager
def forced(name: str) -> Iterator[None]:
    """Within the block every product takes form `name`; for tests and tuning."""
    global _forced
    before, _forced = _forced, name
    form.cache_clear()
    try:
        yield
    finally:
        _forced = before
        form.cache_clear()


@functools.cache
def _rows(isa: str) -> list[dict]:
    for path in (user_table(isa), CONFIGS / f"cpu_{isa}.json"):
        if path.is_file():
            return json.loads(path.read_text())["rows"]
    return []


def _rule(op: str, M: int) -> str:
    return "in_place" if M <= (32 if op == "fwd" else 8) else "panels"


@functools.lru_cache(maxsize=4096)
def form(op: str, dtype: int, M: int, N: int, K: int) -> int:
    """The form's index in FORMS for op "fwd" or "bwd"."""
    if _forced is not None:
        return FORMS.index(_forced)
    if M == 0:
        return 0
    rows = [row for row in _rows(_isa) if row["op"] == op and row["dtype"] == DTYPES[dtype]]
    apart = lambda row: abs(math.log(row["N"] / N)) + abs(math.log(row["K"] / K))
    best = min(rows, key=apart, default=None)
    if best is None or abs(math.log(best["N"] * best["K"] / (N * K))) > NEAR:
        return FORMS.index(_rule(op, M))
    nearest = min(best["forms"], key=lambda entry: abs(math.log(entry[0] / M)))
    return FORMS.index(nearest[1])
