"""The many-adapter ops in plain PyTorch: definition, float64 oracle, last fallback.

Row m of the batch uses adapter l = ids[m] (none when l is outside 0 ... L - 1), of true rank r = ranks[i, l] and scale s = scalings[i, l]
in output slice i. The slices share x (q/k/v, gate/up) and y is their concatenation:

    h[i, m, :r] = s * drop_l(x[m]) A_i[l, :r]^T
    y[m, slice i] = x[m] W_i^T + b_i + h[i, m, :r] B_i[l, :, :r]^T

    g[i, m, :r] = s * dy[m, slice i] B_i[l, :, :r]
    dx[m] = sum_i dy[m, slice i] W_i + drop_l'(g[i, m, :r] A_i[l, :r])
    dA_i[l, :r] = sum over the rows of l of g[i, m]^T drop_l(x[m])          dB_i[l, :, :r] = sum of dy[m, slice i]^T h[i, m]

With `rank_packed` the slices of A lie behind each other at the true rank: A_i[l] is rows i r ... (i + 1) r of one pool [L, S R, K].

A row's bits must not depend on its neighbours. A product over the rows of one adapter would break that (another M, another kernel inside
the library), so every adapter present runs over all M rows and the rows that use it are selected: M, and with it the library's choice,
stays what it is whatever the mix. With batch_invariant each row runs alone, which makes M and the row's place irrelevant too, and slow.
Reading ids and ranks synchronises with the device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference


def _present(ids: Tensor, L: int) -> list[int]:
    """The adapters of the batch, ascending."""
    return [slot for slot in torch.unique(ids).tolist() if 0 <= slot < L]


def _table(given: Tensor | None, S: int, L: int, full: float) -> list[list]:
    """ranks or scalings `[S, L]` as Python numbers; `full` everywhere when not given."""
    return [[full] * L] * S if given is None else given.tolist()


def slices(widths: list[int]) -> list[slice]:
    """Column ranges of y, one per output slice."""
    ends = [sum(widths[: i + 1]) for i in range(len(widths))]
    return [slice(end - width, end) for width, end in zip(widths, ends, strict=True)]


def h_width(R: int) -> int:
    """Columns of h: R rounded up to 16, so that kernels load every row in 16 bytes at a time."""
    return -(-R // 16) * 16


def _full_rank(pool_a: Tensor, S: int, rank_packed: bool) -> int:
    return pool_a.shape[1] // S if rank_packed else pool_a.shape[1]


def _a(pool: Tensor, i: int, slot: int, r: int, rank_packed: bool) -> Tensor:
    return pool[slot, i * r : (i + 1) * r] if rank_packed else pool[slot, :r]


def _keep_mask(ids: Tensor, present: list[int], dropout_p: Tensor | None, seed: Tensor | None, M: int, K: int) -> Tensor:
    """int32 `[M, ceil(K / 32)]`, each row by its adapter's probability; empty `[0]` without dropout."""
    if dropout_p is None:
        return ids.new_empty(0)
    mask = torch.full((M, -(-K // 32)), -1, dtype=torch.int32, device=ids.device)
    for slot in present:
        if (p := float(dropout_p[slot])) > 0:
            mask = torch.where((ids == slot).unsqueeze(1), reference.dropout_mask(seed, M, K, p), mask)
    return mask


def _dropped(x: Tensor, mask: Tensor, dropout_p: Tensor | None, slot: int) -> Tensor:
    p = 0.0 if dropout_p is None else float(dropout_p[slot])
    return reference._drop(x, mask, p) if p > 0 else x


def _each_row(M: int, run):
    """`run(rows)` for every single row, results concatenated along the rows (dimension -2)."""
    parts = [run(slice(m, m + 1)) for m in range(M)]
    if isinstance(parts[0], Tensor):
        return torch.cat(parts, -2)
    return tuple(torch.cat(column, -2) for column in zip(*parts, strict=True))


def _forward(x, weights, biases, pools_a, pools_b, ids, ranks, scalings, dropout_p, mask, rank_packed):
    S, L, R = len(weights), pools_a[0].shape[0], _full_rank(pools_a[0], len(weights), rank_packed)
    ranks, scalings = _table(ranks, S, L, R), _table(scalings, S, L, 1.0)
    h = x.new_zeros((S, x.shape[0], h_width(R)))
    ys, present = [], _present(ids, L)
    for i in range(S):
        y = F.linear(x, weights[i], biases[i])
        for slot in present:
            if (r := ranks[i][slot]) == 0:
                continue
            mine = (ids == slot).unsqueeze(1)
            a, b = _a(pools_a[i], i, slot, r, rank_packed).to(x.dtype), pools_b[i][slot, :, :r].to(x.dtype)
            hl = reference._scaled_mm(_dropped(x, mask, dropout_p, slot), a.t(), scalings[i][slot])
            h[i, :, :r] = torch.where(mine, hl, h[i, :, :r])
            y = torch.where(mine, torch.addmm(y, hl, b.t()), y)
        ys.append(y)
    return torch.cat(ys, 1) if S > 1 else ys[0], h


def lora_batched_fwd(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    pools_a: list[Tensor],
    pools_b: list[Tensor],
    ids: Tensor,
    ranks: Tensor | None,
    scalings: Tensor | None,
    dropout_p: Tensor | None,
    seed: Tensor | None,
    table: Tensor | None,
    block: int,
    rank_packed: bool,
    batch_invariant: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """x `[M, K]`; per slice: weight `[N_i, K]`, bias `[N_i]` or None, pool_a `[L, R, K]`, pool_b `[L, N_i, R]` (one K, one L, one R).

    ids int32 `[M]`; ranks int32 `[S, L]` or None (all R); scalings float32 `[S, L]` or None (all 1), both with any stride over S (0: one
    row for all slices) and stride 1 over L; dropout_p float32 `[L]` or None. `table` and `block` (see `_batch_table`) serve GPU kernels.
    Returns y `[M, sum N_i]`, h `[S, M, h_width(R)]` in x's dtype (entries of rows without an adapter, and past the true rank, are
    unspecified), and the keep mask int32 `[M, ceil(K / 32)]`, empty without dropout.
    """
    mask = _keep_mask(ids, _present(ids, pools_a[0].shape[0]), dropout_p, seed, *x.shape)

    def run(rows):
        mask_rows = mask if dropout_p is None else mask[rows]
        return _forward(x[rows], weights, biases, pools_a, pools_b, ids[rows], ranks, scalings, dropout_p, mask_rows, rank_packed)

    if batch_invariant and x.shape[0] > 1:
        return *_each_row(x.shape[0], run), mask
    return *run(slice(None)), mask


def lora_batched_bwd(
    dy: Tensor,
    x: Tensor,
    weights: list[Tensor],
    pools_a: list[Tensor],
    pools_b: list[Tensor],
    h: Tensor,
    mask: Tensor,
    ids: Tensor,
    ranks: Tensor | None,
    scalings: Tensor | None,
    dropout_p: Tensor | None,
    table: Tensor | None,
    block: int,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Shapes as in `lora_batched_fwd`; dy `[M, sum N_i]`. Returns dx `[M, K]` in x's dtype, dA and dB per slice in the pools' shapes and
    dtypes (zero for adapters without rows); what is not needed comes back empty: dx `[0]`, no tensors. Sums run over rows in order.
    """
    S, L, R = len(weights), pools_a[0].shape[0], pools_a[0].shape[1]
    ranks, scalings, present = _table(ranks, S, L, R), _table(scalings, S, L, 1.0), _present(ids, L)
    cuts = slices([w.shape[0] for w in weights])
    dx = dy @ torch.cat(weights) if need_dx and S > 1 else dy @ weights[0] if need_dx else x.new_empty(0)
    das = [torch.zeros_like(p, memory_format=torch.contiguous_format) for p in pools_a] if need_da else []
    dbs = [torch.zeros_like(p, memory_format=torch.contiguous_format) for p in pools_b] if need_db else []
    for slot in present:
        rows = (ids == slot).nonzero().flatten()
        mask_rows = mask if dropout_p is None else mask[rows]
        for i in range(S):
            if (r := ranks[i][slot]) == 0:
                continue
            dy_i = dy[rows, cuts[i]]
            a, b = pools_a[i][slot, :r].to(x.dtype), pools_b[i][slot, :, :r].to(x.dtype)
            if need_dx or need_da:
                g = reference._scaled_mm(dy_i, b, scalings[i][slot])
            if need_dx:
                dx[rows] += _dropped(g @ a, mask_rows, dropout_p, slot)
            if need_da:
                das[i][slot, :r] = (g.t() @ _dropped(x[rows], mask_rows, dropout_p, slot)).to(das[i].dtype)
            if need_db:
                dbs[i][slot, :, :r] = (dy_i.t() @ h[i, rows, :r]).to(dbs[i].dtype)
    return dx, das, dbs


def lora_shrink(
    x: Tensor,
    pools_a: list[Tensor],
    ids: Tensor,
    ranks: Tensor | None,
    scalings: Tensor | None,
    table: Tensor | None,
    block: int,
    rank_packed: bool,
    batch_invariant: bool,
) -> Tensor:
    """h `[S, M, R]` in at least float32, h[i, m, :r] = s * x[m] A_i[l, :r]^T; zero for rows without an adapter and past the true rank.

    The products are of x-dtype operands, as in `lora_batched_fwd`; the sum is left unrounded.
    """
    S, L, R = len(pools_a), pools_a[0].shape[0], _full_rank(pools_a[0], len(pools_a), rank_packed)
    wide = torch.promote_types(x.dtype, torch.float32)
    ranks, scalings, present = _table(ranks, S, L, R), _table(scalings, S, L, 1.0), _present(ids, L)

    def run(rows):
        xw, mine = x[rows].to(wide), ids[rows].unsqueeze(1)
        h = xw.new_zeros((S, xw.shape[0], R))
        for i in range(S):
            for slot in present:
                r = ranks[i][slot]
                a = _a(pools_a[i], i, slot, r, rank_packed).to(x.dtype).to(wide)
                h[i, :, :r] = torch.where(mine == slot, reference._scaled_mm(xw, a.t(), scalings[i][slot]), h[i, :, :r])
        return h

    return _each_row(x.shape[0], run) if batch_invariant and x.shape[0] > 1 else run(slice(None))


def lora_expand(
    y: Tensor, h: Tensor, pools_b: list[Tensor], ids: Tensor, ranks: Tensor | None, table: Tensor | None, block: int, batch_invariant: bool
) -> None:
    """y[m, slice i] += h[i, m, :r] B_i[l, :, :r]^T in place; h `[S, M, R]` is rounded to y's dtype first, the sum is rounded once."""
    S, L, R = len(pools_b), pools_b[0].shape[0], pools_b[0].shape[2]
    ranks, present = _table(ranks, S, L, R), _present(ids, L)
    h = h.to(y.dtype)
    cuts = slices([p.shape[1] for p in pools_b])
    every = [slice(m, m + 1) for m in range(y.shape[0])] if batch_invariant else [slice(None)]
    for rows in every:
        mine = ids[rows].unsqueeze(1)
        for i in range(S):
            part = y[rows, cuts[i]]
            for slot in present:
                r = ranks[i][slot]
                part.copy_(torch.where(mine == slot, torch.addmm(part, h[i, rows, :r], pools_b[i][slot, :, :r].to(y.dtype).t()), part))


def _takes_all(*_args: object) -> str | None:
    return None


OPS = {
    "lora_batched_fwd": (lora_batched_fwd, _takes_all),
    "lora_batched_bwd": (lora_batched_bwd, _takes_all),
    "lora_shrink": (lora_shrink, _takes_all),
    "lora_expand": (lora_expand, _takes_all),
}
