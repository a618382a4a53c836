"""What the many-adapter kernels share: choosing among slices, true ranks, per-adapter dropout; and for their launchers, addresses and chunks."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _device
from ..tuning import store
from ..tuning.plan import block_rank

MAX_SLICES = 3  # of one launch: `pick` chooses among them

# What follows from M and the table's layout: specialised, every new batch size could mean a new compile in the middle of serving.
UNSPECIALISED = [
    "M",
    "P",
    "B",
    "srk",
    "ssc",
    "max_groups",
    "tiles",
    "helpers",
    "o_order",
    "o_seg_of",
    "o_seg_start",
    "o_seg_adapter",
    "o_blk_start",
    "o_blk_len",
    "o_blk_adapter",
]


def jit(fn):
    """`triton.jit` with the arguments of UNSPECIALISED that `fn` has left as they come."""
    names = fn.__code__.co_varnames[: fn.__code__.co_argcount]
    return triton.jit(fn, do_not_specialize=[name for name in UNSPECIALISED if name in names])


@triton.jit
def pick(items, i, S: tl.constexpr):
    """items[i] for a run-time i, items being a tuple of S <= 3 pointers, numbers or descriptors."""
    chosen = items[0]
    if S > 1:  # noqa: SIM102  S is known when compiling, i is not
        if i == 1:
            chosen = items[1]
    if S > 2:  # noqa: SIM102
        if i == 2:
            chosen = items[2]
    return chosen


@triton.jit
def slice_of(pn, Ns, S: tl.constexpr, BN: tl.constexpr):
    """(slice, tile within it, first column of y) of column tile pn, the slices being tiled one after another."""
    i = 0
    first = 0
    tile = pn
    if S > 1:
        tiles = tl.cdiv(Ns[0], BN)
        if pn >= tiles:
            i = 1
            first = Ns[0]
            tile = pn - tiles
    if S > 2:
        tiles = tl.cdiv(Ns[0], BN) + tl.cdiv(Ns[1], BN)
        if pn >= tiles:
            i = 2
            first = Ns[0] + Ns[1]
            tile = pn - tiles
    return i, tile, first


@triton.jit
def rank_of(ranks_ptr, i, adapter, R, srk, HAS_RANKS: tl.constexpr):
    """True rank, held within the pool's."""
    r = R
    if HAS_RANKS:
        r = tl.minimum(tl.maximum(tl.load(ranks_ptr + i * srk + adapter), 0), R)
    return r


@triton.jit
def padded(rank):
    """Up to where a row of h `[M, H]` (`reference_batched.h_width`) is zero past its true rank: a mask that leaves loads of 16 bytes whole, as
    the true rank does not: with that one, ranks of 8 spilled in the TMA form."""
    return (rank + 15) // 16 * 16


@triton.jit
def load_b(b_ptr, adapter, rr, rn, rank, columns, sbl, sbn, sbr, VEC: tl.constexpr):
    """Ranks rr and columns rn of an adapter's B, zero past its true rank: there may lie anything, and inf or NaN times a zero of h is NaN.

    sbl and sbn count groups of VEC ranks (`rank_groups`), which are loaded whole and cleared afterwards. Offsets within an adapter are of 32
    bits, as addresses of 64 for every column spill in the TMA form; VEC 0 is for those that need more.
    """
    group: tl.constexpr = max(VEC, 1)
    within = rn * (sbn * group) + rr * sbr
    if VEC == 0:
        within = rn.to(tl.int64) * sbn + rr.to(tl.int64) * sbr
    b = tl.load(b_ptr + adapter.to(tl.int64) * (sbl * group) + within, mask=(rr < (rank + group - 1) // group * group) & columns, other=0.0)
    if VEC > 1:
        b = tl.where(rr < rank, b, 0.0)
    return b


@triton.jit
def drop_of(p):
    """(threshold, keep scale) of a dropout probability, rounded as `reference.drop_threshold` and `keep_scale` round."""
    exact = p * 65536.0  # a power of two: no rounding
    threshold = exact.to(tl.int32)
    rest = exact - threshold.to(tl.float32)
    threshold += ((rest > 0.5) | ((rest == 0.5) & (threshold % 2 == 1))).to(tl.int32)  # half to even
    kept = 65536 - threshold
    return threshold, tl.where(kept > 0, 65536.0 / tl.maximum(kept, 1).to(tl.float32), 0.0)


# ----------------------------------------------------------------------------------------------------------- for launchers


def rank_chunk(R: int) -> int:
    """Rank columns per product: the pool's rank, 16 to 64. True ranks are cut at the same places whatever the mix."""
    return block_rank(R, 64)


def rank_groups(pools_b: list[Tensor]) -> tuple[int, tuple[int, ...], tuple[int, int]]:
    """VEC of `load_b`, the ranks that can be loaded at once wherever a row starts; the sbl of all slices, sbn and sbr."""
    _, N, R = (max(sizes) for sizes in zip(*(b.shape for b in pools_b), strict=True))
    sbls, (sbn, sbr) = tuple(b.stride(0) for b in pools_b), pools_b[0].stride()[1:]
    if (N - 1) * sbn + (R - 1) * sbr >= 1 << 31:
        return 0, sbls, (sbn, sbr)
    vec = math.gcd(8, R, sbn, *sbls) if sbr == 1 else 1
    return vec, tuple(sbl // vec for sbl in sbls), (sbn // vec, sbr)


def unit_rows(*tensors: Tensor) -> bool:
    """Whether all have unit stride along their last dimension."""
    return all(t.stride(-1) == 1 or t.shape[-1] == 1 for t in tensors)


def stride0(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def precision(dtype: torch.dtype) -> str:
    """tl.dot's: no TF32 here, whatever torch's setting."""
    return "ieee" if dtype == torch.float32 else "tf32"


def arch(device: torch.device) -> int:
    """Compute capability as an integer, 90 for sm_90."""
    if device.type != "cuda":
        return store.ARCH
    major, minor = _device.cuda_capability(device.index or 0)
    return 10 * major + minor
