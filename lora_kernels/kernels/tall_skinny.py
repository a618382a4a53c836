"""Tall-skinny reductions over M for dA and dB: split over M, fp32 partials, fixed-order sum."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import keep_scale
from ..tuning.plan import block_rank, whole_rank
from ._jit import load_keep
from ._launch import Launcher, precision, programs, regular


@triton.jit(do_not_specialize=["M", "rows_per_split"])
def tall_skinny_kernel(
    x_ptr,
    g_ptr,
    mask_ptr,
    part_ptr,
    M,
    P,
    R,
    rows_per_split,
    sxm,
    sxp,
    spp,
    spr,
    BM: tl.constexpr,
    BP: tl.constexpr,
    BR: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """part[s] = (keep * x)^T g over the rows of split s.

    dA^T = drop(x)^T g: x [M, K]. dB = dy^T h: x = dy [M, N], g = h.
    Shapes: x [M, P] any strides, g [M, R] contiguous, mask int32 [M, ceil(P / 32)], part fp32 [S, P * R], element (p, r) at p spp + r spr.
    Grid: (ceil(P / BP), S, ceil(R / BR)).
    Memory: x once per rank chunk, g once per column block (from L2), S P R fp32 partials.
    Numerics: the tile is g^T x, with the masked x as B operand (see `shrink_kernel`). fp32 sums in a fixed order; no atomics, same bits every run.
    Source: split-K GEMM with separate reduction; 8 splits of R = 16 write 2 MB where x is 67 MB.
    """
    split = tl.program_id(1)
    rp = tl.program_id(0) * BP + tl.arange(0, BP)
    rr = tl.program_id(2) * BR + tl.arange(0, BR)
    words = tl.cdiv(P, 32)
    acc = tl.zeros((BR, BP), tl.float32)
    for m in range(split * rows_per_split, min((split + 1) * rows_per_split, M), BM):
        rm = m + tl.arange(0, BM)
        rows = rm.to(tl.int64)[:, None]
        x = tl.load(x_ptr + rows * sxm + rp.to(tl.int64)[None, :] * sxp, mask=(rm[:, None] < M) & (rp[None, :] < P), other=0.0)
        g = tl.load(g_ptr + rows * R + rr[None, :], mask=(rm[:, None] < M) & (rr[None, :] < R), other=0.0)
        if MASKED:
            x = tl.where(load_keep(mask_ptr, rm, M, tl.program_id(0) * BP, words, BM, BP), x, 0.0)
        acc = tl.dot(g.T, x, acc, input_precision=PRECISION)
    out = part_ptr + split.to(tl.int64) * P * R + rp.to(tl.int64)[None, :] * spp + rr.to(tl.int64)[:, None] * spr
    tl.store(out, acc, mask=(rp[None, :] < P) & (rr[:, None] < R))


@triton.jit(do_not_specialize=["splits"])
def sum_splits_kernel(part_ptr, out_ptr, scale, n, splits, BLOCK: tl.constexpr):
    """out = scale * sum over s of part[s], s ascending.

    Shapes: part fp32 [splits, n], out [n]. Grid: (ceil(n / BLOCK),). Memory: splits n fp32 read, n written.
    Numerics: fp32, fixed order, rounded once.
    Source: as `tall_skinny_kernel`.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        acc += tl.load(part_ptr + i, mask=i < n, other=0.0)
        part_ptr += n
    tl.store(out_ptr + i, (acc * scale).to(out_ptr.dtype.element_ty), mask=i < n)


class TallSkinny:
    """Launches out = (keep * x)^T g, stored as [P, R] (dB) or, `transposed`, as [R, P] (dA), for one call signature."""

    def __init__(self, x: Tensor, R: int, transposed: bool, dropout_p: float = 0.0):
        (M, P) = x.shape
        if regular(x):
            # BR = 128 with 8 warps, whatever BP: ptxas serialises its wgmma (C7515).
            BR = block_rank(R, 128)
            narrow = BR > 64 or (BR == 64 and not whole_rank(R))  # 64 ranks loaded with a mask, beside 128 columns, spill on sm_100
            BP, BM, warps = (64 if narrow else 128), 64, 4
        else:  # an address per element, or fp32 without TF32: registers allow little
            BR = block_rank(R, 32)
            BP, BM, warps = 64, 16, 4
        columns = -(-P // BP) * -(-R // BR)
        # Two programs per SM keep the copy engines busy; never a split without rows, nor more partials than x itself weighs.
        self.splits = max(1, min(-(-2 * programs(x.device) // columns), -(-M // (4 * BM)), 16))
        rows = triton.cdiv(triton.cdiv(M, self.splits), BM) * BM
        self.splits = -(-M // rows)
        self.n = P * R
        self.scale = keep_scale(dropout_p)
        strides = (1, P) if transposed else (R, 1)
        grid = (-(-P // BP), self.splits, -(-R // BR))
        ints = (M, P, R, rows, *x.stride(), *strides)
        constants = {"BM": BM, "BP": BP, "BR": BR, "MASKED": dropout_p > 0, "PRECISION": precision(x.dtype)}
        self.launch = Launcher(tall_skinny_kernel, grid, (), ints, warps, 3, **constants)
        self.sum = Launcher(sum_splits_kernel, (-(-self.n // 1024),), (), (self.n, self.splits), 4, 2, BLOCK=1024)

    def __call__(self, stream: int, x: Tensor, g: Tensor, mask: Tensor | None, out: Tensor) -> None:
        part = out.new_empty(self.splits * self.n, dtype=torch.float32)
        self.launch(stream, (), (x, g, mask, part))
        self.sum(stream, (), (part, out), (self.scale,))
