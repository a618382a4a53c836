"""`lora_shrink`: h = s * x A^T with each row's own adapter, for a base layer that someone else computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _checks, _checks_batched
from .._errors import LoraKernelsError, message
from . import _serving_path
from ._call import dense, records_grad, refuse_transforms, run_op
from ._serving_path import as_list
from .batch_meta import BatchMeta, check_ranks, check_scalings
from .lora_batched import resolve_meta, squeeze_slab

torch.library.define(
    "lora_kernels::lora_shrink",
    "(Tensor x, Tensor[] pools_a, Tensor ids, Tensor? ranks, Tensor? scalings, Tensor? table, int block, bool rank_packed,"
    " bool batch_invariant, str backend, bool strict) -> Tensor",
)


@torch.library.impl("lora_kernels::lora_shrink", "CompositeExplicitAutograd")
def _impl(x, *rest):
    *args, backend, strict = rest
    return run_op("lora_shrink", x.device.type, backend, strict, (dense(x), *args))


@torch.library.register_fake("lora_kernels::lora_shrink")
def _fake(x, pools_a, ids, ranks, scalings, table, block, rank_packed, batch_invariant, backend, strict):
    R = pools_a[0].shape[1] // (len(pools_a) if rank_packed else 1)
    return x.new_empty((len(pools_a), x.shape[0], R), dtype=torch.promote_types(x.dtype, torch.float32))


def refuse_grad(op: str, *tensors: Tensor) -> None:
    if records_grad() and any(t.requires_grad for t in tensors):
        raise LoraKernelsError(message(f"{op}: no gradients", allowed="serving", fix="lora_batched_linear trains; or run under torch.no_grad()"))


def lora_shrink(
    x: Tensor,
    pool_a: Tensor | Sequence[Tensor],
    meta: BatchMeta | Tensor,
    ranks: Tensor | None = None,
    scalings: Tensor | None = None,
    backend: str = "auto",
    strict: bool = False,
    batch_invariant: bool | None = None,
    rank_packed: bool = False,
) -> Tensor:
    """The low-rank half of a layer whose base someone else computes (quantised, tensor-parallel).

    Equivalent to:
        h = zeros(M, R)
        for m, l in enumerate(token_lora_mapping):
            if l >= 0: h[m, :ranks[l]] = scalings[l] * F.linear(x[m], pool_a[l, :ranks[l]]).float()

    Args: as in `lora_batched_linear`; `meta` is a BatchMeta or int32 ids.

    Returns:
        h float32 `[M, R]`, or `[S, M, R]` for a list of pools; zero where a row has no adapter and past its true rank.

    Raises: as `lora_batched_linear`, and LoraKernelsError where a gradient would be needed.
    Fallback: cuda -> triton -> reference on a GPU, cpu -> reference on a CPU.
    Source: Punica, arXiv:2310.18547.
    """
    op = "lora_shrink"
    try:
        pools_a = [squeeze_slab(p) for p in as_list(pool_a)]
        tensors, options = (*pools_a, ranks, scalings), (len(pools_a), rank_packed, batch_invariant, backend, strict)
        key, given = _serving_path.key_of(x, tensors, meta, op, *options), (meta, ranks, scalings)
        run = _serving_path.find(key)
    except (AttributeError, TypeError):
        _checks_batched.check_lists(op, x=x, pool_a=pool_a)
        _checks.check_options(op, backend, strict=strict, batch_invariant=batch_invariant, rank_packed=rank_packed)
        raise
    if run is not None:
        h = run(x, pools_a, *given)
        return h[0] if isinstance(pool_a, Tensor) else h
    _checks_batched.check_lists(op, x=x, pool_a=pools_a)
    refuse_transforms(op, x, *pools_a)
    _checks.check_options(op, backend, strict=strict, batch_invariant=batch_invariant, rank_packed=rank_packed)
    _checks_batched.check_pool_a(op, x, pools_a, rank_packed)
    refuse_grad(op, x, *pools_a)
    S, L = len(pools_a), pools_a[0].shape[0]
    flat = x.reshape(-1, x.shape[-1])
    meta = resolve_meta(op, meta, flat.shape[0], L, x, batch_invariant)
    ranks = _checks_batched.per_slice(op, "ranks", ranks, torch.int32, S, L, x.device)
    check_ranks(op, ranks, pools_a[0].shape[1] // (S if rank_packed else 1))
    scalings = _checks_batched.per_slice(op, "scalings", scalings, torch.float32, S, L, x.device)
    check_scalings(op, scalings)
    args = (flat, pools_a, meta.ids, ranks, scalings, meta.table, meta.block, rank_packed, meta.batch_invariant)
    h = torch.ops.lora_kernels.lora_shrink.default(*args, backend, strict)
    if key is not None:
        _serving_path.remember_shrink(key, *given, args, backend, strict)
    return h[0] if isinstance(pool_a, Tensor) else h
