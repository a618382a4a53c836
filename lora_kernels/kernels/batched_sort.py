"""The batch table of many rows in two launches: a counting sort by adapter."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _batch_table
from ._launch import Launcher
from .batched_common import jit

MOST_ROWS = 1 << 17  # every tile reads the counts of all tiles
MOST_ADAPTERS = 2047  # a program holds a count per adapter
TILE, CHUNK = 256, 32


@triton.jit
def key_of(ids_ptr, row, M, L):
    """Sort key of rows: the adapter, or L where there is none."""
    slot = tl.load(ids_ptr + row, mask=row < M, other=-1)
    return tl.where((slot >= 0) & (slot < L), slot, L)


@jit
def count_kernel(ids_ptr, count_ptr, M, L, BM: tl.constexpr, BINS: tl.constexpr):
    """count[t, key]: rows of tile t with that key. Shapes: ids int32 `[M]`, count int32 `[tiles, BINS]`. Grid: (tiles,)."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    counts = tl.histogram(key_of(ids_ptr, row, M, L), BINS, mask=row < M)
    tl.store(count_ptr + tl.program_id(0) * BINS + tl.arange(0, BINS), counts)


@jit
def sort_kernel(
    ids_ptr, count_ptr, out_ptr, M, L, P, B, tiles,
    o_order, o_seg_of, o_seg_start, o_seg_adapter, o_blk_start, o_blk_len, o_blk_adapter,
    BM: tl.constexpr, TB: tl.constexpr, BINS: tl.constexpr, TILES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """All arrays of `_batch_table` from ids and the counts of `count_kernel`; P and B are the bounds of segments and blocks.

    Every program adds up the counts of all tiles, TILES at a time, and those before its own: with the rank of a row among the rows of its
    key in its tile, that is the row's place in its segment, and by running sums over the keys its sorted place, segment and block.
    Grid: (tiles,). Memory: counts once per tile (from L2), ids and table once. Numerics: integers; every word of the table has one writer.
    """
    t = tl.program_id(0)
    key = tl.arange(0, BINS)
    total = tl.zeros((BINS,), tl.int32)
    before = tl.zeros((BINS,), tl.int32)
    for c in range(0, tiles, TILES):
        other = c + tl.arange(0, TILES)
        counts = tl.load(count_ptr + other[:, None] * BINS + key[None, :], mask=(other < tiles)[:, None], other=0)
        total += tl.sum(counts, 0)
        before += tl.sum(tl.where((other < t)[:, None], counts, 0), 0)
    held = tl.where(key < L, total, 0)
    present = (held > 0).to(tl.int32)
    blocks_of = tl.cdiv(held, TB)
    start = tl.cumsum(total, 0) - total
    seg = tl.cumsum(present, 0) - present
    block = tl.cumsum(blocks_of, 0) - blocks_of
    rows, segments, blocks = tl.sum(held, 0), tl.sum(present, 0), tl.sum(blocks_of, 0)

    row = t * BM + tl.arange(0, BM)
    live = row < M
    mine = key_of(ids_ptr, row, M, L)
    within = tl.gather(before, mine, 0)
    for c in range(t * BM, min(t * BM + BM, M), CHUNK):
        other = c + tl.arange(0, CHUNK)
        earlier = (mine[:, None] == key_of(ids_ptr, other, M, L)[None, :]) & (other[None, :] < row[:, None])
        within += tl.sum(earlier.to(tl.int32), 1)
    place = tl.gather(start, mine, 0) + within
    tl.store(out_ptr + o_order + place, row, mask=live)
    tl.store(out_ptr + o_seg_of + place, tl.gather(seg, mine, 0), mask=live)
    block_first = live & (mine < L) & (within % TB == 0)
    entry = tl.gather(block, mine, 0) + within // TB
    tl.store(out_ptr + o_blk_start + entry, place, mask=block_first)
    tl.store(out_ptr + o_blk_len + entry, tl.minimum(tl.gather(total, mine, 0) - within, TB), mask=block_first)
    tl.store(out_ptr + o_blk_adapter + entry, mine, mask=block_first)
    # What no segment or block fills.
    past = (row >= segments) & (row < P)
    tl.store(out_ptr + o_seg_start + row, rows + row * 0, mask=past)
    tl.store(out_ptr + o_seg_adapter + row, row * 0, mask=past)
    past = (row >= blocks) & (row < B)
    tl.store(out_ptr + o_blk_start + row, row * 0, mask=past)
    tl.store(out_ptr + o_blk_len + row, row * 0, mask=past)
    tl.store(out_ptr + o_blk_adapter + row, row * 0, mask=past)
    if t == 0:
        tl.store(out_ptr, blocks)
        tl.store(out_ptr + 1, rows)
        tl.store(out_ptr + 2, segments)
        tl.store(out_ptr + 3, 0)
        tl.store(out_ptr + o_seg_start + seg, start, mask=held > 0)
        tl.store(out_ptr + o_seg_adapter + seg, key, mask=held > 0)
        tl.store(out_ptr + o_seg_start + P, rows)


class SortedTable:
    """Launches the table of M rows for one (M, L, block)."""

    def __init__(self, M: int, L: int, block: int):
        at, tiles, bins = _batch_table.layout(M, L, block), triton.cdiv(M, TILE), max(64, triton.next_power_of_2(L + 1))
        self.counts = (tiles, bins)
        self.count = Launcher(count_kernel, (tiles,), (), (M, L), 4, 1, BM=TILE, BINS=bins)
        ints = (M, L, at.max_segments, at.max_blocks, tiles)
        ints += (at.order, at.seg_of, at.seg_start, at.seg_adapter, at.blk_start, at.blk_len, at.blk_adapter)
        constants = {"BM": TILE, "TB": block, "BINS": bins, "TILES": max(1, min(16, 4096 // bins)), "CHUNK": CHUNK}
        self.sort = Launcher(sort_kernel, (tiles,), (), ints, 8, 1, **constants)

    def __call__(self, stream: int, ids: Tensor, out: Tensor) -> None:
        counts = ids.new_empty(self.counts, dtype=torch.int32)
        self.count(stream, (), (ids, counts))
        self.sort(stream, (), (ids, counts, out))
