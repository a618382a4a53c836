"""Many adapters, tiles that loop over the segments crossing them: base + update, update alone, and the reductions for dA and dB.

All kernels walk the rows in the sorted order of the batch table (`_batch_table`), so that a tile meets as few adapters as can be, and
read and write rows where they lie. Every length that depends on the mix is read from device memory: the grid does not depend on it.
"""

from __future__ import annotations

import triton
import triton.language as tl

# What follows from M and the table's layout: specialised, every new batch size could mean a new compile in the middle of serving.
UNSPECIALISED = [
    "M",
    "P",
    "B",
    "srk",
    "ssc",
    "max_groups",
    "o_order",
    "o_seg_of",
    "o_seg_start",
    "o_seg_adapter",
    "o_blk_start",
    "o_blk_len",
    "o_blk_adapter",
]


def jit(fn):
    """`triton.jit` with the arguments of UNSPECIALISED that `fn` has left as they come."""
    names = fn.__code__.co_varnames[: fn.__code__.co_argcount]
    return triton.jit(fn, do_not_specialize=[name for name in UNSPECIALISED if name in names])


@triton.jit
def pick(items, i, S: tl.constexpr):
    """items[i] for a run-time i, items being a tuple of S <= 3 pointers or numbers."""
    chosen = items[0]
    if S > 1:  # noqa: SIM102  S is known when compiling, i is not
        if i == 1:
            chosen = items[1]
    if S > 2:  # noqa: SIM102
        if i == 2:
            chosen = items[2]
    return chosen


@triton.jit
def slice_of(pn, Ns, S: tl.constexpr, BN: tl.constexpr):
    """(slice, tile within it, first column of y) of column tile pn, the slices being tiled one after another."""
    i = 0
    first = 0
    tile = pn
    if S > 1:
        tiles = tl.cdiv(Ns[0], BN)
        if pn >= tiles:
            i = 1
            first = Ns[0]
            tile = pn - tiles
    if S > 2:
        tiles = tl.cdiv(Ns[0], BN) + tl.cdiv(Ns[1], BN)
        if pn >= tiles:
            i = 2
            first = Ns[0] + Ns[1]
            tile = pn - tiles
    return i, tile, first


@triton.jit
def rank_of(ranks_ptr, i, adapter, R, srk, HAS_RANKS: tl.constexpr):
    """True rank, held within the pool's."""
    r = R
    if HAS_RANKS:
        r = tl.minimum(tl.maximum(tl.load(ranks_ptr + i * srk + adapter), 0), R)
    return r


@jit
def batched_linear_kernel(
    x_ptr, y_ptr, h_ptr, table_ptr, ranks_ptr, ws, biases, bs, Ns, sbls,
    M, K, R, sxm, sym, swn, swk, sbn, sbr, shs, shm, srk,
    o_order, o_seg_of, o_seg_start, o_seg_adapter,
    S: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr, BASE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RANKS: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """y[m, n] = x[m] W_i[n]^T + b_i[n] + h[i, m, :r] B_i[l, n, :r]^T, l the adapter of row m; without BASE, y += the last term.

    Shapes: x `[M, K]`, W_i `[N_i, K]`, B_i `[L, N_i, R]`, b_i `[N_i]` in x's dtype (B: or float32); h `[S, M, R]` any dtype, cast to x's;
        y `[M, sum N_i]`.
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
        b_ptr = pick(bs, i, S) + adapter.to(tl.int64) * pick(sbls, i, S)
        term = tl.zeros((BM, BN), tl.float32)
        # Not pipelined: a cast operand would be a register operand of a pipelined wgmma, which ptxas before 13.3 miscompiles (triton#9433).
        for r in tl.range(0, rank, BR, num_stages=1):
            inside = (r + rr) < rank
            h = tl.load(h_ptr + i * shs + rows[:, None] * shm + (r + rr)[None, :], mask=mine[:, None] & inside[None, :], other=0.0)
            b = tl.load(b_ptr + rn[:, None] * sbn + (r + rr)[None, :] * sbr, mask=(rn[:, None] < N) & inside[None, :], other=0.0)
            term = tl.dot(h.to(x_ptr.dtype.element_ty), b.to(x_ptr.dtype.element_ty).T, term, input_precision=PREC)
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


@jit
def segment_reduce_kernel(
    u_ptr, v_ptr, out_ptr, table_ptr, ranks_ptr, i, C, R, sum_, svm, sol, sor, soc, srk,
    o_order, o_seg_start, o_seg_adapter,
    BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, HAS_RANKS: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """out[l, r, c] = sum over the rows m of adapter l of u[m, r] v[m, c]: dA (u = g, v = x) and dB (u = h, v = dy).

    Shapes: u `[M, R]`, v `[M, C]`; out `[L, R, C]` by strides (sol, sor, soc), zero where no program writes.
    Grid: (columns / BC, R / BR, max segments); programs past the last segment or the true rank leave at once.
    Memory: every row of a segment once per rank block; out written once.
    Numerics: float32, rows in ascending order in one accumulator; no atomics, same bits every run.
    """
    seg = tl.program_id(2)
    if seg >= tl.load(table_ptr + 2):
        return
    start = tl.load(table_ptr + o_seg_start + seg)
    end = tl.load(table_ptr + o_seg_start + seg + 1)
    adapter = tl.load(table_ptr + o_seg_adapter + seg)
    rank = rank_of(ranks_ptr, i, adapter, R, srk, HAS_RANKS)
    if tl.program_id(1) * BR >= rank:
        return
    rr = tl.program_id(1) * BR + tl.arange(0, BR)
    rc = tl.program_id(0) * BC + tl.arange(0, BC)
    acc = tl.zeros((BR, BC), tl.float32)
    for p in range(start, end, BM):
        rp = p + tl.arange(0, BM)
        live = rp < end
        rows = tl.load(table_ptr + o_order + rp, mask=live, other=0).to(tl.int64)
        u = tl.load(u_ptr + rows[:, None] * sum_ + rr[None, :], mask=live[:, None] & (rr[None, :] < rank), other=0.0)
        v = tl.load(v_ptr + rows[:, None] * svm + rc[None, :], mask=live[:, None] & (rc[None, :] < C), other=0.0)
        acc = tl.dot(u.T, v, acc, input_precision=PREC)
    out = out_ptr + adapter.to(tl.int64) * sol + rr[:, None] * sor + rc[None, :] * soc
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(rr[:, None] < rank) & (rc[None, :] < C))
