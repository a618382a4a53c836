"""Many adapters, many rows: tiles of rows as they lie, x, W and y through TMA descriptors, one rank product per adapter met in a tile.

Beside the gather form (`batched_prefill`) the base GEMM runs as in `update_tma_kernel`; the price is a rank product for every adapter that a
tile of 128 rows meets, wherever its rows lie. No table is needed for that: a tile finds its adapters, ascending, among its own ids.

Where the tiles leave some programs one tile less than the others, those compute h (OWN_H) while the others are at their first tile, so that
h costs no launch and no time of its own. sync = [ticket | units | done | exits], all zero before and after every launch:
  * No deadlock. Tickets below `helpers` take units of h until all are claimed, and wait for nothing before. A program that waits for h has a
    higher ticket, or was a helper: either way every helper's ticket is held by a program that runs or has run, and they leave no unit
    unclaimed. No co-residency of programs is assumed.
  * Publish. h is written by plain stores; the barrier orders every thread's stores before the release of the one thread that counts the unit.
  * Take. The acquire of one thread, then a barrier: every thread's later loads see h. The loads are `.cg`; once through, no later tile waits.
  * Reset. A program counts itself among the exits after its last use of the others; the last one zeroes all four.
"""

from __future__ import annotations

import itertools

import triton
import triton.language as tl
from torch import Tensor

from .. import _batch_table
from ..tuning.plan import block_rank, tma_arch
from ._jit import load_keep, tile_of
from ._launch import Launcher, Pointers, programs, regular, workspace
from .batched_common import MAX_SLICES, drop_of, jit, load_b, padded, pick, precision, rank_groups, rank_of, stride0
from .batched_shrink import h_block, h_steps
from .update import w_tile

BM, BK = 128, 64
# Rows of one adapter mostly lie together: then the tiles meet 1 + (L - 1) BM / M adapters on average, if all L of the pool are there, in the form
# of sorted rows just as in this one. At 8 their products take a fifth as long as the base at K = 4096 (benchmarks/offline_report.py), less than the
# gather form is likely to lose. The mix may decide nothing here, and scattered rows meet up to min(L, 128): up to 16 adapters that is borne with;
# beyond, only batches of so many rows are trusted to be prompts, of many tokens each.
MOST_ADAPTERS, MOST_MET, PROMPT_ROWS = 16, 8, 2048
TICKET, UNITS, DONE, EXITS = (tl.constexpr(v) for v in range(4))
# Triton makes dot(h, b, acc) of acc + dot(h, b). What 3.8 makes of that, ptxas serialises with every other wgmma of the kernel (C7520), so the sum
# is kept apart there; in the other versions that costs registers, which spill (docs/measured.md, Other versions of Triton).
APART = tl.constexpr(triton.__version__.startswith("3.8."))


@triton.jit
def finish(
    acc, y_desc, om, on, h_ptr, ids_ptr, ranks_ptr, mask_ptr, p_ptr, bias_ptr, b_ptr, i, M, N, L, R, sbl, sbn, sbr, shm, srk,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, VEC: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RANKS: tl.constexpr,
    MASKED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Add low-rank terms and bias to a tile of the base product and store it."""
    rm = om + tl.arange(0, BM)
    rn = on + tl.arange(0, BN)
    rr = tl.arange(0, BR)
    slot = tl.load(ids_ptr + rm, mask=rm < M, other=-1)
    slot = tl.where((slot >= 0) & (slot < L), slot, L)
    h_rows = h_ptr + rm.to(tl.int64)[:, None] * shm
    adapter = tl.min(slot, 0)
    while adapter < L:
        rank = rank_of(ranks_ptr, i, adapter, R, srk, HAS_RANKS)
        mine = (slot == adapter)[:, None]
        for r in tl.range(0, rank, BR, num_stages=1):
            inside = (rm < M)[:, None] & ((r + rr)[None, :] < padded(rank))
            h = tl.load(h_rows + (r + rr)[None, :], mask=inside, other=0.0, cache_modifier=".cg")
            columns = rn[None, :]
            b = load_b(b_ptr, adapter, (r + rr)[:, None], columns, rank, columns < N, sbl, sbn, sbr, VEC)
            term = tl.dot(h, b.to(h.dtype), input_precision=PREC)
            if MASKED:
                _, keep_scale = drop_of(tl.load(p_ptr + adapter))
                term = tl.where(load_keep(mask_ptr, rm, M, on, tl.cdiv(N, 32), BM, BN), term * keep_scale, 0.0)
            if APART:
                acc += tl.where(mine, term, -0.0)  # x + -0.0 is x, also for x = -0.0
            else:
                acc = tl.where(mine, acc + term, acc)
        adapter = tl.min(tl.where(slot > adapter, slot, L), 0)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + rn, mask=rn < N, other=0.0).to(tl.float32)[None, :]
    y_desc.store([om, on], acc.to(y_desc.dtype))


@jit
def segmented_tma_kernel(
    x_desc, w0_desc, w1_desc, w2_desc, y0_desc, y1_desc, y2_desc, h_ptr, ids_ptr, ranks_ptr, mask_ptr, p_ptr, biases, bs,
    x_ptr, table_ptr, scalings_ptr, sync_ptr, as_,
    Ns, ends, sbls, M, K, L, R, sbn, sbr, shs, shm, srk, sxm, sal, sar, sak, ssc, o_order, o_blk_start, o_blk_len, o_blk_adapter, RC, helpers,
    S: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, VEC: tl.constexpr, GROUP_M: tl.constexpr,
    TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RANKS: tl.constexpr, MASKED: tl.constexpr, PREC: tl.constexpr,
    OWN_H: tl.constexpr, TB: tl.constexpr, HK: tl.constexpr, HR: tl.constexpr, HAS_SCALINGS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """y[m, n] = x[m] W_i[n]^T + b_i[n] + drop'(h[i, m, :r] B_i[l, n, :r]^T), l the adapter of row m; persistent.

    Shapes: x `[M, K]`, 16-bit; W_i `[N_i, K]` when TRANSPOSED, else (dx) `[K, N_i]`; y_i `[M, N_i]`, views of one y; all with a row pitch of
        a multiple of 16 bytes; ids int32 `[M]`; h `[S, M, H]` in x's dtype, zero as `padded` says; B_i `[L, N_i, R]` any strides, x's
        dtype or float32; b_i `[N_i]`; MASKED: mask int32 `[M, ceil(N / 32)]`, p float32 `[L]`.
        A descriptor per slice: slices may lie anywhere, and a tile at the edge of one neither reads nor writes the next.
    Grid: (min(number of SMs, tiles),), OWN_H (number of SMs,); grouped order. Independent of the adapter mix.
    Memory: as a GEMM; per tile and adapter met in it BM r of h and BN r of B, from L2; OWN_H: x once more, beside the first tiles.
    Numerics: float32; ascending k, then a rank product per BR ranks, then the bias; the tile is finished in two halves, for registers. A
        row takes a product only from its own adapter (`where`, not a product with zero: another's inf or NaN stays there), so its bits depend
        on itself, (BK, BR) and the tile shape alone. The product has registers of its own: those of the K loop, ptxas would serialise it.
    Source: persistent matmul of the Triton tutorials (09-persistent-matmul); SGMV, arXiv:2310.18547.
    """
    num_m = tl.cdiv(M, BM)
    num_n = ends[S - 1]
    half: tl.constexpr = BN // 2
    first = tl.program_id(0)
    units = 0
    done = 0
    if OWN_H:
        ticket = tl.atomic_add(sync_ptr + TICKET, 1, sem="relaxed")
        first = tl.num_programs(0) - 1 - ticket
        units = tl.load(table_ptr) * RC
        if ticket < helpers:
            u = tl.atomic_add(sync_ptr + UNITS, 1, sem="relaxed")
            while u < units:
                h_block(
                    u, x_ptr, h_ptr, table_ptr, ranks_ptr, scalings_ptr, as_, K, R, sxm, sal, sar, sak, shs, shm, srk, ssc,
                    o_order, o_blk_start, o_blk_len, o_blk_adapter, units // RC,
                    S, HK, HR, TB, HAS_RANKS, HAS_SCALINGS, PACKED, True, PREC, 5 if S == 1 else 7,
                )  # fmt: skip
                tl.debug_barrier()  # all threads' stores of h before the release
                tl.atomic_add(sync_ptr + DONE, 1, sem="release", scope="gpu")
                u = tl.atomic_add(sync_ptr + UNITS, 1, sem="relaxed")
    for item in tl.range(first, num_m * num_n, tl.num_programs(0)):
        pm, pn = tile_of(item, num_m, num_n, GROUP_M)
        i = 0
        tile = pn
        if S > 1:  # noqa: SIM102  S is known when compiling, pn is not
            if pn >= ends[0]:
                i = 1
                tile = pn - ends[0]
        if S > 2:  # noqa: SIM102
            if pn >= ends[1]:
                i = 2
                tile = pn - ends[1]
        w_desc = pick((w0_desc, w1_desc, w2_desc), i, S)
        om = pm * BM
        on = tile * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for ok in range(0, K, BK):
            acc = tl.dot(x_desc.load([om, ok]), w_tile(w_desc, ok, on, TRANSPOSED), acc, input_precision=PREC)
        if OWN_H:
            while done < units:  # once it is through, no later tile waits
                done = tl.atomic_add(sync_ptr + DONE, 0, sem="acquire", scope="gpu")
            tl.debug_barrier()  # no thread loads h before the acquire
        y_desc = pick((y0_desc, y1_desc, y2_desc), i, S)
        N = pick(Ns, i, S)
        sbl = pick(sbls, i, S)
        b_ptr = pick(bs, i, S)
        h = h_ptr + i * shs
        bias_ptr = b_ptr
        if HAS_BIAS:
            bias_ptr = pick(biases, i, S)
        left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, half)), (0, 2, 1)))
        finish(
            left, y_desc, om, on, h, ids_ptr, ranks_ptr, mask_ptr, p_ptr, bias_ptr, b_ptr, i, M, N, L, R, sbl, sbn, sbr, shm, srk,
            BM, half, BR, VEC, HAS_BIAS, HAS_RANKS, MASKED, PREC,
        )  # fmt: skip
        finish(
            right, y_desc, om, on + half, h, ids_ptr, ranks_ptr, mask_ptr, p_ptr, bias_ptr, b_ptr, i, M, N, L, R, sbl, sbn, sbr, shm, srk,
            BM, half, BR, VEC, HAS_BIAS, HAS_RANKS, MASKED, PREC,
        )  # fmt: skip
    if OWN_H:
        tl.debug_barrier()
        if tl.atomic_add(sync_ptr + EXITS, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
            for word in tl.static_range(4):
                tl.atomic_xchg(sync_ptr + word, 0, sem="relaxed")


def _columns(M: int, Ns: list[int], sms: int, masked: bool) -> int:
    """BN: 256 where that still gives every SM a tile, and no mask takes registers."""
    return 256 if not masked and triton.cdiv(M, BM) * sum(triton.cdiv(N, 256) for N in Ns) >= sms else 128


def _described(weights: list[Tensor]) -> list[Tensor]:
    """The slices of W with contiguous rows: `[N, K]`, or `[K, N]` of those given as its transposed."""
    return [w if w.stride(1) == 1 else w.t() for w in weights]


def _few(M: int, L: int) -> bool:
    """Whether tiles can be expected to meet few adapters, from what is known without the mix."""
    return L <= MOST_ADAPTERS or (M >= PROMPT_ROWS and (L - 1) * BM <= (MOST_MET - 1) * M)


def serves(x: Tensor, y: Tensor, weights: list[Tensor], pools_b: list[Tensor], arch: int, batch_invariant: bool) -> bool:
    """Static facts only: Hopper and up, 16-bit rows that TMA can describe, not too many adapters for the rows.

    `batch_invariant` wants the one plan that every M can have.
    """
    described = [x, *_described(weights), *y.split([w.shape[0] for w in weights], 1)]
    return tma_arch(arch) and not batch_invariant and _few(x.shape[0], pools_b[0].shape[0]) and regular(*described)


def _helpers(x: Tensor, pools_a: list[Tensor] | None, R: int, BN: int, tiles: int, block: int, single: bool) -> int:
    """Programs that compute h: those with one tile less than the others; 0 where h has a launch of its own.

    One per BN rows reads x in the time of a tile at 47 GB/s (132 programs at 790 TFLOP/s). Half as long again is allowed for, with the most
    blocks that a mix can have: then the others wait as long as a launch would take. Casts of A spill, and three slices of 64 ranks or of those
    that are loaded one at a time (`single`).
    """
    if pools_a is None or pools_a[0].dtype != x.dtype or (len(pools_a) == MAX_SLICES and (R > 32 or single)) or block != _batch_table.LARGE_BLOCK:
        return 0
    spare, blocks = -tiles % programs(x.device), _batch_table.layout(x.shape[0], pools_a[0].shape[0], block).max_blocks
    return spare if 3 * spare * BN >= 2 * blocks * block else 0


class TmaTiles:
    """Launches y and takes arguments as `batched_prefill.Tiles`, where `serves` says so. Given A, it also computes h, where `own_h` is true."""

    def __init__(self, x, y, h, weights, biases, pools_b, ranks, block: int, masked: bool = False, pools_a=None, scalings=None, packed: bool = False):
        (M, K), S, R, b, sms = x.shape, len(pools_b), pools_b[0].shape[2], pools_b[0], programs(x.device)
        self.widths, self.absent, transposed = [w.shape[0] for w in weights], (None,) * (MAX_SLICES - S), weights[0].stride(1) == 1
        vec, sbls, sbnr = rank_groups(pools_b)
        single = vec < 2 and sbnr[1] == 1
        BN = _columns(M, self.widths, sms, masked)
        ends = tuple(itertools.accumulate(triton.cdiv(N, BN) for N in self.widths))
        tiles = triton.cdiv(M, BM) * ends[-1]
        helpers = _helpers(x, pools_a, R, BN, tiles, block, single)
        self.own_h = helpers > 0
        w_block, y_block = (BN, BK) if transposed else (BK, BN), (BM, BN // 2)
        blocks = ((BM, BK), *(w_block,) * S, *self.absent, *(y_block,) * S, *self.absent)
        ints = (tuple(self.widths), ends, sbls, M, K, b.shape[0], R, *sbnr)
        ints += (h.stride(0), h.stride(1), stride0(ranks))
        cast = b.dtype != x.dtype
        most = 64 if BN == 256 and not cast and not single else 16 if cast and masked else 32  # more spill: casts, single loads, masks
        BR = block_rank(R, most)
        constants = {"S": S, "BM": BM, "BN": BN, "BK": BK, "BR": BR, "VEC": vec, "GROUP_M": 8, "TRANSPOSED": transposed}
        constants |= {"HAS_BIAS": biases is not None, "HAS_RANKS": ranks is not None, "MASKED": masked, "PREC": precision(x.dtype)}
        if self.own_h:
            at, (HK, HR) = _batch_table.layout(M, b.shape[0], block), h_steps(x, pools_a, R, 1)
            ints += (x.stride(0), *pools_a[0].stride(), stride0(scalings), at.order, at.blk_start, at.blk_len, at.blk_adapter)
            ints += (triton.cdiv(R, HR), helpers)
        else:
            ints, HK, HR, block = (*ints, *(0,) * 11), 0, 0, 0
        constants |= {"OWN_H": self.own_h, "TB": block, "HK": HK, "HR": HR, "HAS_SCALINGS": scalings is not None, "PACKED": packed}
        grid = (sms if self.own_h else min(sms, tiles),)
        self.launch = Launcher(segmented_tma_kernel, grid, blocks, ints, 8, 3 if BN == 256 else 4, **constants)

    def __call__(self, stream, x, y, h, weights, biases, pools_b, ranks, ids, table, mask=None, p=None, pools_a=None, scalings=None) -> None:
        ys = (y,) if len(self.widths) == 1 else y.split(self.widths, 1)
        described = (x, *_described(weights), *self.absent, *ys, *self.absent)
        own = (x, table, scalings, workspace(x.device, stream, 4), Pointers(pools_a)) if self.own_h else (None,) * 5
        self.launch(stream, described, (h, ids, ranks, mask, p, biases, Pointers(pools_b), *own))
