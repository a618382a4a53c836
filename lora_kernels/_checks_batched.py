"""Validation of the arguments of the many-adapter ops: shapes, dtypes and devices of pools, ranks, scalings and ids."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ._checks import _shape, check_devices, check_dtype, check_tensors
from ._errors import LoraTypeError, LoraValueError, message


def check_plain(op: str, **tensors: object) -> None:
    """`check_tensors`; nor may one wrap others (DTensor, quantised weights), which have the memory that would be read."""
    check_tensors(op, **tensors)
    for name, t in tensors.items():
        if is_traceable_wrapper_subclass(t) and type(t).__name__ != "AsyncCollectiveTensor":  # which waits for its own and lets ops through
            fix = "DTensor.to_local() on each rank; lora_shrink and lora_expand beside a layer that computes its own base product"
            raise LoraTypeError(message(f"{op}: {name} wraps other tensors", type(t).__name__, "a plain torch.Tensor", fix))


def check_lists(op: str, **tensors: object) -> None:
    """The first (x or y) is a tensor of at least one dimension; each other (pools, weights) a tensor or a list or tuple of them, not empty."""
    (first, t), *lists = tensors.items()
    check_plain(op, **{first: t})
    if t.dim() < 1:
        raise LoraValueError(message(f"{op}: {first} has no dimension", _shape(t), "[..., features]"))
    for name, given in lists:
        given = [given] if isinstance(given, Tensor) else given
        listed = isinstance(given, (list, tuple))
        if not listed or not given:
            got = repr(given) if listed else type(given).__name__
            raise LoraTypeError(message(f"{op}: {name} is no tensor", got, "torch.Tensor, or a list or tuple of one per slice"))
        for t in given:
            check_plain(op, **{name: t})


def check_bias(op: str, bias: object, stacked: bool) -> None:
    """None, a tensor, or, where the weight is not one stacked tensor, a list or tuple of either."""
    if stacked and isinstance(bias, (list, tuple)):
        got = f"{type(bias).__name__} of {len(bias)}"
        raise LoraTypeError(message(f"{op}: bias is a list, weight is not", got, "a tensor or None", "torch.cat(bias)"))
    for b in bias if isinstance(bias, (list, tuple)) else [bias]:
        if b is not None:
            check_plain(op, bias=b)


def check_pool_a(op: str, x: Tensor, pools_a: list[Tensor], rank_packed: bool) -> None:
    """Every pool_a is `[L, R, K]` (rank_packed: `[L, S R, K]`), K being x's, all of one shape, in x's dtype or float32."""
    K, S = x.shape[-1], len(pools_a)
    for a in pools_a:
        if a.dim() != 3 or a.shape[2] != K or a.shape != pools_a[0].shape or 0 in a.shape:
            got = f"pool_a {', '.join(_shape(p) for p in pools_a)}, x {_shape(x)}"
            raise LoraValueError(message(f"{op}: pool_a does not fit x", got, f"[L, R, {K}], one L and R >= 1 for all slices, K >= 1"))
    if rank_packed and pools_a[0].shape[1] % S:
        raise LoraValueError(message(f"{op}: rank-packed pool_a does not divide into slices", _shape(pools_a[0]), f"[L, {S} R, K]"))
    check_dtype(op, x=x)
    _check_dtypes(op, x, pool_a=pools_a)


def check_pool_b(op: str, x: Tensor, pools_b: list[Tensor], S: int, L: int, R: int) -> None:
    """One pool_b `[L, N_i, R]` per slice, in x's dtype or float32."""
    if len(pools_b) != S or any(b.dim() != 3 or (b.shape[0], b.shape[2]) != (L, R) or 0 in b.shape for b in pools_b):
        got = ", ".join(_shape(p) for p in pools_b)
        raise LoraValueError(message(f"{op}: pool_b does not fit pool_a", f"pool_b {got}", f"{S} x [{L}, N, {R}], N >= 1", "pool_b is [L, N, R]"))
    _check_dtypes(op, x, pool_b=pools_b)


def check_base(op: str, x: Tensor, weights: list[Tensor], biases: list[Tensor | None], pools_b: list[Tensor]) -> None:
    """One weight `[N_i, K]` and bias `[N_i]` or None per slice, in x's dtype."""
    for w, bias, b in zip(weights, biases, pools_b, strict=True):
        N = b.shape[1]
        if w.shape != (N, x.shape[-1]):
            raise LoraValueError(message(f"{op}: weight does not fit x and pool_b", f"weight {_shape(w)}", f"[{N}, {x.shape[-1]}]"))
        if bias is not None and bias.shape != (N,):
            raise LoraValueError(message(f"{op}: bias does not fit weight", f"bias {_shape(bias)}", f"[{N}] or None"))
        if w.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
            got = f"x {x.dtype}, weight {w.dtype}" + ("" if bias is None else f", bias {bias.dtype}")
            raise LoraTypeError(message(f"{op}: x, weight and bias differ in dtype", got, "one dtype", "cast x, or run under torch.autocast"))
        check_devices(op, x=x, weight=w, bias=bias)


def _check_dtypes(op: str, x: Tensor, **pools: list[Tensor]) -> None:
    for name, tensors in pools.items():
        for t in tensors:
            if t.dtype != tensors[0].dtype or t.dtype not in (x.dtype, torch.float32):
                raise LoraTypeError(message(f"{op}: {name} has an unsupported dtype", t.dtype, f"{x.dtype} (as x) or torch.float32"))
            check_devices(op, x=x, **{name: t})


def per_slice(op: str, name: str, t: Tensor | None, dtype: torch.dtype, S: int, L: int, device: torch.device) -> Tensor | None:
    """ranks or scalings `[L]` or `[S, L]` as `[S, L]` of `dtype`, without a copy where the type fits."""
    if t is None:
        return None
    check_plain(op, **{name: t})
    if t.requires_grad and torch.is_grad_enabled():
        raise LoraValueError(message(f"{op}: {name} requires grad, but only the adapters are trained", fix=f"{name}.detach()"))
    if t.shape not in ((L,), (S, L)):
        raise LoraValueError(message(f"{op}: {name} does not fit the pools", f"{name} {_shape(t)}", f"[{L}] or [{S}, {L}]"))
    if t.is_floating_point() != dtype.is_floating_point or t.dtype == torch.bool or t.is_complex():
        raise LoraTypeError(message(f"{op}: {name} has an unsupported dtype", t.dtype, dtype))
    if t.device != device:
        raise LoraValueError(message(f"{op}: {name} on another device", t.device, device, f"{name}.to(x.device)"))
    return row(t, dtype).expand(S, L)


def narrowed(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t in `dtype`; what is out of int32's range stays out of every pool's, where a plain cast of 2**32 gives 0."""
    return (t.clamp(-(2**31), 2**31 - 1) if t.dtype == torch.int64 else t).to(dtype)


def row(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Checked ranks or scalings as `[1, L]` or `[S, L]` of `dtype` with contiguous rows."""
    if t is None:
        return None
    t = t if t.dtype == dtype else narrowed(t, dtype)
    if t.stride(-1) != 1:
        t = t.contiguous()
    return t if t.dim() == 2 else t.unsqueeze(0)
