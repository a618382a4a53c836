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
def kept_halves(word, threshold):
    """Bits 15 and 31: whether the low and the high half of a uint32 are at least the threshold, 0 to 65536. Three operations for both.

    A half's lower 15 bits carry into its own top bit: to be kept it needs either of the two, and both where the threshold is above 0x8000.
    """
    above = threshold > 0x8000
    either = tl.where(above, 0, 0xFFFFFFFF).to(tl.uint32)
    carry = (word & 0x7FFF7FFF) + (tl.where(above, 0x10000, 0x8000) - threshold).to(tl.uint32) * 0x10001
    return ((carry & word) | ((carry | word) & either)) & 0x80008000


@triton.jit
def keep_bytes(seed, rm, groups, K, threshold):
    """Keep decisions of rows rm and of 8-column groups, as `reference.dropout_mask`: `[BM, G]` of 8 bits each, in words; zero past K.

    One Philox4x32 call per 8 elements, decided and packed by the thread that made it. threshold: one, or `[BM, 1]`.
    """
    column = groups[None, :].to(tl.uint32) + tl.zeros((rm.shape[0], 1), tl.uint32)
    row = rm[:, None].to(tl.uint32) + tl.zeros((1, groups.shape[0]), tl.uint32)
    zero = column * 0
    r0, r1, r2, r3 = tl.philox(seed, column, row, zero, zero, ROUNDS)
    kept = (kept_halves(r0, threshold) >> 15) | (kept_halves(r1, threshold) >> 13)
    kept |= (kept_halves(r2, threshold) >> 11) | (kept_halves(r3, threshold) >> 9)
    inside = (1 << tl.minimum(tl.maximum(K - groups * 8, 0), 8)) - 1
    return (kept | (kept >> 15)) & inside[None, :].to(tl.uint32)


@triton.jit
def bits_of(packed, BM: tl.constexpr, BK: tl.constexpr):
    """bool `[BM, BK]` of `keep_bytes`."""
    return (((packed[:, :, None] >> tl.arange(0, 8)[None, None, :].to(tl.uint32)) & 1) != 0).reshape(BM, BK)


@triton.jit
def store_bytes(mask_ptr, rm, M, groups, words, packed):
    """Packed keep decisions into the mask `[M, words]` of 32-bit words, byte by byte: no thread needs another's.

    The addresses are made to look unaligned (the grid has no third dimension): else Triton deals four bytes to a thread, and computes Philox a
    second time for threads so dealt.
    """
    unaligned = tl.num_programs(2) - 1
    spot = mask_ptr.to(tl.pointer_type(tl.uint8)) + unaligned + rm.to(tl.int64)[:, None] * (words * 4) + groups[None, :]
    tl.store(spot, packed.to(tl.uint8), mask=(rm[:, None] < M) & (groups[None, :] < words * 4))


@triton.jit
def load_keep(mask_ptr, rm, M, first, words, BM: tl.constexpr, BK: tl.constexpr):
    """Keep decisions `[BM, BK]` of columns first ... first + BK (first a multiple of 32) from the packed mask `[M, words]`."""
    wc = first // 32 + tl.arange(0, BK // 32)
    inside = (rm[:, None] < M) & (wc[None, :] < words)
    packed = tl.load(mask_ptr + rm.to(tl.int64)[:, None] * words + wc[None, :], mask=inside, other=0)
    return (((packed[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1) != 0).reshape(BM, BK)
