"""Measured plans on a GPU: every CUDA kernel that a plan can name, at a model's size, and a table that the tuner writes and the op follows."""

from __future__ import annotations

import json

import pytest
import torch
from oracle import Case, assert_close
from place import DEVICE, EMULATED, hardware

import lora_kernels as lk
from lora_kernels.bench import tune
from lora_kernels.native import cuda
from lora_kernels.ops import lora_linear as op
from lora_kernels.tuning import store
from lora_kernels.tuning.plan import Problem, cuda_plans

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda.unusable() is not None, reason=str(cuda.unusable())),
    pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="the kernels are for sm_90"),
]
bf16 = torch.bfloat16
NAMES = ("y", "dx", "da", "db")


def run(c: Case, backend: str) -> dict[str, torch.Tensor]:
    for prepared in (op._forward_runs, op._backward_runs):  # with another plan
        prepared.clear()
    x, a, b = (t.detach().clone().requires_grad_() for t in (c.x, c.lora_a, c.lora_b))
    y = lk.lora_linear(x, c.weight, c.bias, a, b, c.scaling, c.dropout_p, seed=c.seed, backend=backend, strict=True)
    return dict(zip(NAMES, (y.detach(), *torch.autograd.grad(y, (x, a, b), c.dy)), strict=True))


@pytest.mark.parametrize("R, dropout_p", [(16, 0.0), (64, 0.0), (128, 0.0), (16, 0.05)], ids=["R16", "R64", "R128", "R16-dropout"])
def test_every_plan_at_a_models_size(R, dropout_p, monkeypatch):
    M, N, K = (392, 776, 264) if EMULATED else (2048 + 40, 4096, 4096)
    c = Case.random(M, N, K, R, bf16, bias=False, dropout_p=dropout_p, device=DEVICE)
    plans = {side: cuda_plans(Problem(side, M, N, K, R, bf16, dropout_p > 0)) for side in ("fwd", "dx")}
    for i in range(max(map(len, plans.values()))):
        chosen = {side: found[i % len(found)] for side, found in plans.items()}
        monkeypatch.setattr(store, "choose", lambda problem, device, chosen=chosen: chosen[problem.op])
        assert_close(run(c, "cuda"), c)


@hardware
def test_the_op_follows_the_table_that_the_tuner_wrote(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path))
    size = ["--device", "cuda", "--quick", "--size", "1024x1024", "--tokens", "512", "--rank", "16"]
    assert tune.main(size) == 0
    path = tmp_path / store.table_name(torch.cuda.get_device_name())
    entries = json.loads(path.read_text())["entries"]
    assert len(entries) == 4
    assert not any("wrong" in why for entry in entries for why in entry["skipped"].values())
    for entry in entries:
        cuda_times = [us for name, us in entry["us"].items() if name.startswith("cuda")]
        assert cuda_times, "no CUDA kernel was timed"
    store.tables.cache_clear()
    store.choose.cache_clear()
    for entry in entries:
        problem = Problem(entry["op"], 512, 1024, 1024, 16, bf16, entry["dropout"])
        assert store.choose(problem, torch.device("cuda:0")) == store.read_plan(entry["plan"], problem)
    for dropout_p in (0.0, 0.05):
        c = Case.random(512, 1024, 1024, 16, bf16, bias=False, dropout_p=dropout_p, device=DEVICE)
        assert_close(run(c, "auto"), c)
    store.tables.cache_clear()  # not for the tests after this one
    store.choose.cache_clear()
