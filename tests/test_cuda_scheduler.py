"""The CUDA kernels' scheduler, layouts and Philox, from their own headers compiled for the host, and the synchronisation run as a model."""

from __future__ import annotations

import ctypes
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cuda_model.model import Barrier, Memory, Problem, Simulation

from lora_kernels import reference

HERE = Path(__file__).parent
CXX = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler")


class Host:
    """The headers' functions."""

    def __init__(self, library: ctypes.CDLL):
        self.lib = library
        for name in ("k_major", "mn_major"):
            getattr(library, name).restype = ctypes.c_uint64

    def raster_at(self, p: Problem, u: int) -> tuple[int, int]:
        out = (ctypes.c_int * 2)()
        self.lib.raster_at(p.rows, p.cols, p.group_m, int(p.column0), u, out)
        return out[0], out[1]

    def ring(self, slots: int, pushes: int) -> tuple[int, int, int]:
        """(slot, slot before, phase)"""
        packed = self.lib.host_ring(slots, pushes)
        return packed & 255, packed >> 8 & 255, packed >> 16

    def static_unit(self, *args):
        return self.lib.host_static_unit(*args)

    def ticket_unit(self, *args):
        return self.lib.host_ticket_unit(*args)

    def last_ticket(self, *args):
        return self.lib.host_last_ticket(*args)

    def last_taker(self, *args):
        return self.lib.host_last_taker(*args)


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> Host:
    target = tmp_path_factory.mktemp("cuda_model") / "host.so"
    subprocess.run([CXX, "-std=c++17", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", HERE / "cuda_model" / "host.cpp", "-o", target], check=True)
    return Host(ctypes.CDLL(str(target)))


# -------------------------------------------------------------------------------------------------------------------- schedule


@pytest.mark.parametrize("column0", [False, True], ids=["update", "column0"])
def test_every_unit_once(host, column0):
    rng = random.Random(1)
    for _ in range(200):
        p = Problem(rng.randint(1, 40), rng.randint(1, 60), 1, 1, 1, 1, 3, column0, group_m=rng.randint(1, 12))
        seen = [host.raster_at(p, u) for u in range(p.units)]
        assert sorted(seen) == [(m, n) for m in range(p.rows) for n in range(p.cols)]
        if column0:
            assert seen[: p.rows] == [(m, 0) for m in range(p.rows)]


def test_static_order_deals_every_unit_once(host):
    rng = random.Random(2)
    for _ in range(100):
        units, clusters = rng.randint(1, 500), rng.randint(1, 132)
        dealt = []
        for cluster in range(clusters):
            turn = 0
            while (u := host.static_unit(turn, cluster, clusters, units)) >= 0:
                dealt.append(u)
                turn += 1
        assert sorted(dealt) == list(range(units))


def test_steps_cover_the_extent(host):
    for extent in range(8, 600, 8):
        steps = [host.lib.host_steps_of(b, extent) for b in range(-(-extent // 64))]
        assert all(1 <= s <= 4 for s in steps)
        assert all(s == 4 for s in steps[:-1])
        assert 0 <= 64 * (len(steps) - 1) + 16 * steps[-1] - extent < 16


CASES = [
    Problem(1, 1, 1, 1, 1, 1, 3, True),  # one tile: nothing is published
    Problem(1, 1, 1, 1, 2, 1, 3, True),
    Problem(3, 1, 2, 1, 1, 5, 3, True),  # more clusters than units
    Problem(4, 3, 1, 1, 2, 3, 4, True, resident=1),  # the machine holds one cluster at a time
    Problem(5, 4, 3, 1, 2, 4, 3, True, resident=2),
    Problem(2, 5, 7, 1, 1, 3, 4, True, resident=1),
    Problem(3, 3, 2, 4, 2, 2, 4, False),
    Problem(3, 3, 2, 2, 1, 4, 6, False, masked=True),
    Problem(2, 3, 1, 1, 2, 2, 4, False, masked=True),
    Problem(3, 3, 2, 0, 2, 2, 4, False),  # base product alone
]


def random_case(rng: random.Random) -> Problem:
    column0 = rng.random() < 0.6
    cluster, clusters = rng.choice((1, 2)), rng.randint(1, 6)
    r_blocks = 1 if column0 else rng.randint(1, 4)
    slots = 3 if column0 else rng.choice((4, 6))
    rows, cols, k_blocks = rng.randint(1, 5), rng.randint(1, 5), rng.randint(1, 6)
    masked = not column0 and rng.random() < 0.4
    return Problem(rows, cols, k_blocks, r_blocks, cluster, clusters, slots, column0, masked, rng.randint(1, 4), rng.randint(0, clusters))


def check(p: Problem, host: Host, seed: int, memory: Memory | None = None) -> Memory:
    memory = Simulation(p, host, seed, memory).run()
    tiles = {(m, n, w) for m in range(p.rows * p.cluster) for n in range(p.cols) for w in range(2)}
    assert set(memory.done) == tiles
    assert memory.ticket == 0
    assert not any(memory.ready.values())
    assert not any(memory.taken.values())
    return memory


@pytest.mark.parametrize("p", CASES, ids=lambda p: f"{p.rows}x{p.cols}-k{p.k_blocks}-r{p.r_blocks}-cluster{p.cluster}x{p.clusters}")
def test_model_on_edges(host, p):
    for seed in range(4):
        memory = check(p, host, seed)
        memory.done.clear()
        memory.published.clear()
        check(p, host, seed + 100, memory)  # a second launch on the flags as the first one left them


def test_model_on_random_problems(host):
    rng = random.Random(3)
    for seed in range(250):
        check(random_case(rng), host, seed)


def test_the_model_finds_an_early_load(host, monkeypatch):
    """The model must be able to fail: a producer that does not wait for `empty` overwrites what is being read."""
    honest = Barrier.passes
    monkeypatch.setattr(Barrier, "passes", lambda self, parity: self.count > 1 or honest(self, parity))
    with pytest.raises(AssertionError, match=r"being read|slot holds|more arrivals|twice"):
        [check(Problem(2, 3, 5, 1, 2, 2, 3, False), host, seed) for seed in range(20)]


def test_the_model_finds_a_counter_left_behind(host, monkeypatch):
    monkeypatch.setattr(Host, "last_ticket", lambda *_: 0)
    with pytest.raises(AssertionError):
        check(Problem(2, 2, 3, 1, 1, 1, 3, True), host, 0)


def test_the_model_finds_a_static_order_that_starves(host, monkeypatch):
    """Column-0 form dealt statically deadlocks when only the CTAs that hold no column-0 tile run: why the ticket is there."""
    p = Problem(4, 2, 1, 1, 1, 8, 3, True, resident=1)

    class Static(Simulation):
        def producer(self, cluster, rank, index):
            self.host = type("StaticHost", (), {})()
            for name in ("raster_at", "ring", "last_taker", "static_unit"):
                setattr(self.host, name, getattr(host, name))
            drawn = iter([index, -1])
            self.host.ticket_unit = lambda *_: next(drawn)
            self.host.last_ticket = lambda *_: 0
            return super().producer(cluster, rank, index)

    with pytest.raises(AssertionError, match="deadlock"):
        [Static(p, host, seed).run() for seed in range(20)]


# ---------------------------------------------------------------------------------------------------------------------- layout


def swizzle(address: int, width: int) -> int:
    """TMA's and wgmma's address swizzle: 16-byte chunk bits XOR the bits 3 above, as many as the width has chunks."""
    bits = {128: 7, 64: 3, 32: 1}[width]
    return address ^ ((address >> 7 & bits) << 4)


def tma_box(rows: int, row_bytes: int, at: int) -> dict[int, tuple[int, int]]:
    """Byte address of every 16-bit element -> (row, column) after TMA wrote a box with the swizzle as wide as its rows."""
    return {swizzle(at + r * row_bytes + 2 * c, row_bytes): (r, c) for r in range(rows) for c in range(row_bytes // 2)}


def fields(descriptor: int) -> tuple[int, int, int, int]:
    """start, leading offset, stride offset in bytes, swizzle width."""
    width = {1: 128, 2: 64, 3: 32}[descriptor >> 62]
    return (descriptor & 0x3FFF) << 4, (descriptor >> 16 & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4, width


@pytest.mark.parametrize("rows", [16, 64, 192, 256])
def test_k_major_descriptor_reads_what_tma_wrote(host, rows):
    base = 5 * 1024
    memory = tma_box(rows, 128, base)
    for step in range(4):
        start, _, stride, width = fields(host.lib.k_major(base) + step * (host.lib.k_major_step() >> 4))
        for n in range(rows):
            for k in range(16):
                address = start + n // 8 * stride + n % 8 * 128 + 2 * k
                assert memory[swizzle(address, width)] == (n, 16 * step + k)


@pytest.mark.parametrize("parts", [1, 2], ids=["128-rows", "256-rows"])
def test_warpgroups_share_the_rows_of_a_tile(host, parts):
    """Each 64-row wgmma reads its own panel of the x tile as TMA wrote it in one box, and every row of the tile is one's."""
    rows, panel, base = 128 * parts, 64 * 128, 3 * 1024
    memory, seen = tma_box(rows, 128, base), []
    for w in range(2):
        first = host.lib.k_major(base + host.lib.host_part_of(w, parts, 0) * panel)
        for i in range(parts):
            start, _, stride, width = fields(first + i * (panel >> 4))
            at = [memory[swizzle(start + r // 8 * stride + r % 8 * 128, width)] for r in range(64)]
            assert at == [(64 * host.lib.host_part_of(w, parts, i) + r, 0) for r in range(64)]
            seen += [row for row, _ in at]
    assert sorted(seen) == list(range(rows))


@pytest.mark.parametrize("columns", [16, 32, 64, 128, 192, 256])
def test_mn_major_descriptor_reads_what_tma_wrote(host, columns):
    base, wide = 7 * 1024, min(columns, 64)
    memory = {}
    for box in range(columns // wide):
        for address, (k, n) in tma_box(64, 2 * wide, base + box * 64 * 2 * wide).items():
            memory[address] = (box * wide + n, k)
    for step in range(4):
        at = host.lib.mn_major(columns, base) + step * (host.lib.mn_major_step(columns) >> 4)
        start, leading, stride, width = fields(at)
        assert width == 2 * wide
        for n in range(columns):
            for k in range(16):
                address = start + n // wide * leading + k // 8 * stride + k % 8 * width + n % wide * 2
                assert memory[swizzle(address, width)] == (n, 16 * step + k)


def test_cluster_shares_of_a_tile_keep_the_swizzle(host):
    """Half a tile loaded by another CTA at a row offset lies where the whole box would have put it."""
    whole = tma_box(256, 128, 1024)
    halves = tma_box(128, 128, 1024) | {a: (r + 128, c) for a, (r, c) in tma_box(128, 128, 1024 + 128 * 128).items()}
    assert whole == halves
    whole, first, second = tma_box(64, 128, 1024), tma_box(32, 128, 1024), tma_box(32, 128, 1024 + 32 * 128)
    assert whole == first | {a: (r + 32, c) for a, (r, c) in second.items()}


def test_panels_hold_what_tma_stores(host):
    """stmatrix of the accumulator fragments into the swizzled panel gives each element the address at which TMA reads it."""
    lib, panel = host.lib, tma_box(64, 128, 0)
    found = {}
    for warp in range(4):
        for j in range(4):
            # matrix q of a warp holds the fragments d[8 j + 2 q], d[8 j + 2 q + 1] of every lane
            for q in range(4):
                for i in range(8):
                    source = warp * 32 + 8 * q + i
                    row_address = lib.host_swizzled(lib.host_stmatrix_row(source), lib.host_stmatrix_chunk(source, j))
                    for e in range(8):
                        owner = warp * 32 + 4 * i + e // 2
                        row = lib.host_fragment_row(owner) + (8 if q % 2 else 0)
                        column = 16 * j + 8 * (q // 2) + lib.host_fragment_column(owner) + e % 2
                        found[row_address + 2 * e] = (row, column)
    assert found == panel


# --------------------------------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.5 + 2**-16, 0.7, 1.0 - 2**-16, 1.0])
@pytest.mark.parametrize("M, K", [(1, 8), (3, 40), (17, 1000), (130, 64)])
def test_keep_mask_is_the_reference_bit_for_bit(host, M, K, p):
    for seed in (0, 1234, 2**62 - 1, -5):
        mask = torch.full((M, -(-K // 32)), 7, dtype=torch.int32)
        host.lib.keep_mask(ctypes.c_uint64(seed % 2**64), M, K, reference.drop_threshold(p), ctypes.c_void_p(mask.data_ptr()))
        assert torch.equal(mask, reference.dropout_mask(torch.tensor([seed]), M, K, p))


def test_lane_masks_follow_the_bits(host):
    words = (ctypes.c_uint32 * 4)()
    for c in range(200):
        bits = host.lib.lane_masks(ctypes.c_uint64(99), c, 3 * c, 20000, words)
        lanes = [word >> shift & 0xFFFF for word in words for shift in (0, 16)]
        assert lanes == [0xFFFF if bits >> i & 1 else 0 for i in range(8)]
