"""Host microseconds per call of `lora_linear` and `lora_batched_linear`, beside F.linear in the same run: `pytest benchmarks/bench_host_overhead.py`.

With a GPU: asynchronous calls on it at a size whose kernels are shorter than the launch (the queue never fills). Without one: the same host
code on a driver that launches nothing (tests/triton/fake_cuda.py), and F.linear on the CPU with one row of 8 numbers, which is little more
than dispatch and allocation. The driver's own launch cost is then in none of the figures. Run it in a process of its own.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
pytest.importorskip("pytest_benchmark")

import lora_kernels as lk
from lora_kernels.kernels import _launch
from lora_kernels.native import signature
from lora_kernels.ops import _registry, _serving_path
from lora_kernels.ops import lora_linear as op_linear
from lora_kernels.tuning import cpu as plan_cpu

M, N, K, R = 64, 64, 64, 16
ON_GPU = torch.cuda.is_available()


@pytest.fixture(scope="module")
def operands():
    torch.set_num_threads(1)
    if not ON_GPU:
        sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "triton"))
        import fake_cuda

        fake_cuda.install(Path(tempfile.mkdtemp()))
        _registry._SERVES["triton"] = ("cpu",)
    shapes = (M, K), (N, K), (N,), (R, K), (N, R)
    return [torch.randn(shape).to("cuda" if ON_GPU else "cpu", torch.bfloat16) for shape in shapes]


def run(benchmark, call) -> None:
    call()
    if ON_GPU:
        torch.cuda.synchronize()
    # On a GPU fewer launches in all than its queue holds (1024): these kernels of one program may take longer than their launch.
    rounds, iterations = (20, 20) if ON_GPU else (50, 200)
    benchmark.pedantic(call, rounds=rounds, iterations=iterations, warmup_rounds=5)
    if ON_GPU:
        torch.cuda.synchronize()


def tiny(operands) -> tuple:
    x, weight, bias = operands[:3]
    return (x, weight, bias) if ON_GPU else (x[:1, :8].float(), weight[:8, :8].float(), bias[:8].float())


def test_f_linear(benchmark, operands) -> None:
    x, weight, bias = tiny(operands)
    with torch.no_grad():
        run(benchmark, lambda: F.linear(x, weight, bias))


def test_f_linear_autograd(benchmark, operands) -> None:
    x, weight, bias = tiny(operands)
    x = x.clone().requires_grad_()
    run(benchmark, lambda: F.linear(x, weight, bias))


def test_lora_linear(benchmark, operands) -> None:
    x, weight, bias, a, b = operands
    with torch.no_grad():
        run(benchmark, lambda: lk.lora_linear(x, weight, bias, a, b, 0.5, backend="triton", strict=True))


def test_lora_linear_autograd(benchmark, operands) -> None:
    x, weight, bias, a, b = operands
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    run(benchmark, lambda: lk.lora_linear(x, weight, bias, a, b, 0.5, backend="triton", strict=True))


@pytest.mark.parametrize("ours", [False, True], ids=["f_linear", "lora_linear"])
def test_under_autocast(benchmark, operands, ours) -> None:
    """Operands in autocast's dtype already, so that nothing is cast."""
    x, weight, bias, a, b = operands
    small = [t.to(torch.bfloat16) for t in tiny(operands)]
    call = (lambda: lk.lora_linear(x, weight, bias, a, b, 0.5, backend="triton", strict=True)) if ours else (lambda: F.linear(*small))
    with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16):
        run(benchmark, call)


def test_through_the_dispatcher(benchmark, operands) -> None:
    """What the lean path saves: the torch.library op itself, which torch.compile and dispatch modes go through."""
    x, weight, bias, a, b = operands
    op = torch.ops.lora_kernels.lora_linear_fwd.default
    run(benchmark, lambda: op(x, weight, bias, a, b, 0.5, 0.0, None, "triton", True))


@pytest.mark.parametrize("lean", [True, False], ids=["lean", "tritons_own"])
def test_one_launch(benchmark, operands, lean) -> None:
    """The column-0 kernel alone: 4 descriptors, 4 pointers, 7 numbers, 8 constexprs."""
    from lora_kernels.kernels._launch import workspace
    from lora_kernels.kernels.column0 import Column0
    from lora_kernels.tuning.plan import Plan

    x, weight, bias, a, b = operands
    y, h = x.new_empty(M, N), x.new_empty(M, R)
    launch = Column0(Plan("triton", "column0", 128, 128, 64, 8, 3), x, weight.t(), bias, b.t()).launch
    args = ((x, weight, a, y), (bias, h, b, workspace(x.device, 0, 3)), (0.5,))
    launch._first(*args)
    run(benchmark, (lambda: launch(0, *args)) if lean else (lambda: launch._first(*args)))


@pytest.fixture
def batch(operands):
    """A decode step of 8 adapters: x, weight, bias, the pools, and the metadata that all layers of the step share."""
    from lora_kernels.kernels import batched_table
    from lora_kernels.ops.batch_meta import BatchMeta

    x, weight, bias, a, b = operands
    meta = BatchMeta(torch.arange(M, dtype=torch.int32, device=x.device) % 8, 8)
    if not ON_GPU:  # a CPU's metadata has no table
        from lora_kernels import _batch_table

        meta.table = batched_table.build(meta.ids, 8, meta.block, meta.ids.new_empty(_batch_table.layout(M, 8, meta.block).size))
    return x, weight, bias, a.expand(8, R, K).contiguous(), b.expand(8, N, R).contiguous(), meta


def test_lora_batched_linear(benchmark, batch) -> None:
    with torch.no_grad():
        run(benchmark, lambda: lk.lora_batched_linear(*batch, backend="triton", strict=True))


def test_lora_batched_linear_through_the_dispatcher(benchmark, batch) -> None:
    x, weight, bias, a, b, meta = batch
    op = torch.ops.lora_kernels.lora_batched_fwd.default
    constants = (None, None, None, None, meta.table, meta.block, False, False, "triton", True)
    run(benchmark, lambda: op(x, [weight], [bias], [a], [b], meta.ids, *constants))


def test_table_of_the_batch(benchmark, batch) -> None:
    """Once per step, for all layers."""
    from lora_kernels.kernels import batched_table

    meta = batch[-1]
    run(benchmark, lambda: batched_table.build(meta.ids, 8, meta.block, meta.table))


@pytest.mark.parametrize("lean", [True, False], ids=["lean", "tritons_own"])
def test_one_decode_launch(benchmark, batch, lean) -> None:
    """The decode kernel alone: 8 pointers, 4 tuples of pointers, 2 tuples of numbers, 19 numbers."""
    from lora_kernels.kernels import batched

    x, weight, bias, a, b, meta = batch
    args = (x, [weight], [bias], [a], [b], meta.ids, None, None, None, None, meta.table)
    forward = batched.Forward(*args, meta.block, False, False)
    decode = forward.runs[0][2]
    y, h = x.new_empty(M, N), x.new_empty(1, M, R)
    call = (0, x, y, h, [weight], batched._biases([bias]), [a], [b], None, None, meta.table)
    decode(*call)
    if not lean:
        launch, decode.launch = decode.launch, lambda stream, described, pointers: launch._first(described, pointers, ())
    run(benchmark, lambda: decode(*call))


@pytest.fixture
def row():
    """One row through the native CPU engine, 8 x 8 with R 16 and 8 adapters: arithmetic of well under a microsecond."""
    from lora_kernels.native import cpu

    if (reason := cpu.unusable()) is not None:
        pytest.skip(reason)
    x, weight, a, b = torch.randn(1, 8), torch.randn(8, 8), torch.randn(8, R, 8), torch.randn(8, 8, R)
    with plan_cpu.forced("in_place"):
        yield x, weight, a, b, lk.BatchMeta(torch.zeros(1, dtype=torch.int32), 8)


PIECES = (
    "signature, native",
    "signature, python",
    "signature of an unobserved call, native",
    "signature of an unobserved call, python",
    "range, native",
    "range, aminmax",
    "apply, lean",
    "apply, whole",
    "empty, numbers",
    "empty, tuple",
    "empty, past the dispatcher",
)


@pytest.mark.parametrize("piece", PIECES)
def test_piece(benchmark, row, piece) -> None:
    """What the figures in comments of ops/ and native/ stand on."""
    x, weight, a, b, meta = row
    a, b = a[0].clone().requires_grad_(), b[0].clone().requires_grad_()
    y, h, mask = x.new_empty(1, 8), x.new_empty(1, R), torch.empty(0, dtype=torch.int32)
    operands = (x, a, b, None, weight, (0.5, 0.0, None, "cpu", True, lambda *_: (y.detach(), h, mask)))
    calls = {
        "signature, native": lambda: signature.signature(x, weight, a, b, None),
        "signature, python": lambda: signature._from_attributes(x, weight, a, b, None),
        "signature of an unobserved call, native": lambda: signature.unobserved_signature(x, weight, a, b, None),
        "signature of an unobserved call, python": lambda: signature._unobserved_from_attributes(x, weight, a, b, None),
        "range, native": lambda: signature.value_range(meta.ids),
        "range, aminmax": lambda: [int(v) for v in meta.ids.aminmax()],
        "apply, lean": lambda: op_linear._apply(*operands),
        "apply, whole": lambda: op_linear._LoraLinear.apply(*operands),
        "empty, numbers": lambda: x.new_empty(1, 8),
        "empty, tuple": lambda: x.new_empty((1, 8)),
        "empty, past the dispatcher": _launch.maker(x, 1, 8),
    }
    run(benchmark, calls[piece])


@pytest.mark.parametrize("trained", [False, True], ids=["no_gradient", "autograd"])
def test_cpu_lora_linear(benchmark, row, trained) -> None:
    x, weight, a, b, _ = row
    a, b = (t[0].clone().requires_grad_(trained) for t in (a, b))
    run(benchmark, lambda: lk.lora_linear(x, weight, None, a, b, 0.5, backend="cpu", strict=True))


@pytest.mark.parametrize("trained", [False, True], ids=["no_gradient", "autograd"])
@pytest.mark.parametrize("kind", ["f_linear_layer", "LoraLinear", "peft", "peft_patched", "peft_patched_looks_anew"])
def test_cpu_layer(benchmark, monkeypatch, row, kind, trained) -> None:
    """A layer of 8 x 8 with rank 4 called as a module: what a step pays per layer."""
    if kind == "f_linear_layer":
        layer = torch.nn.Linear(8, 8).requires_grad_(False)
    elif kind == "LoraLinear":
        layer = lk.LoraLinear(8, 8, r=4)
    else:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), peft.LoraConfig(r=4, target_modules=["0"]))
        layer = model.base_model.model[0]
        if kind != "peft":
            lk.patch(model)
        if kind == "peft_patched_looks_anew":
            from lora_kernels.integrations import peft_layer

            monkeypatch.setattr(peft_layer.Seen, "holds", lambda *_: False)
            monkeypatch.setattr(peft_layer, "_keep_verdict", lambda *_: None)
    x = row[0].clone().requires_grad_(trained)
    with torch.set_grad_enabled(trained):
        run(benchmark, lambda: layer(x))


@pytest.mark.parametrize("lean", [True, False], ids=["lean", "checks_and_dispatcher"])
def test_cpu_lora_batched_linear(benchmark, monkeypatch, row, lean) -> None:
    x, weight, a, b, meta = row
    if not lean:
        monkeypatch.setattr(_serving_path, "linear_key", lambda *_: None)
    run(benchmark, lambda: lk.lora_batched_linear(x, weight, None, a, b, meta, backend="cpu", strict=True))


@pytest.mark.parametrize("ours", [False, True], ids=["f_linear", "lora_batched_linear"])
def test_cpu_serving_under_autocast(benchmark, row, ours) -> None:
    """Operands in autocast's dtype already, so that nothing is cast."""
    x, weight, a, b, meta = (t.to(torch.bfloat16) if isinstance(t, torch.Tensor) else t for t in row)
    call = (lambda: lk.lora_batched_linear(x, weight, None, a, b, meta, backend="cpu", strict=True)) if ours else (lambda: F.linear(x, weight))
    with torch.autocast("cpu", torch.bfloat16):
        run(benchmark, call)


def test_cpu_shrink_and_expand_under_autocast(benchmark, row) -> None:
    x, _, a, b, meta = row
    y = torch.zeros(1, 8)
    with torch.autocast("cpu", torch.bfloat16):
        run(benchmark, lambda: lk.lora_expand(y, lk.lora_shrink(x, a, meta, backend="cpu", strict=True), b, meta, backend="cpu", strict=True))


def test_cpu_shrink_and_expand(benchmark, row) -> None:
    x, _, a, b, meta = row
    y = torch.zeros(1, 8)
    run(benchmark, lambda: lk.lora_expand(y, lk.lora_shrink(x, a, meta, backend="cpu", strict=True), b, meta, backend="cpu", strict=True))
