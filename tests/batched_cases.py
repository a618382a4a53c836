"""Problems with many adapters, their float64 truth row by row, and eager PyTorch's answer in the same dtype."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels import _batch_table, testing


class Quantised(Tensor):
    """A weight as torchao makes them: a tensor around others, with rules for some operators and NotImplementedError for the rest."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner: Tensor):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, *_):
        return Quantised(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        if func.namespace == "aten":
            return func(*[a.inner if isinstance(a, Quantised) else a for a in args], **(kwargs or {}))
        raise NotImplementedError(f"Quantised has no rule for {func}")


@dataclass(frozen=True)
class Batch:
    """x [M, K]; per slice weight [N_i, K], bias [N_i] or None, pool_a [L, R, K], pool_b [L, N_i, R]; ids [M], ranks, scalings [S, L]."""

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    pools_a: list[Tensor]
    pools_b: list[Tensor]
    ids: Tensor
    ranks: Tensor | None
    scalings: Tensor | None

    @classmethod
    def random(cls, ids, Ns, K, R, L, dtype=torch.float32, pool_dtype=None, ranks=None, bias=True, seed=0, device="cpu") -> Batch:
        g = torch.Generator().manual_seed(seed)
        M, S = len(ids), len(Ns)
        make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
        pool_dtype = pool_dtype or dtype
        if ranks == "mixed":
            ranks = torch.randint(0, R + 1, (S, L), generator=g, dtype=torch.int32)
        return cls(
            make(M, K).to(device, dtype),
            [(make(N, K) / K**0.5).to(device, dtype) for N in Ns],
            [make(N).to(device, dtype) if bias else None for N in Ns],
            [(make(L, R, K) / K**0.5).to(device, pool_dtype) for _ in Ns],
            [(make(L, N, R) / R**0.5).to(device, pool_dtype) for N in Ns],
            torch.tensor(ids, dtype=torch.int32, device=device),
            None if ranks is None else torch.as_tensor(ranks, dtype=torch.int32, device=device).expand(S, L),
            (torch.rand(S, L, generator=g) + 0.5).to(device),
        )

    @property
    def base(self) -> tuple:
        return self.x, self.weights, self.biases, self.pools_a, self.pools_b, self.ids

    def table(self, batch_invariant: bool = False, block: int | None = None) -> tuple[Tensor, int]:
        M, L = len(self.ids), self.pools_a[0].shape[0]
        block = block or _batch_table.default_block(M, batch_invariant)
        out = torch.empty(_batch_table.layout(M, L, block).size, dtype=torch.int32, device=self.ids.device)
        return _batch_table.build(self.ids, L, block, out), block

    def expected(self, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Tensor:
        """y, one adapter after the other, every operation rounded to `dtype`."""
        cast = lambda t: None if t is None else t.to(device, dtype)
        x, ids, parts = cast(self.x), self.ids.cpu(), []
        ranks, scalings = (None if t is None else t.tolist() for t in (self.ranks, self.scalings))
        for i, (w, bias, a, b) in enumerate(zip(self.weights, self.biases, self.pools_a, self.pools_b, strict=True)):
            y = F.linear(x, cast(w), cast(bias))
            for slot in range(a.shape[0]):
                rows, r = (ids == slot).nonzero().flatten().to(device), a.shape[1] if ranks is None else ranks[i][slot]
                if len(rows) and r:
                    scale = 1.0 if scalings is None else scalings[i][slot]
                    y[rows] += scale * F.linear(F.linear(x[rows], cast(a[slot, :r].to(self.x.dtype))), cast(b[slot, :, :r].to(self.x.dtype)))
            parts.append(y)
        return torch.cat(parts, 1)

    def assert_close(self, y: Tensor) -> None:
        """y is as near to the truth as eager PyTorch in the same dtype: twice its error, plus a rounding (h, base and sum are rounded apart).

        A rounding of base and update, whose sum may be far smaller than they are. In float64, where the truth is no better than eager, a few.
        """
        exact, dtype = self.expected(device=y.device), self.x.dtype
        assert (y.shape, y.dtype) == (exact.shape, dtype)
        rounding = torch.finfo(dtype).eps * (16 if dtype == torch.float64 else 1)
        base = self.replace(ids=torch.full_like(self.ids, -1)).expected(device=y.device)
        if exact.numel() and exact.norm() > 0:
            rounding *= max(1.0, ((base.norm() + (exact - base).norm()) / exact.norm()).item())
        error, eager = (testing.relative_rmse(t, exact) for t in (y, self.expected(dtype, y.device)))
        assert error <= testing.ALLOWED_RATIO * eager + rounding, f"relative RMSE {error:.2e}, eager {eager:.2e}"

    def replace(self, **changes) -> Batch:
        return replace(self, **changes)
