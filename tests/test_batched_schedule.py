"""Plain-Python models of the counters of decode (kernels/batched_decode.py) and prefill (kernels/batched_tma.py) under hostile schedules.

Each program is a generator that stops after every access to shared memory; a scheduler picks who goes on, with as few programs resident as it
likes. Memory is sequentially consistent here: what the model shows is counting, waiting and resetting; the ordering of plain loads and stores
is argued in the kernel's file.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

TICKET, GROUPS, EXITS, COUNTERS = range(4)
WAIT = object()


class Stuck(AssertionError):
    """Every resident program waits and nobody can go on."""


@dataclass
class Launch:
    """One launch: `tiles` column tiles x `split` programs, `blocks` token blocks, `groups` of h with `parts` units each, or one (`whole`)."""

    sync: list[int]
    tiles: int
    split: int
    blocks: int
    groups: int
    parts: int
    max_groups: int
    whole: bool = False
    wait_first: bool = False  # the fault a single resident program must expose
    early_reset: bool = False  # the fault a second launch must expose
    done: Counter = field(default_factory=Counter)
    part_of: Counter = field(default_factory=Counter)
    published: set = field(default_factory=set)
    base: set = field(default_factory=set)
    lora: Counter = field(default_factory=Counter)
    stored: Counter = field(default_factory=Counter)

    def add(self, at: int, n: int) -> int:
        before = self.sync[at]
        self.sync[at] += n
        return before

    @property
    def units(self) -> int:
        return self.groups * (1 if self.whole else self.parts)

    def wait(self):
        while self.sync[GROUPS] < self.units:
            yield WAIT

    def program(self, pn: int, ps: int):
        if self.wait_first:
            yield from self.wait()
        u = self.add(TICKET, 1)
        yield
        while u < self.units:
            self.done[u] += 1
            yield
            if self.whole:
                self.published.add(u)
                yield
            else:
                yield from self.part(u // self.parts)
            self.add(GROUPS, 1)
            yield
            u = self.add(TICKET, 1)
            yield
        self.base.add((pn, ps))
        yield
        if ps < self.blocks:
            yield from self.wait()
            for block in range(ps, self.blocks, self.split):
                assert len(self.published) == self.groups, "h read before it was published"
                self.lora[pn, block] += 1
                yield
        arrived = self.add(COUNTERS + self.max_groups + pn, 1)
        yield
        if arrived == self.split - 1:
            assert all((pn, s) in self.base for s in range(self.split)), "y summed before all parts were stored"
            assert all(self.lora[pn, b] == 1 for b in range(self.blocks)), "y summed before the low-rank terms were stored"
            self.stored[pn] += 1
            self.sync[COUNTERS + self.max_groups + pn] = 0
            yield
        left = self.add(EXITS, 1)
        yield
        if left == (0 if self.early_reset else self.tiles * self.split - 1):
            for at in (TICKET, GROUPS, EXITS):
                self.sync[at] = 0
                yield

    def part(self, group: int):
        self.part_of[group] += 1
        yield
        arrived = self.add(COUNTERS + group, 1)
        yield
        if arrived == self.parts - 1:
            assert self.part_of[group] == self.parts, "summed before all parts were stored"
            self.published.add(group)
            yield
            self.sync[COUNTERS + group] = 0
            yield

    def run(self, resident: int, rng: random.Random) -> None:
        """Programs start in launch order, at most `resident` at a time, and are stepped in an arbitrary order."""
        waiting = [(pn, ps) for ps in range(self.split) for pn in range(self.tiles)]
        running: list = []
        idle = 0
        while waiting or running:
            while waiting and len(running) < resident:
                running.append(self.program(*waiting.pop(0)))
            program = rng.choice(running) if rng.random() < 0.7 else running[-1]
            try:
                idle = idle + 1 if next(program) is WAIT else 0
            except StopIteration:
                running.remove(program)
                idle = 0
            if idle > 60 * len(running):  # each has been asked many times over
                raise Stuck(f"{len(running)} programs wait, {len(waiting)} have not started")
        assert self.done == Counter(range(self.units))
        assert self.stored == Counter(range(self.tiles))
        assert not any(self.sync), f"counters left behind: {self.sync}"


def launches(rng: random.Random, **faults):
    """Launches of different mixes that share one sync buffer, as layers and graph replays do."""
    max_groups = 12
    sync = [0] * (COUNTERS + max_groups + 8)
    for _ in range(3):
        blocks = rng.randint(0, 6)
        groups = blocks * rng.choice([1, 2])
        yield Launch(sync, rng.randint(1, 6), rng.choice([1, 2, 4]), blocks, groups, rng.choice([1, 3, 8]), max_groups, rng.random() < 0.5, **faults)


def run_launches(seeds: int, resident: int, **faults) -> None:
    for seed in range(seeds):
        rng = random.Random(seed)
        for launch in launches(rng, **faults):
            launch.run(resident, rng)


@pytest.mark.parametrize("resident", [1, 2, 5, 1000])
def test_every_unit_once_nobody_stuck_all_counters_back(resident):
    run_launches(60, resident)


def test_the_model_sees_a_wait_on_work_that_cannot_run():
    with pytest.raises(Stuck):
        run_launches(20, 1, wait_first=True)


def test_the_model_sees_an_early_reset():
    with pytest.raises(AssertionError):
        run_launches(20, 3, early_reset=True)


@dataclass
class Prefill:
    """One launch of the TMA prefill that computes h itself: `helpers` of the programs take units first, `items` are the tiles."""

    sync: list[int]
    programs: int
    helpers: int
    items: int
    units: int
    last_help: bool = False  # the fault a single resident program must expose
    early_reset: bool = False  # the fault a second launch must expose
    stored: Counter = field(default_factory=Counter)
    h: Counter = field(default_factory=Counter)

    def add(self, at: int, n: int = 1) -> int:
        self.sync[at] += n
        return self.sync[at] - n

    def program(self):
        ticket = self.add(0)
        yield
        if ticket >= self.programs - self.helpers if self.last_help else ticket < self.helpers:
            u = self.add(1)
            yield
            while u < self.units:
                self.h[u] += 1
                yield
                self.add(2)
                yield
                u = self.add(1)
                yield
        done = 0
        for item in range(self.programs - 1 - ticket, self.items, self.programs):
            yield
            while done < self.units:
                done = self.sync[2]
                yield WAIT if done < self.units else None
            assert sum(self.h.values()) == self.units, "h read before it was stored"
            self.stored[item] += 1
            yield
        if self.add(3) == (0 if self.early_reset else self.programs - 1):
            for at in range(4):
                self.sync[at] = 0
                yield

    def run(self, resident: int, rng: random.Random) -> None:
        """At most `resident` programs at a time, stepped in an arbitrary order; which program comes first does not matter: tickets are drawn."""
        waiting, running, idle = self.programs, [], 0
        while waiting or running:
            while waiting and len(running) < resident:
                running.append(self.program())
                waiting -= 1
            program = rng.choice(running)
            try:
                idle = idle + 1 if next(program) is WAIT else 0
            except StopIteration:
                running.remove(program)
                idle = 0
            if idle > 60 * len(running):
                raise Stuck(f"{len(running)} programs wait, {waiting} have not started")
        assert self.h == Counter(range(self.units))
        assert self.stored == Counter(range(self.items))
        assert not any(self.sync), f"counters left behind: {self.sync}"


def run_prefill(seeds: int, resident: int, **faults) -> None:
    for seed in range(seeds):
        rng, sync = random.Random(seed), [0] * 4
        for _ in range(3):
            programs = rng.randint(2, 6)
            items = rng.choice([n for n in range(1, 20) if n % programs])
            Prefill(sync, programs, -items % programs, items, rng.choice([0, 1, 7]), **faults).run(resident, rng)


@pytest.mark.parametrize("resident", [1, 2, 5, 1000])
def test_prefill_every_tile_after_all_units_nobody_stuck_all_counters_back(resident):
    run_prefill(60, resident)


@pytest.mark.parametrize(("fault", "resident", "seen"), [("last_help", 1, Stuck), ("early_reset", 3, AssertionError)])
def test_the_model_of_prefill_sees_faults(fault, resident, seen):
    with pytest.raises(seen):
        run_prefill(20, resident, **{fault: True})
