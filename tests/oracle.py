"""The float64 oracle of `lora_linear` and the criterion every implementation is held to.

An implementation passes when `lora_kernels.testing.error_ratio` against eager PyTorch in the same dtype is at most 2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels import reference, testing


class Case(NamedTuple):
    """One problem: x [M, K], weight [N, K], bias [N] or None, lora_a [R, K], lora_b [N, R], dy [M, N]."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    dy: Tensor
    scaling: float = 0.75
    dropout_p: float = 0.0
    seed: int = 1234

    @classmethod
    def random(cls, M, N, K, R, dtype=torch.float32, adapter_dtype=None, bias=True, generator_seed=0, device="cpu", **rest) -> Case:
        g = torch.Generator().manual_seed(generator_seed)
        make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
        adapter_dtype = adapter_dtype or dtype
        return cls(
            make(M, K).to(device, dtype),
            (make(N, K) / K**0.5).to(device, dtype),
            make(N).to(device, dtype) if bias else None,
            (make(R, K) / K**0.5).to(device, adapter_dtype),
            make(N, R).to(device, adapter_dtype),
            make(M, N).to(device, dtype),
            **rest,
        )

    def to(self, dtype: torch.dtype) -> Case:
        return self._replace(**{k: v.to(dtype) for k, v in self._asdict().items() if isinstance(v, Tensor)})


def eager(c: Case) -> dict[str, Tensor]:
    """Forward and gradients by plain autograd in the case's own dtypes (adapters cast to x's); dropout by the exported mask."""
    x, a, b = (t.detach().clone().requires_grad_() for t in (c.x, c.lora_a, c.lora_b))
    bias = None if c.bias is None else c.bias.detach().clone().requires_grad_()
    dropped = x
    if c.dropout_p > 0:
        seed = torch.tensor([c.seed], device=x.device)
        keep = reference.unpack_bits(reference.dropout_mask(seed, *x.shape, c.dropout_p), x.shape[1])
        dropped = torch.where(keep, x * reference.keep_scale(c.dropout_p), x.new_zeros(()))
    y = F.linear(x, c.weight, bias) + c.scaling * F.linear(F.linear(dropped, a.to(x.dtype)), b.to(x.dtype))
    y.backward(c.dy)
    return {"y": y.detach(), "dx": x.grad, "da": a.grad, "db": b.grad} | ({} if bias is None else {"dbias": bias.grad})


def row_leaks(dtype: torch.dtype) -> bool:
    """Whether PyTorch's own product lets a row's NaN into the row before: bf16 on AMX does (2.13), in some sizes."""
    x = torch.ones(17, 200, dtype=dtype)
    x[1:] = torch.nan
    return bool(F.linear(x, torch.ones(8, 200, dtype=dtype))[0].isnan().any())


def assert_close(got: dict[str, Tensor], c: Case) -> None:
    """Every tensor in `got` has the shape and dtype of eager's, and at most twice its error."""
    exact, same_dtype = eager(c.to(torch.float64)), eager(c)
    for name, tensor in got.items():
        assert tensor.shape == exact[name].shape, f"{name}: shape {tuple(tensor.shape)}, expected {tuple(exact[name].shape)}"
        assert tensor.dtype == same_dtype[name].dtype, f"{name}: dtype {tensor.dtype}, expected {same_dtype[name].dtype}"
        if c.x.dtype == torch.float64:  # the oracle's own dtype: only the order of summation differs
            assert testing.relative_rmse(tensor, exact[name]) < 1e-13, name
            continue
        ratio = testing.error_ratio(tensor, same_dtype[name], exact[name])
        assert ratio <= testing.ALLOWED_RATIO, f"{name}: {ratio:.2f} times eager's error, allowed {testing.ALLOWED_RATIO}"
