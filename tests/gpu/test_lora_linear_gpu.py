"""The Triton kernels of `lora_linear` on a GPU: float64, repeats, streams, devices, graphs, memory. `pytest -m gpu` (never run so far)."""

from __future__ import annotations

import gc

import pytest
import torch
from oracle import Case, assert_close
from place import DEVICE, all_equal, hardware, repeats

pytest.importorskip("triton")

import lora_kernels as lk
from lora_kernels import reference
from lora_kernels.ops import lora_linear as op
from lora_kernels.tuning import store
from lora_kernels.tuning.plan import POINTER_TILE, Plan

pytestmark = pytest.mark.gpu

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
ODD = [(1, 33, 65, 4), (17, 31, 47, 8), (64, 96, 104, 24), (5, 40, 72, 64), (130, 264, 136, 128), (300, 520, 296, 256), (1000, 264, 520, 16)]
REAL = [(8192, 4096, 4096, 16), (4096, 14336, 4096, 64), (2048, 4096, 14336, 128)]
FORMS = {
    "column0": Plan("triton", "column0", 128, 256, 64, 8, 3),
    "tma": Plan("triton", "tma", 128, 256, 64, 8, 3),
    "pointer": Plan("triton", "pointer", *POINTER_TILE),
}


def shape_id(shape) -> str:
    return "M{}-N{}-K{}-R{}".format(*shape)


def dtype_id(dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.fixture
def force(monkeypatch):
    """force(form): every call gets this kernel form, or what the operands allow of it."""
    from lora_kernels.kernels import lora_linear as kernels

    caches = (op._forward_runs, op._backward_runs, kernels._forwards, kernels._backwards)

    def forget() -> None:
        for cache in caches:
            cache.clear()

    def choose(form: str) -> None:
        if form != "pointer" and torch.cuda.get_device_capability() < (9, 0):
            pytest.skip("TMA needs sm_90")
        monkeypatch.setattr(store, "choose", lambda problem, device: FORMS[form])
        forget()

    yield choose
    forget()


def run(c: Case) -> dict[str, torch.Tensor]:
    x, a, b = (t.detach().clone().requires_grad_() for t in (c.x, c.lora_a, c.lora_b))
    y = lk.lora_linear(x, c.weight, c.bias, a, b, c.scaling, c.dropout_p, seed=c.seed, backend="triton", strict=True)
    y.backward(c.dy)
    return {"y": y.detach(), "dx": x.grad, "da": a.grad, "db": b.grad}


@pytest.mark.parametrize("form", FORMS)
def test_sanitize_every_form(form, force) -> None:
    """Small, with tails in every direction, for compute-sanitizer."""
    force(form)
    for dropout_p in (0.0, 0.3):
        c = Case.random(300, 520, 136, 24, bf16, device=DEVICE, dropout_p=dropout_p)
        assert_close(run(c), c)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", [bf16, fp16], ids=dtype_id)
@pytest.mark.parametrize("shape", ODD, ids=shape_id)
@pytest.mark.parametrize("form", FORMS)
def test_odd_sizes_match_float64(form, shape, dtype, dropout_p, force) -> None:
    force(form)
    c = Case.random(*shape, dtype, bias=shape[0] % 2 == 1, dropout_p=dropout_p, device=DEVICE)
    assert_close(run(c), c)


@hardware
@pytest.mark.parametrize("dropout_p", [0.0, 0.05], ids=["plain", "dropout"])
@pytest.mark.parametrize("adapters", [bf16, fp32], ids=dtype_id)
@pytest.mark.parametrize("shape", REAL, ids=shape_id)
def test_real_shapes_match_float64(shape, adapters, dropout_p, force) -> None:
    force("column0")
    c = Case.random(*shape, bf16, adapters, bias=False, dropout_p=dropout_p, device=DEVICE)
    assert_close(run(c), c)


@pytest.mark.parametrize("tf32", [False, True], ids=["ieee", "tf32"])
def test_fp32_follows_the_tf32_setting(tf32) -> None:
    c = Case.random(130, 96, 200, 16, fp32, device=DEVICE, dropout_p=0.1)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        got = run(c)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    if not tf32:  # cuBLAS rounds to TF32 in its own way, and a CPU's eager PyTorch not at all
        assert_close(got, c)
    exact = Case.random(130, 96, 200, 16, torch.float64, device=DEVICE, dropout_p=0.1)
    error = (got["y"] - run_reference(exact)).norm() / got["y"].norm()
    assert 1e-5 < error < 2e-3 if tf32 else error < 1e-5


def run_reference(c: Case) -> torch.Tensor:
    seed = torch.tensor([c.seed], device=DEVICE)
    return reference.lora_linear_fwd(c.x, c.weight, c.bias, c.lora_a, c.lora_b, c.scaling, c.dropout_p, seed)[0]


@pytest.mark.parametrize("K", [32, 200, 4095])
def test_mask_is_the_reference_mask(K) -> None:
    seed = torch.tensor([0x123456789ABCDEF], device=DEVICE)
    c = Case.random(333, 64, K, 8, bf16, device=DEVICE)
    for p in (0.05, 0.5, 1.0):
        _, _, mask = torch.ops.lora_kernels.lora_linear_fwd(c.x, c.weight, None, c.lora_a, c.lora_b, 1.0, p, seed, "triton", True)
        assert torch.equal(mask, reference.dropout_mask(seed, 333, K, p))


@pytest.mark.parametrize("form", ["column0", "tma"])
def test_a_thousand_times_the_same_bits(form, force) -> None:
    """Also the race test of the column-0 flags: a stale or late h changes bits."""
    force(form)
    c = Case.random(1111, 2056, 1032, 16, bf16, device=DEVICE, dropout_p=0.0 if form == "column0" else 0.1)
    first = run(c)
    assert all_equal(first.values(), (run(c).values() for _ in repeats(1000)))


@hardware
def test_two_streams_at_once(force) -> None:
    """Each stream has its own flags: launches that overlap do not take each other's h."""
    force("column0")
    cases = [Case.random(640, 1032, 520, 16, bf16, device=DEVICE, generator_seed=i) for i in range(2)]
    expected = [run(c)["y"] for c in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    for _ in range(100):
        got = []
        for stream, c in zip(streams, cases, strict=False):
            with torch.cuda.stream(stream):
                got.append(run(c)["y"])
        torch.cuda.synchronize()
        assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=False))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_current() -> None:
    c = Case.random(130, 264, 136, 16, bf16, device="cuda:1")
    with torch.cuda.device(0):
        assert_close(run(c), c)
        assert torch.cuda.current_device() == 0


@hardware
@pytest.mark.parametrize("form", ["column0", "tma"])
def test_graph_capture_of_forward_and_backward(form, force) -> None:
    force(form)
    c = Case.random(520, 1032, 264, 16, bf16, device=DEVICE, dropout_p=0.0 if form == "column0" else 0.1)
    seed = torch.tensor([5], device=DEVICE)
    x, a, b = (t.detach().clone().requires_grad_() for t in (c.x, c.lora_a, c.lora_b))

    def step() -> tuple[torch.Tensor, ...]:
        y = lk.lora_linear(x, c.weight, c.bias, a, b, c.scaling, c.dropout_p, seed=seed, backend="triton", strict=True)
        return (y.detach(), *torch.autograd.grad(y, (x, a, b), c.dy))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    captured = []
    for graph in graphs:
        with torch.cuda.graph(graph):
            captured.append(step())
    for round_ in range(3):
        with torch.no_grad():
            x.copy_(c.x * (round_ + 1))
        expected = step()
        for graph, got in zip(graphs, captured, strict=False):
            for _ in range(2):
                graph.replay()
            assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=False))


@hardware
def test_peak_memory_of_a_training_step() -> None:
    """Beyond inputs, outputs and gradients: h, g, the bit mask and rank-sized partials; no M x N or M x K temporary."""
    M, N, K, R = 8192, 4096, 4096, 16
    c = Case.random(M, N, K, R, bf16, fp32, bias=False, device=DEVICE, dropout_p=0.05)
    x, a, b = c.x.requires_grad_(), c.lora_a.requires_grad_(), c.lora_b.requires_grad_()

    def step() -> None:
        y = lk.lora_linear(x, c.weight, None, a, b, c.scaling, c.dropout_p, backend="triton", strict=True)
        y.backward(c.dy)

    step()
    x.grad = a.grad = b.grad = None
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    peak = torch.cuda.max_memory_allocated() - before
    results = 2 * (M * N + M * K)
    small = 4 * 2 * M * R + M * K // 8 + 16 * 4 * R * (N + K) + 8 * R * (N + K) + 2**20
    assert peak <= results + small, f"{peak} bytes, {results} of y and dx, {small} allowed beside them"
    del step


def test_strided_inputs() -> None:
    c = Case.random(70, 96, 136, 16, bf16, device=DEVICE, dropout_p=0.2)
    turned = c._replace(**{name: getattr(c, name).t().contiguous().t() for name in ("x", "weight", "lora_a", "lora_b", "dy")})
    assert_close(run(turned), c)


@hardware
def test_devices_that_differ_are_refused() -> None:
    c = Case.random(8, 16, 16, 4, bf16, device=DEVICE)
    with pytest.raises(lk.LoraValueError, match="different devices"):
        lk.lora_linear(c.x, c.weight, None, c.lora_a.cpu(), c.lora_b)


def test_float64_falls_back_and_strict_raises() -> None:
    c = Case.random(8, 16, 16, 4, torch.float64, device=DEVICE)
    with pytest.raises(lk.BackendError, match="dtype torch.float64"):
        lk.lora_linear(c.x, c.weight, None, c.lora_a, c.lora_b, backend="triton", strict=True)
    lk.lora_linear(c.x, c.weight, None, c.lora_a, c.lora_b, backend="triton")
