"""The many-adapter kernels, forward and backward, against float64; their counters; neighbour invariance bit for bit."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

sys.path.insert(0, str(Path(__file__).parents[1]))

from batched_cases import Batch

from lora_kernels import _batch_table, reference_batched, testing
from lora_kernels.kernels import _launch, batched, batched_decode, batched_prefill, batched_reduce, batched_table, batched_tma
from lora_kernels.kernels.batched_common import rank_groups

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
MIXED = [0, 0, 3, -1, 2, 2, 2, -1, 1, 3, 3, 0, -1, 2, 9, -5, 4]  # 9 and -5 name no adapter

CASES = {
    "bf16-mixed_ranks": dict(ids=MIXED, Ns=[72], K=136, R=24, L=5, dtype=bf16, ranks="mixed"),
    "bf16-three_slices": dict(ids=MIXED, Ns=[80, 24, 24], K=72, R=16, L=5, dtype=bf16),
    "fp16-two_slices-fp32_pools-no_bias": dict(ids=MIXED, Ns=[40, 72], K=200, R=8, L=5, dtype=fp16, pool_dtype=fp32, bias=False),
    "fp32-odd": dict(ids=MIXED[:7], Ns=[33], K=37, R=5, L=4, dtype=fp32, ranks="mixed"),
    "bf16-one_row": dict(ids=[1], Ns=[64], K=128, R=16, L=2, dtype=bf16),
    "bf16-none": dict(ids=[-1] * 5, Ns=[40], K=64, R=16, L=2, dtype=bf16),
    "bf16-rank_above_chunk": dict(ids=[0, 1, 2, 1], Ns=[40], K=64, R=100, L=3, dtype=bf16, ranks=[100, 65, 1]),
    "bf16-full_blocks": dict(ids=[0] * 33 + [1] * 16, Ns=[40], K=64, R=16, L=2, dtype=bf16),
    "bf16-parts_of_K": dict(ids=MIXED, Ns=[40], K=1032, R=16, L=5, dtype=bf16),
    "bf16-wide_tiles": dict(ids=MIXED * 9, Ns=[264, 504, 48], K=72, R=80, L=5, dtype=bf16, ranks="mixed"),
    "bf16-two_wide_slices": dict(ids=MIXED * 9, Ns=[264, 40], K=72, R=80, L=5, dtype=bf16, ranks="mixed"),
    "fp16-one_slice": dict(ids=MIXED, Ns=[136], K=264, R=20, L=5, dtype=fp16, ranks="mixed", bias=False),
    "bf16-many_in_a_tile": dict(ids=[m * 7 % 41 - 1 if m < 128 else 40 + m // 64 for m in range(2050)], Ns=[24], K=16, R=8, L=80, dtype=bf16),
}
TMA = [name for name in CASES if not name.startswith("fp32") and name != "bf16-parts_of_K"]
OWN_H = [name for name in TMA if "pools" not in name and name != "bf16-wide_tiles"]


@contextlib.contextmanager
def form_of(form: str):
    """Calls within take this form of prefill; "tma" and "own_h" (h in the same launch) must be what they would take anyway."""
    serves, tiles, programs = batched.tma_serves, batched.TmaTiles, _launch.PROGRAMS
    made = []
    if form == "gather":
        batched.tma_serves = lambda *args: False
    elif form in ("tma", "own_h"):
        _launch.PROGRAMS = 5 if form == "own_h" else 1  # alone, a program has as many tiles as any other, and h gets its own launch
        batched.TmaTiles = lambda *args: made.append(tiles(*args)) or made[-1]
    batched._prepared.clear()
    try:
        yield
        assert bool(made) == (form in ("tma", "own_h")), "gathered after all"
        assert all(t.own_h == (form == "own_h") for t in made)
    finally:
        batched.tma_serves, batched.TmaTiles, _launch.PROGRAMS = serves, tiles, programs
        batched._prepared.clear()


def forward(b: Batch, form: str, packed: bool = False):
    invariant = form == "invariant"
    table, block = b.table(invariant, 64 if form in ("tma", "own_h", "gather") else None)
    with form_of(form):
        y, h, _ = batched.lora_batched_fwd(*b.base, b.ranks, b.scalings, None, None, table, block, packed, invariant)
    assert all(not flags.any() for flags in _launch.flags.kept.values()), "counters left behind"
    return y, h


ONLY = {"bf16-parts_of_K": ["decode"], "bf16-wide_tiles": ["tma"], "bf16-two_wide_slices": ["tma", "own_h"], "bf16-many_in_a_tile": ["tma"]}
FORMS = [(n, f) for n in CASES for f in ONLY.get(n, ["decode", "gather", "invariant"] + ["tma"] * (n in TMA) + ["own_h"] * (n in OWN_H))]


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_forward(name, form):
    b = Batch.random(**CASES[name])
    b.assert_close(forward(b, form)[0])


@pytest.mark.parametrize("form", ["decode", "gather", "tma", "own_h"])
def test_row_bits_ignore_neighbours(form):
    """Row 4 keeps its bits when the others change adapter, rank and content, even to NaN and infinity."""
    b = Batch.random(ids=MIXED, Ns=[72], K=200, R=24, L=5, dtype=bf16, ranks=[24, 3, 9, 24, 0])
    first = forward(b, form)[0]
    x, pools_a, pools_b = b.x.clone(), [b.pools_a[0].clone()], [b.pools_b[0].clone()]
    x[5:] = float("nan")
    for slot in (0, 1, 3, 4):
        pools_a[0][slot], pools_b[0][slot] = float("inf"), float("nan")
    ids = torch.tensor([3, 1, 0, 4, 2, 4, 4, 0, 0, 0, 1, 1, 1, 3, 3, 3, -1], dtype=torch.int32)
    second = forward(b.replace(x=x, pools_a=pools_a, pools_b=pools_b, ids=ids), form)[0]
    assert torch.equal(first[4], second[4])
    moved = forward(b.replace(x=b.x.roll(3, 0), ids=b.ids.roll(3)), form)[0]
    assert torch.equal(moved.roll(-3, 0), first)


def test_units_of_one_part_of_K_and_of_all_give_the_same_bits():
    """Decode cuts the h of one adapter into 8 units for its 10 programs, and of five adapters into one unit each."""
    b = Batch.random(ids=MIXED, Ns=[264], K=1032, R=24, L=5, dtype=bf16, ranks=[24, 3, 9, 24, 0])
    y, h = forward(b, "decode")
    b.assert_close(y)
    for adapter in (0, 1, 2):
        mine = b.ids == adapter
        alone, h_alone = forward(b.replace(ids=torch.where(mine, b.ids, -1)), "decode")
        rank = b.ranks.flatten()[adapter]
        assert torch.equal(alone[mine], y[mine])
        assert torch.equal(h_alone[:, mine, :rank], h[:, mine, :rank])


@pytest.mark.skipif(not isinstance(batched_tma.finish, InterpretedFunction), reason="compiled for one value of APART")
@pytest.mark.parametrize("masked", [False, True], ids=["", "dropout"])
def test_a_sum_kept_apart_has_the_same_bits(masked, monkeypatch):
    """`finish` as Triton 3.8 needs it, beside a neighbour whose B is infinite and NaN."""
    b = Batch.random(ids=MIXED, Ns=[72], K=200, R=24, L=5, dtype=bf16, ranks=[24, 3, 9, 24, 0])
    b.pools_b[0][3], b.pools_b[0][0, 5] = float("nan"), float("inf")
    p = torch.tensor([0.3, 0.0, 0.5, 0.1, 0.2]) if masked else None
    found = []
    for apart in (True, False):
        monkeypatch.setattr(batched_tma, "APART", tl.constexpr(apart))
        with form_of("tma"):
            found.append(gradients(batched, b, torch.randn(17, 72, generator=torch.Generator().manual_seed(1)).to(bf16), p, block=64))
    for what in found[0]:
        torch.testing.assert_close(found[0][what], found[1][what], rtol=0, atol=0, equal_nan=True, msg=what)


@contextlib.contextmanager
def nan_in_new_memory():
    """torch's own: whatever is allocated, the scratch of h among it, starts as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.ones(1).new_empty(9).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


RANKS = {8: [8, 1, 5, 0], 100: [100, 24, 1, 65], 5: [5, 2, 0, 1]}  # B by 8 and 4 ranks at a time, and one by one


def ranked(R: int) -> tuple[Batch, Batch]:
    """A problem of these true ranks, and the same with NaN in the pools past them."""
    b = Batch.random(ids=[0, 3, 1, -1, 2, 1, 0], Ns=[24], K=40, R=R, L=4, dtype=bf16, ranks=RANKS[R])
    pools_a, pools_b = b.pools_a[0].clone(), b.pools_b[0].clone()
    for slot, r in enumerate(RANKS[R]):
        pools_a[slot, r:], pools_b[slot, :, r:] = float("nan"), float("nan")
    return b, b.replace(pools_a=[pools_a], pools_b=[pools_b])


@pytest.mark.parametrize("form", ["decode", "gather", "tma", "own_h"])
@pytest.mark.parametrize("R", RANKS)
def test_nothing_past_the_true_rank_counts(R, form):
    b, poisoned = ranked(R)
    y, h = forward(b, form)
    b.assert_close(y)
    assert h.shape[2] % 16 == 0
    with nan_in_new_memory():
        assert torch.equal(forward(poisoned, form)[0], y)


@pytest.mark.parametrize(("form", "dropout"), [("gather", True), ("tma", True), ("own_h", False)])
def test_nothing_past_the_true_rank_counts_in_gradients(form, dropout):
    b, poisoned = ranked(8)
    p, dy = torch.tensor([0.3, 0.0, 0.5, 0.1]) if dropout else None, torch.randn(7, 24).to(bf16)
    with form_of(form):
        clean = gradients(batched, b, dy, p, block=64)
        with nan_in_new_memory():
            found = gradients(batched, poisoned, dy, p, block=64)
    for what in clean:
        assert torch.equal(found[what], clean[what]), what


@pytest.mark.parametrize("form", ["decode", "gather", "tma"])
def test_offsets_of_64_bits(form, monkeypatch):
    """B whose rows lie too far apart for offsets of 32 bits: the kernels for it give the same bits."""
    far, b = torch.empty_strided((2, 4097, 8), (8, 1 << 19, 1), device="meta"), ranked(8)[0]
    assert rank_groups([far]) == (0, (8,), (1 << 19, 1))
    assert rank_groups([far[:, :4096]]) == (8, (1,), (1 << 16, 1))
    y = forward(b, form)[0]
    for module in (batched_decode, batched_prefill, batched_tma):
        monkeypatch.setattr(module, "rank_groups", lambda pools: (0, tuple(t.stride(0) for t in pools), pools[0].stride()[1:]))
    assert torch.equal(forward(b, form)[0], y)


def test_batch_invariant_ignores_M():
    b = Batch.random(ids=MIXED * 5, Ns=[72], K=136, R=16, L=5, dtype=bf16)
    full = forward(b, "invariant")[0]
    for rows in (slice(4, 5), slice(0, 70)):
        part = forward(b.replace(x=b.x[rows], ids=b.ids[rows]), "invariant")[0]
        assert torch.equal(part, full[rows])


def test_serving_calls_are_the_op():
    """Weight and bias stacked or as lists, x of more dimensions, ranks of all slices in one row: the op's bits."""
    b = Batch.random(**CASES["bf16-three_slices"], ranks=[16, 3, 8, 0, 5])
    table, block = b.table(block=64)
    args = (*b.base, b.ranks, b.scalings, None, None, table, block, False, False)
    y = batched.lora_batched_fwd(*args)[0]
    call = batched.lora_batched_fwd.prepare_serving((1, 17), *args)
    for weight, bias in ((b.weights, b.biases), (torch.cat(b.weights), torch.cat(b.biases))):
        assert torch.equal(call(b.x[None], weight, bias, b.pools_a, b.pools_b, b.ids, b.ranks[0].contiguous(), b.scalings, table), y[None])


def test_rank_packed_slices():
    """SGLang's layout: slice i of an adapter of rank r in rows i r ... (i + 1) r of one pool."""
    b = Batch.random(ids=MIXED, Ns=[24, 40], K=72, R=16, L=5, dtype=bf16, ranks=[16, 3, 8, 0, 5])
    pool = torch.full((5, 32, 72), float("nan"), dtype=bf16)
    for slot, r in enumerate(b.ranks[0].tolist()):
        for i in range(2):
            pool[slot, i * r : (i + 1) * r] = b.pools_a[i][slot, :r]
    for form in ("decode", "gather", "own_h"):
        y, _ = forward(b.replace(pools_a=[pool, pool]), form, packed=True)
        assert torch.equal(y, forward(b, form)[0])


@pytest.mark.parametrize("name", ["bf16-mixed_ranks", "bf16-three_slices", "fp32-odd", "fp16-two_slices-fp32_pools-no_bias"])
def test_shrink_and_expand(name):
    b = Batch.random(**CASES[name])
    table, block = b.table()
    shrink_args = (b.pools_a, b.ids, b.ranks, b.scalings, table, block, False, False)
    h = batched.lora_shrink(b.x, *shrink_args)
    assert (
        testing.relative_rmse(h, reference_batched.lora_shrink(b.x.double(), [a.to(b.x.dtype).double() for a in b.pools_a], *shrink_args[1:])) < 1e-6
    )
    y = torch.cat([torch.nn.functional.linear(b.x, w, bias) for w, bias in zip(b.weights, b.biases, strict=True)], 1)
    before = y.clone()
    batched.lora_expand(y, h, b.pools_b, b.ids, b.ranks, table, block, False)
    b.assert_close(y)
    none = (b.ids < 0) | (b.ids >= b.pools_a[0].shape[0])
    assert torch.equal(y[none], before[none])


def gradients(ops, b: Batch, dy, p=None, dtype=None, block=None) -> dict:
    """y, keep mask, dx, and dA and dB per slice, by the reference or by the kernels."""
    dtype = dtype or b.x.dtype
    cast = lambda ts: [None if t is None else t.to(dtype) for t in ts]
    x, w, bias, pools_a, pools_b = b.x.to(dtype), cast(b.weights), cast(b.biases), cast(b.pools_a), cast(b.pools_b)
    (table, block), seed = b.table(block=block), torch.tensor([0x123456789ABCDEF])
    y, h, mask = ops.lora_batched_fwd(x, w, bias, pools_a, pools_b, b.ids, b.ranks, b.scalings, p, seed, table, block, False, False)
    args = (dy.to(dtype), x, w, pools_a, pools_b, h, mask, b.ids, b.ranks, b.scalings, p, table, block, True, True, True)
    dx, da, db = ops.lora_batched_bwd(*args)
    return dict(y=y, mask=mask, dx=dx, **{f"dA{i}": t for i, t in enumerate(da)}, **{f"dB{i}": t for i, t in enumerate(db)})


BACKWARD = [
    ("bf16-mixed_ranks", "tma", False),
    ("bf16-mixed_ranks", "tma", True),
    ("bf16-mixed_ranks", "own_h", False),
    ("bf16-mixed_ranks", "gather", True),
    ("fp16-two_slices-fp32_pools-no_bias", "", True),
    ("fp32-odd", "", False),
]


@pytest.mark.parametrize(("name", "form", "dropout"), BACKWARD)
def test_backward(name, form, dropout):
    b = Batch.random(**CASES[name])
    p = torch.tensor([0.3, 0.0, 0.5, 1.0, 0.05][: b.pools_a[0].shape[0]]) if dropout else None
    dy = torch.randn(len(b.ids), sum(w.shape[0] for w in b.weights)).to(b.x.dtype)
    with form_of(form) if form else contextlib.nullcontext():
        got = gradients(batched, b, dy, p, block=64 if form else None)
    eager, exact = gradients(reference_batched, b, dy, p), gradients(reference_batched, b, dy, p, torch.float64)
    assert torch.equal(got["mask"], exact["mask"])
    for what in got:
        assert what == "mask" or testing.error_ratio(got[what], eager[what], exact[what]) <= testing.ALLOWED_RATIO, what


def test_gradients_in_chunks(monkeypatch):
    """Segments of several chunks, of one, and of none; and the bits of an adapter's gradients ignore the others' rows."""
    monkeypatch.setattr(batched_reduce, "FEWEST_ROWS", 64)
    ids = torch.tensor(([0] * 7 + [1] + [3] * 3) * 40)[torch.randperm(440, generator=torch.Generator().manual_seed(1))]
    b = Batch.random(ids=ids.tolist(), Ns=[40], K=72, R=16, L=4, dtype=bf16, ranks=[16, 9, 5, 16])
    apart = lambda t: torch.stack([t, t], 1)[:, 1]  # no two adapters, or rows of x, behind each other
    b = b.replace(x=apart(b.x), pools_a=[apart(b.pools_a[0])], pools_b=[apart(b.pools_b[0])])
    dy = torch.randn(440, 40).to(bf16)
    got, eager, exact = gradients(batched, b, dy), gradients(reference_batched, b, dy), gradients(reference_batched, b, dy, None, torch.float64)
    for what in ("dx", "dA0", "dB0"):
        assert testing.error_ratio(got[what], eager[what], exact[what]) <= testing.ALLOWED_RATIO, what
    assert not got["dA0"][2].any()
    assert not got["dB0"][2].any()
    others = b.replace(ids=torch.where(b.ids == 1, -1, torch.where(b.ids == 3, 2, b.ids)))
    for what in ("dA0", "dB0"):
        assert torch.equal(gradients(batched, others, dy)[what][0], got[what][0])


MIXES = {
    "mixed": MIXED * 3,
    "one": [0],
    "none": [-1] * 5,
    "distinct": list(range(40))[::-1],
    "one_adapter": [2] * 33,
    "256_rows": torch.randint(-1, 6, (256,), generator=torch.Generator().manual_seed(3)).tolist(),
    "two_launches": torch.randint(-1, 6, (600,), generator=torch.Generator().manual_seed(4)).tolist(),
    "two_launches-distinct": list(range(300))[::-1],
    "two_launches-none": [-1] * 257,
}


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("name", MIXES)
def test_table(name, block):
    """One launch up to 256 rows, two beyond: the arrays that PyTorch builds, word for word."""
    ids = torch.tensor(MIXES[name], dtype=torch.int32)
    for L in (1, 5, 40):
        size = _batch_table.layout(len(ids), L, block).size
        found = batched_table.build(ids, L, block, torch.full((size,), -7, dtype=torch.int32))
        assert torch.equal(found, _batch_table.build(ids, L, block, torch.empty(size, dtype=torch.int32)))
    assert (len(ids) > 256) == any(isinstance(table, batched_table.SortedTable) for table in batched_table._tables.values())
    batched_table._tables.clear()


def test_table_of_blocks_covers_every_row_once():
    b = Batch.random(ids=MIXED * 4, Ns=[8], K=8, R=1, L=5)
    table, block = b.table()
    at = _batch_table.layout(len(b.ids), 5, block)
    order = table[at.order : at.order + len(b.ids)].tolist()
    seen = []
    for e in range(int(table[0])):
        start, length, slot = (int(table[o + e]) for o in (at.blk_start, at.blk_len, at.blk_adapter))
        rows = order[start : start + length]
        assert 1 <= length <= block
        assert b.ids[rows].tolist() == [slot] * length
        seen += rows
    assert sorted(seen) == [m for m, slot in enumerate(b.ids.tolist()) if 0 <= slot < 5]
