"""The many-adapter ops against the CPU oracles that SGLang and vLLM ship (`make oracles`; skipped where a file was not fetched)."""

from __future__ import annotations

import sys
from pathlib import Path

import foreign_files
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))

from batched_cases import Batch

from lora_kernels import testing
from lora_kernels.ops.lora_batched import lora_batched_linear
from lora_kernels.ops.lora_expand import lora_expand
from lora_kernels.ops.lora_shrink import lora_shrink

BACKENDS = ["reference", "auto"]
NEAR = {torch.float32: 1e-6, torch.float64: 1e-13}


def oracle(name: str):
    if not foreign_files.cached(name).exists():
        pytest.skip(f"{foreign_files.SOURCES[name].requirement} not fetched: make oracles")
    return foreign_files.load(name)


@st.composite
def segments(draw):
    """A batch in segments, as the servers make it: (ids, ranks, sizes); the last slot is the base one, of rank 0."""
    L, R = draw(st.integers(2, 5)), draw(st.sampled_from([1, 4, 8]))
    runs = draw(st.lists(st.tuples(st.integers(0, L - 1), st.integers(0, 7)), min_size=1, max_size=8))
    ranks = [*draw(st.lists(st.integers(0, R), min_size=L - 1, max_size=L - 1)), 0]
    Ns = draw(st.lists(st.integers(1, 30), min_size=1, max_size=3))
    return runs, ranks, Ns, R, L, draw(st.integers(1, 60))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(case=segments(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_sglang(backend, case, dtype):
    """Rank-packed slices, mixed true ranks, a scale per adapter, base rows through a slot of rank 0."""
    ops = oracle("sglang")
    runs, ranks, Ns, R, L, K = case
    S, ids = len(Ns), [slot for slot, n in runs for _ in range(n)]
    b = Batch.random(ids=ids, Ns=Ns, K=K, R=R, L=L, dtype=dtype, ranks=ranks)
    scalings = b.scalings[0]
    stacked = torch.zeros(L, S * R, K, dtype=dtype)
    for slot, r in enumerate(ranks):
        for i in range(S):
            stacked[slot, i * r : (i + 1) * r] = b.pools_a[i][slot, :r]
    base = [torch.nn.functional.linear(b.x, w, bias) for w, bias in zip(b.weights, b.biases, strict=True)]
    weight_indices, lengths = (torch.tensor(v) for v in zip(*runs, strict=True))
    ranks_t, offsets = torch.tensor(ranks), torch.tensor([0, *torch.tensor(Ns).cumsum(0).tolist()])
    h = ops.sgemm_lora_a_fwd(b.x, stacked, weight_indices, lengths, ranks_t, scalings, S)
    expected = ops.sgemm_lora_b_fwd(h, torch.cat(b.pools_b, 1), weight_indices, lengths, ranks_t, offsets, torch.cat(base, 1))
    pools_b = list(torch.cat(b.pools_b, 1).split(Ns, 1))
    weight, bias = torch.cat(b.weights), torch.cat(b.biases)
    y = lora_batched_linear(b.x, weight, bias, [stacked] * S, pools_b, b.ids, ranks_t, scalings, rank_packed=True, backend=backend)
    assert testing.relative_rmse(y, expected) < NEAR[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(case=segments(), dtype=st.sampled_from([torch.float32, torch.float64]), with_none=st.booleans())
def test_vllm(backend, case, dtype, with_none):
    """bgmv_shrink and bgmv_expand: slabs, -1 = none, ranks padded with zeros; h and y apart, as `lora_shrink` and `lora_expand`."""
    ops = oracle("vllm")
    runs, _, Ns, R, L, K = case
    ids = [slot if not with_none or slot < L - 1 else -1 for slot, n in runs for _ in range(n)]
    b = Batch.random(ids=ids, Ns=Ns[:1], K=K, R=R, L=L, dtype=dtype)
    indices, h = b.ids.long(), torch.zeros(len(ids), R, dtype=dtype)
    ops.bgmv_shrink(b.x, b.pools_a[0].unsqueeze(1), h, indices, 0.5)
    mine = lora_shrink(b.x, b.pools_a[0].unsqueeze(1), b.ids, scalings=torch.full((L,), 0.5), backend=backend)
    assert testing.relative_rmse(mine, h) < NEAR[dtype]
    expected = torch.nn.functional.linear(b.x, b.weights[0], b.biases[0])
    y = expected.clone()
    ops.bgmv_expand(h, b.pools_b[0].unsqueeze(1), expected, indices, True)
    lora_expand(y, mine.to(dtype), b.pools_b[0].unsqueeze(1), b.ids, backend=backend)
    assert testing.relative_rmse(y, expected) < NEAR[dtype]
