"""The device table of one batch: which rows use which adapter, sorted and cut into blocks, built without a host synchronisation.

One int32 tensor whose size depends on (M, L, block) alone, so that its address and the grids that read it stay the same for every
mix of adapters (one CUDA graph per batch size). In it, for P = min(M, L) and B = `max_blocks`:

    counts       [4]      blocks, rows with an adapter, segments (adapters present), 0
    order        [M]      the rows sorted by adapter, stable; rows without an adapter come last
    seg_of       [M]      segment of each sorted row (the number of segments for rows without an adapter)
    seg_start    [P + 1]  first sorted row of each segment; those past the last segment hold the number of rows with an adapter
    seg_adapter  [P]      adapter of each segment; like the blocks' arrays zero past the last
    blk_start    [B]      token blocks: at most `block` sorted rows of one adapter
    blk_len      [B]
    blk_adapter  [B]
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SMALL_BLOCK, LARGE_BLOCK = 16, 64
DECODE_ROWS = 256


class Layout(NamedTuple):
    """Offsets, in int32 words, of the arrays of a table, and its bounds."""

    order: int
    seg_of: int
    seg_start: int
    seg_adapter: int
    blk_start: int
    blk_len: int
    blk_adapter: int
    size: int
    max_segments: int
    max_blocks: int


def layout(M: int, L: int, block: int) -> Layout:
    segments = min(M, L)
    # Every adapter present adds at most one part-filled block, and no block is empty.
    blocks = min(M, M // block + segments)
    offsets, end = [], 4
    for size in (M, M, segments + 1, segments, blocks, blocks, blocks):
        offsets.append(end)
        end += size
    return Layout(*offsets, end, segments, blocks)


def default_block(M: int, batch_invariant: bool) -> int:
    """Rows per token block: 16 where decode kernels run, else 64. With batch_invariant one size for every M."""
    return SMALL_BLOCK if M <= DECODE_ROWS and not batch_invariant else LARGE_BLOCK


def build(ids: Tensor, L: int, block: int, out: Tensor) -> Tensor:
    """Fill `out` from ids int32 `[M]`. Ids outside 0 ... L - 1 count as none. No host synchronisation; same inputs, same bits."""
    M, at = ids.shape[0], layout(ids.shape[0], L, block)
    if M == 0:
        return out.zero_()
    key = torch.where((ids >= 0) & (ids < L), ids, L)
    key, order = torch.sort(key, stable=True)
    adapters = torch.arange(L + 1, dtype=torch.int32, device=ids.device)
    start = torch.searchsorted(key, adapters)  # [L + 1]: first sorted row of each adapter; start[L] = rows with an adapter
    rows = start.diff()
    block_end = torch.cumsum((rows + (block - 1)) // block, 0)
    seg_end = torch.cumsum((rows > 0).to(torch.int64), 0)  # segments up to and with each adapter

    e = torch.arange(at.max_blocks, device=ids.device)
    blk_adapter = torch.searchsorted(block_end, e, right=True).clamp_(max=L - 1)
    within = e - (block_end - (rows + (block - 1)) // block)[blk_adapter]
    blk_start = start[blk_adapter] + within * block
    blk_len = torch.minimum(rows[blk_adapter] - within * block, torch.full_like(e, block))

    s = torch.arange(at.max_segments, device=ids.device)
    seg_adapter = torch.searchsorted(seg_end, s, right=True)  # L for those past the last
    seg_of = torch.cat([seg_end - 1, seg_end[-1:]])[key.long()]
    counts = torch.stack([block_end[-1], start[-1], seg_end[-1], torch.zeros_like(start[-1])])
    seg_live = s < seg_end[-1]
    parts = [counts, order, seg_of, start[seg_adapter], start[-1:], torch.where(seg_live, seg_adapter, torch.zeros_like(s))]
    blocks_live = e < block_end[-1]
    parts += [torch.where(blocks_live, t, torch.zeros_like(t)) for t in (blk_start, blk_len, blk_adapter)]
    return out.copy_(torch.cat(parts))
