"""Base GEMM plus rank-R update in one pass over the output, for y and for dx: by pointers (any strides) and by TMA (sm_90 and up)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..reference import keep_scale
from ..tuning.plan import POINTER_TILE, Plan, block_rank, whole_rank
from ._jit import load_keep, tile_of
from ._launch import Launcher, precision, programs


@triton.jit
def rank_step(acc, h_rows, b_columns, rr, rm, rn, M, N, R, sbr, PRECISION: tl.constexpr):
    """acc + h B over the ranks rr; `.cg`, as h may come from another program of the same launch (column0)."""
    h = tl.load(h_rows + rr[None, :], mask=(rm[:, None] < M) & (rr[None, :] < R), other=0.0, cache_modifier=".cg")
    b = tl.load(b_columns + rr.to(tl.int64)[:, None] * sbr, mask=(rr[:, None] < R) & (rn[None, :] < N), other=0.0)
    return tl.dot(h, b.to(h.dtype), acc, input_precision=PRECISION)


@triton.jit
def rank_product(acc, h_ptr, b_ptr, rm, rn, M, N, R, sbr, sbn, BR: tl.constexpr, ONE_STEP: tl.constexpr, PRECISION: tl.constexpr):
    """acc + h B for rows rm of h `[M, R]` (contiguous) and columns rn of B `[R, N]` (any strides, cast to h's dtype).

    R is padded here, by masked loads. The loop for R > BR is a run-time one: unrolled, ptxas hoists its loads and spills at R = 128.
    """
    h_rows = h_ptr + rm.to(tl.int64)[:, None] * R
    b_columns = b_ptr + rn.to(tl.int64)[None, :] * sbn
    rr = tl.arange(0, BR)
    if ONE_STEP:
        acc = rank_step(acc, h_rows, b_columns, rr, rm, rn, M, N, R, sbr, PRECISION)
    else:
        for first in tl.range(0, R, BR, num_stages=1):
            acc = rank_step(acc, h_rows, b_columns, first + rr, rm, rn, M, N, R, sbr, PRECISION)
    return acc


@triton.jit(do_not_specialize=["M"])
def update_pointer_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    h_ptr,
    b_ptr,
    mask_ptr,
    y_ptr,
    keep_scale,
    M,
    N,
    K,
    R,
    sxm,
    sxk,
    swk,
    swn,
    sbr,
    sbn,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    ONE_STEP: tl.constexpr,
    GROUP_M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MASKED: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y = x W + bias + drop'(h B).

    Forward: W = weight^T, B = lora_b^T. dx: x = dy, W = weight, h = g, B = lora_a, and N and K trade places.
    Shapes: x [M, K], W [K, N], B [R, N] of any strides; h [M, R], y [M, N] contiguous; bias [N]; mask int32 [M, ceil(N / 32)].
    Grid: (ceil(M / BM) * ceil(N / BN),), grouped order.
    Memory: x and W as any GEMM, h and B once per tile (from L2), y written once.
    Numerics: one fp32 accumulator for both products, y rounded once; same bits every run.
        The rank product comes before the K loop: after it, ptxas serialises the loop's wgmma (C7515); and drop' may only touch it.
    Source: accumulator initialised with the rank product, LoRAFusion (arXiv:2510.00206), section 4.
    """
    pm, pn = tile_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP_M)
    rm = pm * BM + tl.arange(0, BM)
    rn = pn * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    acc = rank_product(tl.zeros((BM, BN), tl.float32), h_ptr, b_ptr, rm, rn, M, N, R, sbr, sbn, BR, ONE_STEP, PRECISION)
    if MASKED:
        acc = tl.where(load_keep(mask_ptr, rm, M, pn * BN, tl.cdiv(N, 32), BM, BN), acc * keep_scale, 0.0)
    # Rows past M read row 0 again: no row mask in the main loop, and the store drops what they give. Columns keep their order and a mask:
    # for dx they are the contiguous axis, and a column list that Triton cannot see to be contiguous is not copied asynchronously.
    x_ptrs = x_ptr + tl.where(rm < M, rm, 0).to(tl.int64)[:, None] * sxm + rk.to(tl.int64)[None, :] * sxk
    w_ptrs = w_ptr + rn.to(tl.int64)[None, :] * swn + rk.to(tl.int64)[:, None] * swk
    inside = rn[None, :] < N
    for k in range(0, K, BK):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs, mask=inside, other=0.0)
        else:
            x = tl.load(x_ptrs, mask=k + rk[None, :] < K, other=0.0)
            w = tl.load(w_ptrs, mask=inside & (k + rk[:, None] < K), other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        x_ptrs += BK * sxk
        w_ptrs += BK * swk
    if HAS_BIAS:
        acc += tl.load(bias_ptr + rn, mask=rn < N, other=0.0).to(tl.float32)[None, :]
    out = y_ptr + rm.to(tl.int64)[:, None] * N + rn[None, :]
    tl.store(out, acc.to(y_ptr.dtype.element_ty), mask=(rm[:, None] < M) & (rn[None, :] < N))


@triton.jit
def w_tile(w_desc, ok, on, TRANSPOSED: tl.constexpr):
    """The `[BK, BN]` tile of W from a descriptor over `[N, K]` (TRANSPOSED: K-major operand) or over `[K, N]` (MN-major operand)."""
    if TRANSPOSED:
        return w_desc.load([on, ok]).T
    else:
        return w_desc.load([ok, on])


@triton.jit
def store_halves(y_desc, acc, om, on, BM: tl.constexpr, BN: tl.constexpr):
    """Store the tile through half-width staging, which leaves shared memory for one more pipeline stage."""
    left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
    y_desc.store([om, on], left.to(y_desc.dtype))
    y_desc.store([om, on + BN // 2], right.to(y_desc.dtype))


@triton.jit(do_not_specialize=["M"])
def update_tma_kernel(
    x_desc,
    w_desc,
    y_desc,
    bias_ptr,
    h_ptr,
    b_ptr,
    mask_ptr,
    keep_scale,
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
    ONE_STEP: tl.constexpr,
    GROUP_M: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y = x W + bias + drop'(h B), persistent, x, W and y through TMA descriptors.

    Shapes: x [M, K] and W, [N, K] when TRANSPOSED (forward) or [K, N] (dx), row pitch a multiple of 16 bytes; y [M, N] contiguous;
        h, B, bias, mask and the two uses as in `update_pointer_kernel`: rank-sized operands stay on pointers, so any R and a float32 B do.
    Grid: (min(number of SMs, tiles),); a program walks the tiles program_id, + grid, ..., in grouped order.
    Memory: as any GEMM, h and B once per tile (from L2), y written once; edges are TMA zero fill.
    Numerics: one fp32 accumulator for both products, y rounded once; the order of summation depends on nothing but the block sizes.
    Source: persistent matmul of the Triton tutorials (09-persistent-matmul); the rank product first as in LoRAFusion (arXiv:2510.00206).
    """
    num_m = tl.cdiv(M, BM)
    num_n = tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        pm, pn = tile_of(tile, num_m, num_n, GROUP_M)
        om = pm * BM
        on = pn * BN
        rm = om + tl.arange(0, BM)
        rn = on + tl.arange(0, BN)
        acc = rank_product(tl.zeros((BM, BN), tl.float32), h_ptr, b_ptr, rm, rn, M, N, R, sbr, sbn, BR, ONE_STEP, PRECISION)
        if MASKED:
            acc = tl.where(load_keep(mask_ptr, rm, M, on, tl.cdiv(N, 32), BM, BN), acc * keep_scale, 0.0)
        for ok in range(0, K, BK):
            acc = tl.dot(x_desc.load([om, ok]), w_tile(w_desc, ok, on, TRANSPOSED), acc, input_precision=PRECISION)
        if HAS_BIAS:
            acc += tl.load(bias_ptr + rn, mask=rn < N, other=0.0).to(tl.float32)[None, :]
        store_halves(y_desc, acc, om, on, BM, BN)


class Update:
    """Launches y = x W + bias + drop'(h B) for one call signature. W is given as [K, N] (weight.t() or weight), B as [R, N]."""

    def __init__(self, plan: Plan, x: Tensor, w: Tensor, bias: Tensor | None, b: Tensor, dropout_p: float = 0.0):
        (M, K), N, R = x.shape, w.shape[1], b.shape[0]
        BM, BN, BK = plan.block_m, plan.block_n, plan.block_k
        BR = block_rank(R, 64 if plan.form == "tma" else 32)
        if R > BR and (not whole_rank(R) or (plan.form == "pointer" and POINTER_TILE[0] > BM)):
            BR = 16  # in a loop, masked blocks and those of small tiles: 32 ranks spill 16 to 88 bytes by pointers, 64 ranks 2336 by TMA (Triton 3.6)
        self.tma = plan.form != "pointer"
        self.keep_scale = keep_scale(dropout_p)
        tiles = -(-M // BM) * -(-N // BN)
        same = {"BM": BM, "BN": BN, "BK": BK, "BR": BR, "ONE_STEP": R <= BR, "GROUP_M": plan.group_m, "HAS_BIAS": bias is not None}
        same |= {"MASKED": dropout_p > 0, "PRECISION": precision(x.dtype)}
        if self.tma:
            self.transposed = w.stride(0) == 1
            blocks = ((BM, BK), (BN, BK) if self.transposed else (BK, BN), (BM, BN // 2))
            ints = (M, N, K, R, *b.stride())
            grid = (min(programs(x.device), tiles),)
            self.launch = Launcher(update_tma_kernel, grid, blocks, ints, plan.warps, plan.stages, TRANSPOSED=self.transposed, **same)
        else:
            ints = (M, N, K, R, *x.stride(), *w.stride(), *b.stride())
            self.launch = Launcher(update_pointer_kernel, (tiles,), (), ints, plan.warps, plan.stages, EVEN_K=K % BK == 0, **same)

    def __call__(self, stream: int, x: Tensor, w: Tensor, bias: Tensor | None, h: Tensor, b: Tensor, mask: Tensor | None, y: Tensor) -> None:
        """Here W is weight as stored, [N, K] or [K, N]: its address and the descriptor's shape are all that is read."""
        if self.tma:
            self.launch(stream, (x, w, y), (bias, h, b, mask), (self.keep_scale,))
        else:
            self.launch(stream, (), (x, w, bias, h, b, mask, y), (self.keep_scale,))
