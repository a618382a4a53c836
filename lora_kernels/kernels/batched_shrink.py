"""Many adapters: h of the rows of each token block, as units of work that a launch of its own or a larger kernel takes.

Few rows: a unit is one slice's part of K, so that there are enough of them (`h_unit`). Many rows: all slices of a block from one read of x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _batch_table
from ._launch import Launcher, Pointers, workspace
from .batched_common import arch, jit, padded, pick, precision, rank_chunk, rank_of, stride0

COUNTERS = tl.constexpr(3)  # sync[3 ...]: one arrival counter per group; before them the decode kernel's ticket, groups and exits


@triton.jit
def store_h(acc, h_ptr, scalings_ptr, i, adapter, rows, live, rr, rank, shs, shm, ssc, HAS_SCALINGS: tl.constexpr, PADDED: tl.constexpr):
    """Scale the float32 sums and store what exists of them, with PADDED and the zeros behind (`padded`)."""
    if HAS_SCALINGS:
        acc *= tl.load(scalings_ptr + i * ssc + adapter)
    width = rank
    if PADDED:
        width = padded(rank)
        acc = tl.where(rr[None, :] < rank, acc, 0.0)  # x may be infinite
    tl.store(h_ptr + i * shs + rows[:, None] * shm + rr[None, :], acc.to(h_ptr.dtype.element_ty), mask=live[:, None] & (rr[None, :] < width))


@triton.jit
def h_unit(
    u, count, x_ptr, h_ptr, hpart_ptr, table_ptr, ranks_ptr, scalings_ptr, sync_ptr, as_, K, R, sxm, sal, sar, sak, shs, shm, srk, ssc,
    o_order, o_blk_start, o_blk_len, o_blk_adapter, blocks, RC,
    S: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, TB: tl.constexpr, KC: tl.constexpr,
    HAS_RANKS: tl.constexpr, HAS_SCALINGS: tl.constexpr, PACKED: tl.constexpr, PADDED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Unit u: h[i, rows of a block, BR columns] from `count` parts of K, one or all KC; of single parts the last of the group's KC sums and stores h.

    Either way h is the sum of the parts' own sums in ascending order: the same bits.
    """
    units = KC // count
    group = u // units
    part = u % units
    block = group % blocks
    i = group // blocks // RC
    r0 = group // blocks % RC * BR
    start = tl.load(table_ptr + o_blk_start + block)
    length = tl.load(table_ptr + o_blk_len + block)
    adapter = tl.load(table_ptr + o_blk_adapter + block)
    rank = rank_of(ranks_ptr, i, adapter, R, srk, HAS_RANKS)
    if r0 < rank:
        rt = tl.arange(0, TB)
        rr = r0 + tl.arange(0, BR)
        live = rt < length
        rows = tl.load(table_ptr + o_order + start + rt, mask=live, other=0).to(tl.int64)
        a_ptr = pick(as_, i, S) + adapter.to(tl.int64) * sal
        if PACKED:
            a_ptr += i * rank * sar
        per_part = tl.cdiv(tl.cdiv(K, KC), BK) * BK
        acc = tl.zeros((TB, BR), tl.float32)
        total = acc
        for k in range(part * per_part, min((part + count) * per_part, K), BK):
            rk = k + tl.arange(0, BK)
            x = tl.load(x_ptr + rows[:, None] * sxm + rk[None, :], mask=live[:, None] & (rk[None, :] < K), other=0.0)
            a = tl.load(a_ptr + rr[:, None] * sar + rk[None, :] * sak, mask=(rr[:, None] < rank) & (rk[None, :] < K), other=0.0)
            acc = tl.dot(x, a.to(x_ptr.dtype.element_ty).T, acc, input_precision=PREC)
            ends = (k + BK) % per_part == 0
            total = tl.where(ends, total + acc, total)
            acc = tl.where(ends, 0.0, acc)
        total += acc
        arrived = KC - 1
        if count < KC:
            parts = hpart_ptr + group.to(tl.int64) * (KC * TB * BR) + rt[:, None] * BR + tl.arange(0, BR)[None, :]
            tl.store(parts + part * (TB * BR), total)
            tl.debug_barrier()
            arrived = tl.atomic_add(sync_ptr + COUNTERS + group, 1, sem="acq_rel", scope="gpu")
            if arrived == KC - 1:
                total = tl.zeros((TB, BR), tl.float32)
                for c in range(KC):
                    total += tl.load(parts + c * (TB * BR), cache_modifier=".cg")
                tl.atomic_xchg(sync_ptr + COUNTERS + group, 0, sem="relaxed")
        if arrived == KC - 1:
            store_h(total, h_ptr, scalings_ptr, i, adapter, rows, live, rr, rank, shs, shm, ssc, HAS_SCALINGS, PADDED)


@triton.jit
def h_step(acc, x, a_ptr, rr, rk, K, rank, sar, sak, PREC: tl.constexpr):
    """acc + x A^T over the columns rk of K."""
    a = tl.load(a_ptr + rr[:, None] * sar + rk[None, :] * sak, mask=(rr[:, None] < rank) & (rk[None, :] < K), other=0.0)
    return tl.dot(x, a.to(x.dtype).T, acc, input_precision=PREC)


@triton.jit
def h_block(
    u, x_ptr, h_ptr, table_ptr, ranks_ptr, scalings_ptr, as_, K, R, sxm, sal, sar, sak, shs, shm, srk, ssc,
    o_order, o_blk_start, o_blk_len, o_blk_adapter, blocks,
    S: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, TB: tl.constexpr,
    HAS_RANKS: tl.constexpr, HAS_SCALINGS: tl.constexpr, PACKED: tl.constexpr, PADDED: tl.constexpr, PREC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Unit u of blocks * RC: h[:, rows of a block, BR columns], x read once for all slices."""
    block = u % blocks
    r0 = u // blocks * BR
    start = tl.load(table_ptr + o_blk_start + block)
    length = tl.load(table_ptr + o_blk_len + block)
    adapter = tl.load(table_ptr + o_blk_adapter + block)
    rank0 = rank_of(ranks_ptr, 0, adapter, R, srk, HAS_RANKS)
    rank1 = rank0
    rank2 = rank0
    if S > 1:
        rank1 = rank_of(ranks_ptr, 1, adapter, R, srk, HAS_RANKS)
    if S > 2:
        rank2 = rank_of(ranks_ptr, 2, adapter, R, srk, HAS_RANKS)
    if r0 < max(rank0, rank1, rank2):
        rt = tl.arange(0, TB)
        rr = r0 + tl.arange(0, BR)
        live = rt < length
        rows = tl.load(table_ptr + o_order + start + rt, mask=live, other=0).to(tl.int64)
        first = adapter.to(tl.int64) * sal
        acc0 = tl.zeros((TB, BR), tl.float32)
        acc1 = acc0
        acc2 = acc0
        for k in tl.range(0, K, BK, num_stages=STAGES):
            rk = k + tl.arange(0, BK)
            x = tl.load(x_ptr + rows[:, None] * sxm + rk[None, :], mask=live[:, None] & (rk[None, :] < K), other=0.0)
            acc0 = h_step(acc0, x, as_[0] + first, rr, rk, K, rank0, sar, sak, PREC)
            if S > 1:
                acc1 = h_step(acc1, x, as_[1] + first + (rank1 * sar if PACKED else 0), rr, rk, K, rank1, sar, sak, PREC)
            if S > 2:
                acc2 = h_step(acc2, x, as_[2] + first + (2 * rank2 * sar if PACKED else 0), rr, rk, K, rank2, sar, sak, PREC)
        store_h(acc0, h_ptr, scalings_ptr, 0, adapter, rows, live, rr, rank0, shs, shm, ssc, HAS_SCALINGS, PADDED)
        if S > 1:
            store_h(acc1, h_ptr, scalings_ptr, 1, adapter, rows, live, rr, rank1, shs, shm, ssc, HAS_SCALINGS, PADDED)
        if S > 2:
            store_h(acc2, h_ptr, scalings_ptr, 2, adapter, rows, live, rr, rank2, shs, shm, ssc, HAS_SCALINGS, PADDED)


@jit
def shrink_kernel(
    x_ptr, h_ptr, hpart_ptr, table_ptr, ranks_ptr, scalings_ptr, sync_ptr, as_, K, R, sxm, sal, sar, sak, shs, shm, srk, ssc,
    o_order, o_blk_start, o_blk_len, o_blk_adapter, RC,
    S: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, TB: tl.constexpr, KC: tl.constexpr,
    HAS_RANKS: tl.constexpr, HAS_SCALINGS: tl.constexpr, PACKED: tl.constexpr, PADDED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """h[i, m, :r] = scale[i, l] x[m] A_i[l, :r]^T, l the adapter of row m.

    Shapes: x `[M, K]`; A_i `[L, R, K]` (PACKED: `[L, S R, K]`) x's dtype or float32; h `[S, M, R]` any dtype, written where l and r exist;
        PADDED: `[S, M, H]`, H a multiple of 16, zero past r up to the next such.
    Grid: (max_blocks * RC), with parts of K (max_blocks * S * RC * KC); programs past the blocks of this batch leave at once.
    Memory: x once per rank chunk, A_l once per token block; with KC > 1 x once per slice, and the parts, float32, written and read once.
    Numerics: float32 over ascending k, KC parts added in order, scale applied to the float32 sum. No atomics on data.
    Source: BGMV/SGMV shrink, arXiv:2310.18547.
    """
    blocks = tl.load(table_ptr)
    u = tl.program_id(0)
    if KC == 1:
        if u < blocks * RC:
            h_block(
                u, x_ptr, h_ptr, table_ptr, ranks_ptr, scalings_ptr, as_, K, R, sxm, sal, sar, sak, shs, shm, srk, ssc,
                o_order, o_blk_start, o_blk_len, o_blk_adapter, blocks, S, BK, BR, TB, HAS_RANKS, HAS_SCALINGS, PACKED, PADDED, PREC, 3,
            )  # fmt: skip
    elif u < blocks * S * RC * KC:
        h_unit(
            u, 1, x_ptr, h_ptr, hpart_ptr, table_ptr, ranks_ptr, scalings_ptr, sync_ptr, as_, K, R, sxm, sal, sar, sak, shs, shm, srk, ssc,
            o_order, o_blk_start, o_blk_len, o_blk_adapter, blocks, RC, S, BK, BR, TB, KC, HAS_RANKS, HAS_SCALINGS, PACKED, PADDED, PREC,
        )  # fmt: skip


def h_steps(x: Tensor, pools_a: list[Tensor], R: int, parts: int) -> tuple[int, int]:
    """(BK, BR) of the units of h."""
    together, short = parts == 1 and len(pools_a) > 1, x.element_size() == 4 or x.shape[1] % 8 != 0
    spills = together and rank_chunk(R) * len(pools_a) > 128 and arch(x.device) < 90  # in the stores of h
    BK = 32 if short or spills else 128 if pools_a[0].dtype == x.dtype and not together else 64
    return BK, min(rank_chunk(R), 32) if together and short else rank_chunk(R)  # an accumulator and a tile of A for each slice: 64 ranks spill


class Shrink:
    """Launches h[i, m, :r] for one call signature: x, pools of equal strides (`packed`: one pool for all), h `[S, M, R]` or `[S, M, H]` any dtype.

    `parts` > 1 splits K, for few rows; the parts are summed in order.
    """

    def __init__(self, x: Tensor, pools_a: list[Tensor], h: Tensor, ranks, scalings, block: int, packed: bool, parts: int):
        (M, K), S, a = x.shape, len(pools_a), pools_a[0]
        R = a.shape[1] // (S if packed else 1)
        at, together, (BK, BR) = _batch_table.layout(M, a.shape[0], block), parts == 1 and S > 1, h_steps(x, pools_a, R, parts)
        RC = triton.cdiv(R, BR)
        groups = at.max_blocks * RC * (S if parts > 1 else 1)
        self.parts = groups * parts * block * BR if parts > 1 else 0
        self.flags = 3 + groups
        ints = (K, R, x.stride(0), *a.stride(), h.stride(0), h.stride(1), stride0(ranks), stride0(scalings))
        ints += (at.order, at.blk_start, at.blk_len, at.blk_adapter, RC)
        constants = {"S": S, "BK": BK, "BR": BR, "TB": block, "KC": parts, "HAS_RANKS": ranks is not None, "HAS_SCALINGS": scalings is not None}
        constants |= {"PACKED": packed, "PADDED": h.shape[2] % 16 == 0, "PREC": precision(x.dtype)}
        self.launch = Launcher(shrink_kernel, (groups * parts,), (), ints, 8 if together else 4, 3, **constants) if groups else None

    def __call__(self, stream: int, x: Tensor, pools_a: list[Tensor], h: Tensor, ranks, scalings, table: Tensor) -> None:
        if self.launch is None:  # pools without slots
            return
        hpart = x.new_empty(self.parts, dtype=torch.float32) if self.parts else None
        sync = workspace(x.device, stream, self.flags) if self.parts else None
        self.launch(stream, (), (x, h, hpart, table, ranks, scalings, sync, Pointers(pools_a)))
