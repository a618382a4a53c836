"""The CPU plan: which form of the large product runs a (op, dtype, M, N, K).

From the measured table of this instruction set (`configs/cpu_<isa>.json`, exact shape first, then the nearest in log space), else a rule of
thumb. `lora-kernels tune --device cpu` measures a table for the user's machine (`store.user_folder`).
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path

from .._errors import LoraValueError, message
from . import store

FORMS = ("in_place", "panels", "torch")  # lk::Form; torch: PyTorch computes the large product, the kernels the rank-R parts
DTYPES = ("float32", "bfloat16", "float16")  # lk::Dtype
NEAR = math.log(4)  # a table row speaks for shapes whose N * K is within this factor

_isa = ""
_forced: str | None = None


def table_name(isa: str) -> str:
    return f"cpu_{isa}.json"


def read_rows(path: Path, isa: str) -> list[dict]:
    """The rows of one table. Raises LoraValueError for another instruction set's, or one with forms this build lacks."""
    content = json.loads(path.read_text())
    if content["isa"] != isa:
        raise LoraValueError(message("it belongs to another instruction set", repr(content["isa"]), repr(isa), "run `lora-kernels tune` here"))
    for row in content["rows"]:
        sizes, forms = (row["N"], row["K"], *(M for M, _ in row["forms"])), [form for _, form in row["forms"]]
        named = row["op"] in ("fwd", "bwd") and row["dtype"] in DTYPES and forms and set(forms) <= set(FORMS)
        if not named or not all(type(size) is int and 1 <= size < 2**63 for size in sizes):
            allowed = f"op fwd or bwd; dtype {', '.join(DTYPES)}; sizes from 1; forms {', '.join(FORMS)}"
            raise LoraValueError(message("a row cannot be used", repr(row)[:200], allowed, "run `lora-kernels tune --device cpu --again`"))
    return content["rows"]


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
    return next(store.readable(table_name(isa), lambda path: read_rows(path, isa)), [])


def _rule(op: str, M: int) -> str:
    return "in_place" if (32 if op == "fwd" else 2) >= M else "panels"  # backward: panels win from 4 rows on (configs/cpu_avx512_bf16.json)


@functools.lru_cache(maxsize=4096)
def form(op: str, dtype: int, M: int, N: int, K: int) -> int:
    """The form's index in FORMS for op "fwd" or "bwd"."""
    if _forced is not None:
        return FORMS.index(_forced)
    if M == 0:
        return 0
    rows = [row for row in _rows(_isa) if row["op"] == op and row["dtype"] == DTYPES[dtype]]

    def apart(row: dict) -> float:
        return abs(math.log(row["N"] / N)) + abs(math.log(row["K"] / K))

    best = min(rows, key=apart, default=None)
    if best is None or abs(math.log(best["N"] * best["K"] / (N * K))) > NEAR:
        return FORMS.index(_rule(op, M))
    nearest = min(best["forms"], key=lambda entry: abs(math.log(entry[0] / M)))
    return FORMS.index(nearest[1])
