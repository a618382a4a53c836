"""Measured plans: one JSON table per GPU, looked up exactly, then at the nearest measured M in log space; else the heuristic.

A table is `{"device": ..., "entries": [{"op", "M", "N", "K", "R", "dtype", "dropout", "plan": {Plan's fields}, "us": {...}}, ...]}`.
Shipped tables lie in `configs/`; the user's own (written by `lora-kernels tune`) in `LORA_KERNELS_CACHE`, by default ~/.cache/lora_kernels, and win.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import TypeVar

import torch

from .. import _device
from .._errors import LoraValueError, message, warn_once
from .plan import FORMS, IMPLEMENTATIONS, Plan, Problem, cuda_plans, heuristic

T = TypeVar("T")
SHIPPED = Path(__file__).parent / "configs"
DAMAGED = (OSError, RecursionError, OverflowError, ValueError, KeyError, TypeError, AttributeError)  # what reading any file may raise
Table = dict[tuple, list[tuple[int, Plan]]]


def table_name(gpu: str) -> str:
    """File name of a GPU's table, e.g. "NVIDIA H200" -> "nvidia-h200.json"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def user_folder() -> Path:
    """Where this user's measured tables lie. Raises LoraValueError for a user without a home, who has none."""
    if os.environ.get("LORA_KERNELS_CACHE"):
        return Path(os.environ["LORA_KERNELS_CACHE"])
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_kernels"
    except RuntimeError as error:  # HOME is unset, and this user's id is not in /etc/passwd, as in a container
        raise LoraValueError(message("no folder for measured plans", error, fix="set LORA_KERNELS_CACHE to a folder of yours")) from None


def _key(problem: Problem) -> tuple:
    return (problem.op, problem.N, problem.K, problem.R, problem.dtype, problem.dropout)


def _power(value: int, least: int = 1) -> bool:
    return type(value) is int and value >= least and not value & (value - 1)


def read_plan(raw: dict, problem: Problem) -> Plan:
    """The plan of this problem from its JSON form, checked."""
    names = {f.name for f in fields(Plan)}
    if not set(raw) <= names:
        raise LoraValueError(message("tuning table: unknown plan field", sorted(set(raw) - names), ", ".join(sorted(names))))
    plan = Plan(**raw)
    if plan.implementation not in IMPLEMENTATIONS or plan.form not in FORMS:
        got = f"implementation {plan.implementation!r}, form {plan.form!r}"
        raise LoraValueError(message("tuning table: unknown plan", got, f"{', '.join(IMPLEMENTATIONS)}; {', '.join(FORMS)}"))
    if plan.implementation == "cuda":
        exists = replace(plan, group_m=8) in cuda_plans(problem)
    else:
        exists = all(_power(size, 16) for size in (plan.block_m, plan.block_n, plan.block_k)) and _power(plan.warps) and plan.stages >= 1
    if not exists or plan.group_m < 1:
        allowed = "for cuda those of plan.cuda_plans, else blocks that are powers of 2 from 16 and warps from 1; any group_m and stages from 1"
        raise LoraValueError(message("tuning table: no kernel does this plan", f"{plan} for {problem}", allowed, "run `lora-kernels tune --again`"))
    return plan


def read_entry(entry: dict) -> tuple[Problem, Plan]:
    """A problem and its plan from a table's JSON form, checked."""
    dtype = getattr(torch, entry["dtype"])
    problem = Problem(entry["op"], entry["M"], entry["N"], entry["K"], entry["R"], dtype, entry.get("dropout", False))
    if type(problem.M) is not int or problem.M < 1:
        raise LoraValueError(message("M is no number of tokens", repr(problem.M)[:80], "an int of at least 1"))
    return problem, read_plan(entry["plan"], problem)


def read_entries(path: Path, device: str) -> list[dict]:
    """The entries of one JSON table. Raises LoraValueError for a table of another device."""
    content = json.loads(path.read_text())
    if content["device"] != device:
        raise LoraValueError(message("it belongs to another device", repr(content["device"]), repr(device), "run `lora-kernels tune` here"))
    return content["entries"]


def read_table(path: Path, device: str) -> Table:
    """The plans of one table, by everything but M; each list ascending in M."""
    table: Table = {}
    for entry in read_entries(path, device):
        problem, plan = read_entry(entry)
        table.setdefault(_key(problem), []).append((problem.M, plan))
    return {key: sorted(rows, key=lambda row: row[0]) for key, rows in table.items()}


def readable(names: Iterable[str], read: Callable[[Path], T]) -> Iterator[T]:
    """The user's tables of these file names and the shipped ones, where they exist. A damaged or foreign one is left out, with one logged reason."""
    folders = [SHIPPED]
    with contextlib.suppress(LoraValueError):
        folders.insert(0, user_folder())
    for path in (folder / name for folder in folders for name in names):
        try:
            if path.is_file():
                yield read(path)
        except DAMAGED as error:
            warn_once(f"tuning table {path} is not used: {type(error).__name__}: {error}")


@functools.cache
def tables(gpu: str) -> tuple[Table, ...]:
    """The tables of this GPU, the user's first."""
    return tuple(readable([table_name(gpu)], lambda path: read_table(path, gpu)))


def look_up(table: Table, problem: Problem) -> Plan | None:
    """The plan measured for this problem, or at the nearest M in log space; None where N, K, R, dtype were not measured."""
    rows = table.get(_key(problem))
    if not rows:
        return None
    return min(rows, key=lambda row: (abs(math.log(row[0] / max(problem.M, 1))), row[0]))[1]


@functools.lru_cache(maxsize=8192)
def choose(problem: Problem, device: torch.device) -> Plan:
    """The plan for this problem on this device."""
    if device.type != "cuda":
        return heuristic(problem, ARCH)
    index = device.index if device.index is not None else torch.cuda.current_device()
    for table in tables(torch.cuda.get_device_name(index)):
        plan = look_up(table, problem)
        if plan is not None:
            return plan
    major, minor = _device.cuda_capability(index)
    return heuristic(problem, 10 * major + minor)


ARCH = 90  # of a device that is not there (interpreter, offline compiles)


# Ops whose backend a plan chooses; arguments as in `reference`.
PLANNED = ("lora_linear_fwd", "lora_linear_bwd")


def problem_of(op: str, args: tuple) -> tuple[Problem, torch.device]:
    """The planning problem of a call of one of the PLANNED ops, and its device."""
    if op == "lora_linear_fwd":
        x, weight, _, lora_a, _, _, dropout_p, _ = args
        (M, K), N = x.shape, weight.shape[0]
        return Problem("fwd", M, N, K, lora_a.shape[0], x.dtype, dropout_p > 0), x.device
    dy, x, weight, lora_a = args[:4]
    M, (N, K) = dy.shape[0], weight.shape
    return Problem("dx", M, K, N, lora_a.shape[0], x.dtype, args[8] > 0), x.device


def order(op: str, args: tuple, ladder: tuple[str, ...]) -> tuple[str, ...]:
    """The ladder with the planned implementation first.

    A "torch" plan is the reference (cuBLAS + in-place addmm_), except with dropout: the mask is the kernels' to make and to apply, and
    the Triton launchers then call cuBLAS for the base GEMM themselves.
    """
    problem, device = problem_of(op, args)
    first = choose(problem, device).implementation
    if first == "torch":
        first = "triton" if problem.dropout and problem.dtype in (torch.bfloat16, torch.float16) else "reference"
    return (first, *(name for name in ladder if name != first))
