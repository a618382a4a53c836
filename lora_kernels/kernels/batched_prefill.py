"""Many adapters, many rows: tiles of gathered rows that loop over the segments crossing them; base + update, or the update alone.

The kernel walks the rows in the sorted order of the batch table (`_batch_table`), so that a tile meets as few adapters as can be, and
reads and writes rows where they lie. What depends on the mix is read from device memory: the grid does not depend on it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _batch_table
from ..tuning.plan import block_rank
from ._jit import load_keep
from ._launch import Launcher, Pointers
from .batched_common import drop_of, jit, load_b, padded, pick, precision, rank_groups, rank_of, slice_of, stride0


@jit
def batched_linear_kernel(
    x_ptr, y_ptr, h_ptr, table_ptr, ranks_ptr, mask_ptr, p_ptr, ws, biases, bs,
    Ns, sbls, M, K, R, sxm, sym, swn, swk, sbn, sbr, shs, shm, srk,
    o_order, o_seg_of, o_seg_start, o_seg_adapter,
    S: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, VEC: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr, BASE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RANKS: tl.constexpr, MASKED: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """y[m, n] = x[m] W_i[n]^T + b_i[n] + h[i, m, :r] B_i[l, n, :r]^T, l the adapter of row m; without BASE, y += the last term.
    MASKED (dx): dropout's mask and scale on the last term.

    Shapes: x `[M, K]`, W_i `[N_i, K]`, B_i `[L, N_i, R]`, b_i `[N_i]` in x's dtype (B: or float32); h `[S, M, H]`, zero as
        `padded` says (without BASE `[S, M, R]`, any past r), any dtype, cast to x's;
        y `[M, sum N_i]`; mask int32 `[M, ceil(N / 32)]`, p `[L]`, where S is 1.
    Grid: one program per BM x BN tile, all slices in one launch; columns of GROUP_M row tiles. Independent of the adapter mix.
    Memory: x and W as in a GEMM; per tile and segment crossing it BM r of h and BN r of B; y stored once (without BASE: read and stored).
    Numerics: float32; ascending k, then the rank products, then the bias. A row takes a product only from its own segment (`where`, not a
        product with zero: another adapter's inf or NaN stays there), so its bits depend on itself, (BK, BR) and the tile shape alone.
        The rank products have an accumulator of their own, after the K loop: continued in the loop's accumulator, before or after it,
        ptxas serialises the loop's wgmma (C7515), as the segment loop around them carries it.
    Source: SGMV, arXiv:2310.18547; here the update is added in the base GEMM's accumulator.
    """
    num_m = tl.cdiv(M, BM)
    pid = tl.program_id(0)
    num_n = tl.num_programs(0) // num_m
    per_group = GROUP_M * num_n
    first_m = pid // per_group * GROUP_M
    height = min(num_m - first_m, GROUP_M)
    pm = first_m + pid % per_group % height
    i, tile, col0 = slice_of(pid % per_group // height, Ns, S, BN)
    N = pick(Ns, i, S)

    p0 = pm * BM
    rp = p0 + tl.arange(0, BM)
    live = rp < M
    rows = tl.load(table_ptr + o_order + rp, mask=live, other=0).to(tl.int64)
    rn = tile * BN + tl.arange(0, BN)
    rr = tl.arange(0, BR)
    acc = tl.zeros((BM, BN), tl.float32)
    if BASE:
        rk = tl.arange(0, BK)
        columns = rn[None, :] < N
        x_ptrs = x_ptr + rows[:, None] * sxm + rk[None, :]
        w_ptrs = pick(ws, i, S) + rn.to(tl.int64)[None, :] * swn + rk.to(tl.int64)[:, None] * swk
        for k in range(0, K, BK):
            if EVEN_K:
                x = tl.load(x_ptrs)
                w = tl.load(w_ptrs, mask=columns, other=0.0)
            else:
                x = tl.load(x_ptrs, mask=k + rk[None, :] < K, other=0.0)
                w = tl.load(w_ptrs, mask=columns & (k + rk[:, None] < K), other=0.0)
            acc = tl.dot(x, w, acc, input_precision=PREC)
            x_ptrs += BK
            w_ptrs += BK * swk
    segments = tl.load(table_ptr + 2)
    seg = tl.load(table_ptr + o_seg_of + p0)
    last = tl.minimum(tl.load(table_ptr + o_seg_of + tl.minimum(p0 + BM, M) - 1) + 1, segments)
    while seg < last:
        start = tl.load(table_ptr + o_seg_start + seg)
        end = tl.load(table_ptr + o_seg_start + seg + 1)
        adapter = tl.load(table_ptr + o_seg_adapter + seg)
        rank = rank_of(ranks_ptr, i, adapter, R, srk, HAS_RANKS)
        mine = (rp >= start) & (rp < end)
        width = rank
        if BASE:  # h is ours
            width = padded(rank)
        b_ptr = pick(bs, i, S)
        term = tl.zeros((BM, BN), tl.float32)
        # Not pipelined: a cast operand would be a register operand of a pipelined wgmma, which ptxas before 13.3 miscompiles (triton#9433).
        for r in tl.range(0, rank, BR, num_stages=1):
            ranks = (r + rr)[None, :]
            h = tl.load(h_ptr + i * shs + rows[:, None] * shm + ranks, mask=mine[:, None] & (ranks < width), other=0.0)
            b = load_b(b_ptr, adapter, ranks, rn[:, None], rank, rn[:, None] < N, pick(sbls, i, S), sbn, sbr, VEC)
            term = tl.dot(h.to(x_ptr.dtype.element_ty), b.to(x_ptr.dtype.element_ty).T, term, input_precision=PREC)
        if MASKED:
            _, keep_scale = drop_of(tl.load(p_ptr + adapter))
            keep = load_keep(mask_ptr, tl.where(live, rows, M), M, tile * BN, tl.cdiv(N, 32), BM, BN)
            term = tl.where(keep, term * keep_scale, 0.0)
        acc = tl.where(mine[:, None], acc + term, acc)
        seg += 1

    yp = y_ptr + rows[:, None] * sym + (col0 + rn)[None, :]
    keep = live[:, None] & (rn[None, :] < N)
    if BASE:
        if HAS_BIAS:
            acc += tl.load(pick(biases, i, S) + rn, mask=rn < N, other=0.0).to(tl.float32)[None, :]
        tl.store(yp, acc.to(y_ptr.dtype.element_ty), mask=keep)
    else:
        # Rows without an adapter are neither read nor written.
        keep = keep & (rp < tl.load(table_ptr + 1))[:, None]
        acc += tl.load(yp, mask=keep, other=0.0).to(tl.float32)
        tl.store(yp, acc.to(y_ptr.dtype.element_ty), mask=keep)


class Plan(NamedTuple):
    BM: int
    BN: int
    BK: int
    warps: int
    stages: int


PREFILL = Plan(128, 128, 64, 8, 3)
SMALL = Plan(64, 128, 64, 8, 3)  # sm_80, where 128 x 128 spills; and every M under batch_invariant, so that a row's sums have one order
FLOAT32 = Plan(64, 64, 32, 4, 2)
ODD = Plan(32, 32, 32, 4, 2)  # K no multiple of the others' step: its mask, or addresses per element, take registers
EXPAND = Plan(64, 128, 64, 8, 2)


def plan(dtype: torch.dtype, K: int, arch: int, base: bool, batch_invariant: bool) -> Plan:
    if base and K % (32 if dtype == torch.float32 else 64):
        return ODD
    if dtype == torch.float32:
        return FLOAT32
    if not base:
        return EXPAND
    return SMALL if batch_invariant or arch < 90 else PREFILL


class Tiles:
    """Launches y from x, or y += the update where `weights` is empty, for one call signature. Slices as in `batched_decode.Decode`."""

    own_h = False

    def __init__(self, plan: Plan, x: Tensor, y: Tensor, h: Tensor, weights, biases, pools_b, ranks, block: int, masked: bool = False):
        (M, K), S, R, b = x.shape, len(pools_b), pools_b[0].shape[2], pools_b[0]
        at = _batch_table.layout(M, b.shape[0], block)
        self.base = bool(weights)
        Ns, w = tuple(t.shape[1] for t in pools_b), weights[0] if weights else b[0]
        BR = block_rank(R, 64 if x.element_size() == 2 else 32)  # float32: 64 spill on sm_80 beside the addresses of three slices
        tiles = triton.cdiv(M, plan.BM) * sum(triton.cdiv(N, plan.BN) for N in Ns)
        vec, sbls, sbnr = rank_groups(pools_b)
        ints = (Ns, sbls, M, K, R, x.stride(0), y.stride(0), *w.stride(), *sbnr)
        ints += (h.stride(0), h.stride(1), stride0(ranks), at.order, at.seg_of, at.seg_start, at.seg_adapter)
        constants = {"S": S, "BM": plan.BM, "BN": plan.BN, "BK": plan.BK, "BR": BR, "VEC": vec, "GROUP_M": 8, "EVEN_K": K % plan.BK == 0}
        constants |= {"BASE": self.base, "HAS_BIAS": biases is not None, "HAS_RANKS": ranks is not None, "MASKED": masked}
        self.launch = Launcher(batched_linear_kernel, (tiles,), (), ints, plan.warps, plan.stages, **constants, PREC=precision(x.dtype))

    def __call__(
        self, stream: int, x: Tensor, y: Tensor, h: Tensor, weights, biases, pools_b, ranks, ids, table: Tensor, mask=None, p=None, **_
    ) -> None:
        bs = Pointers(pools_b)
        self.launch(stream, (), (x, y, h, table, ranks, mask, p, Pointers(weights) if self.base else bs, biases, bs))
