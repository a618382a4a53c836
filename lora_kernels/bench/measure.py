"""One case: bind every contestant to every operand set, let the gate refuse, time the rest, write the record."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable

import torch

from .. import testing
from . import memory, roofs
from .contestants import Bound, Contestant
from .gate import Gate, run
from .problem import Operands, count_sets, floor_bytes, floor_flops, operands
from .shapes import Case
from .timing import Ratio, quantile, time_calls

HOPELESS = 5.0  # seconds that one call may take on a CPU: a contestant runs ten times and more before its last round
REFERENCES = ("base", "naive", "peft", "peft_mixed", "loop")  # whose times the others are put in ratio to


def _call(bounds: list[Bound], sets: list[Operands], case: Case) -> Callable[[int], object]:
    n = len(sets)
    if case.backward:

        def step(i: int):
            bound = bounds[i % n]
            y = bound.forward()
            return torch.autograd.grad(y, bound.leaves, sets[i % n].dy.view(y.shape))

        return step
    if case.dropout:
        return lambda i: bounds[i % n].forward()

    def forward(i: int):
        with torch.no_grad():
            return bounds[i % n].forward()

    return forward


def measure(case: Case, contestants: Iterable[Contestant], device: torch.device, budget: float) -> dict:
    """The record of one case: floor, and per contestant times, ratios and memory, or why there are none."""
    sets = [operands(case, device, seed) for seed in range(count_sets(case, device))]
    gate = Gate(case, sets[0])
    results: dict[str, dict] = {}
    calls: dict[str, Callable[[int], object]] = {}
    for contestant in contestants:
        entry = results[contestant.name] = {}
        missing = contestant.missing(case, device)
        if missing:
            entry["absent"] = missing
            continue
        try:
            bounds = [contestant.bind(ops, case) for ops in sets]
            start = time.perf_counter()
            refused, entry["errors"] = gate.refuses(contestant, bounds[0])
            if device.type == "cpu" and time.perf_counter() - start > HOPELESS:  # or it was compiled: a second call tells
                start = time.perf_counter()
                run(bounds[0], case, sets[0].dy)
                if time.perf_counter() - start > HOPELESS:
                    entry["absent"] = f"a call takes more than {HOPELESS:g} s"
                    continue
            if refused is None and case.backward:
                entry["saved_bytes"] = testing.saved_bytes(bounds[0].forward, weights=(sets[0].weight, *bounds[0].leaves[1:]))
            if refused is None:
                entry["peak_bytes"] = memory.peak(lambda b=bounds[0]: run(b, case, sets[0].dy), device)
        except Exception as error:  # someone else's code: whatever it raises, the others go on
            refused = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        if refused:
            entry["refused"] = refused
            continue
        calls[contestant.name] = _call(bounds, sets, case)
    del gate
    gc.collect()
    times, timers = time_calls(calls, len(sets), budget, device) if calls else ({}, {})
    for name, seconds in times.items():
        results[name] |= _summary(seconds, timers[name], times)
    moved, computed = floor_bytes(case), floor_flops(case)
    floor = {"bytes": moved, "flops": computed, "us": 1e6 * roofs.floor_seconds(moved, computed, device, case.dtype)}
    return {"case": case.as_dict(), "sets": len(sets), "floor": floor, "results": results}


def _summary(seconds: list[float], timer: str, times: dict[str, list[float]]) -> dict:
    ratios = {}
    for name in REFERENCES:
        if name in times:
            ratio = Ratio.of(seconds, times[name])
            ratios[name] = {"median": ratio.median, "q20": ratio.q20, "q80": ratio.q80}
    us = [1e6 * s for s in seconds]
    return {"us": quantile(us, 0.5), "q20": quantile(us, 0.2), "q80": quantile(us, 0.8), "rounds": len(us), "timer": timer, "over": ratios}
