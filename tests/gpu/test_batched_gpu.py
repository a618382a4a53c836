"""The many-adapter kernels on a GPU: numerics, repeated bits, invariance, no host synchronisation, CUDA graphs over changing mixes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from batched_cases import Batch

from lora_kernels import _batch_table, testing
from lora_kernels.ops.batch_meta import BatchMeta
from lora_kernels.ops.lora_batched import lora_batched_linear
from lora_kernels.ops.lora_expand import lora_expand
from lora_kernels.ops.lora_shrink import lora_shrink

pytestmark = pytest.mark.gpu

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32


def ids_of(M, L, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-1, L, (M,), generator=g).tolist()


SHAPES = {
    "M1": dict(ids=[0], Ns=[4096], K=4096, R=16, L=1),
    "M17-odd": dict(ids=ids_of(17, 5), Ns=[333], K=777, R=5, L=5, ranks="mixed"),
    "M64-mixed_ranks": dict(ids=ids_of(64, 8), Ns=[1024], K=2048, R=64, L=8, ranks="mixed"),
    "M64-qkv": dict(ids=ids_of(64, 8), Ns=[1024, 256, 256], K=1024, R=16, L=8),
    "M256-distinct": dict(ids=list(range(256)), Ns=[512], K=1024, R=16, L=256),
    "M64-rank512": dict(ids=ids_of(64, 3), Ns=[512], K=512, R=512, L=3, ranks=[1, 100, 512]),
    "M1000-segments": dict(ids=sorted(ids_of(1000, 8)), Ns=[768], K=1024, R=64, L=8, ranks="mixed"),
    "M1000-shuffled": dict(ids=ids_of(1000, 40), Ns=[300, 200], K=520, R=24, L=40, ranks="mixed"),
    "M40-none": dict(ids=[-1] * 40, Ns=[256], K=256, R=16, L=2),
}
DTYPES = {"bf16": (bf16, None), "fp16": (fp16, None), "fp32": (fp32, None), "bf16-fp32_pools": (bf16, fp32)}


def linear(b: Batch, meta=None, **options):
    weight, bias = torch.cat(b.weights), None if b.biases[0] is None else torch.cat(b.biases)
    mapping = b.ids if meta is None else meta
    return lora_batched_linear(b.x, weight, bias, b.pools_a, b.pools_b, mapping, b.ranks, b.scalings, backend="triton", strict=True, **options)


@pytest.mark.parametrize("invariant", [False, True], ids=["fastest", "batch_invariant"])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_matches_float64_and_repeats(name, dtypes, invariant):
    dtype, pool_dtype = DTYPES[dtypes]
    b = Batch.random(dtype=dtype, pool_dtype=pool_dtype, device="cuda", **SHAPES[name])
    y = linear(b, batch_invariant=invariant)
    b.assert_close(y)
    meta = BatchMeta(b.ids, b.pools_a[0].shape[0], invariant)
    for _ in range(30):  # a race between ticket, flags and stores would show as other bits
        assert torch.equal(linear(b, meta), y)


@pytest.mark.parametrize("M", [17, 300], ids=["decode", "segments"])
def test_sanitize_both_forms(M):
    """Small, with tails in every direction, for compute-sanitizer."""
    b = Batch.random(ids=ids_of(M, 5), Ns=[200, 72], K=264, R=24, L=5, dtype=bf16, device="cuda", ranks="mixed")
    for _ in range(2):  # the second finds the counters as the first left them
        b.assert_close(linear(b))


@pytest.mark.parametrize("M", [64, 1000])
def test_row_bits_ignore_neighbours_and_place(M):
    b = Batch.random(ids=ids_of(M, 5), Ns=[512], K=1024, R=24, L=5, dtype=bf16, device="cuda", ranks=[24, 3, 9, 24, 0])
    mine, first = b.ids == 2, linear(b)
    x, a, bb = b.x.clone(), b.pools_a[0].clone(), b.pools_b[0].clone()
    x[~mine] = float("nan")
    a[[0, 1, 3, 4]], bb[[0, 1, 3, 4]] = float("inf"), float("nan")
    others = torch.tensor([-1, 0, 1, 3, 4], dtype=torch.int32, device="cuda")[torch.randint(0, 5, (M,), device="cuda")]
    second = linear(b.replace(x=x, pools_a=[a], pools_b=[bb], ids=torch.where(mine, b.ids, others)))
    assert torch.equal(first[mine], second[mine])
    order = torch.randperm(M, device="cuda")
    assert torch.equal(linear(b.replace(x=b.x[order], ids=b.ids[order])), first[order])


def test_batch_invariant_ignores_M():
    b = Batch.random(ids=ids_of(600, 8), Ns=[512], K=1024, R=16, L=8, dtype=bf16, device="cuda")
    full = linear(b, batch_invariant=True)
    for rows in (slice(4, 5), slice(0, 64), slice(100, 500)):
        assert torch.equal(linear(b.replace(x=b.x[rows], ids=b.ids[rows]), batch_invariant=True), full[rows])


@pytest.mark.parametrize("M", [64, 1000])
def test_shrink_and_expand(M):
    b = Batch.random(ids=ids_of(M, 8), Ns=[512, 128], K=1024, R=64, L=8, dtype=bf16, device="cuda", ranks="mixed")
    meta = BatchMeta(b.ids, 8)
    h = lora_shrink(b.x, b.pools_a, meta, b.ranks, b.scalings, backend="triton", strict=True)
    y = torch.cat([torch.nn.functional.linear(b.x, w, bias) for w, bias in zip(b.weights, b.biases, strict=True)], 1)
    lora_expand(y, h, b.pools_b, meta, b.ranks, backend="triton", strict=True)
    b.assert_close(y)
    assert not h[:, b.ids < 0].any()


@pytest.mark.parametrize("M", [64, 1000])
def test_gradients(M):
    b = Batch.random(ids=ids_of(M, 5), Ns=[200, 72], K=264, R=24, L=5, dtype=bf16, device="cuda", ranks="mixed")
    dy = torch.randn(M, 272, device="cuda", dtype=bf16)

    def grads(backend, dtype=bf16):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (b.x, *b.pools_a, *b.pools_b)]
        cast = lambda ts: [t.to(dtype) for t in ts]
        weight, bias = torch.cat(cast(b.weights)), torch.cat(cast(b.biases))
        y = lora_batched_linear(leaves[0], weight, bias, leaves[1:3], leaves[3:], b.ids, b.ranks, b.scalings, backend=backend, strict=True)
        y.backward(dy.to(dtype))
        return [t.grad for t in leaves]

    got, again, eager, exact = grads("triton"), grads("triton"), grads("reference"), grads("reference", torch.float64)
    for g, second, e, x64 in zip(got, again, eager, exact, strict=True):
        assert torch.equal(g, second)
        assert testing.error_ratio(g, e, x64) <= testing.ALLOWED_RATIO


def test_metadata_needs_no_host_synchronisation():
    """Metadata and both forms of the layer under CUDA's own check."""
    for M in (64, 1000):
        b = Batch.random(ids=ids_of(M, 8), Ns=[512], K=512, R=16, L=8, dtype=bf16, device="cuda")
        linear(b, BatchMeta(b.ids, 8))  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            meta = BatchMeta(b.ids, 8)
            linear(b, meta)
            meta.update_(b.ids)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        cpu = b.replace(ids=b.ids.cpu()).ids
        at = _batch_table.layout(M, 8, meta.block)
        assert torch.equal(meta.table.cpu(), _batch_table.build(cpu, 8, meta.block, cpu.new_empty(at.size)))


@pytest.mark.parametrize("M", [16, 64, 1000])
def test_one_graph_serves_every_mix(M):
    """Captured with one mix, replayed with others: same bits as eager, many times, the counters back at zero each time."""
    b = Batch.random(ids=ids_of(M, 8), Ns=[1024], K=1024, R=16, L=8, dtype=bf16, device="cuda", ranks="mixed")
    meta, x = BatchMeta(b.ids, 8), b.x.clone()
    weight, bias = b.weights[0], b.biases[0]
    call = lambda: lora_batched_linear(x, weight, bias, b.pools_a[0], b.pools_b[0], meta, b.ranks, b.scalings, backend="triton", strict=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y = call()
    for seed in range(20):
        ids = torch.tensor([-1] * M if seed == 7 else ids_of(M, 8, seed), dtype=torch.int32, device="cuda")
        meta.update_(ids)
        x.copy_(torch.randn_like(x))
        graph.replay()
        replayed = y.clone()
        assert torch.equal(replayed, call())
        b.replace(x=x, ids=ids).assert_close(replayed)


def test_ids_outside_the_pool(monkeypatch):
    b = Batch.random(ids=[0, 5, -3, 1], Ns=[64], K=64, R=8, L=2, dtype=bf16, device="cuda")
    b.assert_close(linear(b))  # 5 and -3 count as none
    monkeypatch.setenv("LORA_KERNELS_CHECK_IDS", "1")
    with pytest.raises(ValueError, match="outside the pool"):
        linear(b)
