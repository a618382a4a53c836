"""A model of the CUDA kernels' producers, consumers, barriers and flags that runs on the CPU in random interleavings.

Decisions (which unit, which slot, which phase, who resets) come from the kernels' own headers through `host`; this file only adds what
the hardware does: mbarriers with transaction counts, TMA boxes that land some time later, and threads that make progress in any order.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

WARPS = 4  # of a consumer warpgroup


class Barrier:
    """mbarrier: a phase ends when all arrivals are in and the transaction count is zero."""

    def __init__(self, arrivals: int):
        self.count = self.pending = arrivals
        self.tx = self.phases = 0

    def _settle(self):
        assert self.pending >= 0, "more arrivals than the phase takes"
        if self.pending == 0 and self.tx == 0:
            self.phases += 1
            self.pending = self.count

    def arrive(self, tx: int = 0):
        self.tx += tx
        self.pending -= 1
        self._settle()

    def complete(self, tx: int):
        self.tx -= tx
        self._settle()

    def passes(self, parity: int) -> bool:
        return self.phases % 2 != parity


@dataclass
class Problem:
    rows: int  # of units
    cols: int
    k_blocks: int
    r_blocks: int
    cluster: int
    clusters: int
    slots: int
    column0: bool
    masked: bool = False
    group_m: int = 2
    resident: int = 0  # clusters that the machine runs at a time; 0: all

    @property
    def units(self) -> int:
        return self.rows * self.cols


@dataclass
class Memory:
    """Global flags and what was computed."""

    ticket: int = 0
    ready: dict[int, int] = field(default_factory=dict)
    taken: dict[int, int] = field(default_factory=dict)
    published: set = field(default_factory=set)
    done: dict = field(default_factory=dict)


class Cta:
    def __init__(self, p: Problem):
        self.full = [Barrier(1) for _ in range(p.slots)]
        self.empty = [Barrier(2 * WARPS * p.cluster) for _ in range(p.slots)]
        self.mail_full = [Barrier(1) for _ in range(8)]
        self.mail = [None] * 8
        self.header = [None] * p.slots
        self.content = [{} for _ in range(p.slots)]  # box kind -> (m, n, block) it holds
        self.reading = [0] * p.slots  # consumer warpgroups that may be reading


class Simulation:
    def __init__(self, p: Problem, host, seed: int, memory: Memory | None = None):
        self.p, self.host, self.random, self.memory = p, host, random.Random(seed), memory or Memory()
        self.flying: list = []  # TMA boxes and mails that have not landed

    # ---- what the hardware does

    def land(self, i: int):
        self.flying.pop(i)()

    def load(self, cluster: list[Cta], targets: list[int], slot: int, kind: str, what: tuple):
        def one(cta: Cta):
            def arrive():
                assert not cta.reading[slot], f"{kind} lands in a slot that is being read"
                cta.content[slot][kind] = what
                cta.full[slot].complete(1)

            return arrive

        self.flying += [one(cluster[t]) for t in targets]

    # ---- producer thread and consumer warpgroup: generators that yield while they wait

    def boxes(self, unit, block: int, is_rank: bool) -> list[str]:
        """Boxes that one CTA loads for itself. Besides, "w0" and "w1" are the shares of W or B, each multicast to the whole cluster."""
        own_h = self.p.column0 and unit[1] == 0
        return (["x", "a"] if own_h else ["x"]) if not is_rank else ([] if own_h else ["h"])

    def blocks(self):
        base = [("base", k) for k in range(self.p.k_blocks)]
        rank = [("rank", r) for r in range(self.p.r_blocks)]
        return rank + base if self.p.masked else base + rank

    def producer(self, cluster: list[Cta], rank: int, index: int):
        p, host, me = self.p, self.host, cluster[rank]
        pushes = claims = 0

        def slot_phase():
            return host.ring(p.slots, pushes)

        while True:
            if p.column0:
                mail_slot, _, mail_phase = host.ring(8, claims)
                if rank == 0:
                    drawn = self.memory.ticket
                    self.memory.ticket += 1
                    if host.last_ticket(drawn, p.units, p.clusters):
                        self.memory.ticket = 0
                    u = host.ticket_unit(drawn, p.units)
                    for r in range(1, p.cluster):

                        def post(to=cluster[r], at=mail_slot, value=u):
                            to.mail[at] = value
                            to.mail_full[at].complete(1)

                        self.flying.append(post)
                else:
                    me.mail_full[mail_slot].arrive(1)
                    while not me.mail_full[mail_slot].passes(mail_phase):
                        yield
                    u = me.mail[mail_slot]
            else:
                u = host.static_unit(claims, index, p.clusters, p.units)
            claims += 1
            yield
            slot, _, phase = slot_phase()
            if u < 0:
                while not me.empty[slot].passes(phase ^ 1):
                    yield
                me.header[slot] = -1
                me.full[slot].arrive()
                return
            unit = host.raster_at(p, u)
            m = unit[0] * p.cluster + rank
            for name, block in self.blocks():
                slot, _, phase = slot_phase()
                while not me.empty[slot].passes(phase ^ 1):
                    yield
                me.header[slot] = u
                own = self.boxes(unit, block, name == "rank")
                me.full[slot].arrive(len(own) + p.cluster)
                yield
                for kind in own:
                    if kind == "h" and p.column0:
                        while self.memory.ready.get(m, 0) < 2:
                            yield
                        assert {(m, 0), (m, 1)} <= self.memory.published
                        before = self.memory.taken.get(m, 0)
                        self.memory.taken[m] = before + 1
                        if host.last_taker(before, p.cols):
                            self.memory.ready[m] = self.memory.taken[m] = 0
                    self.load(cluster, [rank], slot, kind, (m, unit[1], name, block))
                    yield
                self.load(cluster, list(range(p.cluster)), slot, f"w{rank}", (unit[0], unit[1], name, block))
                pushes += 1
                yield

    def consumer(self, cluster: list[Cta], rank: int, w: int):
        p, host, me = self.p, self.host, cluster[rank]
        taken = 0

        def wait():
            slot, _, phase = host.ring(p.slots, taken)
            while not me.full[slot].passes(phase):
                yield
            me.reading[slot] += 1

        def release(slot):
            me.reading[slot] -= 1
            for _ in range(WARPS):
                for cta in cluster:
                    cta.empty[slot].arrive()

        while True:
            slot, _, phase = host.ring(p.slots, taken)
            while not me.full[slot].passes(phase):
                yield
            u = me.header[slot]
            if u < 0:
                return
            unit = host.raster_at(p, u)
            m, n = unit[0] * p.cluster + rank, unit[1]
            names = self.blocks()
            for i, (name, block) in enumerate(names):
                yield from wait()
                slot, before, _ = host.ring(p.slots, taken)
                for kind in self.boxes(unit, block, name == "rank"):
                    assert me.content[slot][kind] == (m, n, name, block), f"consumer wants {(m, n, name, block)}, slot holds {me.content[slot]}"
                for r in range(p.cluster):
                    assert me.content[slot][f"w{r}"] == (unit[0], n, name, block)
                yield
                first, last = name != names[i - 1][0] or i == 0, i == len(names) - 1 or names[i + 1][0] != name
                if name == "rank":
                    release(slot)
                else:  # one slot late: the wgmmas of this slot may still run
                    if not first:
                        release(before)
                    if last:
                        release(slot)
                taken += 1
                if name == "base" and last and p.column0 and n == 0:
                    self.memory.published.add((m, w))
                    yield
                    if p.cols > 1:
                        self.memory.ready[m] = self.memory.ready.get(m, 0) + 1
                yield
            assert (m, n, w) not in self.memory.done, "tile computed twice"
            self.memory.done[m, n, w] = True

    def run(self) -> Memory:
        p = self.p
        waiting = list(range(p.clusters))
        self.random.shuffle(waiting)  # no assumption about the order in which CTAs start
        running: dict[int, list] = {}
        idle = 0
        while waiting or running or self.flying:
            while waiting and len(running) < (p.resident or p.clusters):
                index = waiting.pop()
                ctas = [Cta(p) for _ in range(p.cluster)]
                actors = [self.producer(ctas, r, index) for r in range(p.cluster)]
                running[index] = actors + [self.consumer(ctas, r, w) for r in range(p.cluster) for w in range(2)]
            choices = len(self.flying) + sum(map(len, running.values()))
            pick = self.random.randrange(choices)
            if pick < len(self.flying):
                self.land(pick)
                idle = 0
                continue
            before = self.snapshot()
            index, actors = self.random.choice(list(running.items()))
            actor = self.random.choice(actors)
            for _ in range(self.random.randrange(1, 12)):
                if next(actor, "end") == "end":
                    actors.remove(actor)
                    break
            if not actors:
                del running[index]
            idle = idle + 1 if before == self.snapshot() else 0
            assert idle < 4000, f"deadlock: {p}"
        return self.memory

    def snapshot(self):
        return len(self.flying), len(self.memory.done), self.memory.ticket, sum(self.memory.taken.values()), sum(self.memory.ready.values())
