"""The batch table in one launch up to 256 rows, in two beyond (`_batch_table.build` takes about 50 small ones)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import _batch_table
from ._launch import Launcher, on_device
from .batched_common import jit
from .batched_sort import MOST_ADAPTERS, MOST_ROWS, SortedTable

CHUNK = 32


@jit
def table_kernel(
    ids_ptr, out_ptr, M, L, P, B, o_order, o_seg_of, o_seg_start, o_seg_adapter, o_blk_start, o_blk_len, o_blk_adapter,
    BM: tl.constexpr, TB: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """All arrays of `_batch_table` from ids int32 `[M]`, M <= BM; P and B are the bounds of segments and blocks.

    Every row counts the rows that sort before it (smaller adapter, or the same and an earlier row): that is its sorted place, and what
    starts a segment or a block among them numbers its segment and block. M x M comparisons, CHUNK columns at a time; no atomics.
    Grid: one program.
    """
    row = tl.arange(0, BM)
    live = row < M
    slot = tl.load(ids_ptr + row, mask=live, other=-1)
    key = tl.where((slot >= 0) & (slot < L), slot, L)
    place = tl.zeros((BM,), tl.int32)
    within = tl.zeros((BM,), tl.int32)
    length = tl.zeros((BM,), tl.int32)
    seg = tl.zeros((BM,), tl.int32)
    block = tl.zeros((BM,), tl.int32)
    for c in range(0, M, CHUNK):
        other = c + tl.arange(0, CHUNK)
        other_slot = tl.load(ids_ptr + other, mask=other < M, other=-1)
        other_key = tl.where((other_slot >= 0) & (other_slot < L), other_slot, L)
        present = (other < M)[None, :]
        same = (key[:, None] == other_key[None, :]) & present
        smaller = (other_key[None, :] < key[:, None]) & present
        earlier = same & (other[None, :] < row[:, None])
        other_within = tl.sum((same & live[:, None] & (row[:, None] < other[None, :])).to(tl.int32), 0)
        adapter = other_key < L
        starts_seg = adapter & (other_within == 0)
        starts_block = adapter & (other_within % TB == 0)
        place += tl.sum((smaller | earlier).to(tl.int32), 1)
        within += tl.sum(earlier.to(tl.int32), 1)
        length += tl.sum(same.to(tl.int32), 1)
        seg += tl.sum((smaller & starts_seg[None, :]).to(tl.int32), 1)
        block += tl.sum(((smaller | earlier) & starts_block[None, :]).to(tl.int32), 1)

    used = live & (key < L)
    first = used & (within == 0)
    block_first = used & (within % TB == 0)
    rows, segments, blocks = tl.sum(used.to(tl.int32), 0), tl.sum(first.to(tl.int32), 0), tl.sum(block_first.to(tl.int32), 0)
    tl.store(out_ptr, blocks)
    tl.store(out_ptr + 1, rows)
    tl.store(out_ptr + 2, segments)
    tl.store(out_ptr + 3, 0)
    tl.store(out_ptr + o_order + place, row, mask=live)
    tl.store(out_ptr + o_seg_of + place, seg, mask=live)
    tl.store(out_ptr + o_seg_start + seg, place, mask=first)
    tl.store(out_ptr + o_seg_adapter + seg, key, mask=first)
    tl.store(out_ptr + o_blk_start + block, place, mask=block_first)
    tl.store(out_ptr + o_blk_len + block, tl.minimum(length - within, TB), mask=block_first)
    tl.store(out_ptr + o_blk_adapter + block, key, mask=block_first)
    # What no segment or block fills.
    tl.store(out_ptr + o_seg_start + P, rows)
    tl.store(out_ptr + o_seg_start + row, rows + row * 0, mask=(row >= segments) & (row < P))
    tl.store(out_ptr + o_seg_adapter + row, row * 0, mask=(row >= segments) & (row < P))
    past = (row >= blocks) & (row < B)
    tl.store(out_ptr + o_blk_start + row, row * 0, mask=past)
    tl.store(out_ptr + o_blk_len + row, row * 0, mask=past)
    tl.store(out_ptr + o_blk_adapter + row, row * 0, mask=past)


class Table:
    """Launches the table of 1 to 256 rows for one (M, L, block)."""

    def __init__(self, M: int, L: int, block: int):
        at = _batch_table.layout(M, L, block)
        ints = (M, L, at.max_segments, at.max_blocks, at.order, at.seg_of, at.seg_start, at.seg_adapter, at.blk_start, at.blk_len, at.blk_adapter)
        BM = max(16, triton.next_power_of_2(M))
        self.launch = Launcher(table_kernel, (1,), (), ints, 8, 1, BM=BM, TB=block, CHUNK=CHUNK)

    def __call__(self, stream: int, ids: Tensor, out: Tensor) -> None:
        self.launch(stream, (), (ids, out))


_tables: dict[tuple, Table | SortedTable | None] = {}


def build(ids: Tensor, L: int, block: int, out: Tensor) -> Tensor:
    """As `_batch_table.build`: one launch up to 256 rows, two up to `batched_sort.MOST_ROWS` rows of few enough adapters, else PyTorch."""
    M = ids.shape[0]
    key = M, L, block, ids.data_ptr() % 16, out.data_ptr() % 16, ids.device
    if key not in _tables:
        if len(_tables) >= 4096:
            _tables.clear()
        small, sorts = 0 < M <= _batch_table.DECODE_ROWS, 0 < M <= MOST_ROWS and L <= MOST_ADAPTERS
        _tables[key] = Table(M, L, block) if small else SortedTable(M, L, block) if sorts else None
    table = _tables[key]
    if table is None:
        return _batch_table.build(ids, L, block, out)
    on_device(ids, table, ids, out)
    return out
