"""The Hopper kernels on a GPU: every form against float64, bits that repeat, graphs, streams, flags. `make gpu`; skipped without a GPU."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from place import DEVICE, EMULATED, all_equal, hardware, repeats

import lora_kernels as lk
from lora_kernels import reference
from lora_kernels.native import cuda
from lora_kernels.native.cuda import Form
from lora_kernels.tuning.plan import CUDA_TILES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda.unusable() is not None, reason=str(cuda.unusable())),
    pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="the kernels are for sm_90"),
]

bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
FLOOR = {bf16: 4e-3, fp16: 5e-4}

# M, N, K, R: one row, tails in every direction, less than a tile, several tiles, R that pads to 16, 32 and 64
ODD = [
    (1, 8, 8, 8),
    (17, 16, 72, 8),
    (127, 264, 136, 16),
    (129, 248, 64, 24),
    (300, 1000, 520, 32),
    (385, 520, 1032, 40),
    (640, 768, 448, 64),
]
WIDE_RANKS = [(129, 264, 136, 72), (300, 520, 520, 128), (257, 1000, 200, 200), (64, 256, 128, 256)]

# N, K of the projections
MODELS = {
    "llama3-8b-qo": (4096, 4096),
    "llama3-8b-kv": (1024, 4096),
    "llama3-8b-up": (14336, 4096),
    "llama3-8b-down": (4096, 14336),
    "llama3-70b-qo": (8192, 8192),
    "llama3-70b-up": (28672, 8192),
    "llama3-70b-down": (8192, 28672),
    "qwen3-8b-up": (12288, 4096),
    "qwen3-32b-q": (8192, 5120),
    "qwen3-32b-down": (5120, 25600),
}


def shape_id(shape):
    return "M{}-N{}-K{}-R{}".format(*shape)


def randn(*shape, dtype=bf16, scale=1.0):
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


def rmse(got, exact):
    return ((got.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def check(got, exact, same_dtype, what):
    """At most twice the error of eager PyTorch in the same dtype, plus the rounding floor. NaN never passes."""
    error, base, floor = rmse(got, exact), rmse(same_dtype, exact), FLOOR[got.dtype]
    assert error <= 2 * base + floor, f"{what}: relative RMSE {error:.2e}, eager {base:.2e}"


def poison(*sizes, dtype=bf16):
    """Leaves NaN in the allocator's free blocks that the next outputs will take: what a kernel does not write is found."""
    for t in [torch.full(s, float("nan"), dtype=dtype, device=DEVICE) for s in sizes]:
        del t


def operands(M, N, K, R, dtype, backward):
    """x [M, K], w, a, b in the layout of the direction, and the same as ordinary factors: y = x W + h B, h = x A."""
    x, w = randn(M, K, dtype=dtype), randn(*((K, N) if backward else (N, K)), dtype=dtype, scale=K**-0.5)
    a, b = randn(*((K, R) if backward else (R, K)), dtype=dtype, scale=K**-0.5), randn(*((R, N) if backward else (N, R)), dtype=dtype)
    return (x, w, a, b), ((w, a, b) if backward else (w.t(), a.t(), b.t()))


@pytest.fixture(autouse=True)
def _flags_are_zero_afterwards():
    yield
    torch.cuda.synchronize()
    assert all(int(t.abs().sum()) == 0 for t in cuda.flags.kept.values())


def test_sanitize_every_form():
    """Small and complete, for compute-sanitizer: each form, both clusters, tails in every direction."""
    M, N, K, R = 300, 520, 136, 24
    for backward in (False, True):
        (x, w, a, b), _ = operands(M, N, K, R, bf16, backward)
        for cluster in (1, 2):
            _, h = cuda.linear(x, w, None, a, b, None, 1.0, backward, how=Form(True, 128, 256, cluster))
            for tile in CUDA_TILES:
                cuda.linear(x, w, None, None, b, h, 1.0, backward, how=Form(False, *tile, cluster))
            if backward:
                mask = reference.dropout_mask(torch.tensor([5], device=DEVICE), M, N, 0.3)
                cuda.linear(x, w, None, None, b, h, 1.4, True, mask=mask, how=Form(False, 128, 256, cluster))
    run(*problem(300, 520, 1160, 72), 0.1)
    torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------------------------- each kernel


@pytest.mark.parametrize("dtype", [bf16, fp16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "dx"])
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("shape", ODD, ids=shape_id)
def test_column0(shape, cluster, backward, dtype):
    M, N, K, R = shape
    (x, w, a, b), (W, A, B) = operands(M, N, K, R, dtype, backward)
    bias = None if backward else randn(N, dtype=dtype)
    poison((M, N), (M, R), dtype=dtype)
    y, h = cuda.linear(x, w, bias, a, b, None, 0.75, backward, how=Form(True, 128, 256, cluster))
    exact_h = 0.75 * (x.double() @ A.double())
    exact = x.double() @ W.double() + exact_h @ B.double() + (0 if bias is None else bias.double())
    eager_h = 0.75 * (x @ A)
    eager = x @ W + eager_h @ B + (0 if bias is None else bias)
    check(h, exact_h, eager_h, "h")
    check(y, exact, eager, "y")


@pytest.mark.parametrize("dtype", [bf16, fp16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "dx"])
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("tile", CUDA_TILES, ids=lambda tile: "{}x{}".format(*tile))
@pytest.mark.parametrize("shape", ODD[::2] + WIDE_RANKS, ids=shape_id)
def test_update(shape, tile, cluster, backward, dtype):
    M, N, K, R = shape
    (x, w, _, b), (W, _, B) = operands(M, N, K, R, dtype, backward)
    h, bias = randn(M, R, dtype=dtype), None if backward else randn(N, dtype=dtype)
    poison((M, N), dtype=dtype)
    y, _ = cuda.linear(x, w, bias, None, b, h, 1.0, backward, how=Form(False, *tile, cluster))
    exact = x.double() @ W.double() + h.double() @ B.double() + (0 if bias is None else bias.double())
    check(y, exact, x @ W + h @ B + (0 if bias is None else bias), "y")


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("shape", ODD + WIDE_RANKS, ids=shape_id)
def test_masked_dx(shape, cluster):
    M, N, K, R = shape
    p, (x, w, _, b), (W, _, B) = 0.3, *operands(M, N, K, R, bf16, True)
    g, mask = randn(M, R), reference.dropout_mask(torch.tensor([5], device=DEVICE), M, N, p)
    poison((M, N))
    y, _ = cuda.linear(x, w, None, None, b, g, reference.keep_scale(p), True, mask=mask, how=Form(False, 128, 256, cluster))
    keep = reference.unpack_bits(mask, N)
    exact = x.double() @ W.double() + torch.where(keep, (g.double() @ B.double()) * reference.keep_scale(p), 0.0)
    check(y, exact, x @ W + torch.where(keep, (g @ B) * reference.keep_scale(p), 0.0).to(bf16), "dx")


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("tile", CUDA_TILES, ids=lambda tile: "{}x{}".format(*tile))
def test_base_product_alone(tile, cluster):
    x, w = randn(300, 520), randn(776, 520, scale=520**-0.5)
    y, _ = cuda.linear(x, w, None, None, None, None, 1.0, False, how=Form(False, *tile, cluster))
    check(y, x.double() @ w.double().t(), F.linear(x, w), "y")


@pytest.mark.parametrize("dtype", [bf16, fp16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("p", [0.0, 0.1, 1.0], ids=["no_dropout", "dropout", "all_dropped"])
@pytest.mark.parametrize("shape", [*ODD, *WIDE_RANKS, *([] if EMULATED else [(2048, 8, 4096, 64), (8192, 8, 4096, 16)])], ids=shape_id)
def test_shrink_and_mask(shape, p, dtype):
    M, _, K, R = shape
    x, a, seed = randn(M, K, dtype=dtype), randn(R, K, dtype=dtype, scale=K**-0.5), torch.tensor([2**40 + 17], device=DEVICE)
    mask = torch.full((M, -(-K // 32)), 7, dtype=torch.int32, device=DEVICE) if p > 0 else None
    poison((M, R), dtype=dtype)
    h = cuda.shrink(x, a, 0.75, False, mask, seed, p)
    kept = x
    if p > 0:
        assert torch.equal(mask, reference.dropout_mask(seed, M, K, p))
        kept = torch.where(reference.unpack_bits(mask, K), x, x.new_zeros(()))
    scale = 0.75 * reference.keep_scale(p)
    check(h, scale * (kept.double() @ a.double().t()), (scale * (kept @ a.t())).to(dtype), "h")


@pytest.mark.parametrize("shape", ODD + WIDE_RANKS, ids=shape_id)
def test_shrink_of_dy(shape):
    M, N, _, R = shape
    dy, b = randn(M, N), randn(N, R, scale=N**-0.5)
    g = cuda.shrink(dy, b, 2.0, True)
    check(g, 2 * (dy.double() @ b.double()), 2 * (dy @ b), "g")


@pytest.mark.parametrize("split", [1, 2, 4, 8])
def test_shrink_splits_agree(split, monkeypatch):
    monkeypatch.setattr(cuda, "split", lambda *_: split)
    x, a = randn(300, 1160), randn(64, 1160, scale=1160**-0.5)
    check(cuda.shrink(x, a, 1.0, False), x.double() @ a.double().t(), x @ a.t(), "h")


@hardware
def test_loaded_kernels_use_no_local_memory():
    for name, (registers, local) in cuda._module().cuda_loaded().items():
        assert registers <= 168, name
        assert local == 0, name


# -------------------------------------------------------------------------------------------------------------------- whole op


def run(x, w, bias, a, b, dy, p=0.0, backend="cuda", strict=True, scaling=0.75):
    x, a, b = (t.detach().clone().requires_grad_() for t in (x, a, b))
    y = lk.lora_linear(x, w, bias, a, b, scaling, p, seed=11, backend=backend, strict=strict)
    y.backward(dy)
    return {"y": y.detach(), "dx": x.grad, "da": a.grad, "db": b.grad}


def problem(M, N, K, R, dtype=bf16, adapter=None):
    adapter = adapter or dtype
    return (
        randn(M, K, dtype=dtype),
        randn(N, K, dtype=dtype, scale=K**-0.5),
        randn(N, dtype=dtype),
        randn(R, K, dtype=adapter, scale=K**-0.5),
        randn(N, R, dtype=adapter),
        randn(M, N, dtype=dtype),
    )


def check_op(args, p):
    exact = run(*(t.double() for t in args), p, backend="reference", strict=False)
    eager = run(*args, p, backend="reference", strict=False)
    got = run(*args, p)
    for name, tensor in got.items():
        assert tensor.dtype == eager[name].dtype
        error, base = rmse(tensor, exact[name]), rmse(eager[name], exact[name])
        assert error <= 2 * base + FLOOR[args[0].dtype], f"{name}: relative RMSE {error:.2e}, eager {base:.2e}"


@pytest.mark.parametrize("p", [0.0, 0.1], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("dtypes", [(bf16, bf16), (bf16, fp32), (fp16, fp16), (fp16, fp32)], ids=["bf16", "bf16-fp32", "fp16", "fp16-fp32"])
@pytest.mark.parametrize("shape", ODD + WIDE_RANKS, ids=shape_id)
def test_op(shape, dtypes, p):
    check_op(problem(*shape, *dtypes), p)


@hardware
@pytest.mark.parametrize("R", [16, 64, 128])
@pytest.mark.parametrize("model", MODELS)
def test_model_shapes(model, R):
    N, K = MODELS[model]
    check_op(problem(1000 if R == 128 else 2048, N, K, R), 0.05 if R == 64 else 0.0)


def test_views_of_larger_tensors():
    """Row pitches wider than the rows, as slices of a fused projection have."""
    x, w = randn(200, 1024)[:, 256:768], randn(384, 2048, scale=512**-0.5)[:, 512:1024]
    a, b = randn(16, 512, scale=512**-0.5), randn(384, 16)
    y = lk.lora_linear(x, w, None, a, b, 1.0, backend="cuda", strict=True)
    exact = x.double() @ w.double().t() + (x.double() @ a.double().t()) @ b.double().t()
    check(y, exact, F.linear(x, w) + F.linear(F.linear(x, a), b), "y")


def test_what_it_refuses():
    args = problem(64, 64, 64, 12)
    with pytest.raises(lk.BackendError, match="R = 12"):
        run(*args)
    x, w, bias, a, b, dy = problem(64, 64, 64, 16)
    with pytest.raises(lk.BackendError, match="weight with strides"):
        run(x, w.t().contiguous().t(), bias, a, b, dy)


# ----------------------------------------------------------------------------------------------------- races, graphs, streams


@pytest.mark.parametrize("R", [16, 64])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "dx"])
@pytest.mark.parametrize("cluster", [1, 2])
def test_column0_gives_the_same_bits_1000_times(cluster, backward, R):
    (x, w, a, b), _ = operands(2048 + 40, 1544, 1032, R, bf16, backward)
    how = Form(True, 128, 256, cluster)
    first = cuda.linear(x, w, None, a, b, None, 0.5, backward, how=how)
    assert all_equal(first, (cuda.linear(x, w, None, a, b, None, 0.5, backward, how=how) for _ in repeats(1000)))


@pytest.mark.parametrize("R, p", [(16, 0.0), (64, 0.1), (128, 0.0)])
def test_op_gives_the_same_bits_1000_times(R, p):
    args = problem(777, 1032, 520, R, bf16, fp32)
    first = run(*args, p)
    assert all_equal(first.values(), (run(*args, p).values() for _ in repeats(1000)))


def test_one_row_of_tiles_many_columns():
    """Most CTAs wait for one: M = 1 and N of many tiles."""
    args = problem(1, 64 * 256, 4096, 16)
    for _ in repeats(50):
        check_op(args, 0.0)


@hardware
@pytest.mark.parametrize("R, p", [(16, 0.0), (64, 0.1), (128, 0.0)], ids=["column0", "dropout", "update"])
def test_graph_replays_with_changed_inputs(R, p):
    x, w, bias, a, b, dy = problem(1025, 776, 520, R)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(x, w, bias, a, b, dy, p)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    seed = torch.tensor([3], device=DEVICE)
    with torch.cuda.graph(graph):
        y, h, mask = cuda.lora_linear_fwd(x, w, bias, a, b, 0.75, p, seed)
        dx, da, db = cuda.lora_linear_bwd(dy, x, w, a, b, h, mask, 0.75, p, True, True, True)
    for turn in range(5):
        x.copy_(randn(*x.shape))
        a.copy_(randn(*a.shape, scale=0.05))
        seed.fill_(turn)
        for _ in range(3):  # back to back: flags must be zero again in time
            graph.replay()
        expected_y, expected_h, expected_mask = cuda.lora_linear_fwd(x, w, bias, a, b, 0.75, p, seed)
        expected = cuda.lora_linear_bwd(dy, x, w, a, b, expected_h, expected_mask, 0.75, p, True, True, True)
        for got, want in zip((y, h, mask, dx, da, db), (expected_y, expected_h, expected_mask, *expected), strict=True):
            assert torch.equal(got, want)


@hardware
def test_two_streams_at_once():
    problems = [operands(4096, 4096, 1024, 16, bf16, False)[0] for _ in range(2)]
    alone = [cuda.linear(x, w, None, a, b, None, 1.0, False)[0] for x, w, a, b in problems]
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream(), torch.cuda.Stream()], [[], []]

    def work(i):
        x, w, a, b = problems[i]
        with torch.cuda.stream(streams[i]):
            for _ in range(50):
                results[i].append(cuda.linear(x, w, None, a, b, None, 1.0, False)[0])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    torch.cuda.synchronize()
    for i in range(2):
        assert all(torch.equal(alone[i], y) for y in results[i])


def test_errors_leave_the_next_call_working():
    x, w, _, a, b, _ = problem(128, 256, 64, 16)
    with pytest.raises(lk.BackendError, match="no such kernel"):
        cuda.linear(x, w, None, a, b, None, 1.0, False, how=Form(True, 128, 128, 1))
    y, _ = cuda.linear(x, w, None, a, b, None, 1.0, False)
    check(y, x.double() @ w.double().t() + x.double() @ a.double().t() @ b.double().t(), F.linear(x, w) + F.linear(F.linear(x, a), b), "y")
