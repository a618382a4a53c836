"""Launchers of the many-adapter kernels: plans, scratch memory, and what they refuse."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .. import _batch_table, _device
from ._launch import workspace
from .batched_decode import decode_kernel, shrink_kernel
from .batched_prefill import batched_linear_kernel, segment_reduce_kernel

MAX_SLICES = 3
SPLIT_SHRINK = 8  # parts of K per unit of h in decode: 4096 / 8 = 4 steps of BK = 128


class DecodePlan(NamedTuple):
    """Tile shapes of `decode_kernel`. BM follows M, the rest N and K; nothing follows the adapter mix."""

    BM: int
    BN: int
    BK: int
    SPLIT_K: int
    num_warps: int
    num_stages: int


class TilePlan(NamedTuple):
    """Tile shapes of `batched_linear_kernel`."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int


PREFILL = TilePlan(128, 128, 64, 8, 3)
SMALL = TilePlan(64, 128, 64, 8, 3)  # sm_80, where 128 x 128 spills; and every M under batch_invariant, so that a row's sums have one order
FLOAT32 = TilePlan(64, 64, 32, 4, 2)
EXPAND = TilePlan(64, 128, 64, 8, 2)


def decode_plan(M: int, total_n: int, K: int, itemsize: int, sms: int, cast: bool) -> DecodePlan:
    """About two programs per SM, each with at least four steps of K. Short steps in float32, and where rows of 16 bytes do not line up
    (addresses per element: longer ones spill); `cast`: pools of another dtype, which take registers.
    """
    BM = max(16, triton.next_power_of_2(M))
    short = itemsize == 4 or K % 8 != 0
    BK = 32 if short else 64 if BM >= 256 or cast else 128
    split = max(1, min(8, triton.cdiv(2 * sms, triton.cdiv(total_n, 64)), triton.cdiv(K, 4 * BK)))
    stages = 2 if short else 4 if BM <= 64 else 3
    return DecodePlan(BM, 64, BK, 1 << (split.bit_length() - 1), 8 if BM >= 256 else 4, stages)


def rank_chunk(R: int) -> int:
    """Rank columns per product: the pool's rank, 16 to 64. True ranks are cut at the same places whatever the mix."""
    return min(64, max(16, triton.next_power_of_2(R)))


def scratch(device: torch.device, words: int) -> Tensor:
    """Zeroed int32 counters of the current stream of `device`; every kernel leaves them zero. Under capture each call has its own."""
    return workspace(device, torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0, words)


def on_its_device(run):
    """Triton launches on the current device: make it that of the first argument."""

    @functools.wraps(run)
    def guarded(first, *rest):
        if first.device.type != "cuda" or first.device.index == torch.cuda.current_device():
            return run(first, *rest)
        with torch.cuda.device(first.device):
            return run(first, *rest)

    return guarded


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


def _stride0(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def _groups(weights: list[Tensor], pools_a: list[Tensor], pools_b: list[Tensor]) -> list[range]:
    """Runs of at most three slices that share all strides but those between adapters of B: one launch each."""
    alike = [(w.stride(), a.stride(), b.stride()[1:]) for w, a, b in zip(weights, pools_a, pools_b, strict=True)]
    runs: list[range] = []
    for i in range(len(alike)):
        if runs and alike[i] == alike[i - 1] and len(runs[-1]) < MAX_SLICES:
            runs[-1] = range(runs[-1].start, i + 1)
        else:
            runs.append(range(i, i + 1))
    return runs


def _launch_shrink(x, pools_a, h, ids, ranks, scalings, table, block, packed, parts):
    """h[i, m, :r] for the pools of one group; h `[S, M, R]`, any dtype."""
    (M, K), S, R = x.shape, len(pools_a), h.shape[2]
    at = _batch_table.layout(M, pools_a[0].shape[0], block)
    BR = rank_chunk(R)
    RC, BK = triton.cdiv(R, BR), 128 if x.element_size() == 2 and K % 8 == 0 else 32
    groups = at.max_blocks * S * RC
    if groups == 0:
        return
    hpart = x.new_empty(groups * parts * block * BR if parts > 1 else 1, dtype=torch.float32)
    sync = scratch(x.device, 3 + groups) if parts > 1 else table
    a = pools_a[0]
    shrink_kernel[(groups * parts,)](
        x, h, hpart, table, table if ranks is None else ranks, hpart if scalings is None else scalings, sync, tuple(pools_a),
        K, R, x.stride(0), *a.stride(), h.stride(0), h.stride(1), _stride0(ranks), _stride0(scalings),
        at.order, at.blk_start, at.blk_len, at.blk_adapter, RC,
        S=S, BK=BK, BR=BR, TB=block, KC=parts, HAS_RANKS=ranks is not None, HAS_SCALINGS=scalings is not None, PACKED=packed,
        PREC=_precision(x), num_warps=4, num_stages=3,
    )  # fmt: skip


def _launch_tiles(x, y, h, weights, biases, pools_b, ranks, table, block, plan, base):
    """y (a view of one group's columns) from x, or y += the update when not base."""
    M, S, R, L = y.shape[0], len(pools_b), h.shape[2], pools_b[0].shape[0]
    at = _batch_table.layout(M, L, block)
    Ns = [b.shape[1] for b in pools_b]
    b, w = pools_b[0], weights[0] if base else pools_b[0][0]
    tiles = triton.cdiv(M, plan.BM) * sum(triton.cdiv(N, plan.BN) for N in Ns)
    batched_linear_kernel[(tiles,)](
        x, y, h, table, table if ranks is None else ranks, tuple(weights) if base else tuple(pools_b), _bias_tuple(biases, pools_b),
        tuple(pools_b), tuple(Ns), tuple(p.stride(0) for p in pools_b),
        M, x.shape[1], R, x.stride(0), y.stride(0), *w.stride(), *b.stride()[1:], h.stride(0), h.stride(1), _stride0(ranks),
        at.order, at.seg_of, at.seg_start, at.seg_adapter,
        S=S, BM=plan.BM, BN=plan.BN, BK=plan.BK, BR=rank_chunk(R), GROUP_M=8,
        EVEN_K=x.shape[1] % plan.BK == 0, BASE=base, HAS_BIAS=biases is not None and biases[0] is not None,
        HAS_RANKS=ranks is not None, PREC=_precision(x), num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip


def _bias_tuple(biases, fallback) -> tuple:
    return tuple(b.contiguous() for b in biases) if biases is not None and biases[0] is not None else tuple(fallback)


def _launch_decode(x, y, h, weights, biases, pools_a, pools_b, ranks, scalings, table, block, packed):
    (M, K), S, R, L = x.shape, len(weights), h.shape[2], pools_a[0].shape[0]
    at = _batch_table.layout(M, L, block)
    Ns = [w.shape[0] for w in weights]
    total_n, BR = sum(Ns), rank_chunk(R)
    plan = decode_plan(M, total_n, K, x.element_size(), _sms(x.device), pools_a[0].dtype != x.dtype)
    RC = triton.cdiv(R, BR)
    groups, tiles = at.max_blocks * S * RC, sum(triton.cdiv(N, plan.BN) for N in Ns)
    floats = [groups * SPLIT_SHRINK * block * BR, plan.SPLIT_K * total_n * plan.BM if plan.SPLIT_K > 1 else 0, total_n * plan.BM]
    hpart, part, lora = x.new_empty(sum(floats), dtype=torch.float32).split(floats)
    sync = scratch(x.device, 3 + groups + tiles)
    a, b = pools_a[0], pools_b[0]
    decode_kernel[(tiles, plan.SPLIT_K)](
        x, y, h, hpart, part, lora, table, table if ranks is None else ranks, lora if scalings is None else scalings, sync,
        tuple(weights), _bias_tuple(biases, pools_b), tuple(pools_a), tuple(pools_b), tuple(Ns), tuple(p.stride(0) for p in pools_b),
        M, K, R, x.stride(0), y.stride(0), weights[0].stride(0), a.stride(0), a.stride(1), h.stride(0), h.stride(1), b.stride(1),
        _stride0(ranks), _stride0(scalings), at.order, at.blk_start, at.blk_len, at.blk_adapter, RC, total_n, groups,
        S=S, BM=plan.BM, BN=plan.BN, BK=plan.BK, BR=BR, TB=block, KC=SPLIT_SHRINK, SPLIT_K=plan.SPLIT_K,
        HAS_BIAS=biases[0] is not None, HAS_RANKS=ranks is not None, HAS_SCALINGS=scalings is not None, PACKED=packed,
        PREC=_precision(x), num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip


def _sms(device: torch.device) -> int:
    return _device.sm_count(device.index or 0) if device.type == "cuda" else 8


def _major(device: torch.device) -> int:
    return _device.cuda_capability(device.index or 0)[0] if device.type == "cuda" else 9


def _rows(t: Tensor) -> Tensor:
    """`t` with unit stride along its rows."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _tile_plan(x: Tensor, batch_invariant: bool) -> TilePlan:
    if x.dtype == torch.float32:
        return FLOAT32
    return SMALL if batch_invariant or _major(x.device) < 9 else PREFILL


def _decodes(M: int, block: int, batch_invariant: bool, weights, pools_a, pools_b) -> bool:
    """The one-launch kernel wants few rows, small blocks, and unit strides along K of W and A and along R of B."""
    unit = all(t.stride(-1) == 1 or t.shape[-1] == 1 for t in (*weights, *pools_a, *pools_b))
    return M <= _batch_table.DECODE_ROWS and block == _batch_table.SMALL_BLOCK and not batch_invariant and unit


# ------------------------------------------------------------------------------------------------------------- the ops


def _cut(t: Tensor | None, run: range) -> Tensor | None:
    return None if t is None else t[run.start : run.stop]


@on_its_device
def lora_batched_fwd(x, weights, biases, pools_a, pools_b, ids, ranks, scalings, dropout_p, seed, table, block, rank_packed, batch_invariant):
    """As `reference_batched.lora_batched_fwd`, without dropout."""
    x, M = _rows(x), x.shape[0]
    widths = [w.shape[0] for w in weights]
    y, h = x.new_empty((M, sum(widths))), x.new_empty((len(weights), M, pools_b[0].shape[2]))
    mask = x.new_empty(0, dtype=torch.int32)
    if M == 0:
        return y, h, mask
    packed_runs = [range(len(weights))] if rank_packed else _groups(weights, pools_a, pools_b)
    for run in packed_runs:
        s = slice(run.start, run.stop)
        yg, hg, args = y[:, sum(widths[: run.start]) : sum(widths[: run.stop])], h[s], (_cut(ranks, run), _cut(scalings, run))
        if _decodes(M, block, batch_invariant, weights[s], pools_a[s], pools_b[s]):
            _launch_decode(x, yg, hg, weights[s], biases[s], pools_a[s], pools_b[s], *args, table, block, rank_packed)
        else:
            _launch_shrink(x, pools_a[s], hg, ids, *args, table, block, rank_packed, 1)
            _launch_tiles(x, yg, hg, weights[s], biases[s], pools_b[s], args[0], table, block, _tile_plan(x, batch_invariant), True)
    return y, h, mask


@on_its_device
def lora_shrink(x, pools_a, ids, ranks, scalings, table, block, rank_packed, batch_invariant):
    """As `reference_batched.lora_shrink`. Up to 256 rows the work is split along K, summed in a fixed order."""
    x, S = _rows(x), len(pools_a)
    h = x.new_zeros((S, x.shape[0], pools_a[0].shape[1] // (S if rank_packed else 1)), dtype=torch.float32)
    parts = SPLIT_SHRINK if block == _batch_table.SMALL_BLOCK and not batch_invariant else 1
    runs = [range(S)] if rank_packed else _groups(pools_a, pools_a, pools_a)
    for run in runs:
        s = slice(run.start, run.stop)
        _launch_shrink(x, pools_a[s], h[s], ids, _cut(ranks, run), _cut(scalings, run), table, block, rank_packed, parts)
    return h


@on_its_device
def lora_expand(y, h, pools_b, ids, ranks, table, block, batch_invariant):
    """As `reference_batched.lora_expand`. h is cast here: cast in the kernel it would be a register operand of wgmma."""
    if y.shape[0] == 0:
        return
    h = h.to(y.dtype)
    widths = [b.shape[1] for b in pools_b]
    for run in _groups(pools_b, pools_b, pools_b):
        s = slice(run.start, run.stop)
        yg = y[:, sum(widths[: run.start]) : sum(widths[: run.stop])]
        plan = FLOAT32 if y.dtype == torch.float32 else EXPAND
        _launch_tiles(yg, yg, h[s], [], None, pools_b[s], _cut(ranks, run), table, block, plan, False)


@on_its_device
def lora_batched_bwd(dy, x, weights, pools_a, pools_b, h, mask, ids, ranks, scalings, dropout_p, table, block, need_dx, need_da, need_db):
    """As `reference_batched.lora_batched_bwd`, without dropout. dx is the forward kernel with (W, A, B) -> (W^T, B^T, A^T)."""
    dy, x = _rows(dy), _rows(x)
    M, R, L = x.shape[0], h.shape[2], pools_a[0].shape[0]
    at = _batch_table.layout(M, L, block)
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    das = [p.new_zeros(p.shape) for p in pools_a] if need_da else []
    dbs = [p.new_zeros(p.shape) for p in pools_b] if need_db else []
    if M == 0:
        return dx, das, dbs
    g = torch.empty_like(h)
    widths = [w.shape[0] for w in weights]
    plan = _tile_plan(x, False)
    for i, dyi in enumerate(dy.split(widths, 1)):
        run = range(i, i + 1)
        rank, scale = _cut(ranks, run), _cut(scalings, run)
        if need_dx or need_da:
            _launch_shrink(dyi, [pools_b[i].transpose(1, 2)], g[i : i + 1], ids, rank, scale, table, block, False, 1)
        if need_dx:
            part = torch.empty_like(dx) if i else dx
            _launch_tiles(dyi, part, g[i : i + 1], [weights[i].t()], None, [pools_a[i].transpose(1, 2)], rank, table, block, plan, True)
            if i:
                dx += part
        for out, u, v, strides in (
            *([(das[i], g[i], x, das[i].stride())] if need_da else []),
            *([(dbs[i], h[i], dyi, (dbs[i].stride(0), dbs[i].stride(2), dbs[i].stride(1)))] if need_db else []),
        ):
            C, BR = v.shape[1], rank_chunk(R)
            segment_reduce_kernel[(triton.cdiv(C, 128), triton.cdiv(R, BR), at.max_segments)](
                u, v, out, table, table if ranks is None else rank, 0, C, R, u.stride(0), v.stride(0), *strides, 0,
                at.order, at.seg_start, at.seg_adapter,
                BM=32, BC=128, BR=BR, HAS_RANKS=ranks is not None, PREC=_precision(x), num_warps=4, num_stages=2,
            )  # fmt: skip
    return dx, das, dbs


# ------------------------------------------------------------------------------------------------------- what they refuse


def _refuses_dtype(x: Tensor) -> str | None:
    return None if x.dtype in (torch.bfloat16, torch.float16, torch.float32) else f"the Triton kernels take no {x.dtype}"


def _refuses_fwd(x, weights, biases, pools_a, pools_b, ids, ranks, scalings, dropout_p, seed, table, block, rank_packed, batch_invariant):
    if dropout_p is not None:
        return "dropout on many adapters is not implemented in Triton"
    if len({b is None for b in biases}) > 1:
        return "either all slices have a bias or none"
    if rank_packed and len(_groups(weights, pools_a, pools_b)) > 1:
        return f"rank-packed slices need equal strides and at most {MAX_SLICES} slices"
    return _refuses_dtype(x)


def _refuses_bwd(dy, x, weights, pools_a, pools_b, h, mask, ids, ranks, scalings, dropout_p, *_):
    return "dropout on many adapters is not implemented in Triton" if dropout_p is not None else _refuses_dtype(x)


def _refuses_shrink(x, pools_a, ids, ranks, scalings, table, block, rank_packed, batch_invariant):
    if rank_packed and len(pools_a) > MAX_SLICES:
        return f"rank-packed slices: at most {MAX_SLICES}"
    return _refuses_dtype(x)


def _refuses_expand(y, *_):
    return _refuses_dtype(y) if y.stride(-1) == 1 or y.shape[-1] == 1 else "y needs unit stride along its rows"


OPS = {
    "lora_batched_fwd": (lora_batched_fwd, _refuses_fwd),
    "lora_batched_bwd": (lora_batched_bwd, _refuses_bwd),
    "lora_shrink": (lora_shrink, _refuses_shrink),
    "lora_expand": (lora_expand, _refuses_expand),
}
