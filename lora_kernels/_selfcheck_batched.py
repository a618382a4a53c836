"""The cases of `lora-kernels check` for the many-adapter ops; `_selfcheck` runs and judges them.

Each generator gives (case, ours, eager, tensors): two functions from the tensors to named results, ours on the backend, eager in plain
PyTorch row by row, which in float64 is the truth.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference, testing
from .ops.lora_batched import lora_batched_linear
from .ops.lora_expand import lora_expand
from .ops.lora_shrink import lora_shrink

# M, (N of each slice), K, R: a prefill of two slices, odd everything, one row
SHAPES = [(130, (96, 64), 160, 16), (37, (83,), 131, 24), (1, (160,), 96, 8)]
ADAPTERS = 5
SEED = 77
Run = Callable[[list[Tensor]], dict[str, Tensor]]
Case = tuple[str, Run, Run, list[Tensor]]


def _problem(M: int, Ns: tuple[int, ...], K: int, R: int, dtypes: tuple[torch.dtype, torch.dtype], device: str) -> list:
    """x, dy, ids, ranks and scalings, then weight, bias, pool_a, pool_b of every slice; adapters of all ranks from 0 to R, rows without one."""
    make = torch.Generator().manual_seed(M + K)
    dtype, pool_dtype = dtypes

    def randn(*shape: int, fan: int = 1, to: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape, generator=make) * fan**-0.5).to(to)

    ids = torch.randint(-1, ADAPTERS, (M,), generator=make, dtype=torch.int32)
    ids[-1] = 0
    ranks = torch.linspace(R, 0, ADAPTERS).to(torch.int32)
    tensors = [randn(M, K), randn(M, sum(Ns)), ids, ranks, torch.rand(ADAPTERS, generator=make) + 0.5]
    for N in Ns:
        tensors += [randn(N, K, fan=K), randn(N), randn(ADAPTERS, R, K, fan=K, to=pool_dtype), randn(ADAPTERS, N, R, fan=R, to=pool_dtype)]
    return [t.to(device) for t in tensors]


def _cases(dtypes: dict, device: str) -> Iterator[tuple[str, list[Tensor]]]:
    for (name, pair), (M, Ns, K, R) in itertools.product(dtypes.items(), SHAPES):
        yield f"{name} | M{M} N{'+'.join(map(str, Ns))} K{K} R{R}, mixed ranks", _problem(M, Ns, K, R, pair, device)


def _with_grads(tensors: list[Tensor], forward: Callable[..., Tensor]) -> dict[str, Tensor]:
    """y and the gradients of x and all pools; forward(x, ids, ranks, scalings, weights, biases, pools_a, pools_b)."""
    x, dy, *rest = tensors
    x = x.detach().clone().requires_grad_()
    weights, biases, *pools = (rest[3 + i :: 4] for i in range(4))
    pools_a, pools_b = ([p.detach().clone().requires_grad_() for p in side] for side in pools)
    y = forward(x, *rest[:3], weights, biases, pools_a, pools_b)
    y.backward(dy)
    d_a, d_b = (torch.cat([p.grad.flatten() for p in side]) for side in (pools_a, pools_b))
    return {"y": y.detach(), "dx": x.grad, "dA": d_a, "dB": d_b}


def _eager_linear(p: float) -> Callable[..., Tensor]:
    def forward(x, ids, ranks, scalings, weights, biases, pools_a, pools_b):
        kept = x * testing.dropout_mask(SEED, *x.shape, p).to(x) * reference.keep_scale(p) if p > 0 else x
        slices = []
        for weight, bias, a, b in zip(weights, biases, pools_a, pools_b, strict=True):
            rows = list(F.linear(x, weight, bias))
            for m, slot in enumerate(ids.tolist()):
                if slot >= 0 and (r := int(ranks[slot])):
                    h = F.linear(kept[m], a[slot, :r].to(x.dtype))
                    rows[m] = rows[m] + scalings[slot].to(x.dtype) * F.linear(h, b[slot, :, :r].to(x.dtype))
            slices.append(torch.stack(rows))
        return torch.cat(slices, 1)

    return forward


def linear(dtypes: dict, backend: str, device: str) -> Iterator[Case]:
    for (case, tensors), p in itertools.product(_cases(dtypes, device), (0.0, 0.1)):

        def ours(x, ids, ranks, scalings, weights, biases, pools_a, pools_b, p=p):
            options = {"dropout_p": p, "seed": SEED} if p > 0 else {}
            y = lora_batched_linear(x, weights, biases, pools_a, pools_b, ids, ranks, scalings, backend, strict=True, **options)
            return torch.cat(y, 1)

        label = case + (f" | dropout {p}" if p else "")
        yield label, lambda t, ours=ours: _with_grads(t, ours), lambda t, p=p: _with_grads(t, _eager_linear(p)), tensors


def shrink(dtypes: dict, backend: str, device: str) -> Iterator[Case]:
    def ours(t: list[Tensor]) -> dict[str, Tensor]:
        return {"h": lora_shrink(t[0], t[7::4], t[2], t[3], t[4], backend, strict=True)}

    def eager(t: list[Tensor]) -> dict[str, Tensor]:
        x, (ids, ranks, scalings), pools = t[0], t[2:5], t[7::4]
        h = torch.zeros(len(pools), x.shape[0], pools[0].shape[1], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        for i, slot in itertools.product(range(len(pools)), range(ADAPTERS)):
            r, rows = int(ranks[slot]), (ids == slot).nonzero().flatten()
            h[i, rows, :r] = scalings[slot] * F.linear(x, pools[i][slot, :r].to(x.dtype))[rows].to(h.dtype)
        return {"h": h}

    for case, tensors in _cases(dtypes, device):
        yield case, ours, eager, tensors


def expand(dtypes: dict, backend: str, device: str) -> Iterator[Case]:
    """y += h B^T on dy as y, with an h made of x's first R columns."""

    def start(t: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        pools = t[8::4]
        return t[1].clone(), t[0][:, : pools[0].shape[2]].expand(len(pools), -1, -1).contiguous(), pools

    def ours(t: list[Tensor]) -> dict[str, Tensor]:
        y, h, pools = start(t)
        return {"y": lora_expand(y, h, pools, t[2], t[3], backend, strict=True)}

    def eager(t: list[Tensor]) -> dict[str, Tensor]:
        y, h, pools = start(t)
        column = 0
        for i, pool in enumerate(pools):
            for m, slot in enumerate(t[2].tolist()):
                if slot >= 0:
                    r = int(t[3][slot])
                    y[m, column : column + pool.shape[1]] += F.linear(h[i, m, :r], pool[slot, :, :r].to(y.dtype))
            column += pool.shape[1]
        return {"y": y}

    for case, tensors in _cases(dtypes, device):
        yield case, ours, eager, tensors
