"""Column-0 form: base GEMM, shrink and rank-R update in one launch, for R <= 64 and without dropout."""

from __future__ import annotations

from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from ..tuning.plan import Plan, block_rank
from ._jit import tile_of
from ._launch import Launcher, PerStream, precision, programs, workspace
from .update import rank_product, store_halves, w_tile


@triton.jit(do_not_specialize=["M"])
def column0_kernel(
    x_desc,
    w_desc,
    a_desc,
    y_desc,
    bias_ptr,
    h_ptr,
    b_ptr,
    sync_ptr,
    scale,
    M,
    N,
    K,
    R,
    sbr,
    sbn,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    GROUP_M: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y = x W + bias + h B with h = scale * x A, h [M, R] computed on the way and written once.

    The tiles of output column 0 also accumulate h from the x tile they hold in shared memory; the others take h at the end of their K loop.
    Forward: W = weight^T, A = lora_a^T, B = lora_b^T. dx: x = dy, W = weight, A = lora_b, B = lora_a; then h is g.
    Shapes: x [M, K]; W and A as [N, K] and [R, K] when TRANSPOSED, else [K, N] and [K, R], all of one 16-bit dtype with a row pitch of a
        multiple of 16 bytes; B [R, N] any strides, x's dtype or float32; h [M, R], y [M, N] contiguous; sync int32 [1 + 2 ceil(M / BM)].
    Grid: (min(number of SMs, tiles),). Items are claimed from a ticket: 0 ... num_m - 1 are the tiles (m, 0), the rest in grouped order.
    Memory: as the GEMM alone, plus A once per row block and h, B per tile (from L2): no second read of x.
    Numerics: fp32 accumulators, h rounded once before the rank product (as eager), y rounded once; which program takes a tile does not
        change its bits.
    Source: this project (design.md); stream-K (arXiv:2301.03598) for partial results handed over by flags.

    Synchronisation, sync = [ticket | ready[num_m] | taken[num_m]], all zero before and after every launch:
      * No deadlock. A program waits for ready[m] only while it holds an item >= num_m. Tickets are handed out in order, so item m has
        then been claimed by a program that is running, and an item < num_m never waits. No co-residency of programs is assumed.
      * Publish. h is written by plain stores, the barrier orders every thread's stores before the one thread that does the release
        exchange (cumulativity makes them visible at gpu scope). Not by a TMA store: it is only waited for as a read of its source.
      * Take. The acquire of one thread, then a barrier: every thread's later loads see h. The loads are `.cg`: an L1 line of h cannot
        be stale, as nobody loads h before ready, but L1 is no use here. TMA (async proxy) would need a proxy fence and is not used.
      * Reset. ready[m] is polled by exactly num_n - 1 items. Each counts itself in taken[m] after its wait; the last one therefore knows
        that nobody polls ready[m] any more and zeroes both. With num_n = 1 nobody waits, nothing is published.
      * Ticket. Every program draws until it gets a number >= total, so exactly total + grid numbers are drawn; whoever draws the last
        one knows that nobody draws again and zeroes the ticket.
      * Replay. The end of the kernel orders the zeroes before the next launch on the stream. Concurrent launches need their own sync
        buffer; `_launch.workspace` gives one per stream, and one per captured call of a CUDA graph.
    """
    num_m = tl.cdiv(M, BM)
    num_n = tl.cdiv(N, BN)
    total = num_m * num_n
    ready_ptr = sync_ptr + 1
    taken_ptr = ready_ptr + num_m
    rr = tl.arange(0, BR)
    item = tl.atomic_add(sync_ptr, 1, sem="relaxed", scope="gpu")
    while item < total:
        pm = item
        pn = 0
        if item >= num_m:
            pm, pn = tile_of(item - num_m, num_m, num_n - 1, GROUP_M)
            pn += 1
        om = pm * BM
        on = pn * BN
        rm = om + tl.arange(0, BM)
        rn = on + tl.arange(0, BN)
        acc = tl.zeros((BM, BN), tl.float32)
        if item < num_m:
            h_acc = tl.zeros((BM, BR), tl.float32)
            for ok in range(0, K, BK):
                x = x_desc.load([om, ok])
                acc = tl.dot(x, w_tile(w_desc, ok, on, TRANSPOSED), acc, input_precision=PRECISION)
                h_acc = tl.dot(x, w_tile(a_desc, ok, 0, TRANSPOSED), h_acc, input_precision=PRECISION)
            h_ptrs = h_ptr + rm.to(tl.int64)[:, None] * R + rr[None, :]
            tl.store(h_ptrs, (h_acc * scale).to(h_ptr.dtype.element_ty), mask=(rm[:, None] < M) & (rr[None, :] < R))
            tl.debug_barrier()  # all threads' stores of h before the release, and before this block's own loads of it below
            if num_n > 1:
                tl.atomic_xchg(ready_ptr + pm, 1, sem="release", scope="gpu")
        else:
            for ok in range(0, K, BK):
                acc = tl.dot(x_desc.load([om, ok]), w_tile(w_desc, ok, on, TRANSPOSED), acc, input_precision=PRECISION)
            while tl.atomic_add(ready_ptr + pm, 0, sem="acquire", scope="gpu") == 0:
                pass
            tl.debug_barrier()  # no thread loads h before the acquire
            if tl.atomic_add(taken_ptr + pm, 1, sem="relaxed", scope="gpu") == num_n - 2:
                tl.atomic_xchg(taken_ptr + pm, 0, sem="relaxed", scope="gpu")
                tl.atomic_xchg(ready_ptr + pm, 0, sem="relaxed", scope="gpu")
        acc = rank_product(acc, h_ptr, b_ptr, rm, rn, M, N, R, sbr, sbn, BR, True, PRECISION)
        if HAS_BIAS:
            acc += tl.load(bias_ptr + rn, mask=rn < N, other=0.0).to(tl.float32)[None, :]
        store_halves(y_desc, acc, om, on, BM, BN)
        item = tl.atomic_add(sync_ptr, 1, sem="relaxed", scope="gpu")
    if item == total + tl.num_programs(0) - 1:
        tl.atomic_xchg(sync_ptr, 0, sem="relaxed", scope="gpu")


class Column0:
    """Launches y = x W + bias + h B, h = scale * x A, for one call signature. W is given as [K, N], B as [R, N], R <= 64."""

    def __init__(self, plan: Plan, x: Tensor, w: Tensor, bias: Tensor | None, b: Tensor):
        (M, K), N, R = x.shape, w.shape[1], b.shape[0]
        BM, BN, BK, BR = plan.block_m, plan.block_n, plan.block_k, block_rank(R, 64)
        transposed = w.stride(0) == 1
        num_m = -(-M // BM)
        self.sync = PerStream(x.device, partial(workspace, x.device, ints=1 + 2 * num_m))
        blocks = ((BM, BK), (BN, BK) if transposed else (BK, BN), (BR, BK) if transposed else (BK, BR), (BM, BN // 2))
        constants = {"BM": BM, "BN": BN, "BK": BK, "BR": BR, "GROUP_M": plan.group_m, "TRANSPOSED": transposed, "HAS_BIAS": bias is not None}
        grid = (min(programs(x.device), num_m * -(-N // BN)),)
        ints = (M, N, K, R, *b.stride())
        self.launch = Launcher(column0_kernel, grid, blocks, ints, plan.warps, plan.stages, **constants, PRECISION=precision(x.dtype))

    def __call__(self, stream: int, x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, y: Tensor, h: Tensor, scale: float) -> None:
        """Here W and A are weight and adapter as stored; A is in x's dtype."""
        # __call__ by its name: through the type's slot a call takes 0.1 us more (Zen 3)
        self.launch.__call__(stream, (x, w, a, y), (bias, h, b, self.sync.on(stream)), (scale,))
