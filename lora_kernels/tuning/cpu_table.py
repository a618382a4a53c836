"""Measured forms of the CPU engine: the table `lora-kernels tune --device cpu` wrote for this CPU and thread count; exact, then nearest M."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import torch

from .. import _device
from .._errors import LoraValueError, message
from . import store

Table = dict[tuple, list[tuple[int, str]]]  # (op, dtype, N, K, threads) -> (M, form), ascending


def read_table(path: Path, device: str, forms: tuple[str, ...]) -> Table:
    """One table. Raises LoraValueError for another device's, or one that names a form this build lacks."""
    table: Table = {}
    for entry in store.read_entries(path, device):
        if entry["chosen"] not in forms:
            raise LoraValueError(message("unknown form", repr(entry["chosen"]), ", ".join(forms)))
        key = (entry["op"], entry["dtype"], entry["N"], entry["K"], entry["threads"])
        table.setdefault(key, []).append((entry["M"], entry["chosen"]))
    return {key: sorted(rows) for key, rows in table.items()}


@functools.cache
def tables(forms: tuple[str, ...]) -> tuple[Table, ...]:
    """The user's table and the shipped one; a damaged or foreign one is left out, with one logged reason."""
    device = _device.cpu_name()
    return tuple(store.readable(device, lambda path: read_table(path, device, forms)))


def look_up(op: str, dtype: str, M: int, N: int, K: int, forms: tuple[str, ...]) -> str | None:
    for table in tables(forms):
        rows = table.get((op, dtype, N, K, torch.get_num_threads()))
        if rows and M > 0:
            return min(rows, key=lambda row: (abs(math.log(row[0] / M)), row[0]))[1]
    return None
