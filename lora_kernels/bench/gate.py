"""The gate: whoever disagrees with float64 is refused, and is not timed.

A result passes when its error is at most twice that of plain PyTorch in the same dtype (plus the rounding floor), and small in itself.
With dropout the mask is first read out of the contestant: with W = 0, dy = 1, A and B constant, dx is the mask times a constant.
The same torch seed then gives the same mask on the real operands, whatever generator the contestant uses. What kept elements are multiplied
by is the contestant's word (1 / (1 - p), ours of the p that is really applied), held against the rate.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .. import testing
from .contestants import Bound, Contestant
from .problem import SCALING, Kept, Operands, Results, exact
from .shapes import Case

LIMIT = {"bfloat16": 2e-2, "float16": 3e-3, "float32": 1e-4}  # relative RMSE that no correct result comes near
_SEED = 1234


def run(bound: Bound, case: Case, dy: Tensor) -> Results:
    """One forward (and backward) of a contestant, by result name."""
    if not case.backward:
        with torch.set_grad_enabled(case.dropout > 0):
            return {"y": _flat(bound.forward())}
    y = bound.forward()
    grads = torch.autograd.grad(y, bound.leaves, dy.view(y.shape))
    return {"y": _flat(y), **dict(zip(("dx", "dA", "dB"), map(_flat, grads), strict=False))}


def _flat(t: Tensor) -> Tensor:
    return t.detach().reshape(-1, t.shape[-1])


def kept(contestant: Contestant, case: Case, ops: Operands) -> Tensor:
    """The dropout mask, bool `[M, K]`, that this contestant draws under `_SEED`."""
    ones = torch.ones_like(ops.x, requires_grad=False).requires_grad_()
    probe = replace(
        ops,
        x=ones,
        weight=torch.zeros_like(ops.weight),
        lora_a=torch.full_like(ops.lora_a, 1 / (SCALING * case.R)),
        lora_b=torch.full_like(ops.lora_b, 1 / case.N),
        dy=ops.x.new_ones(case.M, case.N).detach(),
    )
    bound = contestant.bind(probe, case)
    torch.manual_seed(_SEED)
    y = bound.forward()
    (dx,) = torch.autograd.grad(y, [ones], probe.dy.view(y.shape))
    return dx.reshape(case.M, case.K) > 0.5


def _rate_wrong(keep: Tensor, p: float) -> str | None:
    rate, sigma = 1 - keep.double().mean().item(), (p * (1 - p) / keep.numel()) ** 0.5
    return None if abs(rate - p) < 6 * sigma + 1e-5 else f"it drops {rate:.4f} of the elements instead of {p:g}"


def _scale_wrong(scale: float, p: float) -> str | None:
    """A rate in steps of 1 / 65536 is allowed, and the scale that goes with it."""
    return None if abs(1 / scale - (1 - p)) <= 2**-17 + 1e-12 else f"it multiplies kept elements by {scale:g} where 1 / (1 - p) is {1 / (1 - p):g}"


class Gate:
    """Checks the contestants of one case on its first operand set."""

    def __init__(self, case: Case, ops: Operands):
        self.case, self.ops = case, ops
        self._truth: dict[bool, tuple[Results, Results]] = {}

    def _expected(self, adapter: bool, keep: Kept | None) -> tuple[Results, Results]:
        """Exact results, and plain PyTorch's in the dtype under test. Shared by all whose result is the same."""
        if keep is not None:
            return self._compute(adapter, keep)
        if adapter not in self._truth:
            self._truth[adapter] = self._compute(adapter, None)
        return self._truth[adapter]

    def _compute(self, adapter: bool, keep: Kept | None) -> tuple[Results, Results]:
        dtype = getattr(torch, self.case.dtype)
        return exact(self.case, self.ops, adapter, keep), exact(self.case, self.ops, adapter, keep, dtype)

    def refuses(self, contestant: Contestant, bound: Bound) -> tuple[str | None, dict[str, float]]:
        """Why this contestant is refused, or None; and the relative RMSE of each result."""
        case, keep = self.case, None
        if case.dropout > 0 and contestant.adapter:
            mask = kept(contestant, case, self.ops)
            scale = contestant.keep_scale(case.dropout)
            wrong = _rate_wrong(mask, case.dropout) or _scale_wrong(scale, case.dropout)
            if wrong:
                return wrong, {}
            keep = mask, scale
        torch.manual_seed(_SEED)
        got = run(bound, case, self.ops.dy)
        truth, eager = self._expected(contestant.adapter, keep)
        if set(got) != set(truth):
            return f"it returns {sorted(got)}, wanted {sorted(truth)}", {}
        errors = {}
        for name, want in truth.items():
            if got[name].shape != want.shape:
                return f"{name} has shape {list(got[name].shape)}, wanted {list(want.shape)}", errors
            errors[name] = error = testing.relative_rmse(got[name], want)
            ratio = testing.error_ratio(got[name].to(eager[name].dtype), eager[name], want)
            if not error <= LIMIT[case.dtype] or not ratio <= testing.ALLOWED_RATIO:
                return f"{name} is wrong: relative RMSE {error:.1e}, {ratio:.1f} times plain PyTorch's error", errors
        return None, errors
