"""Shrink: the rank-R projection of x, one pass over x, and with dropout the packed keep mask."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..reference import drop_threshold, keep_scale
from ..tuning.plan import block_rank, whole_rank
from ._jit import bits_of, keep_bytes, store_bytes
from ._launch import Launcher, precision, regular


@triton.jit(do_not_specialize=["M", "threshold"])
def shrink_kernel(
    x_ptr,
    a_ptr,
    h_ptr,
    mask_ptr,
    seed_ptr,
    scale,
    M,
    K,
    R,
    threshold,
    sxm,
    sxk,
    sar,
    sak,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """h = scale * drop(x) A^T.

    Shapes: x [M, K], A [R, K] (any strides; g = s dy B is this kernel with A = B^T), h [M, R] contiguous, mask int32 [M, ceil(K / 32)],
        seed int64 [1]. A may be float32 beside a 16-bit x: it is cast as it is loaded.
    Grid: (ceil(M / BM), ceil(R / BR)). Every rank chunk reads x again; chunk 0 writes the mask.
    Memory: x once per rank chunk, A once per row block (from L2), h and mask written once: M (K + R) elements + M K / 8 bytes.
    Numerics: the tile is h^T, so that the masked x is the B operand: as A, wgmma would take it from registers, which ptxas serialises
        (C7515) and before 13.3 is reported to miscompile. fp32 accumulator, h rounded once; the scaling and 1 / (1 - p), both in `scale`,
        multiply the fp32 sum. No atomics: same bits.
    Source: dropout by Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), 8 x 16 bits a call.
    """
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rr = tl.program_id(1) * BR + tl.arange(0, BR)
    rk = tl.arange(0, BK)
    words = tl.cdiv(K, 32)
    x_rows = x_ptr + rm.to(tl.int64)[:, None] * sxm
    a_rows = a_ptr + rr.to(tl.int64)[:, None] * sar
    if DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros((BR, BM), tl.float32)
    for k in range(0, K, BK):
        ks = k + rk
        x = tl.load(x_rows + ks.to(tl.int64)[None, :] * sxk, mask=(rm[:, None] < M) & (ks[None, :] < K), other=0.0)
        a = tl.load(a_rows + ks.to(tl.int64)[None, :] * sak, mask=(rr[:, None] < R) & (ks[None, :] < K), other=0.0)
        if DROPOUT:
            groups = k // 8 + tl.arange(0, BK // 8)
            packed = keep_bytes(seed, rm, groups, K, threshold)
            if tl.program_id(1) == 0:
                store_bytes(mask_ptr, rm, M, groups, words, packed)
            x = tl.where(bits_of(packed, BM, BK), x, 0.0)
        acc = tl.dot(a.to(x.dtype), x.T, acc, input_precision=PRECISION)
    out = h_ptr + rm.to(tl.int64)[None, :] * R + rr[:, None]
    tl.store(out, (acc * scale).to(h_ptr.dtype.element_ty), mask=(rm[None, :] < M) & (rr[:, None] < R))


class Shrink:
    """Launches h = scale * drop(x) A^T for one call signature. `a` is given as [R, K], lora_b.t() for g."""

    def __init__(self, x: Tensor, a: Tensor, dropout_p: float = 0.0):
        (M, K), R = x.shape, a.shape[0]
        if regular(x):
            # 32 rows a program give two programs per SM at M = 8192; a larger rank block needs the rows to pay for reading A.
            BR = block_rank(R, 128)
            BM, BK, warps, stages = (32, 128, 4, 5) if BR <= 32 else (64, 64, 8, 3)
            if BR == 64 and not dropout_p:
                BK, stages = 128, 4  # 48 KiB of x on the way to an SM, not 16; with dropout the arithmetic takes longer than the copies
            elif BR == 128 and not whole_rank(R):
                BK = 32  # 64 spill on sm_80
        else:  # an address per element, or fp32 without TF32: registers allow little
            BR = block_rank(R, 32)
            BM, BK, warps, stages = 16, 32, 4, 3
        self.scale = keep_scale(dropout_p)
        ints = (M, K, R, drop_threshold(dropout_p), *x.stride(), *a.stride())
        grid = (-(-M // BM), -(-R // BR))
        self.launch = Launcher(shrink_kernel, grid, (), ints, warps, stages, BM=BM, BK=BK, BR=BR, DROPOUT=dropout_p > 0, PRECISION=precision(x.dtype))

    def __call__(self, stream: int, x: Tensor, a: Tensor, h: Tensor, mask: Tensor | None, seed: Tensor | None, scale: float) -> None:
        self.launch(stream, (), (x, a, h, mask, seed), (scale * self.scale,))
