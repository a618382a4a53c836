"""The CPU plan: which form of the large product runs a (op, dtype, M, N, K).

From the measured tables of this instruction set, exact shape first, then the nearest in log space: the user's (`lora-kernels tune --device cpu`,
`store.user_folder`), then the shipped one (`configs/cpu_<isa>.json`, before it that of a core with its own); else by a rule of thumb.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path

from .. import _device
from .._errors import LoraValueError, message
from . import store

FORMS = ("in_place", "panels", "torch")  # lk::Form; torch: PyTorch computes the large product, the kernels the rank-R parts
DTYPES = ("float32", "bfloat16", "float16")  # lk::Dtype
NEAR = math.log(4)  # a table row speaks for shapes whose N, K and N * K are within this factor, and for M within it of one that was measured
LARGE = 1024  # rows; from here on the best form no longer depends on M

_isa = ""
_forced: str | None = None


# Zen 5 multiplies 512 bits at a time, Zen 4 256, so that packing pays from fewer rows on (docs/measured.md).
OWN_TABLES = {("avx512_bf16", "Zen 5")}


def table_name(isa: str, core: str = "") -> str:
    """File name of a table; `core`: of the cores that have their own for this instruction set."""
    own = f"_{core.lower().replace(' ', '')}" if (isa, core) in OWN_TABLES else ""
    return f"cpu_{isa}{own}.json"


def read_rows(path: Path, isa: str) -> list[dict]:
    """The rows of one table. Raises LoraValueError for another instruction set's, or one with forms this build lacks."""
    content = json.loads(path.read_text())
    if content["isa"] != isa:
        raise LoraValueError(message("it belongs to another instruction set", repr(content["isa"]), repr(isa), "run `lora-kernels tune` here"))
    return checked(content["rows"])


def checked(rows: list[dict]) -> list[dict]:
    """The rows of a table, each of which can be used. Raises LoraValueError, or what a row of another structure raises."""
    for row in rows:
        sizes, forms = (row["N"], row["K"], *(M for M, _ in row["forms"])), [form for _, form in row["forms"]]
        named = row["op"] in ("fwd", "bwd") and row["dtype"] in DTYPES and forms and set(forms) <= set(FORMS)
        if not named or not all(type(size) is int and 1 <= size < 2**63 for size in sizes):
            allowed = f"op fwd or bwd; dtype {', '.join(DTYPES)}; sizes from 1; forms {', '.join(FORMS)}"
            raise LoraValueError(message("a row cannot be used", repr(row)[:200], allowed, "run `lora-kernels tune --device cpu --again`"))
    return rows


def reset(isa: str = "") -> None:
    """Use the tables of `isa`."""
    global _isa
    _isa = isa
    form.cache_clear()
    _tables.cache_clear()


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
def _tables(isa: str) -> tuple[list[dict], ...]:
    """The rows of each table: the user's before the shipped, this core's before all cores'."""
    names = dict.fromkeys((table_name(isa, _device.cpu_core()), table_name(isa)))
    return tuple(store.readable(names, lambda path: read_rows(path, isa)))


def _measured(rows: list[dict], M: int, N: int, K: int) -> str | None:
    """What these rows of one op and dtype say of a shape; None where all of them are far from it."""

    def apart(row: dict) -> tuple[float, float]:
        return math.log(row["N"] / N), math.log(row["K"] / K)

    def near(row: dict) -> bool:
        n, k = apart(row)
        return max(abs(n), abs(k), abs(n + k)) <= NEAR

    best = min(filter(near, rows), key=lambda row: sum(map(abs, apart(row))), default=None)
    if best is None:
        return None
    measured, found = min(best["forms"], key=lambda entry: abs(math.log(entry[0] / M)))
    return found if abs(math.log(min(measured, LARGE) / min(M, LARGE))) <= NEAR else None


def _rule(op: str, dtype: int, M: int, K: int) -> str:
    """Panels win from 33 rows on, from 16 where a row of the weight is short; backward from 4 on (configs/cpu_avx512_bf16.json). On tiles (AMX)
    from 2 on (configs/cpu_amx_bf16.json)."""
    tiles = _isa == "amx_bf16" and DTYPES[dtype] == "bfloat16"
    return "in_place" if (2 if op == "bwd" else 1 if tiles else 15 if K <= 128 else 32) >= M else "panels"


@functools.lru_cache(maxsize=4096)
def form(op: str, dtype: int, M: int, N: int, K: int) -> int:
    """The form's index in FORMS for op "fwd" or "bwd"."""
    if _forced is not None:
        return FORMS.index(_forced)
    if M == 0:
        return 0
    for table in _tables(_isa):
        rows = [row for row in table if row["op"] == op and row["dtype"] == DTYPES[dtype]]
        if found := _measured(rows, M, N, K):
            return FORMS.index(found)
    return FORMS.index(_rule(op, dtype, M, K))
