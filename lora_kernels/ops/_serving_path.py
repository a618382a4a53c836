"""The lean path of `lora_batched_linear`: serving calls of a known signature, without the checks and the dispatcher.

They cost 40 us a call where a small decode step on a CPU takes 5 (benchmarks/bench_host_overhead.py). What depends on values (ids, ranks) is
checked every time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import _checks_batched, _device
from ..native.signature import signature
from . import _registry
from .batch_meta import BatchMeta, check_ids, check_ranks
from .lora_linear import keep, unobserved

_OP = "lora_batched_fwd"
_runs: dict[tuple, Callable] = {}


def as_list(t: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return (t,) if isinstance(t, Tensor) else t


def key_of(x, weight, bias, pools_a, pools_b, mapping, ranks, scalings, *options) -> tuple | None:
    """The signature of a call without gradients or dropout that nothing can listen to; None for calls that the lean path does not take."""
    if not unobserved():
        return None
    biases = (bias,) if bias is None else as_list(bias)
    if isinstance(mapping, BatchMeta):
        ids, prepared = mapping.ids, (mapping.num_adapters, mapping.block, mapping.batch_invariant)
    else:
        ids, prepared = mapping, None
    shown = signature(x, *as_list(weight), *biases, *pools_a, *pools_b, ranks, scalings, ids)
    if shown is None or x.is_neg():
        return None
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *as_list(weight), *biases, *pools_a, *pools_b)):
        return None
    return (shown, len(pools_a), isinstance(weight, Tensor), prepared, *options, *_device.env_state())


def find(key: tuple | None) -> Callable | None:
    """What runs calls of this key: run(x, weight, bias, pools_a, pools_b, mapping, ranks, scalings) -> y [..., N] of all slices."""
    return _runs.get(key)


def remember(key: tuple, x, weight, mapping, ranks, scalings, args: tuple, backend: str, strict: bool) -> None:
    """Decide who runs calls of this key, and keep it. The first arguments are the caller's, `args` those of the op, checked."""
    flat, pools_a, pools_b, (block, rank_packed, batch_invariant) = args[0], args[3], args[4], args[-3:]
    plain = not isinstance(mapping, BatchMeta)
    if flat.shape[0] == 0 or (plain and (flat.device.type != "cpu" or not _vector(mapping, torch.int32))):
        return
    run, quiet = _registry.decide(_OP, backend, strict, flat.device.type, args)
    if not quiet:
        return
    prepare, (L, _, R) = getattr(run, "prepare_serving", None), pools_b[0].shape
    if prepare and (x.dim() == 2 or x.is_contiguous()) and _vector(ranks, torch.int32) and _vector(scalings, torch.float32):
        call = prepare(x.shape[:-1], *args)
    else:
        call = _through(run, len(pools_a), isinstance(weight, Tensor), block, rank_packed, batch_invariant)

    def checked(x, weight, bias, pools_a, pools_b, mapping, ranks, scalings):
        if plain:
            check_ids("lora_batched_linear", mapping, L)
            ids, table = mapping, None
        else:
            ids, table = mapping.ids, mapping.table
        check_ranks("lora_batched_linear", ranks, R)
        return call(x, weight, bias, pools_a, pools_b, ids, ranks, scalings, table)

    keep(_runs, key, checked)


def _vector(t: Tensor | None, dtype: torch.dtype) -> bool:
    return t is None or (t.dtype == dtype and t.is_contiguous())


def _through(run: Callable, S: int, stacked: bool, block: int, rank_packed: bool, batch_invariant: bool) -> Callable:
    """`run`, an implementation of the op, with the caller's arguments."""

    def call(x, weight, bias, pools_a, pools_b, ids, ranks, scalings, table):
        widths = [b.shape[1] for b in pools_b]
        weights = weight.split(widths) if stacked and S > 1 else as_list(weight)
        biases = [None] * S if bias is None else bias.split(widths) if stacked and S > 1 else as_list(bias)
        vectors = [None if t is None else _checks_batched.row(t, d).expand(S, -1) for t, d in ((ranks, torch.int32), (scalings, torch.float32))]
        flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        y = run(flat, [*weights], [*biases], [*pools_a], [*pools_b], ids, *vectors, None, None, table, block, rank_packed, batch_invariant)[0]
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])

    return call
