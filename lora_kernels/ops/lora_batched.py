"""`lora_batched_linear`: a linear layer whose rows each use their own adapter, or none, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _batch_table, _checks, _checks_batched, _device
from .._errors import LoraKernelsError, LoraValueError, message
from ..native.signature import has_values
from ..reference_batched import h_width
from . import _serving_path
from ._call import (
    PLAIN,
    any_autocast,
    check_kept,
    dense,
    draw_seed,
    exporting,
    in_autocast_dtype,
    is_batched,
    records_grad,
    refuse_transforms,
    run_op,
)
from ._serving_path import as_list
from .batch_meta import BatchMeta, as_ids, check_ids, check_ranks, check_scalings

_FWD = "lora_batched_fwd"
_BWD = "lora_batched_bwd"

torch.library.define(
    f"lora_kernels::{_FWD}",
    "(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] pools_a, Tensor[] pools_b, Tensor ids, Tensor? ranks, Tensor? scalings,"
    " Tensor? dropout_p, Tensor? seed, Tensor? table, int block, bool rank_packed, bool batch_invariant,"
    " str backend, bool strict) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    f"lora_kernels::{_BWD}",
    "(Tensor dy, Tensor x, Tensor[] weights, Tensor[] pools_a, Tensor[] pools_b, Tensor h, Tensor mask, Tensor ids, Tensor? ranks,"
    " Tensor? scalings, Tensor? dropout_p, Tensor? table, int block, bool need_dx, bool need_da, bool need_db,"
    " str backend, bool strict) -> (Tensor, Tensor[], Tensor[])",
)


@torch.library.impl(f"lora_kernels::{_FWD}", "CompositeExplicitAutograd")
def _fwd_impl(x, *rest):
    *args, backend, strict = rest
    return run_op(_FWD, x.device.type, backend, strict, (dense(x), *args))


@torch.library.impl(f"lora_kernels::{_BWD}", "CompositeExplicitAutograd")
def _bwd_impl(dy, x, *rest):
    *args, backend, strict = rest
    return run_op(_BWD, dy.device.type, backend, strict, (dense(dy), dense(x), *args))


@torch.library.register_fake(f"lora_kernels::{_FWD}")
def _fwd_fake(
    x, weights, biases, pools_a, pools_b, ids, ranks, scalings, dropout_p, seed, table, block, rank_packed, batch_invariant, backend, strict
):
    M, K = x.shape
    mask = x.new_empty((0,) if dropout_p is None else (M, (K + 31) // 32), dtype=torch.int32)
    return x.new_empty((M, sum(w.shape[0] for w in weights))), x.new_empty((len(weights), M, h_width(pools_b[0].shape[2]))), mask


@torch.library.register_fake(f"lora_kernels::{_BWD}")
def _bwd_fake(dy, x, weights, pools_a, pools_b, h, mask, ids, ranks, scalings, dropout_p, table, block, need_dx, need_da, need_db, backend, strict):
    dx = x.new_empty(x.shape if need_dx else (0,))
    return dx, [a.new_empty(a.shape) for a in pools_a] if need_da else [], [b.new_empty(b.shape) for b in pools_b] if need_db else []


_fwd = torch.ops.lora_kernels.lora_batched_fwd.default
_bwd = torch.ops.lora_kernels.lora_batched_bwd.default


class _Call(NamedTuple):
    """What a call carries besides its differentiable tensors."""

    ids: Tensor
    ranks: Tensor | None
    scalings: Tensor | None
    dropout_p: Tensor | None
    seed: Tensor | None
    table: Tensor | None
    block: int
    rank_packed: bool
    batch_invariant: bool
    backend: str
    strict: bool


def _versions(call: _Call) -> list[int | None]:
    """The in-place counters of what the backward reads beside its saved tensors; one of inference mode has none. Empty where traced."""
    if torch.compiler.is_compiling():
        return []
    return [None if t is None or t.is_inference() else t._version for t in (call.ids, call.ranks, call.scalings, call.dropout_p)]


class _LoraBatched(torch.autograd.Function):
    """Saves x (not copied), h and the keep mask. The forward op is the one that serving calls, so its bits are serving's."""

    @staticmethod
    def forward(ctx, call, S, x, *tensors):
        weights, biases, pools_a, pools_b = (list(tensors[i * S : (i + 1) * S]) for i in range(4))
        y, h, mask = _fwd(x, weights, biases, pools_a, pools_b, *call)
        ctx.save_for_backward(x, *weights, *pools_a, *pools_b, h, mask)
        ctx.call, ctx.slices, ctx.widths = call, S, [w.shape[0] for w in weights]
        ctx.versions = _versions(call)
        ctx.kept = [(t.shape, t.dtype) for t in (x, *weights, *pools_a, *pools_b, h, mask)]
        return y

    @staticmethod
    def backward(ctx, dy):
        if not torch.compiler.is_compiling() and is_batched(dy):
            raise LoraKernelsError(message("lora_batched_linear: no vmap of the backward (is_grads_batched)", allowed="one dy at a time", fix=PLAIN))
        if torch.is_grad_enabled():  # create_graph=True
            return _OnceDifferentiable.apply(ctx, dy, *ctx.saved_tensors)
        return _LoraBatched.grads(ctx, dy, *ctx.saved_tensors)

    @staticmethod
    def grads(ctx, dy, x, *rest):
        call, S, (*saved, h, mask) = ctx.call, ctx.slices, rest
        now = _versions(call)
        if ctx.versions and now and ctx.versions != now:
            what = "token_lora_mapping, ranks, scalings or dropout_p was changed in place between forward and backward"
            raise LoraKernelsError(message(f"lora_batched_linear: {what}", fix="change it after backward(), or hand each forward its own"))
        if not torch.compiler.is_compiling():
            names = ["x", *(f"{name}[{i}]" for name in ("weight", "pool_a", "pool_b") for i in range(S)), "h", "mask"]
            for name, t, (shape, dtype) in zip(names, (x, *saved, h, mask), ctx.kept, strict=True):
                check_kept("lora_batched_linear", name, t, shape, (dtype,), dy.device)
        weights, pools_a, pools_b = (saved[i * S : (i + 1) * S] for i in range(3))
        needs = ctx.needs_input_grad[2:]
        need_dx, need_bias, need_da, need_db = needs[0], needs[1 + S : 1 + 2 * S], needs[1 + 2 * S : 1 + 3 * S], needs[1 + 3 * S :]
        constants = (call.ids, call.ranks, call.scalings, call.dropout_p, call.table, call.block)
        dx, da, db = _bwd(dy, x, weights, pools_a, pools_b, h, mask, *constants, need_dx, any(need_da), any(need_db), call.backend, call.strict)
        dbias = [part.sum(0) if need else None for part, need in zip(dy.split(ctx.widths, 1), need_bias, strict=True)]
        wanted = [*zip(da or [None] * S, need_da, strict=True), *zip(db or [None] * S, need_db, strict=True)]
        return None, None, dx if need_dx else None, *[None] * S, *dbias, *[g if need else None for g, need in wanted]


class _OnceDifferentiable(torch.autograd.Function):
    """The backward under create_graph=True: gives the gradients, and a clear error to whoever differentiates them."""

    @staticmethod
    def forward(_, ctx, dy, *saved):
        return _LoraBatched.grads(ctx, dy, *saved)

    @staticmethod
    def backward(_, *grads):
        raise LoraKernelsError(message("lora_batched_linear: second derivatives are not implemented", allowed="one backward pass", fix=PLAIN))


# ------------------------------------------------------------------------------------------------------- arguments, shared


def squeeze_slab(pool: Tensor) -> Tensor:
    """`[L, 1, R, K]`, the layout of vLLM's slabs, as the view `[L, R, K]`."""
    return pool.squeeze(1) if pool.dim() == 4 and pool.shape[1] == 1 else pool


def resolve_meta(op: str, meta: BatchMeta | Tensor, M: int, L: int, x: Tensor, batch_invariant: bool | None) -> BatchMeta:
    """The caller's BatchMeta after checks, or one built for this call from plain ids."""
    if not isinstance(meta, BatchMeta):
        ids = as_ids(op, meta)
        if ids.shape[0] == M and ids.device == x.device:
            if x.device.type == "cpu":
                check_ids(op, ids, L)
                return _PlainIds(ids, L, batch_invariant)
            return BatchMeta(ids, L, batch_invariant)
        meta = _PlainIds(ids, L, batch_invariant)
    if meta.num_tokens != M:
        allowed = f"{M}, one id per row of x (flattened to [M, K])"
        raise LoraValueError(message(f"{op}: token_lora_mapping does not fit x", f"{meta.num_tokens} ids", allowed))
    if meta.ids.device != x.device:
        raise LoraValueError(message(f"{op}: token_lora_mapping on another device", meta.ids.device, x.device, "move it with .to(x.device)"))
    if meta.num_adapters != L:
        raise LoraValueError(message(f"{op}: this BatchMeta was built for other pools", f"{meta.num_adapters} adapters", f"{L}, as pool_a"))
    if batch_invariant is not None and batch_invariant != meta.batch_invariant:
        raise LoraValueError(message(f"{op}: batch_invariant differs from the BatchMeta's", batch_invariant, meta.batch_invariant))
    return meta


class _PlainIds(BatchMeta):
    """Checked ids of one call on a CPU, used where they lie."""

    def __init__(self, ids: Tensor, L: int, batch_invariant: bool | None):
        self._ids, self.num_adapters, self.table = ids, L, None
        self.batch_invariant = _device.env_flag("LORA_KERNELS_BATCH_INVARIANT") if batch_invariant is None else batch_invariant
        self.block = _batch_table.default_block(ids.shape[0], self.batch_invariant)


def _dropout_table(op: str, dropout_p: float | Tensor | None, training: bool, L: int, device: torch.device) -> Tensor | None:
    """Probabilities float32 `[L]`, or None where nothing is dropped."""
    if dropout_p is None:
        return None
    if isinstance(dropout_p, Tensor):
        _checks_batched.check_plain(op, dropout_p=dropout_p)
        if dropout_p.requires_grad and torch.is_grad_enabled():
            raise LoraValueError(message(f"{op}: dropout_p requires grad, but only the adapters are trained", fix="dropout_p.detach()"))
        if dropout_p.shape != (L,) or not dropout_p.is_floating_point():
            raise LoraValueError(message(f"{op}: dropout_p does not fit the pools", f"{dropout_p.dtype} {list(dropout_p.shape)}", f"float [{L}]"))
        if dropout_p.device.type == "cpu" and not torch.compiler.is_compiling() and has_values(dropout_p):
            low, high = dropout_p.aminmax()
            if not 0 <= low <= high <= 1:
                raise LoraValueError(message(f"{op}: dropout_p is no probability", f"{low:g} to {high:g}", "numbers from 0 to 1"))
        return dropout_p.to(device, torch.float32) if training else None
    _checks.check_dropout(op, dropout_p)
    return torch.full((L,), float(dropout_p), dtype=torch.float32, device=device) if training and dropout_p > 0 else None


# ---------------------------------------------------------------------------------------------------------------- public


def lora_batched_linear(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor | None] | None,
    pool_a: Tensor | Sequence[Tensor],
    pool_b: Tensor | Sequence[Tensor],
    token_lora_mapping: Tensor | BatchMeta,
    ranks: Tensor | None = None,
    scalings: Tensor | None = None,
    backend: str = "auto",
    strict: bool = False,
    batch_invariant: bool | None = None,
    dropout_p: float | Tensor | None = None,
    training: bool = True,
    seed: int | Tensor | None = None,
    rank_packed: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Frozen linear layer in which every row uses its own low-rank adapter, or none, in one op.

    Equivalent to:
        y = F.linear(x, weight, bias)
        for m, l in enumerate(token_lora_mapping):
            if l >= 0: y[m] += scalings[l] * F.linear(F.linear(x[m], pool_a[l, :ranks[l]]), pool_b[l, :, :ranks[l]])

    Several output slices that share x (q/k/v, gate/up): give lists for pool_a and pool_b, and either one weight and bias of all slices
    stacked (one y comes back) or lists of them (a tuple of views into one y comes back).

    Args:
        x: `[..., K]` bfloat16, float16 or float32, M rows.
        weight: `[N, K]`, x's dtype, frozen.
        bias: `[N]` or None.
        pool_a: `[L, R, K]` or `[L, 1, R, K]`, x's dtype or float32; views with any strides are used where they lie.
        pool_b: `[L, N, R]` or `[L, 1, N, R]`.
        token_lora_mapping: int32 `[M]`, adapter of each row, -1 = none; or a `BatchMeta`, built once for all layers of a forward.
        ranks: int32 `[L]` (or `[S, L]`, per slice), the true ranks, 0 to R; all R when None. Rank 0 and -1 do no work.
        scalings: float32 `[L]` (or `[S, L]`), finite, applied to the float32 sums of h, which are then rounded to x's dtype (in float16 they
            must stay below 65504); all 1 when None.
        backend, strict: as in `lora_linear`.
        batch_invariant: a row's bits do not depend on M either: one plan for every M. None reads LORA_KERNELS_BATCH_INVARIANT.
        dropout_p: of the low-rank branch's input, a number or float `[L]`, applied when training.
        seed: of the dropout mask; drawn from torch's generator when None.
        rank_packed: the slices of pool_a lie behind each other at the true rank (SGLang): every pool_a entry is the same `[L, S R, K]`.

    Returns:
        `[..., N]` in x's dtype. A row's bits are the same on every run, and whatever the other rows of the batch and their adapters are.

    Gradients: x, pool_a, pool_b (dense, in the pools' dtypes, zero for adapters without rows) and bias, summed in a fixed order.

    Raises:
        LoraValueError, LoraTypeError: shapes, dtypes, devices that do not fit; on a CPU also ids and ranks outside the pools. On a GPU such
            ids count as none (LORA_KERNELS_CHECK_IDS=1 raises, after waiting for the device).
        BackendError: strict, and the backend cannot run this call.

    Fallback: cuda -> triton -> reference on a GPU, cpu -> reference on a CPU, each reason logged once.
    Source: Punica, arXiv:2310.18547 (SGMV, BGMV); S-LoRA, arXiv:2311.03285 (true ranks).
    """
    op = "lora_batched_linear"
    try:
        pools_a, pools_b = [squeeze_slab(p) for p in as_list(pool_a)], [squeeze_slab(p) for p in as_list(pool_b)]
        if torch.compiler.is_compiling() or any_autocast():
            x, weight, bias = in_autocast_dtype(x, weight, bias)
        operands = (x, weight, bias, pools_a, pools_b, token_lora_mapping, ranks, scalings)
        key = None if dropout_p is not None else _serving_path.linear_key(*operands, rank_packed, batch_invariant, training, backend, strict)
        run = _serving_path.find(key)
    except (AttributeError, TypeError):
        _checks_batched.check_lists(op, x=x, weight=weight, pool_a=pool_a, pool_b=pool_b)
        _checks_batched.check_bias(op, bias, isinstance(weight, Tensor))
        _checks.check_options(op, backend, strict=strict, batch_invariant=batch_invariant, rank_packed=rank_packed, training=training)
        raise
    S, stacked = len(pools_a), isinstance(weight, Tensor)
    if run is not None:
        y = run(*operands)
        return y if stacked else y.split([w.shape[0] for w in weight], -1)
    _checks_batched.check_lists(op, x=x, weight=weight, pool_a=pools_a, pool_b=pools_b)
    _checks_batched.check_bias(op, bias, stacked)
    _checks.check_options(op, backend, strict=strict, batch_invariant=batch_invariant, rank_packed=rank_packed, training=training)
    refuse_transforms(op, x, *as_list(weight), *(() if bias is None else as_list(bias)), *pools_a, *pools_b)
    _checks_batched.check_pool_a(op, x, pools_a, rank_packed)
    L, R = pools_a[0].shape[0], pools_a[0].shape[1] // (S if rank_packed else 1)
    _checks_batched.check_pool_b(op, x, pools_b, S, L, R)
    weights, biases = _split_base(op, weight, bias, [b.shape[1] for b in pools_b])
    _checks_batched.check_base(op, x, weights, biases, pools_b)
    _checks.check_seed(op, seed)
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    meta = resolve_meta(op, token_lora_mapping, flat.shape[0], L, x, batch_invariant)
    rank_rows = _checks_batched.per_slice(op, "ranks", ranks, torch.int32, S, L, x.device)
    check_ranks(op, rank_rows, R)
    scaling_rows = _checks_batched.per_slice(op, "scalings", scalings, torch.float32, S, L, x.device)
    check_scalings(op, scaling_rows)
    dropout_p = _dropout_table(op, dropout_p, training, L, x.device)
    seed = None if dropout_p is None else draw_seed(seed, x.device, op)
    call = _Call(meta.ids, rank_rows, scaling_rows, dropout_p, seed, meta.table, meta.block, rank_packed, meta.batch_invariant, backend, strict)
    tensors = (flat, *weights, *biases, *pools_a, *pools_b)
    if records_grad() and any(t is not None and t.requires_grad for t in tensors):
        if rank_packed:
            raise LoraKernelsError(message(f"{op}: no gradients with rank_packed", allowed="serving only", fix="use one pool_a per slice"))
        if any(w.requires_grad for w in weights):
            fix = "weight.requires_grad_(False)"
            raise LoraValueError(message(f"{op}: weight requires grad, but only the adapters are trained", fix=fix))
        if exporting():  # an exported program has ops, but no autograd.Function around them
            raise LoraKernelsError(message(f"{op}: no gradients in an exported program", allowed="serving", fix="export under torch.no_grad()"))
        y = _LoraBatched.apply(call, S, *tensors)
    else:
        y = _fwd(flat, weights, biases, pools_a, pools_b, *call)[0]
        if key is not None:
            args = (flat, weights, biases, pools_a, pools_b, *call[:-2])
            _serving_path.remember(key, x, weight, token_lora_mapping, ranks, scalings, args, backend, strict)
    y = y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])
    return y if stacked else y.split([w.shape[0] for w in weights], -1)


def _split_base(op, weight, bias, widths) -> tuple[list[Tensor], list[Tensor | None]]:
    """Weights and biases per slice, as views."""
    S = len(widths)
    if isinstance(weight, Tensor):
        if S == 1:
            return [weight], [bias]
        if weight.shape[0] != sum(widths) or (bias is not None and bias.shape != (sum(widths),)):
            got = f"weight {list(weight.shape)}" + ("" if bias is None else f", bias {list(bias.shape)}")
            raise LoraValueError(message(f"{op}: stacked weight or bias does not fit pool_b", got, f"N = {sum(widths)}, the sum over slices"))
        return list(weight.split(widths)), [None] * S if bias is None else list(bias.split(widths))
    biases = [None] * S if bias is None else as_list(bias)
    if len(weight) != S or len(biases) != S:
        got = f"{len(weight)} weights, {len(biases)} biases, {S} pools"
        raise LoraValueError(message(f"{op}: lists of different lengths", got, "one weight, bias and pool pair per slice"))
    return list(weight), biases
