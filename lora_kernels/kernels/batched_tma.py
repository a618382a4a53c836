"""Many adapters, many rows: tiles of rows as they lie, x, W and y through TMA descriptors, one rank product per adapter met in a tile.

Beside the gather form (`batched_prefill`) the base GEMM runs as in `update_tma_kernel`; the price is a rank product for every adapter that a
tile of 128 rows meets, wherever its rows lie. No table is needed: a tile finds its adapters, ascending, among its own ids.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..tuning.plan import block_rank, tma_arch
from ._jit import load_keep, tile_of
from ._launch import Launcher, Pointers, programs, regular
from .batched_common import MAX_SLICES, drop_of, jit, pick, precision, rank_of, slice_of, stride0
from .update import w_tile

BM, BK = 128, 64
# Rows of one adapter mostly lie together, and a tile meets one or two; but the mix may decide nothing here, and with 16 in every tile their
# products already take half as long as the base at K = 4096 (benchmarks/offline_report.py).
MOST_ADAPTERS = 16


@triton.jit
def finish(
    acc, y_desc, om, on, h_ptr, ids_ptr, ranks_ptr, mask_ptr, p_ptr, bias_ptr, b_ptr, i, M, N, L, R, sbl, sbn, sbr, shm, srk,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RANKS: tl.constexpr, MASKED: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """Add low-rank terms and bias to a tile of the base product and store it."""
    rm = om + tl.arange(0, BM)
    rn = on + tl.arange(0, BN)
    rr = tl.arange(0, BR)
    slot = tl.load(ids_ptr + rm, mask=rm < M, other=-1)
    slot = tl.where((slot >= 0) & (slot < L), slot, L)
    h_rows = h_ptr + rm.to(tl.int64)[:, None] * shm
    adapter = tl.min(slot, 0)
    while adapter < L:
        rank = rank_of(ranks_ptr, i, adapter, R, srk, HAS_RANKS)
        mine = (slot == adapter)[:, None]
        b_columns = b_ptr + adapter.to(tl.int64) * sbl + rn.to(tl.int64)[None, :] * sbn
        for r in tl.range(0, rank, BR, num_stages=1):
            inside = (r + rr) < rank
            h = tl.load(h_rows + (r + rr)[None, :], mask=(rm < M)[:, None] & inside[None, :], other=0.0)
            b = tl.load(b_columns + (r + rr)[:, None] * sbr, mask=inside[:, None] & (rn[None, :] < N), other=0.0)
            term = tl.dot(h, b.to(h.dtype), input_precision=PREC)
            if MASKED:
                _, keep_scale = drop_of(tl.load(p_ptr + adapter))
                term = tl.where(load_keep(mask_ptr, rm, M, on, tl.cdiv(N, 32), BM, BN), term * keep_scale, 0.0)
            acc = tl.where(mine, acc + term, acc)
        adapter = tl.min(tl.where(slot > adapter, slot, L), 0)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + rn, mask=rn < N, other=0.0).to(tl.float32)[None, :]
    y_desc.store([om, on], acc.to(y_desc.dtype))


@jit
def segmented_tma_kernel(
    x_desc, w0_desc, w1_desc, w2_desc, y0_desc, y1_desc, y2_desc, h_ptr, ids_ptr, ranks_ptr, mask_ptr, p_ptr, biases, bs,
    Ns, sbls, M, K, L, R, sbn, sbr, shs, shm, srk,
    S: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP_M: tl.constexpr,
    TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RANKS: tl.constexpr, MASKED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """y[m, n] = x[m] W_i[n]^T + b_i[n] + drop'(h[i, m, :r] B_i[l, n, :r]^T), l the adapter of row m; persistent.

    Shapes: x `[M, K]`, 16-bit; W_i `[N_i, K]` when TRANSPOSED, else (dx) `[K, N_i]`; y_i `[M, N_i]`, views of one y; all with a row pitch of
        a multiple of 16 bytes; ids int32 `[M]`; h `[S, M, R]` in x's dtype; B_i `[L, N_i, R]` any strides, x's dtype or float32; b_i `[N_i]`;
        MASKED: mask int32 `[M, ceil(N / 32)]`, p float32 `[L]`.
        A descriptor per slice: slices may lie anywhere, and a tile at the edge of one neither reads nor writes the next.
    Grid: (min(number of SMs, tiles),), grouped order. Independent of the adapter mix.
    Memory: as a GEMM; per tile and adapter met in it BM r of h and BN r of B, from L2.
    Numerics: float32; ascending k, then a rank product per BR ranks, then the bias; the tile is finished in two halves, for registers. A
        row takes a product only from its own adapter (`where`, not a product with zero: another's inf or NaN stays there), so its bits depend
        on itself, (BK, BR) and the tile shape alone. The product has registers of its own: those of the K loop, ptxas would serialise it.
    Source: persistent matmul of the Triton tutorials (09-persistent-matmul); SGMV, arXiv:2310.18547.
    """
    num_m = tl.cdiv(M, BM)
    num_n = tl.cdiv(Ns[0], BN)
    if S > 1:
        num_n += tl.cdiv(Ns[1], BN)
    if S > 2:
        num_n += tl.cdiv(Ns[2], BN)
    half: tl.constexpr = BN // 2
    for item in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        pm, pn = tile_of(item, num_m, num_n, GROUP_M)
        i, tile, _ = slice_of(pn, Ns, S, BN)
        w_desc = pick((w0_desc, w1_desc, w2_desc), i, S)
        y_desc = pick((y0_desc, y1_desc, y2_desc), i, S)
        om = pm * BM
        on = tile * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for ok in range(0, K, BK):
            acc = tl.dot(x_desc.load([om, ok]), w_tile(w_desc, ok, on, TRANSPOSED), acc, input_precision=PREC)
        N = pick(Ns, i, S)
        sbl = pick(sbls, i, S)
        b_ptr = pick(bs, i, S)
        h = h_ptr + i * shs
        bias_ptr = b_ptr
        if HAS_BIAS:
            bias_ptr = pick(biases, i, S)
        left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, half)), (0, 2, 1)))
        finish(
            left, y_desc, om, on, h, ids_ptr, ranks_ptr, mask_ptr, p_ptr, bias_ptr, b_ptr, i, M, N, L, R, sbl, sbn, sbr, shm, srk,
            BM, half, BR, HAS_BIAS, HAS_RANKS, MASKED, PREC,
        )  # fmt: skip
        finish(
            right, y_desc, om, on + half, h, ids_ptr, ranks_ptr, mask_ptr, p_ptr, bias_ptr, b_ptr, i, M, N, L, R, sbl, sbn, sbr, shm, srk,
            BM, half, BR, HAS_BIAS, HAS_RANKS, MASKED, PREC,
        )  # fmt: skip


def _columns(M: int, Ns: list[int], sms: int, masked: bool) -> int:
    """BN: 256 where that still gives every SM a tile, and no mask takes registers."""
    return 256 if not masked and triton.cdiv(M, BM) * sum(triton.cdiv(N, 256) for N in Ns) >= sms else 128


def _described(weights: list[Tensor]) -> list[Tensor]:
    """The slices of W with contiguous rows: `[N, K]`, or `[K, N]` of those given as its transposed."""
    return [w if w.stride(1) == 1 else w.t() for w in weights]


def serves(x: Tensor, y: Tensor, weights: list[Tensor], pools_b: list[Tensor], arch: int, batch_invariant: bool) -> bool:
    """Static facts only: Hopper and up, 16-bit rows that TMA can describe, not too many adapters.

    `batch_invariant` wants the one plan that every M can have.
    """
    described = [x, *_described(weights), *y.split([w.shape[0] for w in weights], 1)]
    return tma_arch(arch) and not batch_invariant and pools_b[0].shape[0] <= MOST_ADAPTERS and regular(*described)


class TmaTiles:
    """Launches y and takes arguments as `batched_prefill.Tiles`, where `serves` says so."""

    def __init__(self, x: Tensor, y: Tensor, h: Tensor, weights, biases, pools_b, ranks, masked: bool = False):
        (M, K), S, R, b = x.shape, len(pools_b), h.shape[2], pools_b[0]
        self.widths, self.absent, transposed = [w.shape[0] for w in weights], (None,) * (MAX_SLICES - S), weights[0].stride(1) == 1
        BN = _columns(M, self.widths, programs(x.device), masked)
        tiles = triton.cdiv(M, BM) * sum(triton.cdiv(N, BN) for N in self.widths)
        w_block, y_block = (BN, BK) if transposed else (BK, BN), (BM, BN // 2)
        blocks = ((BM, BK), *(w_block,) * S, *self.absent, *(y_block,) * S, *self.absent)
        ints = (tuple(self.widths), tuple(t.stride(0) for t in pools_b), M, K, b.shape[0], R, *b.stride()[1:])
        ints += (h.stride(0), h.stride(1), stride0(ranks))
        constants = {"S": S, "BM": BM, "BN": BN, "BK": BK, "BR": block_rank(R, 64 if BN == 256 else 32), "GROUP_M": 8, "TRANSPOSED": transposed}
        constants |= {"HAS_BIAS": biases is not None, "HAS_RANKS": ranks is not None, "MASKED": masked, "PREC": precision(x.dtype)}
        grid = (min(programs(x.device), tiles),)
        self.launch = Launcher(segmented_tma_kernel, grid, blocks, ints, 8, 3 if BN == 256 else 4, **constants)

    def __call__(self, stream: int, x: Tensor, y: Tensor, h: Tensor, weights, biases, pools_b, ranks, ids, table, mask=None, p=None) -> None:
        ys = (y,) if len(self.widths) == 1 else y.split(self.widths, 1)
        described = (x, *_described(weights), *self.absent, *ys, *self.absent)
        self.launch(stream, described, (h, ids, ranks, mask, p, biases, Pointers(pools_b)))
