"""fp32 products summed in one chain over k, as a GPU's cores do: what an emulated kernel stands beside. MKL sums in many chains."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def chained_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [M, K] @ b [K, N] by K fused multiply-adds, one after the other."""
    total = a.new_zeros(a.shape[0], b.shape[1])
    for k in range(a.shape[1]):
        total = (total.double() + a[:, k, None].double() * b[k].double()).float()
    return total


class ChainedProducts(TorchDispatchMode):
    """`with ChainedProducts():` mm and addmm of fp32 are chains; everything else is PyTorch's."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default and args[0].dtype == torch.float32:
            return chained_mm(*args)
        if func is torch.ops.aten.addmm.default and args[0].dtype == torch.float32 and not kwargs:
            return args[0] + chained_mm(*args[1:])
        return func(*args, **(kwargs or {}))
