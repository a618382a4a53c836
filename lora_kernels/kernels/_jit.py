"""Device functions shared by the kernel families: tile order and the dropout bits."""

from __future__ import annotations

import triton
import triton.language as tl

from ..reference import PHILOX_ROUNDS

ROUNDS = tl.constexpr(PHILOX_ROUNDS)


@triton.jit
def tile_of(item, num_m, num_n, GROUP_M: tl.constexpr):
    """Tile (m, n) of a linear index: columns of GROUP_M row blocks, so that neighbouring tiles share x and W in L2."""
    per_group = GROUP_M * num_n
    first = item // per_group * GROUP_M
    height = min(num_m - first, GROUP_M)
    within = item % per_group
    return first + within % height, within // height


@triton.jit
def keep_bits(seed, rm, groups, threshold):
    """Keep decisions `[BM, 8 G]` of rows rm and of 8-column groups: one Philox4x32 call per 8 elements, as `reference.dropout_mask`."""
    column = groups[None, :].to(tl.uint32) + tl.zeros((rm.shape[0], 1), tl.uint32)
    row = rm[:, None].to(tl.uint32) + tl.zeros((1, groups.shape[0]), tl.uint32)
    zero = column * 0
    r0, r1, r2, r3 = tl.philox(seed, column, row, zero, zero, ROUNDS)
    words = tl.join(tl.join(r0, r2), tl.join(r1, r3))  # [BM, G, 2, 2]: last two axes count r0, r1, r2, r3
    lanes = tl.join(words & 0xFFFF, words >> 16)  # [BM, G, 2, 2, 2]: low half first
    return (lanes.to(tl.int32) >= threshold).reshape(rm.shape[0], groups.shape[0] * 8)


@triton.jit
def pack_bits(keep, BM: tl.constexpr, BK: tl.constexpr):
    """bool `[BM, BK]` -> int32 words `[BM, BK / 32]`, column 0 in bit 0."""
    bits = keep.to(tl.int32).reshape(BM, BK // 32, 32) << tl.arange(0, 32)[None, None, :]
    return tl.sum(bits, axis=2)


@triton.jit
def load_keep(mask_ptr, rm, M, first, words, BM: tl.constexpr, BK: tl.constexpr):
    """Keep decisions `[BM, BK]` of columns first ... first + BK (first a multiple of 32) from the packed mask `[M, words]`."""
    wc = first // 32 + tl.arange(0, BK // 32)
    inside = (rm[:, None] < M) & (wc[None, :] < words)
    packed = tl.load(mask_ptr + rm.to(tl.int64)[:, None] * words + wc[None, :], mask=inside, other=0)
    return (((packed[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1) != 0).reshape(BM, BK)
