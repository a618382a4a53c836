"""What Python hands to the CUDA kernels: the real launchers over a stand-in module that computes, on the CPU, what each call asks for."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import cuda_stand_in
import pytest
import torch
from cuda_stand_in import StandIn
from oracle import Case, assert_close

import lora_kernels as lk
from lora_kernels.native import cuda
from lora_kernels.ops import _registry
from lora_kernels.tuning import store
from lora_kernels.tuning.plan import CUDA_TILES, Plan, Problem, cuda_plans


@pytest.fixture
def module(monkeypatch):
    return cuda_stand_in.install(monkeypatch)


def forward_backward(c: Case) -> dict[str, torch.Tensor]:
    seed = torch.tensor([c.seed])
    y, h, mask = cuda.lora_linear_fwd(c.x, c.weight, c.bias, c.lora_a, c.lora_b, c.scaling, c.dropout_p, seed)
    grads = cuda.lora_linear_bwd(c.dy, c.x, c.weight, c.lora_a, c.lora_b, h, mask, c.scaling, c.dropout_p, True, True, True)
    return dict(zip(("y", "dx", "da", "db"), (y, *grads), strict=True))


@pytest.mark.parametrize("p", [0.0, 0.3], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("R", [8, 64, 72, 256])
@pytest.mark.parametrize("dtype, adapter", [(torch.bfloat16, torch.float32), (torch.float16, torch.float16)], ids=["bf16-fp32", "fp16"])
def test_calls_compute_the_op(module, dtype, adapter, R, p):
    c = Case.random(130, 72, 264, R, dtype, adapter, bias=R != 8, dropout_p=p)
    assert_close(forward_backward(c), c)
    launches = [(call.backward, getattr(call, "column0", "shrink")) for call in module.calls]
    one = R <= 64 and p == 0
    assert launches == ([(False, True), (True, True)] if one else [(False, "shrink"), (False, False), (True, "shrink"), (True, False)])
    assert all(getattr(call, "dependent", False) == (not one) for call in module.calls if hasattr(call, "block_n"))


def test_only_what_is_needed_runs(module):
    c = Case.random(64, 72, 80, 16, torch.bfloat16)
    _, h, mask = cuda.lora_linear_fwd(c.x, c.weight, c.bias, c.lora_a, c.lora_b, c.scaling, 0.0, None)
    module.calls.clear()
    dx, da, db = cuda.lora_linear_bwd(c.dy, c.x, c.weight, c.lora_a, c.lora_b, h, mask, c.scaling, 0.0, False, False, True)
    assert not module.calls
    assert dx.numel() == da.numel() == 0
    assert_close({"db": db}, c)
    *_, da, _ = cuda.lora_linear_bwd(c.dy, c.x, c.weight, c.lora_a, c.lora_b, h, mask, c.scaling, 0.0, False, True, False)
    assert [hasattr(call, "split") for call in module.calls] == [True]


def test_row_pitches_are_passed_on(module):
    c = Case.random(40, 72, 80, 16, torch.bfloat16)
    wide = lambda t: torch.nn.functional.pad(t, (16, 24))[:, 16:-24]
    c = c._replace(x=wide(c.x), weight=wide(c.weight), lora_a=wide(c.lora_a), lora_b=wide(c.lora_b), dy=wide(c.dy))
    assert cuda.refuses_fwd(c.x, c.weight, c.bias, c.lora_a, c.lora_b, 1.0, 0.0, None) is None
    assert_close(forward_backward(c), c)
    assert module.calls[0].ldx == c.x.stride(0) == 120


def test_adapters_that_tma_cannot_describe_are_copied(module):
    c = Case.random(40, 72, 80, 16, torch.bfloat16)
    odd = torch.empty(16 * 80 + 1, dtype=torch.bfloat16)[1:].view(16, 80).copy_(c.lora_a)
    assert odd.data_ptr() % 16
    c = c._replace(lora_a=odd, lora_b=c.lora_b.t().contiguous().t())
    assert_close(forward_backward(c), c)


REFUSED = {
    "rank": (dict(R=12), "R = 12"),
    "wide_rank": (dict(R=264), "R = 264"),
    "odd_columns": (dict(N=68), "N = 68"),
    "dtype": (dict(dtype=torch.float32), "dtype torch.float32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_why(name):
    changes, reason = REFUSED[name]
    sizes = dict(M=16, N=72, K=80, R=16, dtype=torch.bfloat16) | changes
    c = Case.random(**sizes)
    assert reason in cuda.refuses_fwd(c.x, c.weight, c.bias, c.lora_a, c.lora_b, 1.0, 0.0, None)
    assert reason in cuda.refuses_bwd(c.dy, c.x, c.weight, c.lora_a, c.lora_b, None, None, 1.0, 0.0, True, True, True)


@pytest.mark.parametrize("sizes", [(2**31 - 512, 16, 16), (16, 2**31, 16), (16, 16, 2**31)], ids=["M", "N", "K"])
def test_sizes_past_32_bits_are_refused(sizes):
    (M, N, K), meta = sizes, lambda *shape: torch.empty(shape, dtype=torch.bfloat16, device="meta")
    x, weight, a, b = meta(M, K), meta(N, K), meta(8, K), meta(N, 8)
    assert "(32-bit indices)" in cuda.refuses_fwd(x, weight, None, a, b, 1.0, 0.0, None)
    assert "(32-bit indices)" in cuda.refuses_bwd(meta(M, N), x, weight, a, b, None, None, 1.0, 0.0, True, True, True)


def test_layouts_refused():
    c = Case.random(16, 72, 80, 16, torch.bfloat16)
    transposed = c.weight.t().contiguous().t()
    assert "weight with strides [1, 72]" in cuda.refuses_fwd(c.x, transposed, c.bias, c.lora_a, c.lora_b, 1.0, 0.0, None)
    expanded = torch.ones((), dtype=torch.bfloat16).expand(16, 72)
    assert "dy with strides [0, 0]" in cuda.refuses_bwd(expanded, c.x, c.weight, c.lora_a, c.lora_b, None, None, 1.0, 0.0, True, True, True)


def test_an_error_names_the_kernel_and_drops_the_flags(module, monkeypatch):
    c = Case.random(16, 72, 80, 16, torch.bfloat16)

    def fails(*_):
        raise StandIn.CudaError("linear<bf16> M=16 N=72: launch failed; CUDA error cudaErrorLaunchFailure (unspecified launch failure)")

    monkeypatch.setattr(module, "cuda_linear", fails)
    with pytest.raises(
        lk.BackendError, match=r"CUDA kernel failed; got linear<bf16> M=16 N=72: launch failed; CUDA error cudaErrorLaunchFailure.*fix:"
    ):
        cuda.lora_linear_fwd(c.x, c.weight, c.bias, c.lora_a, c.lora_b, 1.0, 0.0, None)
    assert not cuda.flags.kept


def test_forms_are_ones_the_launcher_takes():
    for M in (1, 128, 129, 1000, 8192):
        for N in (8, 1024, 4096, 28672):
            for R, masked, given in ((16, False, False), (64, False, False), (72, False, True), (256, False, True), (16, True, True)):
                how = cuda.form(M, N, R, masked, given, 132)
                assert how.cluster == (2 if M > 128 else 1)
                assert (how.block_m, how.block_n) in (CUDA_TILES[:1] if how.column0 or masked else CUDA_TILES)
                assert how.column0 == (not masked and not given)
        for K in (8, 256, 4096, 28672):
            s = cuda.split(M, K, 132)
            assert s in (1, 2, 4, 8)
            assert s == 1 or 4 * s <= -(-K // 64)


# ------------------------------------------------------------------------------------------------------------------ by plan

KINDS = {"rank-16": (16, 0.0), "rank-72": (72, 0.0), "dropout": (16, 0.3)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_plan_is_launched_as_it_says_and_computes_the_op(module, monkeypatch, kind):
    R, p = KINDS[kind]
    M, N, K = 40, 72, 104
    c = Case.random(M, N, K, R, torch.bfloat16, bias=False, dropout_p=p)
    for op, size in (("fwd", (M, N, K)), ("dx", (M, K, N))):
        plans = cuda_plans(Problem(op, *size, R, torch.bfloat16, p > 0))
        assert len({plan.form for plan in plans}) == (2 if kind == "rank-16" else 1)
        for i, plan in enumerate(p for p in plans if p.group_m == 8):
            plan = replace(plan, group_m=1 + i)
            module.calls.clear()
            monkeypatch.setattr(
                store, "choose", lambda problem, _, op=op, plan=plan: plan if problem.op == op else Plan("triton", "tma", 64, 64, 64, 4, 2)
            )
            assert_close(forward_backward(c), c)
            (call,) = [call for call in module.calls if hasattr(call, "block_m") and call.backward == (op == "dx")]
            asked = (call.column0, call.block_m, call.block_n, call.cluster, call.group_m)
            assert asked == (plan.form == "column0", plan.block_m, plan.block_n, plan.cluster, plan.group_m)


def test_a_prepared_call_keeps_the_plan_it_was_prepared_with(module, monkeypatch):
    c = Case.random(300, 72, 264, 16, torch.bfloat16)
    args = (c.x, c.weight, c.bias, c.lora_a, c.lora_b, c.scaling, 0.0, None)
    monkeypatch.setattr(store, "choose", lambda *_: Plan("cuda", "tma", 256, 128, group_m=16))
    run = cuda.lora_linear_fwd.prepare(*args)
    monkeypatch.setattr(store, "choose", lambda *_: pytest.fail("looked up again"))
    assert_close({"y": run(*args)[0]}, c)
    assert (module.calls[-1].block_m, module.calls[-1].group_m, module.calls[-1].cluster) == (256, 16, 1)
    assert cuda.lora_linear_fwd.prepare(c.x[:0], *args[1:]) is None


def test_a_measured_table_sends_the_op_here(module, monkeypatch, tmp_path):
    """From the JSON file to the launch: the plan of the nearest M, the backend it puts first, the tile the kernel is asked for."""
    plan = {"implementation": "cuda", "form": "tma", "block_m": 128, "block_n": 192, "group_m": 16, "cluster": 2}
    entry = {"op": "fwd", "M": 512, "N": 72, "K": 264, "R": 16, "dtype": "bfloat16", "dropout": False, "plan": plan}
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path))
    (tmp_path / "test-gpu.json").write_text(json.dumps({"device": "Test GPU", "entries": [entry]}))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Test GPU")
    choose = store.choose.__wrapped__
    monkeypatch.setattr(store, "choose", lambda problem, _: choose(problem, torch.device("cuda:0")))
    store.tables.cache_clear()
    c = Case.random(300, 72, 264, 16, torch.bfloat16)
    args = (c.x, c.weight, c.bias, c.lora_a, c.lora_b, c.scaling, 0.0, None)
    assert _registry.order("lora_linear_fwd", "cuda", args) == ("cuda", "triton", "reference")
    assert_close({"y": cuda.lora_linear_fwd(*args)[0]}, c)
    call = module.calls[-1]
    assert (call.column0, call.block_m, call.block_n, call.cluster, call.group_m) == (False, 128, 192, 2, 16)
    store.tables.cache_clear()


def test_every_form_that_the_benchmark_times_runs(module):
    spec = importlib.util.spec_from_file_location("cuda_forms", Path(__file__).parents[1] / "benchmarks" / "cuda_forms.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    found = dict(benchmark.forms(300, 72, 264, device="cpu"))
    for name, call in found.items():
        module.calls.clear()
        result = call()
        y = result[0] if isinstance(result, tuple) else result
        assert y.isfinite().all(), name
        assert len(module.calls) == (0 if "cublas" in name else 2 if "+" in name else 1), name
    assert {name.split()[0] for name in found} == {"cublas", "base", "column0", "dx", "shrink"}
