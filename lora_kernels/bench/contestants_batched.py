"""Who computes a linear layer whose rows use different adapters (decode)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import _device
from ..ops.batch_meta import BatchMeta
from ..ops.lora_batched import lora_batched_linear
from .contestants import Bound, Contestant, _base
from .problem import SCALING, Operands
from .shapes import Case


def _loop(ops: Operands, case: Case) -> Bound:
    """For every adapter present its rows; sorted on the host outside the clock, as a server would."""
    rows = [(i, (ops.ids == i).nonzero().flatten()) for i in ops.ids.unique().tolist()]

    def forward():
        y = F.linear(ops.x, ops.weight)
        for i, index in rows:
            h = F.linear(ops.x[index], ops.lora_a[i])
            y.index_add_(0, index, F.linear(h, ops.lora_b[i]), alpha=SCALING)
        return y

    return Bound(forward, (ops.x,))


def _gather(ops: Operands, case: Case) -> Bound:
    ids = ops.ids.long()

    def forward():
        h = torch.bmm(ops.lora_a[ids], ops.x.unsqueeze(2))
        return torch.baddbmm(F.linear(ops.x, ops.weight).unsqueeze(2), ops.lora_b[ids], h, alpha=SCALING).squeeze(2)

    return Bound(forward, (ops.x,))


def _peft_mixed(ops: Operands, case: Case) -> Bound:
    """PEFT's mixed batch: one adapter name per sequence, each sequence one token long; adapters in x's dtype."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear
    from torch import nn

    with torch.device("meta"):
        frozen = nn.Linear(case.K, case.N, bias=False)
    frozen.weight = nn.Parameter(ops.weight, requires_grad=False)
    options = {"r": case.R, "lora_alpha": SCALING * case.R}
    layer = Linear(frozen, "a0", config=LoraConfig(**options), **options)
    for i in range(case.L):
        if i:
            layer.update_layer(f"a{i}", config=LoraConfig(**options), **options)
        layer.lora_A[f"a{i}"].weight = nn.Parameter(ops.lora_a[i], requires_grad=False)
        layer.lora_B[f"a{i}"].weight = nn.Parameter(ops.lora_b[i], requires_grad=False)
    layer.eval()
    names, x = [f"a{i}" for i in ops.ids.tolist()], ops.x.unsqueeze(1)
    return Bound(lambda: layer(x, adapter_names=names).squeeze(1), (ops.x,))


def _ours(ops: Operands, case: Case) -> Bound:
    """The mapping is prepared once per step and shared by all layers, so it lies outside the clock, as for the others."""
    scalings = torch.full((case.L,), SCALING, device=ops.x.device)
    meta = BatchMeta(ops.ids, case.L)
    return Bound(lambda: lora_batched_linear(ops.x, ops.weight, None, ops.lora_a, ops.lora_b, meta, scalings=scalings), (ops.x,))


def _peft_missing(case: Case, device: torch.device) -> str | None:
    if case.L > 64:
        return "more than 64 adapters: its Python loop alone takes milliseconds"
    return None if _device.has_module("peft") else "peft is not installed"


def contestants() -> list[Contestant]:
    from . import peers

    return [
        Contestant("base", "the frozen layer alone: the floor", _base, adapter=False),
        Contestant("loop", "base GEMM, then two products and an index_add_ per adapter present", _loop),
        Contestant("gather_bmm", "base GEMM, then bmm over gathered adapters", _gather),
        Contestant("peft_mixed", "PEFT's mixed batch (adapter_names), one token per sequence", _peft_mixed, _peft_missing),
        *peers.batched(),
        Contestant("liger", "", _loop, lambda case, device: "Liger has no LoRA kernel"),
        Contestant("ours", "lora_batched_linear, best backend for the call", _ours),
    ]
