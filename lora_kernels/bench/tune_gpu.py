"""The GPU's plans: Triton forms and tiles that fit the device, the CUDA kernels, and cuBLAS + addmm_, each checked before it is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from unittest import mock

import torch
from torch import Tensor

from .. import _device, reference, testing
from .._errors import BackendError, message
from ..ops import _registry
from ..tuning import store
from ..tuning.plan import FORMS, Plan, Problem, cuda_plans, heuristic, tma_arch
from .problem import MAX_SETS, SCALING, Operands, count_sets, exact, operands
from .shapes import Case
from .timing import Ratio, quantile, time_cuda

# BM, BN, BK, warps, stages; the first QUICK of them for large problems on Hopper
TILES = (
    (128, 256, 64, 8, 3),
    (256, 128, 64, 8, 3),
    (128, 256, 64, 8, 4),
    (128, 128, 64, 8, 4),
    (128, 128, 64, 4, 4),
    (128, 128, 32, 8, 4),
    (64, 256, 64, 4, 4),
    (128, 64, 64, 4, 4),
    (64, 128, 64, 4, 5),
    (64, 64, 64, 4, 5),
)
QUICK = 4
MAX_ACCUMULATORS = 128  # fp32 accumulators per thread; above, tiles spill: 128 x 256 wants 8 warps


def fits(plan: Plan, problem: Problem, shared_limit: int) -> bool:
    """Whether the pipelined tiles fit into shared memory and the accumulators into registers, by the least a kernel can need."""
    shared = plan.stages * plan.block_k * (plan.block_m + plan.block_n) * problem.dtype.itemsize
    return shared <= shared_limit and plan.block_m * plan.block_n <= MAX_ACCUMULATORS * 32 * plan.warps


def candidates(problem: Problem, arch: int, shared_limit: int, cuda: bool, quick: bool = False) -> list[Plan]:
    """Distinct plans that can run: the heuristic's first, then cuBLAS, the CUDA kernels where they are built, the Triton tiles that fit.

    quick: the few Triton tiles that large problems want, and no pointers where there is TMA.
    """
    first = heuristic(problem, arch)
    plans = [replace(first, implementation=name) for name in sorted(("torch", "triton"), key=lambda name: name != first.implementation)]
    plans += cuda_plans(problem) if cuda and arch == 90 else []
    for form in FORMS:
        if form != "pointer" and (not tma_arch(arch) or problem.dtype == torch.float32):
            continue
        if (form == "column0" and (problem.R > 64 or problem.dropout)) or (form == "pointer" and quick and tma_arch(arch)):
            continue
        plans += [Plan("triton", form, *tile) for tile in TILES[: QUICK if quick else None]]
    return list(dict.fromkeys(plan for plan in plans if plan.implementation != "triton" or fits(plan, problem, shared_limit)))


def label(plan: Plan) -> str:
    if plan.implementation == "torch":
        return "torch"
    if plan.implementation == "cuda":
        return f"cuda {plan.form} {plan.block_m}x{plan.block_n} c{plan.cluster} g{plan.group_m}"
    return f"{plan.form} {plan.block_m}x{plan.block_n}x{plan.block_k} w{plan.warps} s{plan.stages}"


class GpuTarget:
    tokens = (64, 256, 1024, 4096, 16384)

    def __init__(self, device: torch.device, quick: bool = False):
        self.device, self.quick = torch.device(device.type, device.index or 0), quick

    def missing(self) -> str | None:
        if not torch.cuda.is_available():
            return "there is no GPU"
        found = _registry.provider("triton")
        return found if isinstance(found, str) else None

    def head(self) -> dict[str, str]:
        return {"device": torch.cuda.get_device_name(self.device)}

    def file_name(self) -> str:
        return store.table_name(torch.cuda.get_device_name(self.device))

    def pack(self, entries: list[dict]) -> dict:
        return {"entries": entries}

    def unpack(self, data: dict) -> list[dict]:
        for entry in data["entries"]:
            store.read_entry(entry)
        return list(data["entries"])

    def jobs(self, sizes: list[tuple[int, int]], tokens: tuple[int, ...], ranks: tuple[int, ...]) -> list[dict]:
        """For "dx" N and K change places: N is the layer's in features."""
        jobs = []
        for K, N in sizes:
            for R in ranks:
                for M in tokens:
                    for op, n, k in (("fwd", N, K), ("dx", K, N)):
                        jobs += [{"op": op, "M": M, "N": n, "K": k, "R": R, "dtype": "bfloat16", "dropout": drop} for drop in (False, True)]
        return jobs

    def measure(self, job: dict) -> dict:
        calls, plans, skipped, sets = self.ready(job, cuda=not isinstance(_registry.provider("cuda"), str))
        if not calls:
            raise BackendError(message("no plan runs here", "; ".join(f"{name}: {why}" for name, why in skipped.items()), fix="lora-kernels check"))
        times, _ = time_cuda(calls, sets, budget=0.2)
        chosen = best(times)
        us = {name: 1e6 * quantile(seconds, 0.5) for name, seconds in times.items()}
        return {"plan": asdict(plans[chosen]), "chosen": chosen, "us": us, "skipped": skipped}

    def ready(self, job: dict, cuda: bool, most_sets: int = MAX_SETS) -> tuple[dict[str, Callable], dict[str, Plan], dict[str, str], int]:
        """Every candidate that compiles, runs and is right: its call over rotating operands, its plan; who is not, and why; how many sets rotate."""
        problem = Problem(job["op"], job["M"], job["N"], job["K"], job["R"], getattr(torch, job["dtype"]), job["dropout"])
        forward = problem.op == "fwd"
        N, K = (problem.N, problem.K) if forward else (problem.K, problem.N)
        case = Case("tune", job["op"], problem.M, K, N, problem.R, mode="forward" if forward else "forward+backward", dtype=job["dtype"])
        case = replace(case, dropout=0.05 if problem.dropout else 0.0)
        sets = [operands(case, self.device, seed) for seed in range(min(most_sets, count_sets(case, self.device)))]
        wanted = _Wanted(case, sets[0], problem)
        limit = torch.cuda.get_device_properties(self.device).shared_memory_per_block_optin
        major, minor = _device.cuda_capability(self.device.index)
        calls, plans, skipped = {}, {}, {}
        for plan in candidates(problem, 10 * major + minor, limit, cuda, self.quick):
            name = label(plan)
            try:
                with mock.patch.object(store, "choose", lambda problem, device, plan=plan: plan):  # what a call is prepared with
                    runs = [_prepare(plan, problem, case, ops) for ops in sets]
                    wrong = wanted.refuses(runs[0]())
            except Exception as error:  # out of shared memory or registers, or a compiler's failure
                wrong = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
            if wrong:
                skipped[name] = wrong
                continue
            calls[name], plans[name] = (lambda i, runs=runs: runs[i % len(runs)]()), plan
        return calls, plans, skipped, len(sets)


def kinds(jobs: list[dict]) -> list[dict]:
    """One job for each set of Triton kernels: they are compiled for op, rank, dtype and dropout, and for sizes that all are multiples of 16."""
    return list({(job["op"], job["R"], job["dtype"], job["dropout"]): job for job in reversed(jobs)}.values())[::-1]


def compile_kind(device: torch.device, quick: bool, job: dict) -> dict[str, str]:
    """For a process of its own: runs the Triton candidates of a job once, which leaves their kernels in Triton's cache. Returns who failed."""
    return GpuTarget(device, quick).ready(job, cuda=False, most_sets=1)[2]


def best(times: dict[str, list[float]]) -> str:
    """The fastest by median, unless its lead over the first (the heuristic's) is within the spread."""
    first = next(iter(times))
    fastest = min(times, key=lambda name: quantile(times[name], 0.5))
    return fastest if Ratio.of(times[fastest], times[first]).resolved else first


class _Wanted:
    """The check of one problem: y or dx against float64, with the mask every backend draws from this seed."""

    def __init__(self, case: Case, ops: Operands, problem: Problem):
        self.name = "y" if problem.op == "fwd" else "dx"
        keep = None
        if case.dropout:
            mask = reference.dropout_mask(_seed(ops), case.M, case.K, case.dropout)
            keep = reference.unpack_bits(mask, case.K), reference.keep_scale(case.dropout)
        self.exact = exact(case, ops, keep=keep)[self.name]
        self.eager = exact(case, ops, keep=keep, dtype=problem.dtype)[self.name]

    def refuses(self, got: Tensor) -> str | None:
        ratio = testing.error_ratio(got, self.eager, self.exact)
        return None if ratio <= testing.ALLOWED_RATIO else f"wrong: {ratio:.1f} times plain PyTorch's error"


def _seed(ops: Operands) -> Tensor:
    return torch.tensor([20], dtype=torch.int64, device=ops.x.device)


def _prepare(plan: Plan, problem: Problem, case: Case, ops: Operands) -> Callable[[], Tensor]:
    """The call that makes y (or dx), all its launches included, for the plan that `store.choose` now gives."""
    forward, p = problem.op == "fwd", case.dropout
    x, w, a, b, seed = ops.x.detach(), ops.weight, ops.lora_a, ops.lora_b, _seed(ops) if p else None
    if forward:
        args = (x, w, None, a, b, SCALING, p, seed)
    else:
        mask = reference.dropout_mask(seed, case.M, case.K, p) if p else x.new_empty(0, dtype=torch.int32)
        args = (ops.dy, x, w, a, b, x.new_empty(case.M, case.R), mask, SCALING, p, True, False, False)
    op = "lora_linear_fwd" if forward else "lora_linear_bwd"
    backend = store.order(op, args, _registry.LADDERS["cuda"])[0]
    refused = _registry.why_not(op, backend, "cuda", args)
    if refused:
        raise BackendError(refused)
    # Not through the op or its implementation: both remember what they prepared for these shapes, which is another plan's.
    run = _registry.provider(backend).OPS[op][0]
    prepare, prepare_nd = getattr(run, "prepare", None), getattr(run, "prepare_nd", None)
    if prepare_nd is not None:
        run = prepare_nd(args[0].shape[:1], *args, **({"trained": True} if forward else {}))
        if run is None:
            raise BackendError("no launch is prepared for operands of this kind")
    elif prepare is not None:
        run = prepare(*args)
    return lambda: run(*args)[0]
