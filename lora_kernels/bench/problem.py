"""The operands of a case, what it must move and compute, and its exact results in float64."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from .._errors import LoraValueError, message
from .shapes import Case

SCALING = 2.0
ROTATE_CPU, ROTATE_CACHES = 64 << 20, 4
MAX_SETS = 16


@dataclass
class Operands:
    """One set: x `[M, K]`, weight `[N, K]`, dy `[M, N]`; adapters `[R, K]`, `[N, R]`, or pools `[L, R, K]`, `[L, N, R]` with ids `[M]`."""

    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    dy: Tensor
    ids: Tensor | None = None


def operands(case: Case, device: torch.device, seed: int) -> Operands:
    """Random normal data, scaled so that base and update are of one size; never zeros, on which hardware runs faster."""
    check_room(case, device)
    generator = torch.Generator(device=device).manual_seed(seed)
    dtype = getattr(torch, case.dtype)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator, dtype=torch.float32).mul_(scale).to(dtype)

    pool = (case.L,) if case.L else ()
    made = Operands(
        x=random(case.M, case.K),
        weight=random(case.N, case.K, scale=case.K**-0.5),
        lora_a=random(*pool, case.R, case.K, scale=case.K**-0.5),
        lora_b=random(*pool, case.N, case.R, scale=case.R**-0.5),
        dy=random(case.M, case.N) if case.backward else random(0),
    )
    if case.L:  # every adapter is used, in no particular order
        order = torch.randperm(case.M, device=device, generator=generator)
        made.ids = (torch.arange(case.M, device=device)[order] % case.L).to(torch.int32)
    if case.backward or case.dropout:
        made.x.requires_grad_()
    return made


def count_sets(case: Case, device: torch.device) -> int:
    """How many operand sets to rotate, so that none is found in a cache: four caches full on a GPU, 64 MiB (two L3) on a CPU; 2 to 16."""
    wanted = ROTATE_CPU
    if device.type == "cuda":
        wanted = ROTATE_CACHES * torch.cuda.get_device_properties(device).L2_cache_size
    one = floor_bytes(case)
    return min(MAX_SETS, max(2, -(-wanted // one)))


def check_room(case: Case, device: torch.device) -> None:
    """Raises LoraValueError for operands and results larger than the device's memory: an allocator's own words name neither."""
    need, have = floor_bytes(case), _memory(device)
    if need > have:
        got, allowed = (f"{size / 2**30:.3g} GiB" for size in (need, have))
        raise LoraValueError(message(f"{case} does not fit into memory", got, allowed, "fewer features, tokens or ranks"))


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def adapters_used(case: Case) -> int:
    return min(case.L, case.M) if case.L else 1


def floor_bytes(case: Case) -> int:
    """Fewest bytes through memory: every operand read once, every result written once, per direction. Nothing intermediate."""
    size = getattr(torch, case.dtype).itemsize
    adapters = adapters_used(case) * case.R * (case.K + case.N)
    elements = case.M * case.K + case.N * case.K + adapters + case.M * case.N
    if case.backward:  # dy, W, x, A, B in; dx, dA, dB out
        elements += case.M * case.N + case.N * case.K + case.M * case.K + adapters + case.M * case.K + adapters
    return size * elements


def floor_flops(case: Case, adapter: bool = True) -> int:
    """Multiplications and additions of the algebra in the cheapest order (through rank R)."""
    M, K, N, R = case.M, case.K, case.N, case.R if adapter else 0
    flops = 2 * M * N * K + 2 * M * R * (K + N)
    if case.backward:  # dx = dy W + g A, g = dy B, dA = g^T x, dB = dy^T h
        flops += 2 * M * N * K + 4 * M * R * (K + N)
    return flops


Results = dict[str, Tensor]  # "y", and with a backward "dx", "dA", "dB"


Kept = tuple[Tensor, float]  # the dropout's mask, bool `[M, K]`, and what kept elements are multiplied by


def exact(case: Case, ops: Operands, adapter: bool = True, keep: Kept | None = None, dtype: torch.dtype = torch.float64) -> Results:
    """The results in float64 (or `dtype`), from the rounded operands."""
    x, w, a, b, dy = (t.detach().to(dtype) for t in (ops.x, ops.weight, ops.lora_a, ops.lora_b, ops.dy))
    found: Results = {"y": x @ w.t()}
    if case.backward:
        found["dx"] = dy @ w
    if not adapter:
        return found
    if ops.ids is not None:
        for i in ops.ids.unique().tolist():
            rows = ops.ids == i
            found["y"][rows] += SCALING * (x[rows] @ a[i].t()) @ b[i].t()
        return found
    drop = (lambda t: t) if keep is None else (lambda t: t * keep[0] * keep[1])
    h = SCALING * drop(x) @ a.t()
    found["y"] += h @ b.t()
    if case.backward:
        g = SCALING * dy @ b
        found["dx"] += drop(g @ a)
        found["dA"] = g.t() @ drop(x)
        found["dB"] = dy.t() @ h
    return found
