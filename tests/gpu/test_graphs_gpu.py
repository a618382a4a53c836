"""Training under torch.compile's CUDA graphs, and graphs beside eager calls and beside each other: whose flags are whose. Triton and CUDA C++.

Where there is no GPU, the body of the compile test runs on the CPU without CUDA graphs; the rest is only collected.
"""

from __future__ import annotations

import pytest
import torch
from oracle import Case, assert_close
from place import hardware

import lora_kernels as lk
from lora_kernels.kernels import _launch
from lora_kernels.native import cuda
from lora_kernels.ops import lora_linear as op
from lora_kernels.tuning import store
from lora_kernels.tuning.plan import Plan

bf16 = torch.bfloat16
COLUMN0 = Plan("triton", "column0", 128, 256, 64, 8, 3)


@pytest.fixture(params=["triton", "cuda"])
def backend(request, monkeypatch):
    """The name, with calls that carry flags wherever a call can: the column-0 form."""
    if request.param == "cuda" and cuda.unusable() is not None:
        pytest.skip(cuda.unusable())
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the column-0 form needs sm_90")
    monkeypatch.setattr(store, "choose", lambda problem, device: COLUMN0)
    caches = (op._forward_runs, op._backward_runs)
    for cache in caches:
        cache.clear()
    yield request.param
    for cache in caches:
        cache.clear()


def step(c: Case, backend: str, x, a, b, seed):
    """One forward and backward: y, dx, da, db."""
    y = lk.lora_linear(x, c.weight, c.bias, a, b, c.scaling, c.dropout_p, seed=seed, backend=backend, strict=True)
    return (y.detach(), *torch.autograd.grad(y, (x, a, b), c.dy))


def leaves(c: Case) -> list[torch.Tensor]:
    return [t.detach().clone().requires_grad_() for t in (c.x, c.lora_a, c.lora_b)]


def check_compiled(c: Case, kernels: str, **compiler) -> None:
    """Forward and backward of a compiled layer, several steps with other inputs each: eager's bits, and right ones."""
    torch._dynamo.reset()
    layer = torch.compile(
        lambda x, a, b, seed: lk.lora_linear(x, c.weight, c.bias, a, b, c.scaling, c.dropout_p, seed=seed, backend=kernels, strict=True),
        fullgraph=True,
        **compiler,
    )
    x, a, b = leaves(c)
    for turn in range(5):
        seed = torch.tensor([c.seed + turn], device=x.device)
        with torch.no_grad():
            x.copy_(c.x * (turn + 1))
        torch.compiler.cudagraph_mark_step_begin()
        y = layer(x, a, b, seed)
        got = [t.detach().clone() for t in (y, *torch.autograd.grad(y, (x, a, b), c.dy))]
        now = c._replace(x=c.x * (turn + 1), seed=c.seed + turn)
        assert_close(dict(zip(("y", "dx", "da", "db"), got, strict=True)), now)
        assert all(torch.equal(g, e) for g, e in zip(got, step(c, kernels, x, a, b, seed), strict=True))


@pytest.mark.parametrize("dropout_p", [0.0, 0.2], ids=["plain", "dropout"])
def test_compiled_on_a_cpu(dropout_p) -> None:
    check_compiled(Case.random(24, 40, 56, 8, torch.float32, dropout_p=dropout_p), "reference", backend="aot_eager")


@hardware
@pytest.mark.gpu
@pytest.mark.parametrize("dropout_p", [0.0, 0.2], ids=["column0", "dropout"])
def test_compiled_with_reduced_overhead(backend, dropout_p) -> None:
    check_compiled(Case.random(520, 1032, 264, 16, bf16, device="cuda", dropout_p=dropout_p), backend, mode="reduce-overhead")


def captured(c: Case, backend: str):
    """A graph of one training step, its inputs and its outputs; the stream's eager flags have been used before."""
    x, a, b = leaves(c)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(c, backend, x, a, b, None)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(c, backend, x, a, b, None)
    return graph, (x, a, b), results


@hardware
@pytest.mark.gpu
def test_flags_that_grow_between_capture_and_replay(backend) -> None:
    """A larger eager call replaces the stream's flags; a graph captured before must not use them, nor what took their place in memory."""
    c = Case.random(520, 1032, 264, 16, bf16, device="cuda")
    graph, inputs, results = captured(c, backend)
    expected = step(c, backend, *inputs, None)
    kept = (cuda.flags if backend == "cuda" else _launch.flags).kept
    before = max(t.numel() for t in kept.values())
    large = Case.random(140_000, 520, 64, 16, bf16, device="cuda")
    y = lk.lora_linear(large.x, large.weight, None, large.lora_a, large.lora_b, backend=backend, strict=True)
    assert max(t.numel() for t in kept.values()) > before
    op._forward_runs.clear(), op._backward_runs.clear()  # whose launches hold on to the old flags
    junk = [torch.full((1024,), 7, dtype=torch.int32, device="cuda") for _ in range(64)]  # one of them where the old flags were
    for _ in range(3):
        for t in results:
            t.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(g, e) for g, e in zip(results, expected, strict=True))
    assert torch.equal(y, lk.lora_linear(large.x, large.weight, None, large.lora_a, large.lora_b, backend=backend, strict=True))
    assert all(bool((t == 7).all()) for t in junk)


@hardware
@pytest.mark.gpu
def test_two_graphs_on_two_streams_beside_eager_calls(backend) -> None:
    """Forward and backward three times at once, each with flags of its own."""
    cases = [Case.random(640, 1032, 520, 16, bf16, device="cuda", generator_seed=i) for i in range(3)]
    graphs = [captured(c, backend) for c in cases[:2]]
    x, a, b = leaves(cases[2])
    eager = step(cases[2], backend, x, a, b, None)
    expected = []
    for graph, _, results in graphs:
        graph.replay()
        torch.cuda.synchronize()
        expected.append([t.clone() for t in results])
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(100):
        for stream, (graph, _, results) in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                for t in results:
                    t.zero_()
                graph.replay()
        again = step(cases[2], backend, x, a, b, None)
        torch.cuda.synchronize()
        assert all(torch.equal(g, e) for g, e in zip(again, eager, strict=True))
        for (_, _, results), want in zip(graphs, expected, strict=True):
            assert all(torch.equal(g, e) for g, e in zip(results, want, strict=True))
