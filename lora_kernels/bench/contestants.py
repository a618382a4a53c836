"""Who computes a LoRA linear layer with one adapter. Found by import, never vendored; who is absent is listed with the reason.

A contestant binds one set of operands and returns a `Bound`: how to run its forward, and the leaves whose gradients a training step needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _device, testing
from ..ops import _registry
from ..ops.lora_linear import lora_linear
from .problem import SCALING, Operands
from .shapes import Case


class Bound(NamedTuple):
    """forward() -> y `[M, N]` or `[1, M, N]`; leaves: (x, A, B), or (x,) without an adapter."""

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]


@dataclass(frozen=True)
class Contestant:
    name: str
    about: str
    bind: Callable[[Operands, Case], Bound]
    missing: Callable[[Case, torch.device], str | None] = lambda case, device: None
    adapter: bool = True  # False: the frozen layer alone
    keep_scale: Callable[[float], float] = lambda p: 1 / (1 - p)  # what it multiplies kept elements by under dropout


def _leaf(t: Tensor, case: Case, dtype: torch.dtype | None = None) -> Tensor:
    return t.detach().to(dtype or t.dtype, copy=True).requires_grad_(case.backward or case.dropout > 0)


def _base(ops: Operands, case: Case) -> Bound:
    return Bound(lambda: F.linear(ops.x, ops.weight), (ops.x,))


def naive_linear(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, p: float) -> Tensor:
    h = F.dropout(x, p) if p > 0 else x
    return F.linear(x, weight) + F.linear(F.linear(h, a), b) * SCALING


def _naive(ops: Operands, case: Case) -> Bound:
    a, b = _leaf(ops.lora_a, case), _leaf(ops.lora_b, case)
    return Bound(lambda: naive_linear(ops.x, ops.weight, a, b, case.dropout), (ops.x, a, b))


class _AddmmLinear(torch.autograd.Function):
    """Base GEMM, then the update added in place, both ways: the best plain PyTorch can do by hand."""

    @staticmethod
    def forward(ctx, x, weight, a, b, p):
        keep = None if p == 0 else torch.empty_like(x).bernoulli_(1 - p).div_(1 - p)
        h = torch.mm(x if keep is None else x * keep, a.t())
        y = F.linear(x, weight)
        y.addmm_(h, b.t(), alpha=SCALING)
        ctx.save_for_backward(x, weight, a, b, h, keep)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, a, b, h, keep = ctx.saved_tensors
        g = torch.mm(dy, b)
        dx = torch.mm(dy, weight)
        if keep is None:
            dx.addmm_(g, a, alpha=SCALING)
        else:
            dx.addcmul_(torch.mm(g, a), keep, value=SCALING)
        da = torch.mm(g.t(), x if keep is None else x * keep).mul_(SCALING)
        return dx, None, da, torch.mm(dy.t(), h).mul_(SCALING), None


def _addmm(ops: Operands, case: Case) -> Bound:
    a, b = _leaf(ops.lora_a, case), _leaf(ops.lora_b, case)
    return Bound(lambda: _AddmmLinear.apply(ops.x, ops.weight, a, b, case.dropout), (ops.x, a, b))


_compiled: dict[Case, Callable] = {}


def _compile(ops: Operands, case: Case) -> Bound:
    """One compilation per case, for its exact shapes."""
    if case not in _compiled:
        torch._dynamo.reset()
        _compiled.clear()
        _compiled[case] = torch.compile(naive_linear, dynamic=False, fullgraph=True)
    run = _compiled[case]
    a, b = _leaf(ops.lora_a, case), _leaf(ops.lora_b, case)
    return Bound(lambda: run(ops.x, ops.weight, a, b, case.dropout), (ops.x, a, b))


def peft_layer(ops: Operands, case: Case, dtype: torch.dtype) -> nn.Module:
    """PEFT's own LoRA layer around these operands, adapters in `dtype`."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    with torch.device("meta"):
        frozen = nn.Linear(case.K, case.N, bias=False)
    frozen.weight = nn.Parameter(ops.weight.detach(), requires_grad=False)
    config = LoraConfig(r=case.R, lora_alpha=SCALING * case.R, lora_dropout=case.dropout)
    layer = Linear(frozen, "default", config=config, r=case.R, lora_alpha=SCALING * case.R, lora_dropout=case.dropout)
    layer.lora_A["default"].weight = nn.Parameter(_leaf(ops.lora_a, case, dtype), requires_grad=case.backward)
    layer.lora_B["default"].weight = nn.Parameter(_leaf(ops.lora_b, case, dtype), requires_grad=case.backward)
    return layer.train(case.backward or case.dropout > 0)


def _peft(dtype: str | None) -> Callable[[Operands, Case], Bound]:
    def bind(ops: Operands, case: Case) -> Bound:
        layer = peft_layer(ops, case, getattr(torch, dtype or case.dtype))
        return Bound(lambda: layer(ops.x), (ops.x, layer.lora_A["default"].weight, layer.lora_B["default"].weight))

    return bind


def _ours(backend: str, dtype: str | None = None) -> Callable[[Operands, Case], Bound]:
    def bind(ops: Operands, case: Case) -> Bound:
        strict = backend != "auto"
        kind = getattr(torch, dtype) if dtype else None
        a, b = _leaf(ops.lora_a, case, kind), _leaf(ops.lora_b, case, kind)
        options = {"scaling": SCALING, "dropout_p": case.dropout, "backend": backend, "strict": strict}
        return Bound(lambda: lora_linear(ops.x, ops.weight, None, a, b, **options), (ops.x, a, b))

    return bind


# ---------------------------------------------------------------------------------------------------------------- presence


def needs(module: str) -> Callable[[Case, torch.device], str | None]:
    return lambda case, device: None if _device.has_module(module) else f"{module} is not installed"


def _needs_low_precision(module: str | None = None) -> Callable[[Case, torch.device], str | None]:
    def missing(case: Case, device: torch.device) -> str | None:
        if case.dtype == "float32":
            return "the same as with adapters in x's dtype"
        return needs(module)(case, device) if module else None

    return missing


def _needs_backend(name: str, op: str = "lora_linear_fwd") -> Callable[[Case, torch.device], str | None]:
    def missing(case: Case, device: torch.device) -> str | None:
        if name not in _registry.LADDERS.get(device.type, ()):
            return f"it does not serve {device.type}"
        found = _registry.provider(name)
        if isinstance(found, str):
            return found
        return None if op in found.OPS else f"it has no {op}"

    return missing


def _few_compilations(case: Case, device: torch.device) -> str | None:
    """A compilation takes seconds, so that with all of them `make gpu` would measure a third of its cases."""
    wanted = case.R == 16 and case.dropout == 0 and case.mode == "forward+backward"
    return None if device.type != "cuda" or wanted else "on a GPU compiled for R = 16, both ways, without dropout alone"


def _never(why: str) -> Callable[[Case, torch.device], str | None]:
    return lambda case, device: why


def _own(name: str, how: str, backend: str, missing=lambda case, device: None, dtype: str | None = None) -> Contestant:
    return Contestant(name, f"lora_linear, {how}", _ours(backend, dtype), missing, keep_scale=testing.keep_scale)


def contestants() -> list[Contestant]:
    from . import peers

    return [
        Contestant("base", "the frozen layer alone: the floor", _base, adapter=False),
        Contestant("naive", "F.linear(x, W) + s * F.linear(F.linear(x, A), B)", _naive),
        Contestant("addmm", "base GEMM, update added in place by addmm_, backward by hand", _addmm),
        Contestant("compile", "torch.compile(naive), static shapes", _compile, _few_compilations),
        Contestant("peft", "PEFT as it comes: fp32 adapters, x cast to fp32", _peft("float32"), needs("peft")),
        Contestant("peft_low", "PEFT with adapters in x's dtype", _peft(None), _needs_low_precision("peft")),
        *peers.linear(),
        Contestant("liger", "", _naive, _never("Liger has no LoRA kernel")),
        _own("ours", "best backend for the call", "auto"),
        _own("ours_fp32", "with fp32 adapters, as PEFT makes them", "auto", _needs_low_precision(), "float32"),
        _own("ours_triton", "Triton only", "triton", _needs_backend("triton")),
        _own("ours_cuda", "CUDA C++ only", "cuda", _needs_backend("cuda")),
    ]
