"""The lean path of the many-adapter ops: serving calls of a known signature, without the checks and the dispatcher.

A call of one small row takes 60 us with them and 10 without (Zen 3, benchmarks/bench_host_overhead.py). What depends on values (ids, ranks) is
checked every time. An implementation of the forward may carry `run.prepare_serving(lead, *args)`: a function of the caller's own arguments, for x
with the leading dimensions `lead`; one of shrink or expand that is marked `takes_vectors` takes ranks and scalings also as `[L]`, for all slices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import _checks_batched
from ..native.signature import unobserved_signature
from . import _registry
from ._call import any_autocast, dense, keep, outside_autocast, records_grad
from .batch_meta import BatchMeta, check_ids, check_ranks, check_scalings

_OP = "lora_batched_fwd"
_runs: dict[tuple, Callable] = {}


def as_list(t: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return (t,) if isinstance(t, Tensor) else t


def key_of(x: Tensor, tensors: Sequence[Tensor | None], mapping, *options) -> tuple | None:
    """The signature of a call without gradients that nothing can listen to, x and `tensors` its operands; None where there is no lean path."""
    if torch.compiler.is_compiling():
        return None
    if isinstance(mapping, BatchMeta):
        ids, prepared = mapping._ids, (mapping.num_adapters, mapping.block, mapping.batch_invariant)
    else:
        ids, prepared = mapping, None
    shown = unobserved_signature(x, *tensors, ids)
    if shown is None:
        return None
    if records_grad() and (x.requires_grad or any(t is not None and t.requires_grad for t in tensors)):
        return None
    return (shown, prepared, any_autocast(), options, *map(type, options))  # 1 equals True, and is no flag


def find(key: tuple | None) -> Callable | None:
    """What runs calls of this key."""
    return _runs.get(key)


def linear_key(x, weight, bias, pools_a, pools_b, mapping, ranks, scalings, *options) -> tuple | None:
    """`key_of` a call of `lora_batched_linear` without dropout."""
    stacked = isinstance(weight, Tensor)
    biases = (bias,) if stacked or bias is None else as_list(bias)  # a list beside one weight has no signature, and is refused
    tensors = (*as_list(weight), *biases, *pools_a, *pools_b, ranks, scalings)
    return key_of(x, tensors, mapping, _OP, len(pools_a), stacked, *options)


def _keep(key: tuple, device_type: str, run: Callable, quiet: bool) -> None:
    keep(_runs, key, functools.partial(outside_autocast, run, device_type) if any_autocast() else run, quiet)


def _unlikely(mapping, first: Tensor) -> bool:
    """Whether calls of this kind are not worth remembering, or cannot be."""
    plain = not isinstance(mapping, BatchMeta)
    return first.shape[0] == 0 or (plain and (first.device.type != "cpu" or not _vector(mapping, torch.int32)))


def _checked(op: str, mapping, L: int, ranks: Tensor | None, R: int, scalings: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """ids and table of the mapping, after the checks that depend on values."""
    check_ranks(op, ranks, R)
    check_scalings(op, scalings)
    if isinstance(mapping, BatchMeta):
        return mapping._ids, mapping.table
    check_ids(op, mapping, L)
    return mapping if mapping.dim() == 1 else mapping.reshape(-1), None


def remember(key: tuple, x, weight, mapping, ranks, scalings, args: tuple, backend: str, strict: bool) -> None:
    """Keep run(x, weight, bias, pools_a, pools_b, mapping, ranks, scalings) -> y `[..., N]` of all slices, for calls of this key.

    The first arguments are the caller's, `args` those of the op, checked.
    """
    flat, pools_a, pools_b, more = args[0], args[3], args[4], args[-3:]
    if _unlikely(mapping, flat):
        return
    args = (dense(flat), *args[1:])
    run, quiet = _registry.decide(_OP, backend, strict, flat.device.type, args)
    prepare, (L, _, R) = getattr(run, "prepare_serving", None), pools_b[0].shape
    if prepare and (x is args[0] or x.is_contiguous()) and _vector(ranks, torch.int32) and _vector(scalings, torch.float32):
        call = prepare(x.shape[:-1], *args)
    else:
        call = _through(run, len(pools_a), isinstance(weight, Tensor), *more)

    def checked(x, weight, bias, pools_a, pools_b, mapping, ranks, scalings):
        ids, table = _checked("lora_batched_linear", mapping, L, ranks, R, scalings)
        return call(x, weight, bias, pools_a, pools_b, ids, ranks, scalings, table)

    _keep(key, flat.device.type, checked, quiet)


def remember_shrink(key: tuple, mapping, ranks, scalings, args: tuple, backend: str, strict: bool) -> None:
    """Keep run(x, pools_a, mapping, ranks, scalings) -> h `[S, M, R]`, for calls of this key."""
    flat, pools_a, more = args[0], args[1], args[-3:]
    if _unlikely(mapping, flat):
        return
    run, quiet = _registry.decide("lora_shrink", backend, strict, flat.device.type, (dense(flat), *args[1:]))
    S, (L, R, _) = len(pools_a), pools_a[0].shape
    R = R // S if more[1] else R
    direct = hasattr(run, "takes_vectors") and _vector(ranks, torch.int32) and _vector(scalings, torch.float32)

    def checked(x, pools_a, mapping, ranks, scalings):
        ids, table = _checked("lora_shrink", mapping, L, ranks, R, scalings)
        if not direct:
            ranks, scalings = _rows_of(ranks, torch.int32, S), _rows_of(scalings, torch.float32, S)
        flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        return run(dense(flat), [*pools_a], ids, ranks, scalings, table, *more)

    _keep(key, flat.device.type, checked, quiet)


def remember_expand(key: tuple, mapping, ranks, args: tuple, backend: str, strict: bool) -> None:
    """Keep run(y, h, pools_b, mapping, ranks), h `[S, M, R]`, for calls of this key."""
    flat, pools_b, more = args[0], args[2], args[-2:]
    if _unlikely(mapping, flat):
        return
    run, quiet = _registry.decide("lora_expand", backend, strict, flat.device.type, args)
    S, (L, _, R) = len(pools_b), pools_b[0].shape
    direct = hasattr(run, "takes_vectors") and _vector(ranks, torch.int32)

    def checked(y, h, pools_b, mapping, ranks):
        ids, table = _checked("lora_expand", mapping, L, ranks, R)
        run(y if y.dim() == 2 else y.view(-1, y.shape[-1]), h, [*pools_b], ids, ranks if direct else _rows_of(ranks, torch.int32, S), table, *more)

    _keep(key, flat.device.type, checked, quiet)


def _rows_of(t: Tensor | None, dtype: torch.dtype, S: int) -> Tensor | None:
    """Ranks or scalings `[L]` or `[S, L]` as the op takes them, `[S, L]`."""
    return None if t is None else _checks_batched.row(t, dtype).expand(S, -1)


def _vector(t: Tensor | None, dtype: torch.dtype) -> bool:
    return t is None or (t.dtype == dtype and t.is_contiguous())


def _through(run: Callable, S: int, stacked: bool, block: int, rank_packed: bool, batch_invariant: bool) -> Callable:
    """`run`, an implementation of the op, with the caller's arguments."""

    def call(x, weight, bias, pools_a, pools_b, ids, ranks, scalings, table):
        widths = [b.shape[1] for b in pools_b]
        weights = weight.split(widths) if stacked and S > 1 else as_list(weight)
        biases = [None] * S if bias is None else bias.split(widths) if stacked and S > 1 else as_list(bias)
        vectors = _rows_of(ranks, torch.int32, S), _rows_of(scalings, torch.float32, S)
        flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        y = run(dense(flat), [*weights], [*biases], [*pools_a], [*pools_b], ids, *vectors, None, None, table, block, rank_packed, batch_invariant)[0]
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])

    return call
