"""The many-adapter kernels, forward and backward, against float64; their counters; neighbour invariance bit for bit."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from batched_cases import Batch

from lora_kernels import _batch_table, reference_batched, testing
from lora_kernels.kernels import batched, batched_table

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
}


def forward(b: Batch, form: str, packed: bool = False):
    invariant = form == "invariant"
    table, block = b.table(invariant, 64 if form == "prefill" else None)
    y, h, _ = batched.lora_batched_fwd(*b.base, b.ranks, b.scalings, None, None, table, block, packed, invariant)
    counters = batched.scratch(b.x.device, 1)
    assert not counters.any(), f"counters left behind: {counters.nonzero().flatten().tolist()}"
    return y, h


@pytest.mark.parametrize("form", ["decode", "prefill", "invariant"])
@pytest.mark.parametrize("name", CASES)
def test_forward(name, form, monkeypatch):
    monkeypatch.setattr(batched, "_sms", lambda device: 4)
    b = Batch.random(**CASES[name])
    b.assert_close(forward(b, form)[0])


@pytest.mark.parametrize("form", ["decode", "prefill"])
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


def test_batch_invariant_ignores_M():
    b = Batch.random(ids=MIXED * 5, Ns=[72], K=136, R=16, L=5, dtype=bf16)
    full = forward(b, "invariant")[0]
    for rows in (slice(4, 5), slice(0, 70)):
        part = forward(b.replace(x=b.x[rows], ids=b.ids[rows]), "invariant")[0]
        assert torch.equal(part, full[rows])


def test_rank_packed_slices():
    """SGLang's layout: slice i of an adapter of rank r in rows i r ... (i + 1) r of one pool."""
    b = Batch.random(ids=MIXED, Ns=[24, 40], K=72, R=16, L=5, dtype=bf16, ranks=[16, 3, 8, 0, 5])
    pool = torch.full((5, 32, 72), float("nan"), dtype=bf16)
    for slot, r in enumerate(b.ranks[0].tolist()):
        for i in range(2):
            pool[slot, i * r : (i + 1) * r] = b.pools_a[i][slot, :r]
    for form in ("decode", "prefill"):
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


@pytest.mark.parametrize("name", ["bf16-mixed_ranks", "bf16-three_slices", "fp32-odd", "bf16-full_blocks"])
def test_backward(name):
    b = Batch.random(**CASES[name])
    table, block = b.table()
    dy = torch.randn(len(b.ids), sum(w.shape[0] for w in b.weights)).to(b.x.dtype)
    flags = (b.ids, b.ranks, b.scalings, None, table, block, True, True, True)

    def run(bwd, dtype, fwd):
        cast = lambda ts: [None if t is None else t.to(dtype) for t in ts]
        x, w, a, bb = b.x.to(dtype), cast(b.weights), cast(b.pools_a), cast(b.pools_b)
        h = fwd(x, w, cast(b.biases), a, bb, b.ids, b.ranks, b.scalings, None, None, table, block, False, False)[1]
        dx, da, db = bwd(dy.to(dtype), x, w, a, bb, h, x.new_empty(0), *flags)
        return [dx, *da, *db]

    got = run(batched.lora_batched_bwd, b.x.dtype, batched.lora_batched_fwd)
    again = run(batched.lora_batched_bwd, b.x.dtype, batched.lora_batched_fwd)
    eager = run(reference_batched.lora_batched_bwd, b.x.dtype, reference_batched.lora_batched_fwd)
    exact = run(reference_batched.lora_batched_bwd, torch.float64, reference_batched.lora_batched_fwd)
    for g, second, e, x64 in zip(got, again, eager, exact, strict=True):
        assert torch.equal(g, second)
        assert testing.error_ratio(g, e, x64) <= testing.ALLOWED_RATIO


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("name", ["mixed", "one", "none", "distinct", "one_adapter", "full"])
def test_table_in_one_launch(name, block):
    g = torch.Generator().manual_seed(3)
    ids = {"mixed": MIXED * 3, "one": [0], "none": [-1] * 5, "distinct": list(range(40))[::-1], "one_adapter": [2] * 33}.get(name)
    ids = torch.randint(-1, 6, (256,), generator=g, dtype=torch.int32) if ids is None else torch.tensor(ids, dtype=torch.int32)
    for L in (1, 5, 40):
        size = _batch_table.layout(len(ids), L, block).size
        found = batched_table.build(ids, L, block, torch.full((size,), -7, dtype=torch.int32))
        assert torch.equal(found, _batch_table.build(ids, L, block, torch.empty(size, dtype=torch.int32)))


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
