"""The plan of a call: implementation, kernel form, block sizes. Measured tables first (`store`), then this pure-Python heuristic."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

IMPLEMENTATIONS = ("cuda", "triton", "torch")
FORMS = ("column0", "tma", "pointer")
CUDA_TILES = ((128, 256), (128, 192), (128, 128), (256, 128))  # BM, BN of csrc/cuda

# One H200: bf16 cuBLAS at 8192^3, and device-to-device copy. The cost model below is in these units.
FLOPS = 790e12
BYTES = 4.3e12


# BM, BN, BK, warps, stages of the pointer kernel. All keep to the 99 KB of shared memory of sm_86, sm_89 and sm_120; operands whose rows
# cannot be read 16 bytes at a time (and fp32) need an address per element, and spill with a larger one.
POINTER_TILE = (128, 128, 32, 8, 4)
ODD_TILE = (64, 64, 32, 4, 2)
ODD_TILE_F32 = (32, 64, 32, 4, 2)


@dataclass(frozen=True)
class Plan:
    """How one base GEMM + rank-R update is computed.

    implementation: "triton", "cuda", or "torch" (cuBLAS + in-place addmm_). form: "column0" makes h in the same launch, "tma" and "pointer" take it
    from a shrink launch before ("cuda" has the first two). cluster: CTAs that share a tile of W ("cuda"). block_k, warps and stages are
    Triton's to choose; the CUDA kernels have their own, 0 stands for them.
    """

    implementation: str
    form: str
    block_m: int
    block_n: int
    block_k: int = 0
    warps: int = 0
    stages: int = 0
    group_m: int = 8
    cluster: int = 1


@dataclass(frozen=True)
class Problem:
    """What a plan is chosen for: op "fwd" (y) or "dx"; M, N, K, R of that GEMM (for dx, N is the layer's in and K its out features)."""

    op: str
    M: int
    N: int
    K: int
    R: int
    dtype: torch.dtype
    dropout: bool = False


def cuda_plans(problem: Problem) -> list[Plan]:
    """Every CUDA kernel for this problem. The column-0 form and the masked dx exist for the widest tile alone."""
    plans = []
    for form in ("column0", "tma") if problem.R <= 64 and not problem.dropout else ("tma",):
        tiles = CUDA_TILES[:1] if form == "column0" or (problem.op == "dx" and problem.dropout) else CUDA_TILES
        plans += [Plan("cuda", form, *tile, group_m=group_m, cluster=cluster) for tile in tiles for cluster in (2, 1) for group_m in (8, 16)]
    return plans


def tma_arch(arch: int) -> bool:
    """Whether the TMA kernels serve this architecture: Hopper and data-centre Blackwell (sm_120 has TMA, but 99 KB of shared memory)."""
    return 90 <= arch < 120


def block_rank(R: int, most: int) -> int:
    """Rank block: the power of two that covers R, at least 16 (the least a tensor-core product takes), at most `most`."""
    return min(most, max(16, 1 << (R - 1).bit_length()))


def whole_rank(R: int) -> bool:
    """Whether a rank block is loaded without a mask, or is small: larger masked ones take registers, so that the kernels have smaller blocks
    for them, and the column-0 form, where 24 ranks spill on sm_100, none.
    """
    return R % 16 == 0 or R <= 16


def heuristic(problem: Problem, arch: int) -> Plan:
    """The plan when no table has measured one. `arch` is the compute capability as an integer, 90 for sm_90."""
    if problem.dtype == torch.float32 or not tma_arch(arch):
        return Plan(_implementation(problem), "pointer", *POINTER_TILE)
    form = "column0" if problem.R <= 64 and not problem.dropout and whole_rank(problem.R) else "tma"
    tile = (128, 256, 64, 8, 3) if problem.M > 64 and problem.N > 128 else (128, 128, 64, 8, 4)
    return Plan(_implementation(problem), form, *tile)


def _implementation(problem: Problem) -> str:
    """A fused kernel where the base GEMM is long enough for a good Triton GEMM to reach cuBLAS, else "torch".

    Published figures put such GEMMs at 94 to 102 % of cuBLAS for K >= 2048 with a full machine (research in docs/measured.md); the
    in-place addmm_ costs 2 M N elements of traffic and the separate shrink M K, about 14 % at 8192 x 4096 x 4096. Below, not worth it.
    """
    if problem.dtype == torch.float32:
        return "torch"  # without TF32, tl.dot is plain FMA
    if problem.M < 1024 or problem.K < 2048 or problem.N < 1024 or (problem.R > 64 and not whole_rank(problem.R)):
        return "torch"  # such ranks take a loop of many short products
    return "triton"  # "cuda" (sm_90) only where a measured table names it: docs/measured.md says what those kernels have shown so far


def fit(plan: Plan, problem: Problem, regular: bool, rank_regular: bool) -> Plan:
    """The plan with its form stepped down to what the call allows: column0 -> tma -> pointer -> pointer with small tiles.

    regular: x, W and y are 16-bit with contiguous, 16-byte aligned rows, as TMA and wide loads want; rank_regular: so is the adapter that
    makes h.
    """
    if plan.implementation == "cuda":  # the call came down from the CUDA kernels, whose tiles are their own
        plan = heuristic(problem, 90)
    if not regular:
        BM, BN, BK, warps, stages = ODD_TILE_F32 if problem.dtype == torch.float32 else ODD_TILE
        return replace(plan, form="pointer", block_m=BM, block_n=BN, block_k=BK, warps=warps, stages=stages)
    if plan.form == "column0" and (problem.R > 64 or problem.dropout or not rank_regular):
        return replace(plan, form="tma")
    return plan
