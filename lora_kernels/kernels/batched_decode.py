"""Many adapters, few rows: the whole layer in one launch, h units dealt by a ticket.

Synchronisation, argued here for `shrink_kernel` too. `sync` is int32 and all zero before and after every launch:

    [0] ticket    [1] groups of h published    [2] programs that have left
    [3 ...] one arrival counter per group, then one per column tile

A *group* is one slice of h for one token block and one chunk of BR rank columns; it has KC *units*, one per part of K, or of many groups each is one.

Every unit once: a unit is claimed by adding to the ticket, so no number is drawn twice; each program draws until its number is past the
last unit, so when any program stops drawing, all units have been drawn.
No wait on work that cannot run: a program waits only after it has stopped drawing, and then for units drawn by programs that are running
(they drew), and that wait for nothing while they hold a unit (the loop over units has no wait in it). So they finish, whatever the number
of programs that are resident: nothing is assumed about co-residency, and the waiting programs need not make room.
Publication: all threads store, a CTA barrier orders them before one thread's atomic with release at gpu scope (barrier and release are
cumulative), and the reader's acquire is followed by a CTA barrier (Triton broadcasts the scalar through shared memory) before the loads,
which skip L1 (.cg). The data are plain stores, never a descriptor (TMA) store: those belong to the async proxy, and a release does not
order them. The last arriver at a counter acquires with the same atomic (acq_rel), so it sees the parts of all others.
Nothing is summed by arrival: the last arriver reads the parts back and adds them in ascending order, its own among them.
Self-reset: an arrival counter is put back by its last arriver, whom nobody follows in this launch. Ticket, groups and exits are put back
by the program that leaves last: every other program has added to exits after its last use of them. A relaxed store is enough there, for the
next reader is another launch on the same stream. Replays of a CUDA graph therefore start clean.
`sync` belongs to one stream (`_launch.workspace`); two launches that overlap must not share it.

A row's bits do not depend on its neighbours: the parts of h are cut by (K, KC), not by the number of units; the low-rank term of a row is
never added to a base part, for which part would depend on the row's block number: it goes to a slab of its own, `lora`, and is added last.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from .. import _batch_table
from ._launch import Launcher, Pointers, programs, regular, workspace
from .batched_common import arch, jit, load_b, padded, pick, precision, rank_chunk, rank_groups, rank_of, slice_of, stride0, unit_rows
from .batched_shrink import COUNTERS, h_unit

TICKET, GROUPS, EXITS = (tl.constexpr(v) for v in range(3))
PARTS = 8  # of K per group of h: 4096 / 8 = 4 steps of BK = 128
AHEAD = 512  # columns of W: 128 KiB for an SM, what memory brings in about the time that h takes (predicted, docs/measured.md)


@triton.jit
def fetch_rows(starts, elements):
    """Asks for so many bytes behind each of these addresses, 16-byte multiples all, to be in L2 (sm_90)."""
    size = elements * (starts.dtype.element_ty.primitive_bitwidth // 8)
    ask: tl.constexpr = "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;"
    tl.inline_asm_elementwise(ask, "=r,l,r", [starts.to(tl.int64), tl.zeros(starts.shape, tl.int32) + size], tl.int32, False, 1)


@jit
def decode_kernel(
    x_ptr, y_ptr, h_ptr, scratch_ptr, table_ptr, ranks_ptr, scalings_ptr, sync_ptr, ws, biases, as_, bs,
    Ns, sbls, M, K, R, sxm, sym, swn, sal, sar, shs, shm, sbn, srk, ssc,
    o_order, o_blk_start, o_blk_len, o_blk_adapter, RC, total_n, max_groups, o_part, o_lora,
    S: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, VEC: tl.constexpr, TB: tl.constexpr, KC: tl.constexpr,
    SPLIT_K: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RANKS: tl.constexpr, HAS_SCALINGS: tl.constexpr, PACKED: tl.constexpr,
    AHEAD: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """y[m, n] = x[m] W_i[n]^T + b_i[n] + h[i, m, :r] B_i[l, n, :r]^T for M <= BM rows, shrink and expand in the same launch.

    Shapes: as `batched_linear_kernel` and `shrink_kernel`; scratch float32: hpart `[groups, KC, TB, BR]`, then part
        `[SPLIT_K, total_n, BM]` and lora `[total_n, BM]` at their offsets.
    Grid: (column tiles of all slices, SPLIT_K). W's rows stand on the wide side of the MMA, the rows of x on the narrow one.
    Memory: W once, the first AHEAD columns of each program asked for before h is computed; A_l and B_l once per token block, y once; x and h from
        L2; parts of y through L2 when SPLIT_K > 1.
    Numerics: float32; parts of K added in ascending order, then the low-rank term, then the bias. Same bits every run.
    Source: stream-K style fix-up, arXiv:2301.03598; BGMV, arXiv:2310.18547.
    """
    blocks = tl.load(table_ptr)
    groups = blocks * S * RC
    hpart_ptr = scratch_ptr
    part_ptr = scratch_ptr + o_part
    lora_ptr = scratch_ptr + o_lora
    pn = tl.program_id(0)
    ps = tl.program_id(1)
    i, tile, col0 = slice_of(pn, Ns, S, BN)
    N = pick(Ns, i, S)
    rn = tile * BN + tl.arange(0, BN)
    wn = tl.where(rn < N, rn, 0).to(tl.int64)
    w_ptr = pick(ws, i, S)
    per_split = tl.cdiv(tl.cdiv(K, SPLIT_K), BK) * BK
    if AHEAD > 0 and ps * per_split < K:
        fetch_rows(w_ptr + wn * swn + ps * per_split, tl.minimum(K - ps * per_split, AHEAD))

    # 1. h: draw units until none is left. Of many groups each is one unit: a unit's time is latency, which a program would wait for several times.
    count = tl.where(groups * KC > 2 * tl.num_programs(0) * tl.num_programs(1), KC, 1)
    units = groups * (KC // count)
    u = tl.atomic_add(sync_ptr + TICKET, 1, sem="relaxed")
    while u < units:
        h_unit(
            u, count, x_ptr, h_ptr, hpart_ptr, table_ptr, ranks_ptr, scalings_ptr, sync_ptr, as_, K, R, sxm, sal, sar, 1, shs, shm, srk, ssc,
            o_order, o_blk_start, o_blk_len, o_blk_adapter, blocks, RC, S, BK, BR, TB, KC, HAS_RANKS, HAS_SCALINGS, PACKED, True, PREC,
        )  # fmt: skip
        # One count per unit: the group's last unit counts after it stored h, and all others' counts are needed before the total is full.
        tl.debug_barrier()
        tl.atomic_add(sync_ptr + GROUPS, 1, sem="release", scope="gpu")
        u = tl.atomic_add(sync_ptr + TICKET, 1, sem="relaxed")

    # 2. this program's part of the base product.
    rm = tl.arange(0, BM)
    rows = tl.load(table_ptr + o_order + rm, mask=rm < M, other=0).to(tl.int64)
    acc = tl.zeros((BN, BM), tl.float32)
    for k in range(ps * per_split, min((ps + 1) * per_split, K), BK):
        rk = k + tl.arange(0, BK)
        w = tl.load(w_ptr + wn[:, None] * swn + rk[None, :], mask=rk[None, :] < K, other=0.0)
        x = tl.load(x_ptr + rows[:, None] * sxm + rk[None, :], mask=rk[None, :] < K, other=0.0)
        acc = tl.dot(w, x.T, acc, input_precision=PREC)
    slab = (col0 + rn)[:, None] * BM + rm[None, :]
    stored = rn[:, None] < N
    if SPLIT_K > 1:
        tl.store(part_ptr + ps * (total_n * BM) + slab, acc, mask=stored)

    # 3. the low-rank term of every SPLIT_K-th token block, to the slab that no other program writes for these columns.
    if ps < blocks:
        while tl.atomic_add(sync_ptr + GROUPS, 0, sem="acquire", scope="gpu") < units:
            pass
        rr = tl.arange(0, BR)
        rt = tl.arange(0, TB)
        for block in range(ps, blocks, SPLIT_K):
            start = tl.load(table_ptr + o_blk_start + block)
            length = tl.load(table_ptr + o_blk_len + block)
            adapter = tl.load(table_ptr + o_blk_adapter + block)
            rank = rank_of(ranks_ptr, i, adapter, R, srk, HAS_RANKS)
            mine = rt < length
            hrows = tl.load(table_ptr + o_order + start + rt, mask=mine, other=0).to(tl.int64)
            # 16 rows: tokens on the tall side, so that this is a plain mma and a cast of B needs no register operand of wgmma.
            term = tl.full((TB, BN), -0.0, tl.float32)  # what rank 0 leaves
            for r in tl.range(0, rank, BR, num_stages=1):
                ranks = (r + rr)[None, :]
                h_ptrs = h_ptr + i * shs + hrows[:, None] * shm + ranks
                h = tl.load(h_ptrs, mask=mine[:, None] & (ranks < padded(rank)), other=0.0, cache_modifier=".cg")
                b = load_b(pick(bs, i, S), adapter, ranks, wn[:, None], rank, True, pick(sbls, i, S), sbn, 1, VEC)
                term = tl.dot(h, b.to(x_ptr.dtype.element_ty).T, term, input_precision=PREC)
            tl.store(lora_ptr + (col0 + rn)[None, :] * BM + (start + rt)[:, None], term, mask=mine[:, None] & (rn[None, :] < N))

    # 4. the last program of a column tile adds the parts and stores y.
    tl.debug_barrier()
    arrivals = sync_ptr + COUNTERS + max_groups + pn
    arrived = 0
    if SPLIT_K > 1:
        arrived = tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu")
    if arrived == SPLIT_K - 1:
        if SPLIT_K > 1:
            acc = tl.zeros((BN, BM), tl.float32)
            for s in tl.range(SPLIT_K, loop_unroll_factor=2 if BM <= 64 else 1):  # both parts are on their way at once
                acc += tl.load(part_ptr + s * (total_n * BM) + slab, mask=stored, other=0.0, cache_modifier=".cg")
            tl.atomic_xchg(arrivals, 0, sem="relaxed")
        # -0.0 is what leaves every number as it is, also a base of -0.0.
        with_adapter = rm < tl.load(table_ptr + 1)
        acc += tl.load(lora_ptr + slab, mask=stored & with_adapter[None, :], other=-0.0, cache_modifier=".cg")
        if HAS_BIAS:
            acc += tl.load(pick(biases, i, S) + wn).to(tl.float32)[:, None]
        yp = y_ptr + rows[None, :] * sym + (col0 + rn)[:, None]
        tl.store(yp, acc.to(y_ptr.dtype.element_ty), mask=stored & (rm[None, :] < M))

    # 5. the last program to leave puts back what is shared by all.
    tl.debug_barrier()
    left = tl.atomic_add(sync_ptr + EXITS, 1, sem="acq_rel", scope="gpu")
    if left == tl.num_programs(0) * tl.num_programs(1) - 1:
        tl.atomic_xchg(sync_ptr + TICKET, 0, sem="relaxed")
        tl.atomic_xchg(sync_ptr + GROUPS, 0, sem="relaxed")
        tl.atomic_xchg(sync_ptr + EXITS, 0, sem="relaxed")


class Plan(NamedTuple):
    """Tile shapes of `decode_kernel`. BM follows M, the rest N and K; nothing follows the adapter mix."""

    BM: int
    BN: int
    BK: int
    SPLIT_K: int
    warps: int
    stages: int


def plan(M: int, total_n: int, K: int, itemsize: int, sms: int, cast: bool) -> Plan:
    """As many parts of K as still make one wave of programs, of at least four steps each: more only add parts of y. What is then on its way to an SM:
    docs/measured.md, "Batched op".

    Up to 32 rows two programs fit on an SM; more rows share W's tiles of 128 columns, since every column tile reads all of x anew; 256 rows and such
    a tile spill. Short steps in float32, and where rows of 16 bytes do not line up (addresses per element: longer ones spill); `cast`: pools of
    another dtype, which take registers.
    """
    BM = max(16, triton.next_power_of_2(M))
    short = itemsize == 4 or K % 8 != 0
    wide = 64 <= BM <= 128 and not short and total_n >= 16 * sms
    BN, per_sm = (128, 1) if wide else (64, 2 if BM <= 32 or (short and BM <= 128) else 1)
    BK = 32 if short else 64 if BM >= 128 or cast else 128
    stages = 2 if short else 5 if BM >= 256 else 4
    tiles = triton.cdiv(total_n, BN)
    split = max(1, min(8, per_sm * sms // tiles, triton.cdiv(K, 4 * BK)))
    return Plan(BM, BN, BK, 1 << (split.bit_length() - 1), 8 if BN == 128 or BM >= 256 else 4, stages)


def serves(M: int, block: int, batch_invariant: bool, weights, pools_a, pools_b) -> bool:
    """Few rows, small token blocks, and unit strides along K of W and A and along R of B."""
    few = M <= _batch_table.DECODE_ROWS and block == _batch_table.SMALL_BLOCK and not batch_invariant
    return few and unit_rows(*weights, *pools_a, *pools_b)


class Decode:
    """Launches y and h for one call signature. The slices have equal strides, or y is written for one alone."""

    def __init__(self, x: Tensor, y: Tensor, h: Tensor, weights, biases, pools_a, pools_b, ranks, scalings, block: int, packed: bool):
        (M, K), S, R, a = x.shape, len(weights), pools_b[0].shape[2], pools_a[0]
        at, BR = _batch_table.layout(M, a.shape[0], block), min(rank_chunk(R), 16 if x.element_size() == 4 else 64)
        Ns, (vec, sbls, (sbn, _)) = tuple(w.shape[0] for w in weights), rank_groups(pools_b)
        total_n, RC = sum(Ns), triton.cdiv(R, BR)
        p = plan(M, total_n, K, x.element_size(), programs(x.device), a.dtype != x.dtype)
        ahead = arch(x.device) >= 90 and regular(*weights) and K % 8 == 0 and not isinstance(decode_kernel, InterpretedFunction)
        groups, tiles = at.max_blocks * S * RC, sum(triton.cdiv(N, p.BN) for N in Ns)
        o_part = groups * PARTS * block * BR
        o_lora = o_part + (p.SPLIT_K * total_n * p.BM if p.SPLIT_K > 1 else 0)
        self.floats = o_lora + total_n * p.BM
        self.flags = 3 + groups + tiles
        ints = (Ns, sbls, M, K, R, x.stride(0), y.stride(0), weights[0].stride(0), a.stride(0), a.stride(1))
        ints += (h.stride(0), h.stride(1), sbn, stride0(ranks), stride0(scalings))
        ints += (at.order, at.blk_start, at.blk_len, at.blk_adapter, RC, total_n, groups, o_part, o_lora)
        constants = {
            "S": S,
            "BM": p.BM,
            "BN": p.BN,
            "BK": p.BK,
            "BR": BR,
            "VEC": vec,
            "TB": block,
            "KC": PARTS,
            "SPLIT_K": p.SPLIT_K,
            "AHEAD": AHEAD if ahead else 0,
            "PACKED": packed,
        }
        constants |= {"HAS_BIAS": biases is not None, "HAS_RANKS": ranks is not None, "HAS_SCALINGS": scalings is not None}
        self.launch = Launcher(decode_kernel, (tiles, p.SPLIT_K), (), ints, p.warps, p.stages, **constants, PREC=precision(x.dtype))

    def __call__(self, stream: int, x: Tensor, y: Tensor, h: Tensor, weights, biases, pools_a, pools_b, ranks, scalings, table: Tensor) -> None:
        scratch, sync = x.new_empty(self.floats, dtype=torch.float32), workspace(x.device, stream, self.flags)
        slices = (Pointers(weights), biases, Pointers(pools_a), Pointers(pools_b))
        self.launch(stream, (), (x, y, h, scratch, table, ranks, scalings, sync, *slices))
