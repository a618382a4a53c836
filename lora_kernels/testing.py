"""What tests and benchmarks share: the error criterion, timers that survive a noisy machine, saved bytes, the dropout mask."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from . import _checks, reference
from .ops._call import draw_seed

ALLOWED_RATIO = 2.0  # what `error_ratio` may reach before a result counts as wrong

# ----------------------------------------------------------------------------------------------------------------- errors


def rmse(got: Tensor, exact: Tensor) -> float:
    """Root mean square of got - exact, in float64 on exact's device; 0 for empty tensors, inf where got is not finite and exact is."""
    if got.shape != exact.shape:
        raise ValueError(f"rmse: got {list(got.shape)}, exact {list(exact.shape)} do not belong together")
    if got.numel() == 0:
        return 0.0
    diff = got.detach().to(exact.device, torch.float64) - exact.detach().to(torch.float64)
    error = diff.square().mean().sqrt().item()
    return error if error == error else float("inf")


def relative_rmse(got: Tensor, exact: Tensor) -> float:
    """`rmse` over the root mean square of exact (1 where exact is all zeros)."""
    norm = rmse(exact, torch.zeros_like(exact)) or 1.0
    return rmse(got, exact) / norm


def error_ratio(got: Tensor, eager: Tensor, exact: Tensor) -> float:
    """got's error against that of eager PyTorch in the same dtype; up to 2 passes.

    With e(t) = rmse(t, exact) and u = unit roundoff of got's dtype x root mean square of exact:

        e(got) / (e(eager) + u / 2)        so that "<= 2" reads e(got) <= 2 e(eager) + u

    got, eager: any shape, the dtype under test; exact: the same shape in float64, computed from the same (rounded) inputs.
    The floor u keeps the ratio meaningful where eager happens to be exact. 0 / 0 is 0. Raises ValueError on a wrong shape or dtype.
    """
    if got.shape != exact.shape or eager.shape != exact.shape or got.dtype != eager.dtype:
        shapes = f"got {got.dtype} {list(got.shape)}, eager {eager.dtype} {list(eager.shape)}, exact {list(exact.shape)}"
        raise ValueError(f"error_ratio: {shapes} do not belong together")
    error = rmse(got, exact)
    if error == 0.0:
        return 0.0
    unit = torch.finfo(got.dtype).eps / 2 * rmse(exact, torch.zeros_like(exact))
    scale = rmse(eager, exact) + unit / 2
    return error / scale if scale > 0 else float("inf")


# ---------------------------------------------------------------------------------------------------------------- dropout


def dropout_mask(seed: int | Tensor, M: int, K: int, p: float) -> Tensor:
    """The keep mask, bool `[M, K]`, that every backend uses for this seed; kept elements are scaled by `keep_scale(p)`."""
    _checks.check_dropout("dropout_mask", p)
    seed = draw_seed(seed, seed.device if isinstance(seed, Tensor) else torch.device("cpu"), "dropout_mask")
    return reference.unpack_bits(reference.dropout_mask(seed, M, K, p), K)


def keep_scale(p: float) -> float:
    """What every backend multiplies kept elements by: 1 / (1 - q), where q is p rounded to a multiple of 1 / 65536.

    Each element is dropped with probability q, so the expectation of a scaled mask is exactly 1; 1 / (1 - p) would be off by up to 2^-17 / (1 - p).
    """
    _checks.check_dropout("keep_scale", p)
    return reference.keep_scale(p)


# ------------------------------------------------------------------------------------------------------------------- time


def time_interleaved(fns: dict[str, Callable[[], object]], rounds: int = 20, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds per call of every function, `rounds` of them each, on the CPU.

    Each round calls all functions once, in an order that rotates, so that a slow moment of the machine hits all alike:
    compare the columns round by round (`ratio`), not their sums.
    """
    names = list(fns)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, rounds):
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            start = time.perf_counter()
            fns[name]()
            if turn >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def time_cuda_cold(fns: dict[str, Callable[[], object]], rounds: int = 50, warmup: int = 5) -> dict[str, list[float]]:
    """Seconds of GPU time per call of every function, interleaved, each call with a cold L2.

    Before each call a buffer of four times the L2 cache is read (written lines would still be on their way to memory during the call).
    That also keeps the GPU busy while the host enqueues the call, so the event pair does not time an idle stream; for a call of many
    small launches capture it in a CUDA graph first.
    """
    device = torch.cuda.current_device()
    flush = torch.zeros(torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.float32, device=device)
    total = torch.zeros((), device=device)
    names = list(fns)
    events: dict[str, list[tuple]] = {name: [] for name in names}
    for turn in range(-warmup, rounds):
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.sum(flush, 0, out=total)
            start.record()
            fns[name]()
            end.record()
            if turn >= 0:
                events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) / 1e3 for start, end in pairs] for name, pairs in events.items()}


def timer(device: torch.device | str) -> Callable[..., dict[str, list[float]]]:
    """`time_cuda_cold` for a CUDA device, `time_interleaved` for any other."""
    return time_cuda_cold if torch.device(device).type == "cuda" else time_interleaved


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Median over the rounds of ours / theirs: below 1, ours is faster."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


# ----------------------------------------------------------------------------------------------------------------- memory


def saved_bytes(forward: Callable[[], object], weights: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward of `forward()`, each storage once, without those of `weights`.

    Layer inputs count: they stay alive only because the backward needs them.
    """
    known = {w.untyped_storage().data_ptr() for w in weights}
    kept: dict[int, Tensor] = {}  # the tensors themselves, so that no storage is freed and its address used again

    def pack(t: Tensor) -> Tensor:
        kept.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = forward()
    total = sum(t.untyped_storage().nbytes() for ptr, t in kept.items() if ptr not in known)
    del out
    return total
