"""The GPU tuner on CPU tensors: every candidate it would time gives the right y or dx under the plan it is forced to."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch

from lora_kernels import _device
from lora_kernels.bench import tune_gpu
from lora_kernels.kernels import _launch
from lora_kernels.ops import _registry

JOB = {"M": 40, "N": 48, "K": 64, "R": 8, "dtype": "float16"}


@pytest.fixture
def target(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(shared_memory_per_block_optin=232_448))
    monkeypatch.setattr(_device, "cuda_capability", lambda index: (9, 0))
    monkeypatch.setattr(_registry, "provider", lambda name: "not here" if name == "cuda" else importlib.import_module(_registry.PROVIDERS[name]))
    monkeypatch.setattr(tune_gpu, "TILES", ((64, 64, 32, 4, 2), (32, 32, 32, 4, 2)))

    def run_once(calls, sets, budget):
        return {name: [float(call(0).isfinite().all())] for name, call in calls.items()}, {}

    monkeypatch.setattr(tune_gpu, "time_cuda", run_once)
    made = tune_gpu.GpuTarget(torch.device("cuda"))
    made.device = torch.device("cpu")
    return made


@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize("op", ["fwd", "dx"])
def test_every_candidate_is_right_under_its_plan(target, op, dropout):
    outcome = target.measure({**JOB, "op": op, "dropout": dropout})
    assert outcome["skipped"] == {}
    forms = {"tma", "pointer"} if dropout else {"column0", "tma", "pointer"}
    assert {name.split()[0] for name in outcome["us"]} == {"torch", *forms}
    assert set(outcome["us"].values()) == {1e6}  # what was timed gave finite numbers


@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize("op", ["fwd", "dx"])
def test_what_is_timed_is_each_candidates_own_launch(target, monkeypatch, op, dropout):
    """Not what another candidate of the same shapes left behind: form and tile of every launch are those of the name it is timed under."""
    launched, timed = [], {}
    launch = _launch.Launcher.__call__
    monkeypatch.setattr(_launch.Launcher, "__call__", lambda self, *args: launched.append(self) or launch(self, *args))

    def watch(calls, sets, budget):
        for name, call in calls.items():
            launched.clear()
            call(0)
            timed[name] = {(made.fn.__name__, made.constants["BM"], made.constants["BN"]) for made in launched if "GROUP_M" in made.constants}
        return {name: [1.0] for name in calls}, {}

    monkeypatch.setattr(tune_gpu, "time_cuda", watch)
    target.measure({**JOB, "op": op, "dropout": dropout})
    kernels = {"column0": "column0_kernel", "tma": "update_tma_kernel", "pointer": "update_pointer_kernel"}
    triton = {name: found for name, found in timed.items() if name != "torch"}
    assert len(triton) > 3
    for name, found in triton.items():
        form, tile, *_ = name.split()
        assert found == {(kernels[form], *map(int, tile.split("x")[:2]))}, name


def test_compiling_a_kind_runs_its_triton_candidates_and_times_nothing(target, monkeypatch):
    ran = []
    prepare = tune_gpu._prepare
    monkeypatch.setattr(tune_gpu, "_prepare", lambda plan, *rest: ran.append(plan) or prepare(plan, *rest))
    monkeypatch.setattr(tune_gpu, "time_cuda", lambda *_: pytest.fail("timed"))
    monkeypatch.setattr(tune_gpu, "GpuTarget", lambda device, quick: target)
    assert tune_gpu.compile_kind(torch.device("cuda"), True, {**JOB, "op": "fwd", "dropout": False}) == {}
    assert {plan.form for plan in ran if plan.implementation == "triton"} == {"column0", "tma", "pointer"}


def test_wrong_candidate_is_skipped(target, monkeypatch):
    prepare = tune_gpu._prepare

    def spoiled(plan, *rest):
        run = prepare(plan, *rest)
        return (lambda: 1.05 * run()) if plan.block_m == 32 else run

    monkeypatch.setattr(tune_gpu, "_prepare", spoiled)
    outcome = target.measure({**JOB, "op": "fwd", "dropout": False})
    assert outcome["skipped"]
    assert all("32x32" in name and "wrong" in why for name, why in outcome["skipped"].items())
    assert not any("32x32" in name for name in outcome["us"])
