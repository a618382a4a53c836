"""`lora_linear`: y = x W^T + b + s * (drop(x) A^T) B^T for one adapter, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks, reference
from .._errors import LoraKernelsError, LoraValueError, message
from ..native.signature import unobserved_signature
from . import _registry
from ._call import (
    PLAIN,
    any_autocast,
    check_kept,
    check_memory,
    dense,
    draw_seed,
    exporting,
    in_autocast_dtype,
    is_batched,
    keep,
    outside_autocast,
    refuse_transforms,
    run_op,
)

_FWD = "lora_linear_fwd"
_BWD = "lora_linear_bwd"

torch.library.define(
    f"lora_kernels::{_FWD}",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, float scaling, float dropout_p, Tensor? seed,"
    " str backend, bool strict) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    f"lora_kernels::{_BWD}",
    "(Tensor dy, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor h, Tensor mask, float scaling, float dropout_p,"
    " bool need_dx, bool need_da, bool need_db, str backend, bool strict) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl(f"lora_kernels::{_FWD}", "CompositeExplicitAutograd")
def _fwd_impl(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed, backend, strict):
    return run_op(_FWD, x.device.type, backend, strict, (dense(x), weight, bias, lora_a, lora_b, scaling, dropout_p, seed))


@torch.library.impl(f"lora_kernels::{_BWD}", "CompositeExplicitAutograd")
def _bwd_impl(dy, x, weight, lora_a, lora_b, h, mask, scaling, dropout_p, need_dx, need_da, need_db, backend, strict):
    args = (dense(dy), dense(x), weight, lora_a, lora_b, h, mask, scaling, dropout_p, need_dx, need_da, need_db)
    return run_op(_BWD, x.device.type, backend, strict, args)


@torch.library.register_fake(f"lora_kernels::{_FWD}")
def _fwd_fake(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed, backend, strict):
    M, K = x.shape
    mask = x.new_empty((M, (K + 31) // 32) if dropout_p > 0 else (0,), dtype=torch.int32)
    return x.new_empty((M, weight.shape[0])), x.new_empty((M, lora_a.shape[0])), mask


@torch.library.register_fake(f"lora_kernels::{_BWD}")
def _bwd_fake(dy, x, weight, lora_a, lora_b, h, mask, scaling, dropout_p, need_dx, need_da, need_db, backend, strict):
    return (
        dy.new_empty((dy.shape[0], weight.shape[1]) if need_dx else (0,)),
        lora_a.new_empty(lora_a.shape if need_da else (0,)),
        lora_b.new_empty(lora_b.shape if need_db else (0,)),
    )


_fwd = torch.ops.lora_kernels.lora_linear_fwd.default
_bwd = torch.ops.lora_kernels.lora_linear_bwd.default


# ------------------------------------------------------------------------------------------------------------ the lean path

# The op through the dispatcher takes 22 us on the host where the lean path takes 6 (Zen 3, benchmarks/bench_host_overhead.py). Where
# nothing can listen to the dispatcher (plain tensors, no mode, no transform), a call whose signature has been checked and decided before
# goes straight to its implementation.

_is_compiling, _is_grad_enabled, _LARGEST = torch.compiler.is_compiling, torch.is_grad_enabled, _checks.LARGEST
_is_inference = torch.is_inference_mode_enabled
_forward_runs: dict[tuple, Callable] = {}
_backward_runs: dict[tuple, Callable] = {}


def _remember(
    runs: dict, key: tuple, op: str, backend: str, strict: bool, autocast: bool, wide: tuple[Tensor, ...], narrow: tuple, **how: bool
) -> Callable:
    """Decide who runs this signature; kept unless a reason was logged (it must be looked at, and may be logged, again).

    The operands `wide` (x, or dy and x) have any number of dimensions and are taken as they are; first result likewise.
    """
    check_memory("lora_linear", *wide, *narrow)
    args, device_type = (*map(_dense_rows, wide), *narrow), wide[0].device.type
    run, quiet = _registry.decide(op, backend, strict, device_type, args)
    run = _prepared(run, wide, args, **how)
    return keep(runs, key, functools.partial(outside_autocast, run, device_type) if autocast else run, quiet)


def _prepared(run: Callable, wide: tuple[Tensor, ...], args: tuple, **how: bool) -> Callable:
    """`run` for every call of this signature, its operands `wide` given as in this one, while `args` has their rows."""
    lead, as_they_are = wide[0].shape[:-1], all(rows is t for rows, t in zip(args, wide, strict=False))
    prepare, prepare_nd = getattr(run, "prepare", None), getattr(run, "prepare_nd", None)
    if prepare_nd is not None:
        direct = as_they_are or all(t.is_contiguous() for t in wide)
        made = prepare_nd(lead if direct else args[0].shape[:1], *args, **how)
        if made is not None and direct:
            return made
    else:
        made = prepare and prepare(*args)
    flat, count = made or run, len(wide)  # not `wide` itself: what is remembered holds on to no operand

    def flattened(*given):
        first, *rest = flat(*map(_dense_rows, given[:count]), *given[count:])
        return _shaped(first, lead) if first.dim() == 2 else first, *rest  # 1-D: a dx that was not needed

    return flat if as_they_are else flattened


class _LoraLinear(torch.autograd.Function):
    """Saves h [M, R], the 1-bit keep mask and, where A is trained, x (not copied)."""

    @staticmethod
    def forward(ctx, x, lora_a, lora_b, bias, weight, call):
        scaling, dropout_p, seed, backend, strict, run = call  # in one argument, as apply looks at each; torch.jit wants to see every tensor
        if run is None:
            y, h, mask = _fwd(_rows(x), weight, bias, lora_a, lora_b, scaling, dropout_p, seed, backend, strict)
            y = y if x.dim() == 2 else _shaped(y, x.shape[:-1])
        else:
            y, h, mask = run(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed)
        if not lora_a.requires_grad and type(x) in (Tensor, torch.nn.Parameter):  # dy stands for x then; a DTensor's may be placed otherwise
            x = None
        ctx.save_for_backward(x, weight, lora_a, lora_b, h, mask)
        ctx.numbers = scaling, dropout_p, backend, strict  # no tensors: backward lets go of saved ones alone
        return y

    @staticmethod
    def backward(ctx, dy):
        need_dx, need_da, need_db, need_bias, *_ = ctx.needs_input_grad
        args = (dy, *ctx.saved_tensors, *ctx.numbers, need_dx, need_da, need_db)
        dx, da, db = outside_autocast(_differentiable_grads, dy.device.type, *args) if torch.is_grad_enabled() else _grads(*args)
        dbias = _rows(dy).sum(0) if need_bias else None
        return dx if need_dx else None, da if need_da else None, db if need_db else None, dbias, None, None


# autograd.Function.apply without its half in Python (3 us on Zen 3, benchmarks/bench_host_overhead.py), which serves functorch: on the
# lean path no transform is active.
_apply = super(torch.autograd.Function, _LoraLinear).apply


def _rows(t: Tensor) -> Tensor:
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


def _dense_rows(t: Tensor) -> Tensor:
    return dense(_rows(t))


def _shaped(t: Tensor, lead: Sequence[int]) -> Tensor:
    """`t` with its rows laid out as `lead`, and no view to autograd: what a Function returns as a view must not be written in place."""
    return torch.ops.aten._unsafe_view.default(t, (*lead, t.shape[1]))


def _grads(dy, x, weight, lora_a, lora_b, h, mask, scaling, dropout_p, backend, strict, need_dx, need_da, need_db):
    x = dy if x is None else x  # not read: dy has its rows, dtype and device
    args = (weight, lora_a, lora_b, h, mask, scaling, dropout_p, need_dx, need_da, need_db)
    compiling = _is_compiling()
    autocast = not compiling and any_autocast()
    shown = None if compiling else unobserved_signature(dy, x, weight, lora_a, lora_b, h, mask)
    if shown is None:
        if not compiling and is_batched(dy):
            saved = None if x is dy else x
            return outside_autocast(_differentiable_grads, dy.device.type, dy, saved, *args[:7], backend, strict, need_dx, need_da, need_db)
        if not compiling:
            _check_saved(dy, x, *args)
            check_memory("lora_linear", dy, x, *args)
        dx, da, db = _bwd(_rows(dy), _rows(x), *args, backend, strict)
        return dx.view(*dy.shape[:-1], dx.shape[1]) if need_dx and dy.dim() != 2 else dx, da, db
    key = (shown, dropout_p, need_dx, need_da, need_db, backend, strict, autocast)
    run = _backward_runs.get(key)
    if run is None:
        _check_saved(dy, x, *args)
        run = _remember(_backward_runs, key, _BWD, backend, strict, autocast, (dy, x), args)
    return run(dy, x, *args)


def _check_saved(dy, x, weight, lora_a, lora_b, h, mask, scaling, dropout_p, *_) -> None:
    lead, N, K, R = dy.shape[:-1], dy.shape[-1], (weight.shape or [0])[-1], (lora_b.shape or [0])[-1]
    own, rank = (dy.dtype,), (dy.dtype, torch.float32)
    expected = {
        "x": (x, (*lead, N if x is dy else K), own),
        "weight": (weight, (N, K), own),
        "lora_a": (lora_a, (R, K), rank),
        "lora_b": (lora_b, (N, R), rank),
        "h": (h, (lead.numel(), R), own),
        "mask": (mask, (lead.numel(), (K + 31) // 32) if dropout_p > 0 else (0,), (torch.int32,)),
    }
    for name, (t, shape, dtypes) in expected.items():
        check_kept("lora_linear", name, t, shape, dtypes, dy.device)


def _differentiable_grads(dy, x, weight, lora_a, lora_b, h, mask, scaling, dropout_p, backend, strict, need_dx, need_da, need_db):
    """The backward in plain PyTorch: under create_graph=True, so that its gradients can be differentiated again, and of many dy at once (vmap)."""
    rows = _rows(dy)
    if x is not None:
        h = reference.shrink(_rows(x), lora_a, mask, scaling, dropout_p) if need_db else h
    elif need_db and need_dx and torch.is_grad_enabled():
        h = _OnceDifferentiable.apply(h, lora_b)
    given = rows if x is None else _rows(x)
    dx, da, db = reference.lora_linear_bwd(rows, given, weight, lora_a, lora_b, h, mask, scaling, dropout_p, need_dx, need_da, need_db)
    return dx.view(*dy.shape[:-1], weight.shape[1]) if need_dx else dx, da, db


class _OnceDifferentiable(torch.autograd.Function):
    """h where A is frozen and x was not saved: a clear error to whoever differentiates it."""

    @staticmethod
    def forward(ctx, h, lora_b):  # lora_b: a tensor that requires grad
        return h.view_as(h)

    @staticmethod
    def backward(ctx, dh):
        fix = "lora_a.requires_grad_(True), or " + PLAIN
        raise LoraKernelsError(message("lora_linear: no second derivatives of dB where lora_a is frozen, as x is not kept then", fix=fix))


def _everywhere(seed: Tensor, x: Tensor) -> Tensor:
    """Rank 0's seed on every rank of the DTensor x's mesh: DTensor would take each rank's own for the same number."""
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    return seed if isinstance(seed, DTensor) else distribute_tensor(seed, x.device_mesh, [Replicate()] * x.device_mesh.ndim)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
    backend: str = "auto",
    strict: bool = False,
) -> Tensor:
    """Frozen linear layer plus its low-rank update, in one op.

    Equivalent to:
        F.linear(x, weight, bias) + scaling * F.linear(F.linear(F.dropout(x, dropout_p, training), lora_a), lora_b)

    Args:
        x: `[..., K]` bfloat16, float16 or float32; any strides (copied for the call where rows are not contiguous); any number of rows,
            also none.
        weight: `[N, K]`, x's dtype, frozen.
        bias: `[N]`, x's dtype, or None.
        lora_a: `[R, K]` in x's dtype or float32.
        lora_b: `[N, R]` in x's dtype or float32.
        scaling: lora_alpha / r (or / sqrt(r)), a run-time number. Applied to h; in float16, where h times a number above 1 may overflow, to
            lora_b before, so that scaling * lora_b must stay below 65504 there.
        dropout_p: probability of dropping an element of the low-rank branch's input, rounded to a multiple of 1 / 65536; kept ones are
            scaled by 1 / (1 - p) of the rounded p, so that expectations are exact. The mask is saved as one bit per element.
        training: dropout applies only when True.
        seed: of the dropout mask; drawn from torch's generator when None (for a DTensor x: rank 0's, sent to its mesh).
        backend: "auto", "cuda", "triton", "cpu" or "reference".
        strict: raise instead of falling back when `backend` cannot run this call.

    Returns:
        `[..., N]` in x's dtype (under torch.autocast: in the autocast dtype, as F.linear).

    Gradients: x, lora_a, lora_b (in the adapters' dtypes), and bias where it requires grad. Same inputs, same bits. Under create_graph=True
        the backward is plain PyTorch, for second derivatives; what torch.export records with gradients is plain PyTorch both ways.

    Raises:
        LoraValueError, LoraTypeError: shapes, dtypes or devices that do not fit; a weight that requires grad.
        BackendError: strict, and the backend cannot run this call.

    Fallback: cuda -> triton -> reference on a GPU, cpu -> reference on a CPU, each reason logged once.
    Source: LoRA, arXiv:2106.09685, eq. 3.
    """
    run = key = None
    compiling = _is_compiling()
    grad = _is_grad_enabled() and (compiling or not _is_inference())  # as records_grad
    autocast = compiling or any_autocast()
    try:
        trained = grad and (lora_a.requires_grad or lora_b.requires_grad or x.requires_grad or (bias is not None and bias.requires_grad))
        if autocast:
            x, weight, bias = in_autocast_dtype(x, weight, bias)
        if x.dtype is torch.float16 and isinstance(scaling, (int, float)) and 1 < abs(scaling) < 65504 and lora_b.is_floating_point():
            lora_b, scaling = lora_b * scaling, 1.0  # s h may overflow where h does not
        shown = None if compiling else unobserved_signature(x, weight, lora_a, lora_b, bias)
        if shown is not None:
            key = (shown, trained, dropout_p, type(dropout_p), training, backend, strict, autocast)
            run = _forward_runs.get(key)
    except (AttributeError, TypeError):  # an operand that is no tensor, an option that is none
        _check("lora_linear", x, weight, bias, lora_a, lora_b, scaling, dropout_p, training, seed, backend, strict)
        raise
    if run is None or type(scaling) is not float or not abs(scaling) <= _LARGEST or not type(training) is type(strict) is bool or seed is not None:
        _check("lora_linear", x, weight, bias, lora_a, lora_b, scaling, dropout_p, training, seed, backend, strict)
        scaling = float(scaling)
    if grad and weight.requires_grad:
        raise LoraValueError(
            message("lora_linear: weight requires grad, but only the adapter is trained", fix="weight.requires_grad_(False), or use F.linear")
        )
    dropout_p = float(dropout_p) if training and dropout_p > reference.NO_DROPOUT else 0.0
    if trained and compiling and exporting():  # an exported program has ops, but no autograd.Function around them
        return _plain(x, weight, bias, lora_a, lora_b, scaling, dropout_p)
    seed = draw_seed(seed, x.device) if dropout_p > 0 else None
    if key is None:
        if seed is not None and hasattr(x, "device_mesh"):
            seed = _everywhere(seed, x)
        refuse_transforms("lora_linear", x, weight, bias, lora_a, lora_b)
        if not compiling:
            check_memory("lora_linear", x, weight, bias, lora_a, lora_b, seed)
        apply = _LoraLinear.apply
    else:
        if run is None:
            args = (weight, bias, lora_a, lora_b, scaling, dropout_p, seed)
            run = _remember(_forward_runs, key, _FWD, backend, strict, autocast, (x,), args, trained=trained)
        if not trained:
            return run(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed)[0]
        apply = _apply
    return apply(x, lora_a, lora_b, bias, weight, (scaling, dropout_p, seed, backend, strict, run))


def _plain(x, weight, bias, lora_a, lora_b, scaling, dropout_p) -> Tensor:
    dropped = F.dropout(x, dropout_p)
    return F.linear(x, weight, bias) + scaling * F.linear(F.linear(dropped, lora_a.to(x.dtype)), lora_b.to(x.dtype))


def _check(op: str, x, weight, bias, lora_a, lora_b, scaling, dropout_p, training, seed, backend, strict) -> None:
    _checks.check_lora_linear(op, x, weight, bias, lora_a, lora_b)
    _checks.check_scaling(op, scaling)
    _checks.check_dropout(op, dropout_p)
    _checks.check_seed(op, seed)
    _checks.check_options(op, backend, training=training, strict=strict)
