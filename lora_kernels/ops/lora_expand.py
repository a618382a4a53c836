"""`lora_expand`: y += h B^T in place with each row's own adapter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _checks, _checks_batched
from .._errors import LoraKernelsError, LoraTypeError, LoraValueError, message
from . import _serving_path
from ._call import refuse_transforms, run_op
from ._serving_path import as_list
from .batch_meta import BatchMeta, check_ranks
from .lora_batched import resolve_meta, squeeze_slab
from .lora_shrink import refuse_grad

torch.library.define(
    "lora_kernels::lora_expand",
    "(Tensor(a!) y, Tensor h, Tensor[] pools_b, Tensor ids, Tensor? ranks, Tensor? table, int block, bool batch_invariant,"
    " str backend, bool strict) -> ()",
)


@torch.library.impl("lora_kernels::lora_expand", "CompositeExplicitAutograd")
def _impl(y, *rest):
    *args, backend, strict = rest
    run_op("lora_expand", y.device.type, backend, strict, (y, *args))


@torch.library.register_fake("lora_kernels::lora_expand")
def _fake(y, h, pools_b, ids, ranks, table, block, batch_invariant, backend, strict):
    return None


def _overlaps(y: Tensor) -> bool:
    """Whether elements of y may share memory."""
    reach = 0  # from the first to the last element of the dimensions so far
    for stride, size in sorted((stride, size) for size, stride in zip(y.shape, y.stride(), strict=True) if size > 1):
        if stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


def _tell_autograd(op: str, y: Tensor) -> None:
    """That y will be written, which autograd does not see of an op like this: a backward that wants the old values raises then."""
    if torch.compiler.is_compiling():
        return
    if not y.is_inference():
        torch._C._increment_version([y])
    elif not torch.is_inference_mode_enabled():
        raise LoraKernelsError(message(f"{op}: y was made in inference mode, and is written only there", fix="torch.inference_mode(), or y.clone()"))


def lora_expand(
    y: Tensor,
    h: Tensor,
    pool_b: Tensor | Sequence[Tensor],
    meta: BatchMeta | Tensor,
    ranks: Tensor | None = None,
    backend: str = "auto",
    strict: bool = False,
    batch_invariant: bool | None = None,
) -> Tensor:
    """Adds every row's low-rank update to y in place; h comes from `lora_shrink` and carries the scaling.

    Equivalent to:
        for m, l in enumerate(token_lora_mapping):
            if l >= 0: y[m] += F.linear(h[m, :ranks[l]].to(y.dtype), pool_b[l, :, :ranks[l]])

    Args:
        y: `[..., N]`, the base layer's output; a view that flattens to `[M, N]` without a copy. For a list of pools N is their sum.
        h: float32 or y's dtype, `[M, R]`, or `[S, M, R]` for a list of pools.
        pool_b: `[L, N, R]` or `[L, 1, N, R]`, y's dtype or float32.
        meta, ranks, backend, strict, batch_invariant: as in `lora_batched_linear`.

    Returns: y.
    Raises: as `lora_shrink`.
    Fallback: cuda -> triton -> reference on a GPU, cpu -> reference on a CPU.
    Source: Punica, arXiv:2310.18547.
    """
    op = "lora_expand"
    try:
        pools_b = [squeeze_slab(p) for p in as_list(pool_b)]
        S, N = len(pools_b), sum(p.shape[1] for p in pools_b)
        h = h.unsqueeze(0) if h.dim() == 2 and S == 1 else h
        key, given = _serving_path.key_of(y, (h, *pools_b, ranks), meta, op, S, batch_invariant, backend, strict), (meta, ranks)
        run = _serving_path.find(key)
    except (AttributeError, IndexError, RuntimeError, TypeError):  # RuntimeError: of a layout whose shape or address PyTorch does not tell
        _checks_batched.check_lists(op, y=y, pool_b=pool_b)
        _checks.check_tensors(op, h=h)
        _checks.check_options(op, backend, strict=strict, batch_invariant=batch_invariant)
        if all(p.dim() > 1 for p in as_list(pool_b)):
            raise
        raise LoraValueError(message(f"{op}: pool_b has too few dimensions", [list(p.shape) for p in as_list(pool_b)], "[L, N, R]")) from None
    if run is not None:
        _tell_autograd(op, y)
        run(y, h, pools_b, *given)
        return y
    _checks_batched.check_lists(op, y=y, h=h, pool_b=pools_b)
    if not torch.compiler.is_compiling() and y.is_neg():
        raise LoraValueError(message(f"{op}: y cannot be written in place, its memory holds -y", "a negated view", fix="y.resolve_neg()"))
    refuse_transforms(op, y, h, *pools_b)
    if h.dim() != 3 or h.shape[0] != S or y.shape[-1] != N or h.shape[1] * N != y.numel():
        got = f"h {list(h.shape)}, y {list(y.shape)}"
        raise LoraValueError(message(f"{op}: h and y do not fit pool_b", got, f"h [{S}, M, R], y [..., {N}] with M rows"))
    _checks.check_dtype(op, y=y)
    _checks_batched.check_pool_b(op, y, pools_b, S, pools_b[0].shape[0], h.shape[2])
    _checks.check_options(op, backend, strict=strict, batch_invariant=batch_invariant)
    _checks.check_devices(op, y=y, h=h)
    if h.dtype not in (y.dtype, torch.float32):
        raise LoraTypeError(message(f"{op}: h has an unsupported dtype", h.dtype, f"{y.dtype} (as y) or torch.float32"))
    refuse_grad(op, y, h, *pools_b)
    try:
        flat = y if y.dim() == 2 else y.view(-1, N)
    except RuntimeError as error:
        raise LoraValueError(message(f"{op}: y cannot be written in place", f"strides {y.stride()}", "rows that flatten to [M, N]")) from error
    if not torch.compiler.is_compiling() and _overlaps(flat):
        got = f"strides {y.stride()}"
        raise LoraValueError(message(f"{op}: y cannot be written in place, elements of it share memory", got, "a place for each", "y.contiguous()"))
    L = pools_b[0].shape[0]
    meta = resolve_meta(op, meta, flat.shape[0], L, y, batch_invariant)
    ranks = _checks_batched.per_slice(op, "ranks", ranks, torch.int32, S, L, y.device)
    check_ranks(op, ranks, h.shape[2])
    _tell_autograd(op, y)
    args = (flat, h, pools_b, meta.ids, ranks, meta.table, meta.block, meta.batch_invariant)
    torch.ops.lora_kernels.lora_expand.default(*args, backend, strict)
    if key is not None:
        _serving_path.remember_expand(key, *given, args, backend, strict)
    return y
