"""The many-adapter kernels on a GPU: numerics, repeated bits, invariance, no host synchronisation, CUDA graphs over changing mixes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from batched_cases import Batch
from place import DEVICE, all_equal, fitting, hardware, repeats

from lora_kernels import _batch_table, reference_batched, testing
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
    "M1000-shuffled": dict(ids=ids_of(1000, 16), Ns=[296], K=520, R=24, L=16, ranks="mixed"),
    "M1000-gathered": dict(ids=ids_of(1000, 100), Ns=[300, 200], K=520, R=24, L=100, ranks="mixed"),
    "M300-rank8": dict(ids=sorted(ids_of(300, 5)), Ns=[264, 40], K=136, R=8, L=5, ranks=[8, 1, 8, 0, 5]),
    "M300-ranks_1_8_24_100": dict(ids=ids_of(300, 4), Ns=[264], K=136, R=100, L=4, ranks=[1, 8, 24, 100]),
    "M40-none": dict(ids=[-1] * 40, Ns=[256], K=256, R=16, L=2),
}
# Llama-3-8B: o, q/k/v, gate/up, down.
LLAMA = {
    "o-M16-distinct": dict(ids=list(range(16)), Ns=[4096], K=4096, R=64, L=16),
    "qkv-M1": dict(ids=[3], Ns=[4096, 1024, 1024], K=4096, R=16, L=8),
    "gate_up-M64": dict(ids=ids_of(64, 8), Ns=[14336, 14336], K=4096, R=16, L=8, ranks="mixed"),
    "down-M256": dict(ids=ids_of(256, 8), Ns=[4096], K=14336, R=16, L=8),
    "o-M256-distinct": dict(ids=list(range(256)), Ns=[4096], K=4096, R=16, L=256),
    "qkv-M8192-segments": dict(ids=[m // 1024 for m in range(8192)], Ns=[4096, 1024, 1024], K=4096, R=64, L=8),
    "qkv-M8192-prompts": dict(ids=[m // 100 for m in range(8192)], Ns=[4096, 1024, 1024], K=4096, R=16, L=82, ranks="mixed"),
    "down-M2048-shuffled": dict(ids=ids_of(2048, 8), Ns=[4096], K=14336, R=16, L=8, ranks="mixed"),
    "o-M2048-gathered": dict(ids=ids_of(2048, 200), Ns=[4096], K=4096, R=16, L=200),
}
DTYPES = {"bf16": (bf16, None), "fp16": (fp16, None), "fp32": (fp32, None), "bf16-fp32_pools": (bf16, fp32)}


def linear(b: Batch, meta=None, **options):
    weight, bias = torch.cat(b.weights), None if b.biases[0] is None else torch.cat(b.biases)
    mapping = b.ids if meta is None else meta
    return lora_batched_linear(b.x, weight, bias, b.pools_a, b.pools_b, mapping, b.ranks, b.scalings, backend="triton", strict=True, **options)


@pytest.mark.parametrize("invariant", [False, True], ids=["fastest", "batch_invariant"])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("name", fitting(SHAPES))
def test_matches_float64_and_repeats(name, dtypes, invariant):
    dtype, pool_dtype = DTYPES[dtypes]
    b = Batch.random(dtype=dtype, pool_dtype=pool_dtype, device=DEVICE, **SHAPES[name])
    y = linear(b, batch_invariant=invariant)
    b.assert_close(y)
    meta = BatchMeta(b.ids, b.pools_a[0].shape[0], invariant)
    assert all_equal([y], ([linear(b, meta)] for _ in repeats(30)))  # a race between ticket, flags and stores would show as other bits


@hardware
@pytest.mark.parametrize("name", LLAMA)
def test_llama_sizes(name):
    b = Batch.random(dtype=bf16, device=DEVICE, bias=False, **LLAMA[name])
    meta = BatchMeta(b.ids, b.pools_a[0].shape[0])
    y = linear(b, meta)
    b.assert_close(y)
    assert all_equal([y], ([linear(b, meta)] for _ in range(100)))


@pytest.mark.parametrize(
    ("M", "Ns", "R"),
    [(17, [200, 72], 24), (300, [200], 24), (300, [200, 72], 8), (300, [196, 72], 24)],
    ids=["decode", "tma", "tma-slices", "gathered"],
)
def test_sanitize_every_form(M, Ns, R):
    """Small, with tails in every direction, forward and backward with dropout, for compute-sanitizer."""
    b = Batch.random(ids=ids_of(M, 5), Ns=Ns, K=264, R=R, L=5, dtype=bf16, device=DEVICE, ranks="mixed")
    for _ in range(2):  # the second finds the counters as the first left them
        b.assert_close(linear(b))
    pools = [t.clone().requires_grad_() for t in (*b.pools_a, *b.pools_b)]
    trained = b.replace(x=b.x.clone().requires_grad_(), pools_a=pools[: len(Ns)], pools_b=pools[len(Ns) :])
    linear(trained, dropout_p=0.3, seed=1).sum().backward()
    assert all(t.grad.isfinite().all() for t in (trained.x, *pools))


@pytest.mark.parametrize("M", [64, 1000])
def test_row_bits_ignore_neighbours_and_place(M):
    b = Batch.random(ids=ids_of(M, 5), Ns=[512], K=1024, R=24, L=5, dtype=bf16, device=DEVICE, ranks=[24, 3, 9, 24, 0])
    mine, first = b.ids == 2, linear(b)
    x, a, bb = b.x.clone(), b.pools_a[0].clone(), b.pools_b[0].clone()
    x[~mine] = float("nan")
    a[[0, 1, 3, 4]], bb[[0, 1, 3, 4]] = float("inf"), float("nan")
    others = torch.tensor([-1, 0, 1, 3, 4], dtype=torch.int32, device=DEVICE)[torch.randint(0, 5, (M,), device=DEVICE)]
    second = linear(b.replace(x=x, pools_a=[a], pools_b=[bb], ids=torch.where(mine, b.ids, others)))
    assert torch.equal(first[mine], second[mine])
    order = torch.randperm(M, device=DEVICE)
    assert torch.equal(linear(b.replace(x=b.x[order], ids=b.ids[order])), first[order])


def test_batch_invariant_ignores_M():
    b = Batch.random(ids=ids_of(600, 8), Ns=[512], K=1024, R=16, L=8, dtype=bf16, device=DEVICE)
    full = linear(b, batch_invariant=True)
    for rows in (slice(4, 5), slice(0, 64), slice(100, 500)):
        assert torch.equal(linear(b.replace(x=b.x[rows], ids=b.ids[rows]), batch_invariant=True), full[rows])


@pytest.mark.parametrize("M", [64, 1000])
def test_shrink_and_expand(M):
    b = Batch.random(ids=ids_of(M, 8), Ns=[512, 128], K=1024, R=64, L=8, dtype=bf16, device=DEVICE, ranks="mixed")
    meta = BatchMeta(b.ids, 8)
    h = lora_shrink(b.x, b.pools_a, meta, b.ranks, b.scalings, backend="triton", strict=True)
    y = torch.cat([torch.nn.functional.linear(b.x, w, bias) for w, bias in zip(b.weights, b.biases, strict=True)], 1)
    lora_expand(y, h, b.pools_b, meta, b.ranks, backend="triton", strict=True)
    b.assert_close(y)
    assert not h[:, b.ids < 0].any()


TRAINING = {
    "M64": dict(ids=ids_of(64, 5), Ns=[200, 72], K=264, R=24, L=5, ranks="mixed"),
    "M1000": dict(ids=ids_of(1000, 5), Ns=[200, 72], K=264, R=24, L=5, ranks="mixed"),
    "M1000-gathered": dict(ids=ids_of(1000, 70), Ns=[200], K=264, R=24, L=70, ranks="mixed"),
    "M8192-one_adapter": dict(ids=[0] * 8192, Ns=[1024], K=1024, R=64, L=1),
    "M8192-skewed": dict(ids=[0] * 6000 + [2] + [1] * 2000 + [3] * 190 + [-1], Ns=[512], K=1024, R=16, L=4),
}


@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize("name", fitting(TRAINING))
def test_gradients(name, dropout):
    b = Batch.random(dtype=bf16, device=DEVICE, **TRAINING[name])
    S, L = len(b.weights), b.pools_a[0].shape[0]
    p = torch.tensor([0.1, 0.0, 0.5, 1.0, 0.05], device=DEVICE).repeat(14)[:L] if dropout else None
    dy = torch.randn(len(b.ids), sum(w.shape[0] for w in b.weights), device=DEVICE, dtype=bf16)

    def grads(backend, dtype=bf16):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (b.x, *b.pools_a, *b.pools_b)]
        weight, bias = torch.cat(b.weights).to(dtype), torch.cat(b.biases).to(dtype)
        pools = leaves[1 : 1 + S], leaves[1 + S :]
        options = dict(backend=backend, strict=True, dropout_p=p, seed=5)
        y = lora_batched_linear(leaves[0], weight, bias, *pools, b.ids, b.ranks, b.scalings, **options)
        y.backward(dy.to(dtype))
        return [y.detach(), *(t.grad for t in leaves)]

    got, eager, exact = grads("triton"), grads("reference"), grads("reference", torch.float64)
    for g, e, x64 in zip(got, eager, exact, strict=True):
        assert testing.error_ratio(g, e, x64) <= testing.ALLOWED_RATIO
    assert all_equal(got, (grads("triton") for _ in repeats(10)))


def test_keep_mask_is_the_references():
    b = Batch.random(ids=ids_of(500, 5), Ns=[64], K=200, R=8, L=5, dtype=bf16, device=DEVICE)
    p, seed = torch.tensor([0.3, 0.0, 0.5, 1.0, 1e-5]), torch.tensor([0x123456789ABCDEF])
    meta = BatchMeta(b.ids, 5)
    args = (*b.base, None, None, p.to(DEVICE), seed.to(DEVICE), meta.table, meta.block, False, False)
    mask = torch.ops.lora_kernels.lora_batched_fwd.default(*args, "triton", True)[2]
    assert torch.equal(mask.cpu(), reference_batched._keep_mask(b.ids.cpu(), list(range(5)), p, seed, 500, 200))


@pytest.mark.parametrize("L", [8, 300])
@pytest.mark.parametrize("M", [1, 256, 257, 8192, 65536])
def test_table_is_pytorchs(M, L):
    ids = torch.tensor(ids_of(M, L), dtype=torch.int32)
    meta = BatchMeta(ids.to(DEVICE), L)
    size = _batch_table.layout(M, L, meta.block).size
    assert torch.equal(meta.table.cpu(), _batch_table.build(ids, L, meta.block, ids.new_empty(size)))


@hardware
@pytest.mark.parametrize("M", [64, 1000])
def test_needs_no_host_synchronisation(M):
    """Metadata, forward, and forward + backward with dropout, under CUDA's own check."""
    b = Batch.random(ids=ids_of(M, 8), Ns=[512], K=512, R=16, L=8, dtype=bf16, device=DEVICE)
    trained = b.replace(x=b.x.clone().requires_grad_(), pools_a=[b.pools_a[0].clone().requires_grad_()])
    p = torch.full((8,), 0.1, device=DEVICE)

    def everything():
        meta = BatchMeta(b.ids, 8)
        linear(b, meta)
        linear(trained, meta, dropout_p=p).sum().backward()
        meta.update_(b.ids)

    everything()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@hardware
@pytest.mark.parametrize("M", [16, 64, 1000, 4096])
def test_one_graph_serves_every_mix(M):
    """Captured with one mix, replayed with others: same bits as eager, many times, the counters back at zero each time."""
    b = Batch.random(ids=ids_of(M, 8), Ns=[1024], K=1024, R=16, L=8, dtype=bf16, device=DEVICE, ranks="mixed")
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
        ids = torch.tensor([-1] * M if seed == 7 else ids_of(M, 8, seed), dtype=torch.int32, device=DEVICE)
        meta.update_(ids)
        x.copy_(torch.randn_like(x))
        graph.replay()
        replayed = y.clone()
        assert torch.equal(replayed, call())
        b.replace(x=x, ids=ids).assert_close(replayed)


@hardware
def test_ids_outside_the_pool(monkeypatch):
    b = Batch.random(ids=[0, 5, -3, 1], Ns=[64], K=64, R=8, L=2, dtype=bf16, device=DEVICE)
    b.assert_close(linear(b))  # 5 and -3 count as none
    monkeypatch.setenv("LORA_KERNELS_CHECK_IDS", "1")
    with pytest.raises(ValueError, match="outside the pool"):
        linear(b)
