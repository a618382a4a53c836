"""The CPU engine's implementations of the many-adapter ops: each call hands over pointers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tuning import cpu as plan

try:
    from .. import _C
except ImportError:  # native/cpu.py says why
    _C = None

DTYPES = {getattr(torch, name): number for number, name in enumerate(plan.DTYPES)}  # lk::Dtype
_PANELS, _RANK_ONLY = plan.FORMS.index("panels"), plan.FORMS.index("torch")


def _ptr(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _row_ptrs(t: Tensor | None, count: int) -> list[int]:
    """Addresses of the rows of ranks or scalings `[S, L]`."""
    if t is None:
        return [0] * count
    start, step = t.data_ptr(), t.stride(0) * t.element_size()
    return [start + i * step for i in range(count)]


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
    """The plan's form for one adapter, except where the rank terms of many decide. Never by the mix: it would show in a row's bits."""
    if batch_invariant:  # one form for every M
        return _PANELS
    form = plan.form("fwd", dtype, M, N, K)
    # Rank terms cost panels one packed B per adapter and panel, which only a large W repays (a rule of thumb: no table covers it yet).
    if form != 0 and dtype == DTYPES[torch.bfloat16] and M <= 64 and N * K <= 2048 * 2048 and _C.cpu_isa() == "avx512_bf16" and plan._forced is None:
        return 0
    return _PANELS if form == _RANK_ONLY else form  # PyTorch's own product is not on offer: y would be rounded twice


def lora_batched_fwd(x, weights, biases, pools_a, pools_b, ids, ranks, scalings, dropout_p, seed, table, block, rank_packed, batch_invariant):
    """`reference_batched.lora_batched_fwd` by the native kernels."""
    M, K = x.shape
    S, (L, R, _) = len(weights), pools_a[0].shape
    if rank_packed:
        R //= S
    dtype, threads = DTYPES[x.dtype], torch.get_num_threads()
    N_all = sum([w.shape[0] for w in weights])
    y, h = x.new_empty((M, N_all)), x.new_empty((S, M, R))
    x_ptr, ldx, ids_ptr, p_ptr, size = x.data_ptr(), x.stride(0), ids.data_ptr(), _ptr(dropout_p), x.element_size()
    if dropout_p is None:
        mask, mask_ptr = x.new_empty((0,), dtype=torch.int32), 0
    else:
        mask = x.new_empty((M, (K + 31) // 32), dtype=torch.int32)
        mask_ptr = mask.data_ptr()
        _C.cpu_batched_mask(int(seed) & (2**64 - 1), M, K, L, ids_ptr, p_ptr, mask_ptr, threads)
    rank_ptrs, scaling_ptrs = _row_ptrs(ranks, S), _row_ptrs(scalings, S)
    y_ptr, h_ptr = y.data_ptr(), h.data_ptr()
    for i in range(S):
        weight, a, b = weights[i], pools_a[i], pools_b[i]
        N = weight.shape[0]
        form = _form(dtype, M, N, K, batch_invariant)
        a_stride, lda, _ = a.stride()
        b_stride, ldb, _ = b.stride()
        _C.cpu_batched_fwd(
            M, N, K, R, L, dtype, form, threads,
            x_ptr, ldx, weight.data_ptr(), weight.stride(0), _ptr(biases[i]),
            a.data_ptr(), a_stride, lda, DTYPES[a.dtype], b.data_ptr(), b_stride, ldb, DTYPES[b.dtype],
            i if rank_packed else 0, ids_ptr, rank_ptrs[i], scaling_ptrs[i], p_ptr, mask_ptr, y_ptr, N_all, h_ptr,
        )  # fmt: skip
        y_ptr += N * size
        h_ptr += M * R * size
    return y, h, mask


def lora_batched_bwd(dy, x, weights, pools_a, pools_b, h, mask, ids, ranks, scalings, dropout_p, table, block, need_dx, need_da, need_db):
    """`reference_batched.lora_batched_bwd` by the native kernels."""
    M, K = x.shape
    S, (L, R, _) = len(weights), pools_a[0].shape
    dx = x.new_empty((M, K) if need_dx else (0,))
    das = [torch.zeros_like(p, memory_format=torch.contiguous_format) for p in pools_a] if need_da else []
    dbs = [torch.zeros_like(p, memory_format=torch.contiguous_format) for p in pools_b] if need_db else []
    h, mask = h.contiguous(), mask.contiguous()
    rank_ptrs, scaling_ptrs, slices, dy_ptr = _row_ptrs(ranks, S), _row_ptrs(scalings, S), [], dy.data_ptr()
    for i in range(S):
        weight, a, b = weights[i], pools_a[i], pools_b[i]
        slices.append((
            weight.shape[0], weight.data_ptr(), weight.stride(0),
            a.data_ptr(), a.stride(0), a.stride(1), DTYPES[a.dtype], b.data_ptr(), b.stride(0), b.stride(1), DTYPES[b.dtype],
            rank_ptrs[i], scaling_ptrs[i], h[i].data_ptr(), dy_ptr, _ptr(das[i]) if need_da else 0, _ptr(dbs[i]) if need_db else 0,
        ))  # fmt: skip
        dy_ptr += weight.shape[0] * dy.element_size()
    _C.cpu_batched_bwd(
        M, K, R, L, DTYPES[x.dtype], torch.get_num_threads(), x.data_ptr(), x.stride(0), dy.stride(0),
        ids.data_ptr(), _ptr(dropout_p), mask.data_ptr(), dx.data_ptr() if need_dx else 0, slices,
    )  # fmt: skip
    return dx, das, dbs


def lora_shrink(x, pools_a, ids, ranks, scalings, table, block, rank_packed, batch_invariant):
    """`reference_batched.lora_shrink` by the native kernels: one form for every M."""
    M, K = x.shape
    S, (L, R, _) = len(pools_a), pools_a[0].shape
    if rank_packed:
        R //= S
    h = x.new_zeros((S, M, R), dtype=torch.float32)
    rank_ptrs, scaling_ptrs, h_ptr = _row_ptrs(ranks, S), _row_ptrs(scalings, S), h.data_ptr()
    for i, a in enumerate(pools_a):
        _C.cpu_shrink(
            M, K, R, L, DTYPES[x.dtype], torch.get_num_threads(), x.data_ptr(), x.stride(0), a.data_ptr(), a.stride(0), a.stride(1), DTYPES[a.dtype],
            i if rank_packed else 0, ids.data_ptr(), rank_ptrs[i], scaling_ptrs[i], h_ptr + i * M * R * 4,
        )  # fmt: skip
    return h


def lora_expand(y, h, pools_b, ids, ranks, table, block, batch_invariant):
    """`reference_batched.lora_expand` by the native kernels: one form for every M."""
    M, (S, _, R) = y.shape[0], h.shape
    rank_ptrs, y_ptr, h_ptr = _row_ptrs(ranks, S), y.data_ptr(), h.data_ptr()
    for i, b in enumerate(pools_b):
        L, N, _ = b.shape
        _C.cpu_expand(
            M, N, R, L, DTYPES[y.dtype], torch.get_num_threads(), y_ptr, y.stride(0), h_ptr + i * h.stride(0) * h.element_size(), h.stride(1),
            DTYPES[h.dtype], b.data_ptr(), b.stride(0), b.stride(1), DTYPES[b.dtype], ids.data_ptr(), rank_ptrs[i],
        )  # fmt: skip
        y_ptr += N * y.element_size()


OPS = {
    "lora_batched_fwd": (lora_batched_fwd, _fwd_refuses),
    "lora_batched_bwd": (lora_batched_bwd, _bwd_refuses),
    "lora_shrink": (lora_shrink, _shrink_refuses),
    "lora_expand": (lora_expand, _expand_refuses),
}
