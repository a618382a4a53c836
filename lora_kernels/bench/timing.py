"""The timing protocol: all contestants in interleaved rounds of one process; medians with quantiles; ratios paired round by round."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Call = Callable[[int], object]  # runs set i of the rotating operands; the caller counts up

MIN_ROUNDS, MAX_ROUNDS = 7, 60
SLOW_ROUNDS, PATIENCE = 3, 4  # where MIN_ROUNDS would take more than PATIENCE budgets
SAMPLE = 5e-4  # a CPU sample repeats a short call for at least this many seconds: 20 times the cost of reading the clock twice


def quantile(values: list[float], q: float) -> float:
    """Linear interpolation between the two nearest order statistics."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


@dataclass(frozen=True)
class Ratio:
    """Median and 20/80 quantiles, over the rounds, of one contestant's time over another's in the same round."""

    median: float
    q20: float
    q80: float

    @classmethod
    def of(cls, ours: list[float], theirs: list[float]) -> Ratio:
        rounds = [a / b for a, b in zip(ours, theirs, strict=True)]
        return cls(statistics.median(rounds), quantile(rounds, 0.2), quantile(rounds, 0.8))

    @property
    def resolved(self) -> bool:
        """Whether the effect is larger than its spread; if not, the ratio is not printed."""
        return self.q80 - self.q20 < abs(self.median - 1)

    def __str__(self) -> str:
        return f"{self.median:.2f}" if self.resolved else f"({self.q20:.2f} to {self.q80:.2f})"


def time_cpu(calls: dict[str, Call], sets: int, budget: float, seed: int = 0) -> dict[str, list[float]]:
    """Seconds per call, one figure per round and contestant; about `budget` seconds in all, at least 7 rounds.

    First touch and warm-up come before the clock: every contestant runs once over every operand set, or until the budget is spent. A round
    runs all contestants in a new random order, so that a slow moment of the machine hits them alike. Where seven rounds would take more
    than four budgets there are fewer, but three.
    """
    shuffle, names = random.Random(seed), list(calls)
    cost = {}
    for name, call in calls.items():
        start = time.perf_counter()
        for i in range(sets):
            call(i)
            if (seconds := time.perf_counter() - start) > budget > 0:
                cost[name] = seconds / (i + 1)
                break
        if name in cost:
            continue
        start = time.perf_counter()
        call(0)
        call(1)
        cost[name] = max((time.perf_counter() - start) / 2, 1e-7)
    repeats = {name: max(1, int(SAMPLE / cost[name])) for name in names}
    one = sum(cost[name] * repeats[name] for name in names)
    fewest = min(MIN_ROUNDS, max(SLOW_ROUNDS, int(PATIENCE * budget / one))) if budget > 0 else MIN_ROUNDS
    times: dict[str, list[float]] = {name: [] for name in names}
    turn = 0
    for _ in range(min(MAX_ROUNDS, max(fewest, int(budget / one)))):
        shuffle.shuffle(names)
        for name in names:
            call, n = calls[name], repeats[name]
            start = time.perf_counter()
            for i in range(turn, turn + n):
                call(i)
            times[name].append((time.perf_counter() - start) / n)
            turn += n
    return times


def _waits(call: Call) -> bool:
    """Whether a call waits for the device (.tolist(), .item()) and so cannot be captured.

    To be known before the capture: one that fails leaves torch on the capture's stream, its generator and allocator still capturing.
    """
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(0)
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


class _Replay:
    """One contestant over all operand sets: a CUDA graph where it can be captured, else its calls in a row."""

    def __init__(self, call: Call, sets: int):
        self.call, self.sets = call, sets
        self.graph: torch.cuda.CUDAGraph | None = None
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for i in range(max(sets, 3)):
                call(i)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        if _waits(call):
            return
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):  # the outer one for a capture that fails
                for i in range(sets):
                    call(i)
            self.graph = graph
        except RuntimeError:  # for another reason
            torch.cuda.synchronize()

    def __call__(self) -> None:
        if self.graph is not None:
            self.graph.replay()
            return
        for i in range(self.sets):
            self.call(i)

    @property
    def timer(self) -> str:
        return "events" if self.graph is None else "graph"


def time_cuda(calls: dict[str, Call], sets: int, budget: float, seed: int = 0) -> tuple[dict[str, list[float]], dict[str, str]]:
    """As `time_cpu`, in GPU seconds between CUDA events; and per contestant whether a CUDA graph was replayed.

    One graph holds the calls of all operand sets, which together exceed the L2 cache several times: each call finds its operands cold,
    and launch gaps stay out. What cannot be captured runs eagerly behind a spinning kernel, so that the host is ahead when it starts.
    """
    shuffle, names = random.Random(seed), list(calls)
    replays = {name: _Replay(call, sets) for name, call in calls.items()}
    torch.cuda.synchronize()

    def once(name: str) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(200_000)  # about 0.1 ms: the events and the first launches are queued behind it
        start.record()
        replays[name]()
        end.record()
        return start, end

    begin = time.perf_counter()
    for name in names:
        once(name)
    torch.cuda.synchronize()
    rounds = int(budget / max(time.perf_counter() - begin, 1e-6))
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(min(MAX_ROUNDS, max(MIN_ROUNDS, rounds))):
        shuffle.shuffle(names)
        events = {name: once(name) for name in names}
        torch.cuda.synchronize()
        for name, (start, end) in events.items():
            times[name].append(start.elapsed_time(end) / 1e3 / sets)
    return times, {name: replay.timer for name, replay in replays.items()}


def time_calls(calls: dict[str, Call], sets: int, budget: float, device: torch.device) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Times per contestant and round, and the timer used for each."""
    if device.type == "cuda":
        return time_cuda(calls, sets, budget)
    return time_cpu(calls, sets, budget), dict.fromkeys(calls, "clock")
