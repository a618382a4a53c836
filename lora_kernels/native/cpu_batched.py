"""The CPU engine's implementations of the many-adapter ops: each call hands its tensors over."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference_batched import h_width
from ..tuning import cpu as plan

try:
    from .. import _C
except ImportError:  # native/cpu.py says why
    _C = None

DTYPES = {getattr(torch, name): number for number, name in enumerate(plan.DTYPES)}  # lk::Dtype
with torch.inference_mode(False):  # as in cpu.py
    _NO_MASK = torch.empty(0, dtype=torch.int32, device="cpu")
_threads = torch.get_num_threads
_PANELS, _RANK_ONLY = plan.FORMS.index("panels"), plan.FORMS.index("torch")


def _refuses(x: Tensor, name: str, matrices: list[Tensor], vectors: tuple[Tensor | None, ...]) -> str | None:
    """x and the matrices (pools by their last two dimensions) need contiguous rows, the vectors contiguous elements."""
    if x.dtype not in DTYPES:
        return f"the kernels take float32, bfloat16 and float16, {name} is {x.dtype}"
    if x.stride(1) != 1 and x.shape[1] != 1:
        return f"{name}'s columns are not contiguous"
    for t in matrices:
        if t.stride(-1) != 1 and t.shape[-1] != 1:
            return "the columns of a weight, pool or gradient are not contiguous"
    for t in vectors:
        if t is not None and t.stride(-1) != 1 and t.shape[-1] > 1:
            return "bias, token_lora_mapping, ranks, scalings or dropout_p is not contiguous"
    return None


def _fwd_refuses(
    x, weights, biases, pools_a, pools_b, ids, ranks, scalings, dropout_p, seed, table, block, rank_packed, batch_invariant
) -> str | None:
    return _refuses(x, "x", [*weights, *pools_a, *pools_b], (*biases, ids, ranks, scalings, dropout_p))


def _bwd_refuses(dy, x, weights, pools_a, pools_b, h, mask, ids, ranks, scalings, dropout_p, table, block, need_dx, need_da, need_db) -> str | None:
    return _refuses(x, "x", [dy, *weights, *pools_a, *pools_b], (ids, ranks, scalings, dropout_p))


def _shrink_refuses(x, pools_a, ids, ranks, scalings, table, block, rank_packed, batch_invariant) -> str | None:
    return _refuses(x, "x", pools_a, (ids, ranks, scalings))


def _expand_refuses(y, h, pools_b, ids, ranks, table, block, batch_invariant) -> str | None:
    return _refuses(y, "y", [h, *pools_b], (ids, ranks))


def _form(dtype: int, M: int, N: int, K: int, batch_invariant: bool) -> int:
    """The plan's form for one adapter: never by the mix, which would show in a row's bits."""
    form = _PANELS if batch_invariant else plan.form("fwd", dtype, M, N, K)  # one form for every M
    return _PANELS if form == _RANK_ONLY else form  # PyTorch's own product is not on offer: y would be rounded twice


def lora_batched_fwd(x, weights, biases, pools_a, pools_b, ids, ranks, scalings, dropout_p, seed, table, block, rank_packed, batch_invariant):
    """`reference_batched.lora_batched_fwd` by the native kernels."""
    M, K = x.shape
    threads, widths = _threads(), [w.shape[0] for w in weights]
    y, h, mask = x.new_empty(M, sum(widths)), x.new_empty(len(weights), M, h_width(pools_b[0].shape[2])), _NO_MASK
    if dropout_p is not None:
        mask = x.new_empty(M, (K + 31) // 32, dtype=torch.int32)
        _C.cpu_batched_mask(int(seed) & (2**64 - 1), K, ids, dropout_p, mask, threads)
    column = 0
    for i, (weight, bias, a, b, N) in enumerate(zip(weights, biases, pools_a, pools_b, widths, strict=True)):
        form = _form(DTYPES[x.dtype], M, N, K, batch_invariant)
        args = (form, threads, i, rank_packed, column, x, weight, bias, a, b, ids, ranks, scalings, dropout_p, mask, y, h)
        _C.cpu_batched_fwd(*args)
        column += N
    return y, h, mask


def _prepare_serving(lead, x, weights, biases, pools_a, pools_b, *rest):
    """The forward without dropout of every call of this signature, with the caller's weight and bias (stacked, or one per slice), its ranks and
    scalings `[L]` or `[S, L]`, and x with the leading dimensions `lead`: [M], or contiguous ones that multiply to M."""
    (M, K), (rank_packed, batch_invariant) = x.shape, rest[-2:]
    dtype, slices, N_all = DTYPES[x.dtype], [], 0
    for i, w in enumerate(weights):
        slices.append((i, N_all, w.shape[0]))
        N_all += w.shape[0]

    def run(x, weight, bias, pools_a, pools_b, ids, ranks, scalings, table):
        y, threads, stacked, several = x.new_empty(*lead, N_all), _threads(), isinstance(weight, Tensor), type(bias) in (list, tuple)
        for i, column, N in slices:
            w, v = weight if stacked else weight[i], bias[i] if several else bias
            form = _form(dtype, M, N, K, batch_invariant)
            args = (form, threads, i, rank_packed, column, x, w, v, pools_a[i], pools_b[i], ids, ranks, scalings, None, None, y, None)
            _C.cpu_batched_fwd(*args)
        return y

    return run


lora_batched_fwd.prepare_serving = _prepare_serving


def lora_batched_bwd(dy, x, weights, pools_a, pools_b, h, mask, ids, ranks, scalings, dropout_p, table, block, need_dx, need_da, need_db):
    """`reference_batched.lora_batched_bwd` by the native kernels."""
    dx = x.new_empty(x.shape) if need_dx else None
    das = [torch.zeros_like(p, memory_format=torch.contiguous_format) for p in pools_a] if need_da else []
    dbs = [torch.zeros_like(p, memory_format=torch.contiguous_format) for p in pools_b] if need_db else []
    h, mask = h.contiguous(), mask.contiguous()
    _C.cpu_batched_bwd(_threads(), dy, x, weights, pools_a, pools_b, h, mask, ids, ranks, scalings, dropout_p, dx, das, dbs)
    return x.new_empty(0) if dx is None else dx, das, dbs


def lora_shrink(x, pools_a, ids, ranks, scalings, table, block, rank_packed, batch_invariant):
    """`reference_batched.lora_shrink` by the native kernels: one form for every M."""
    R = pools_a[0].shape[1] // (len(pools_a) if rank_packed else 1)
    h = x.new_zeros((len(pools_a), x.shape[0], R), dtype=torch.float32)
    for i, a in enumerate(pools_a):
        _C.cpu_shrink(_threads(), i, rank_packed, x, a, ids, ranks, scalings, h)
    return h


def lora_expand(y, h, pools_b, ids, ranks, table, block, batch_invariant):
    """`reference_batched.lora_expand` by the native kernels: one form for every M."""
    column = 0
    for i, b in enumerate(pools_b):
        _C.cpu_expand(_threads(), i, column, y, h, b, ids, ranks)
        column += b.shape[1]


lora_shrink.takes_vectors = lora_expand.takes_vectors = True  # ranks and scalings also as [L], for all slices


OPS = {
    "lora_batched_fwd": (lora_batched_fwd, _fwd_refuses),
    "lora_batched_bwd": (lora_batched_bwd, _bwd_refuses),
    "lora_shrink": (lora_shrink, _shrink_refuses),
    "lora_expand": (lora_expand, _expand_refuses),
}
