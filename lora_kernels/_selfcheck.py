"""`lora-kernels check`: every backend that this machine can use, against float64, in the error measure of `testing.error_ratio`.

An op joins by an entry in `CHECKS`: a generator of `Result`s for one backend on one device.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _selfcheck_batched as batched
from . import reference, testing
from ._errors import BackendError
from .ops import _registry
from .ops.lora_linear import lora_linear


@dataclass(frozen=True)
class Result:
    """One tensor of one case: its relative RMSE against float64 and its error over eager PyTorch's (see `testing.error_ratio`)."""

    op: str
    backend: str
    device: str
    case: str
    tensor: str
    relative_rmse: float = float("nan")
    ratio: float = float("nan")
    refused: str | None = None

    @property
    def ok(self) -> bool:
        return self.refused is not None or self.ratio <= testing.ALLOWED_RATIO


# ------------------------------------------------------------------------------------------------------------ lora_linear

# M, N, K, R: a training tile, odd everything, one token, a rank above the tile sizes
SHAPES = [(128, 256, 192, 16), (37, 83, 131, 5), (1, 160, 96, 8), (64, 96, 200, 72)]
DTYPES = {  # x, W, bias | lora_a, lora_b
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "bf16, fp32 adapters": (torch.bfloat16, torch.float32),
    "fp16, fp32 adapters": (torch.float16, torch.float32),
}
SCALING = 1.75
DROPOUT = 0.1
SEED = 20_240_607


def _problem(M: int, N: int, K: int, R: int, dtype: torch.dtype, adapter_dtype: torch.dtype, device: str) -> list[Tensor]:
    """x, weight, bias, lora_a, lora_b and dy with values of order 1 in y."""
    make = torch.Generator().manual_seed(M * N + K * R)

    def randn(*shape: int, dtype: torch.dtype) -> Tensor:
        return (torch.randn(*shape, generator=make) * shape[-1] ** (-0.5 if len(shape) > 1 else 0)).to(dtype)

    x, dy = torch.randn(M, K, generator=make).to(dtype), torch.randn(M, N, generator=make).to(dtype)
    tensors = [x, randn(N, K, dtype=dtype), randn(N, dtype=dtype), randn(R, K, dtype=adapter_dtype), randn(N, R, dtype=adapter_dtype), dy]
    return [t.to(device) for t in tensors]


def _run(forward: Callable[..., Tensor], tensors: list[Tensor]) -> dict[str, Tensor]:
    """y, dx, dA, dB of `forward(x, weight, bias, lora_a, lora_b)`."""
    x, weight, bias, a, b, dy = tensors
    x, a, b = (t.detach().clone().requires_grad_() for t in (x, a, b))
    y = forward(x, weight, bias, a, b)
    y.backward(dy)
    return {"y": y.detach(), "dx": x.grad, "dA": a.grad, "dB": b.grad}


def _eager(p: float) -> Callable[..., Tensor]:
    """The op in plain PyTorch operations and PyTorch's own autograd, with the mask every backend must use."""

    def forward(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        kept = x
        if p > 0:
            kept = x * testing.dropout_mask(SEED, *x.shape, p).to(x) * reference.keep_scale(p)
        return F.linear(x, weight, bias) + SCALING * F.linear(F.linear(kept, a.to(x.dtype)), b.to(x.dtype))

    return forward


def _check_lora_linear(backend: str, device: str) -> Iterator[Result]:
    for (name, dtypes), (M, N, K, R), p in itertools.product(DTYPES.items(), SHAPES, (0.0, DROPOUT)):
        case = f"{name} | M{M} N{N} K{K} R{R}" + (f" | dropout {p}" if p else "")
        found = Result("lora_linear", backend, device, case, "all")
        tensors = _problem(M, N, K, R, *dtypes, device)

        def ours(x, weight, bias, a, b, p=p):
            return lora_linear(x, weight, bias, a, b, SCALING, dropout_p=p, seed=SEED, backend=backend, strict=True)

        try:
            got = _run(ours, tensors)
        except BackendError as reason:
            yield replace(found, refused=str(reason))
            continue
        eager = _run(_eager(p), tensors)
        exact = _run(_eager(p), [t.to("cpu", torch.float64) for t in tensors])
        for key, value in got.items():
            value, same = value.cpu(), eager[key].cpu()
            yield replace(
                found, tensor=key, relative_rmse=testing.relative_rmse(value, exact[key]), ratio=testing.error_ratio(value, same, exact[key])
            )


# ------------------------------------------------------------------------------------------------------------ many adapters


def _check_batched(op: str, cases: Callable[..., Iterator[batched.Case]]) -> Callable[[str, str], Iterator[Result]]:
    def check(backend: str, device: str) -> Iterator[Result]:
        for case, ours, eager, tensors in cases(DTYPES, backend, device):
            found = Result(op, backend, device, case, "all")
            try:
                got = ours(tensors)
            except BackendError as reason:
                yield replace(found, refused=str(reason))
                continue
            same = eager(tensors)
            exact = eager([t.to("cpu", torch.float64) if t.is_floating_point() else t.cpu() for t in tensors])
            for key, value in got.items():
                ratio = testing.error_ratio(value.cpu(), same[key].cpu(), exact[key])
                yield replace(found, tensor=key, relative_rmse=testing.relative_rmse(value.cpu(), exact[key]), ratio=ratio)

    return check


# ---------------------------------------------------------------------------------------------------------------- all ops

# public op -> (the registered ops it runs on, its check)
CHECKS: dict[str, tuple[tuple[str, ...], Callable[[str, str], Iterator[Result]]]] = {
    "lora_linear": (("lora_linear_fwd", "lora_linear_bwd"), _check_lora_linear),
    "lora_batched_linear": (("lora_batched_fwd", "lora_batched_bwd"), _check_batched("lora_batched_linear", batched.linear)),
    "lora_shrink": (("lora_shrink",), _check_batched("lora_shrink", batched.shrink)),
    "lora_expand": (("lora_expand",), _check_batched("lora_expand", batched.expand)),
}


def devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def targets() -> Iterator[tuple[str, str, str]]:
    """(public op, backend, device) for everything usable here, the best backend first."""
    for op, (needed, _) in CHECKS.items():
        for device in devices():
            for backend in _registry.LADDERS[device]:
                found = _registry.provider(backend)
                if not isinstance(found, str) and any(name in found.OPS for name in needed):
                    yield op, backend, device


def unchecked() -> list[str]:
    """Ops that the reference defines and no check covers."""
    covered = {name for needed, _ in CHECKS.values() for name in needed}
    return sorted(set(reference.OPS) - covered)


def check(op: str, backend: str, device: str) -> tuple[list[Result], float]:
    """All results of one op on one backend, and the seconds they took."""
    start = time.perf_counter()
    results = list(CHECKS[op][1](backend, device))
    return results, time.perf_counter() - start
