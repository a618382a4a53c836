"""Many adapters, backward: dA and dB, each adapter's rows cut into chunks of a size of its own choosing, summed in order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _batch_table
from ._jit import load_keep
from ._launch import Launcher, programs
from .batched_common import drop_of, jit, padded, precision, rank_chunk, rank_of, stride0

FEWEST_ROWS = 256  # of a chunk: below, its sums weigh more than its rows


@jit
def segment_reduce_kernel(
    u_ptr, v_ptr, out_ptr, part_ptr, table_ptr, ranks_ptr, mask_ptr, p_ptr, C, R, P, CHUNK, sum_, svm, sol, sor, soc, srk,
    o_order, o_seg_of, o_seg_start, o_seg_adapter,
    BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, HAS_RANKS: tl.constexpr, MASKED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """out[l, r, c] = sum over the rows m of adapter l of u[m, r] drop(v[m, c]): dA (u = g, v = x) and dB (u = h, v = dy, no dropout).

    A segment is cut into chunks of CHUNK rows from its own start, so an adapter's sums do not depend on the others' rows. A segment of one
    chunk is stored at once; the chunks of longer ones go to part, which `sum_chunks_kernel` adds. Two slots for every window of CHUNK sorted
    rows hold them: a window meets at most one start of such a segment (slot 2 j) and one start of a later chunk (slot 2 j + 1).
    Shapes: u `[M, H]`, v `[M, C]`; out `[L, R, C]` by strides (sol, sor, soc), zero where no program writes; part float32 `[2 J, R, C]`, J =
        ceil(M / CHUNK); MASKED: mask int32 `[M, ceil(C / 32)]`, p float32 `[L]`.
    Grid: (columns / BC, R / BR, P + J): the first chunk of each segment, then the later chunk that starts in each window.
    Memory: every row of a segment once per rank block; out or part written once.
    Numerics: float32, a chunk's rows in ascending order in one accumulator; no atomics, same bits every run.
    """
    z = tl.program_id(2)
    segments = tl.load(table_ptr + 2)
    seg = z
    if z >= P:
        seg = tl.load(table_ptr + o_seg_of + (z - P) * CHUNK)
    if seg >= segments:
        return
    start = tl.load(table_ptr + o_seg_start + seg)
    end = tl.load(table_ptr + o_seg_start + seg + 1)
    whole = end - start <= CHUNK
    slot = start // CHUNK * 2
    present = True
    if z >= P:
        later = tl.cdiv((z - P) * CHUNK - start, CHUNK)
        start += later * CHUNK
        slot = (z - P) * 2 + 1
        present = (later > 0) & (start < end)
    if not present:
        return
    end = tl.minimum(end, start + CHUNK)
    adapter = tl.load(table_ptr + o_seg_adapter + seg)
    rank = rank_of(ranks_ptr, 0, adapter, R, srk, HAS_RANKS)
    if tl.program_id(1) * BR >= rank:
        return
    rr = tl.program_id(1) * BR + tl.arange(0, BR)
    rc = tl.program_id(0) * BC + tl.arange(0, BC)
    acc = tl.zeros((BR, BC), tl.float32)
    for p in range(start, end, BM):
        rp = p + tl.arange(0, BM)
        live = rp < end
        rows = tl.load(table_ptr + o_order + rp, mask=live, other=0).to(tl.int64)
        u = tl.load(u_ptr + rows[:, None] * sum_ + rr[None, :], mask=live[:, None] & (rr[None, :] < padded(rank)), other=0.0)
        v = tl.load(v_ptr + rows[:, None] * svm + rc[None, :], mask=live[:, None] & (rc[None, :] < C), other=0.0)
        if MASKED:
            v = tl.where(load_keep(mask_ptr, rows, 1 << 31, tl.program_id(0) * BC, tl.cdiv(C, 32), BM, BC), v, 0.0)
        acc = tl.dot(u.T, v, acc, input_precision=PREC)
    if MASKED:
        _, keep_scale = drop_of(tl.load(p_ptr + adapter))
        acc *= keep_scale
    inside = (rr[:, None] < rank) & (rc[None, :] < C)
    if whole:
        out = out_ptr + adapter.to(tl.int64) * sol + rr[:, None] * sor + rc[None, :] * soc
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(part_ptr + slot.to(tl.int64) * R * C + rr.to(tl.int64)[:, None] * C + rc[None, :], acc, mask=inside)


@jit
def sum_chunks_kernel(
    part_ptr, out_ptr, table_ptr, ranks_ptr, M, C, R, CHUNK, sol, sor, soc, srk, o_seg_of, o_seg_start, o_seg_adapter,
    BC: tl.constexpr, BR: tl.constexpr, HAS_RANKS: tl.constexpr,
):  # fmt: skip
    """out[l] = sum of its chunks in part, ascending, for the segments of more than one chunk.

    Shapes: as `segment_reduce_kernel`. Grid: (columns / BC, R / BR, J): program j serves the segment of several chunks that starts in window
        j, if there is one: it reaches into window j + 1, and no other does. Memory: the chunks read once, out written once.
    Numerics: float32, fixed order, rounded once.
    """
    j = tl.program_id(2)
    if (j + 1) * CHUNK >= M:
        return
    seg = tl.load(table_ptr + o_seg_of + (j + 1) * CHUNK)
    if seg >= tl.load(table_ptr + 2):
        return
    start = tl.load(table_ptr + o_seg_start + seg)
    chunks = tl.cdiv(tl.load(table_ptr + o_seg_start + seg + 1) - start, CHUNK)
    adapter = tl.load(table_ptr + o_seg_adapter + seg)
    rank = rank_of(ranks_ptr, 0, adapter, R, srk, HAS_RANKS)
    if (start // CHUNK != j) | (chunks == 1) | (tl.program_id(1) * BR >= rank):
        return
    rr = tl.program_id(1) * BR + tl.arange(0, BR)
    rc = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = (rr[:, None] < rank) & (rc[None, :] < C)
    spot = part_ptr + rr.to(tl.int64)[:, None] * C + rc[None, :]
    acc = tl.load(spot + (2 * j).to(tl.int64) * R * C, mask=inside, other=0.0)
    for q in range(1, chunks):
        acc += tl.load(spot + (2 * (j + q) + 1).to(tl.int64) * R * C, mask=inside, other=0.0)
    out = out_ptr + adapter.to(tl.int64) * sol + rr[:, None] * sor + rc[None, :] * soc
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside)


class SegmentReduce:
    """Launches out[l] = sum of u[m]^T drop(v[m]) for one call signature; out contiguous `[L, R, C]`, or `[L, C, R]` when `transposed`."""

    def __init__(self, v: Tensor, h: Tensor, R: int, L: int, ranks, block: int, transposed: bool, masked: bool = False):
        (M, C), BM, BR = v.shape, 32, rank_chunk(R)
        BC = 128 if v.element_size() == 2 and C % 8 == 0 else 64
        at = _batch_table.layout(M, L, block)
        columns = triton.cdiv(C, BC) * triton.cdiv(R, BR)
        # Two programs per SM when one adapter has all rows.
        chunks = max(1, min(triton.cdiv(2 * programs(v.device), columns), M // FEWEST_ROWS, 16))
        chunk = triton.cdiv(triton.cdiv(M, chunks), BM) * BM
        windows = triton.cdiv(M, chunk)
        self.parts = 2 * windows * R * C if windows > 1 else 1
        strides = (R * C, 1, R) if transposed else (R * C, C, 1)
        grid = (triton.cdiv(C, BC), triton.cdiv(R, BR), at.max_segments + windows)
        ints = (C, R, at.max_segments, chunk, h.stride(1), v.stride(0), *strides, stride0(ranks), at.order, at.seg_of, at.seg_start, at.seg_adapter)
        same = {"BC": BC, "BR": BR, "HAS_RANKS": ranks is not None}
        constants = {"BM": BM, **same, "MASKED": masked, "PREC": precision(v.dtype)}
        self.launch = Launcher(segment_reduce_kernel, grid, (), ints, 4, 2, **constants)
        ints = (M, C, R, chunk, *strides, stride0(ranks), at.seg_of, at.seg_start, at.seg_adapter)
        self.sum = Launcher(sum_chunks_kernel, (*grid[:2], windows), (), ints, 4, 2, **same) if windows > 1 else None

    def __call__(self, stream: int, u: Tensor, v: Tensor, out: Tensor, ranks, table: Tensor, mask=None, p=None) -> None:
        """u contiguous `[M, H]`, rows of h."""
        part = v.new_empty(self.parts, dtype=torch.float32)
        self.launch(stream, (), (u, v, out, part, table, ranks, mask, p))
        if self.sum is not None:
            self.sum(stream, (), (part, out, table, ranks))
