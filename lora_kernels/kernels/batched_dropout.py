"""Many adapters, dropout of each adapter's own probability: the packed keep mask, and the shrink of the rows as it leaves them."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import _batch_table
from ..tuning.plan import block_rank
from ._jit import keep_bytes, load_keep, store_bytes
from ._launch import Launcher, Pointers
from .batched_common import drop_of, jit, padded, pick, precision, rank_of, stride0


@jit
def keep_kernel(mask_ptr, seed_ptr, ids_ptr, p_ptr, M, K, L, BM: tl.constexpr, BK: tl.constexpr):
    """mask[m, w]: the keep bits of elements (m, 32 w ...), as `reference_batched`: all ones where the row's adapter drops nothing.

    Shapes: mask int32 `[M, ceil(K / 32)]`; seed int64 `[1]`; ids int32 `[M]`; p float32 `[L]`.
    Grid: (rows / BM, columns / BK). Memory: the mask written once; one Philox call per 8 elements, whatever the slices and rank chunks.
    Numerics: integers, the reference's bit for bit.
    Source: Philox4x32-7, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.program_id(1) * BK
    slot = tl.load(ids_ptr + rm, mask=rm < M, other=-1)
    inside = (slot >= 0) & (slot < L)
    p = tl.load(p_ptr + slot, mask=inside, other=0.0)
    threshold, _ = drop_of(p)
    groups = k // 8 + tl.arange(0, BK // 8)
    packed = keep_bytes(tl.load(seed_ptr), rm, groups, K, threshold[:, None])
    store_bytes(mask_ptr, rm, M, groups, tl.cdiv(K, 32), tl.where((p > 0)[:, None], packed, 0xFF))


@jit
def masked_shrink_kernel(
    x_ptr, h_ptr, mask_ptr, p_ptr, table_ptr, ranks_ptr, scalings_ptr, as_, M, K, R, sxm, sal, sar, sak, shs, shm, srk, ssc,
    o_order, o_blk_start, o_blk_len, o_blk_adapter, RC,
    S: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, TB: tl.constexpr,
    HAS_RANKS: tl.constexpr, HAS_SCALINGS: tl.constexpr, PACKED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """h[i, m, :r] = scale[i, l] drop_l(x[m]) A_i[l, :r]^T, l the adapter of row m.

    Shapes: as `batched_shrink.shrink_kernel`, without parts of K; mask `[M, ceil(K / 32)]`, p `[L]`.
    Grid: (max_blocks * S * RC); programs past the blocks of this batch leave at once.
    Memory: x and mask once per slice and rank chunk, A_l once per token block.
    Numerics: the tile is h^T, so that the masked x is the B operand: as A, wgmma would take it from registers, which ptxas serialises (C7515)
        and before 13.3 is reported to miscompile. float32 over ascending k; the scaling and 1 / (1 - p) multiply the float32 sum.
    Source: BGMV/SGMV shrink, arXiv:2310.18547.
    """
    blocks = tl.load(table_ptr)
    u = tl.program_id(0)
    if u >= blocks * S * RC:
        return
    block = u % blocks
    i = u // blocks // RC
    rr = u // blocks % RC * BR + tl.arange(0, BR)
    start = tl.load(table_ptr + o_blk_start + block)
    length = tl.load(table_ptr + o_blk_len + block)
    adapter = tl.load(table_ptr + o_blk_adapter + block)
    rank = rank_of(ranks_ptr, i, adapter, R, srk, HAS_RANKS)
    rt = tl.arange(0, TB)
    live = rt < length
    rows = tl.load(table_ptr + o_order + start + rt, mask=live, other=0).to(tl.int64)
    a_rows = pick(as_, i, S) + adapter.to(tl.int64) * sal + rr.to(tl.int64)[:, None] * sar
    if PACKED:
        a_rows += i * rank * sar
    x_rows = x_ptr + rows[:, None] * sxm
    words = tl.cdiv(K, 32)
    acc = tl.zeros((BR, TB), tl.float32)
    for k in range(0, K, BK):
        rk = k + tl.arange(0, BK)
        x = tl.load(x_rows + rk[None, :], mask=live[:, None] & (rk[None, :] < K), other=0.0)
        x = tl.where(load_keep(mask_ptr, rows, M, k, words, TB, BK), x, 0.0)
        a = tl.load(a_rows + rk.to(tl.int64)[None, :] * sak, mask=(rr[:, None] < rank) & (rk[None, :] < K), other=0.0)
        acc = tl.dot(a.to(x.dtype), x.T, acc, input_precision=PREC)
    _, scale = drop_of(tl.load(p_ptr + adapter))
    if HAS_SCALINGS:
        scale *= tl.load(scalings_ptr + i * ssc + adapter)
    out = h_ptr + i * shs + rows[None, :] * shm + rr[:, None]
    acc = tl.where(rr[:, None] < rank, acc * scale, 0.0)
    tl.store(out, acc.to(h_ptr.dtype.element_ty), mask=live[None, :] & (rr[:, None] < padded(rank)))


class KeepMask:
    """Launches the mask for one call signature."""

    def __init__(self, M: int, K: int, L: int):
        BM, BK = 32, 128
        self.launch = Launcher(keep_kernel, (triton.cdiv(M, BM), triton.cdiv(K, BK)), (), (M, K, L), 4, 1, BM=BM, BK=BK)

    def __call__(self, stream: int, mask: Tensor, seed: Tensor, ids: Tensor, p: Tensor) -> None:
        self.launch(stream, (), (mask, seed, ids, p))


class MaskedShrink:
    """Launches h for one call signature; arguments as `batched_shrink.Shrink`."""

    def __init__(self, x: Tensor, pools_a: list[Tensor], h: Tensor, ranks, scalings, block: int, packed: bool):
        (M, K), S, a = x.shape, len(pools_a), pools_a[0]
        R = a.shape[1] // (S if packed else 1)
        at = _batch_table.layout(M, a.shape[0], block)
        BR = block_rank(R, 64 if a.dtype == x.dtype else 32)  # a cast A of 64 ranks would be a register operand of wgmma
        RC, BK = triton.cdiv(R, BR), 64 if x.element_size() == 2 and K % 8 == 0 else 32
        ints = (M, K, R, x.stride(0), *a.stride(), h.stride(0), h.stride(1), stride0(ranks), stride0(scalings))
        ints += (at.order, at.blk_start, at.blk_len, at.blk_adapter, RC)
        constants = {"S": S, "BK": BK, "BR": BR, "TB": block, "HAS_RANKS": ranks is not None, "HAS_SCALINGS": scalings is not None}
        constants |= {"PACKED": packed, "PREC": precision(x.dtype)}
        grid = (at.max_blocks * S * RC,)
        self.launch = Launcher(masked_shrink_kernel, grid, (), ints, 4 if x.element_size() == 2 else 8, 3, **constants) if grid[0] else None

    def __call__(self, stream: int, x: Tensor, pools_a: list[Tensor], h: Tensor, ranks, scalings, table: Tensor, mask: Tensor, p: Tensor) -> None:
        if self.launch is not None:
            self.launch(stream, (), (x, h, mask, p, table, ranks, scalings, Pointers(pools_a)))
