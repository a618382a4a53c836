"""Plans: the heuristic, measured tables (exact, nearest M, damaged), the order of backends they give."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from lora_kernels import _errors
from lora_kernels.ops import _registry
from lora_kernels.tuning import store
from lora_kernels.tuning.plan import Plan, Problem, cuda_plans, fit, heuristic

BIG = Problem("fwd", 8192, 4096, 4096, 16, torch.bfloat16)
PLAN = {"implementation": "triton", "form": "tma", "block_m": 128, "block_n": 128, "block_k": 64, "warps": 8, "stages": 4, "group_m": 4}


def entry(M: int, **plan) -> dict:
    return {"op": "fwd", "M": M, "N": 4096, "K": 4096, "R": 16, "dtype": "bfloat16", "plan": PLAN | plan}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "lora_kernels").mkdir()
    store.tables.cache_clear()
    _errors.warn_once.cache_clear()
    yield tmp_path / "lora_kernels"
    store.tables.cache_clear()


@pytest.mark.parametrize(
    "problem, arch, implementation, form",
    [
        (BIG, 90, "triton", "column0"),
        (BIG, 100, "triton", "column0"),
        (BIG, 80, "triton", "pointer"),
        (BIG, 120, "triton", "pointer"),
        (Problem("fwd", 8192, 4096, 4096, 128, torch.bfloat16), 90, "triton", "tma"),
        (Problem("dx", 8192, 4096, 4096, 16, torch.bfloat16, dropout=True), 90, "triton", "tma"),
        (Problem("fwd", 64, 4096, 4096, 16, torch.bfloat16), 90, "torch", "column0"),
        (Problem("fwd", 8192, 4096, 512, 16, torch.bfloat16), 90, "torch", "column0"),
        (Problem("fwd", 8192, 4096, 4096, 16, torch.float32), 90, "torch", "pointer"),
    ],
    ids=["sm_90", "sm_100", "sm_80", "sm_120", "rank_128", "dropout", "few_rows", "short_k", "fp32"],
)
def test_heuristic(problem, arch, implementation, form):
    plan = heuristic(problem, arch)
    assert (plan.implementation, plan.form) == (implementation, form)


def test_heuristic_tile_is_wide_from_65_rows_and_129_columns():
    tile = lambda M, N: heuristic(Problem("fwd", M, N, 4096, 16, torch.bfloat16), 90).block_n
    assert (tile(64, 4096), tile(65, 4096), tile(65, 128), tile(65, 129)) == (128, 256, 128, 256)


@pytest.mark.parametrize("R, form", [(8, "column0"), (12, "column0"), (20, "tma"), (24, "tma"), (32, "column0"), (40, "tma"), (64, "column0")])
def test_ranks_whose_masked_blocks_spill_take_the_other_form(R, form):
    assert heuristic(Problem("fwd", 8192, 4096, 4096, R, torch.bfloat16), 90).form == form


def test_form_steps_down_to_what_the_operands_allow():
    plan = heuristic(BIG, 90)
    assert fit(plan, BIG, True, True) == plan
    assert fit(plan, BIG, True, False).form == "tma"
    odd = fit(plan, BIG, False, True)
    assert odd.form == "pointer"
    assert odd.block_m * odd.block_n < plan.block_m * plan.block_n


def test_table_is_exact_then_nearest_in_log_space(folder):
    path = folder / store.table_name("NVIDIA H200")
    assert path.name == "nvidia-h200.json"
    entries = [entry(8192, warps=4), entry(512, stages=2), entry(1024, implementation="torch")]
    path.write_text(json.dumps({"device": "NVIDIA H200", "entries": entries}))
    (table, *_) = store.tables("NVIDIA H200")
    at = lambda M, **other: store.look_up(table, Problem("fwd", M, 4096, other.get("K", 4096), 16, torch.bfloat16))
    assert at(8192) == Plan(**PLAN | {"warps": 4})
    assert at(1024).implementation == "torch"
    assert at(1400).implementation == "torch"
    assert at(2896).implementation == "torch", "sqrt(1024 x 8192) = 2896.3: still nearer to 1024"
    assert at(2900).warps == 4
    assert at(724).stages == 2
    assert at(1).stages == 2
    assert at(0).stages == 2
    assert at(8192, K=8192) is None


def test_halfway_between_two_measured_sizes_the_smaller_counts(folder):
    path = folder / store.table_name("gpu")
    path.write_text(json.dumps({"device": "gpu", "entries": [entry(4096, warps=4), entry(1024, stages=2)]}))
    (table,) = store.tables("gpu")
    assert store.look_up(table, Problem("fwd", 2048, 4096, 4096, 16, torch.bfloat16)) == Plan(**PLAN | {"stages": 2})


def test_a_call_that_comes_down_from_the_cuda_kernels_gets_tritons_tile():
    assert fit(cuda_plans(BIG)[-1], BIG, True, True) == heuristic(BIG, 90)
    assert fit(cuda_plans(BIG)[0], BIG, False, True).form == "pointer"


@pytest.mark.parametrize(
    "damage", ["not json", '{"entries": [{}]}', json.dumps({"entries": [entry(1, form="magic")]}), json.dumps({"entries": [entry(1, colour=3)]})]
)
def test_damaged_table_is_left_out_with_one_reason(folder, caplog, damage):
    (folder / store.table_name("gpu")).write_text(damage)
    with caplog.at_level(logging.WARNING, "lora_kernels"):
        assert store.tables("gpu") == ()
    assert len(caplog.records) == 1
    assert "tuning table" in caplog.text


def test_order_follows_the_plan(monkeypatch):
    """A "torch" plan is the reference, with dropout the kernels' own use of cuBLAS; else the named implementation goes first."""
    meta = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="meta")
    x, w, a, b = meta(8, 16), meta(32, 16), meta(4, 16), meta(32, 4)
    fwd = lambda p: _registry.order("lora_linear_fwd", "cuda", (x, w, None, a, b, 1.0, p, None))
    bwd = lambda p: _registry.order("lora_linear_bwd", "cuda", (meta(8, 32), x, w, a, b, None, None, 1.0, p, True, True, True))
    for name, plain, dropped in (
        ("torch", ("reference", "cuda", "triton"), ("triton", "cuda", "reference")),
        ("triton", ("triton", "cuda", "reference"), ("triton", "cuda", "reference")),
        ("cuda", ("cuda", "triton", "reference"), ("cuda", "triton", "reference")),
    ):
        seen = []
        monkeypatch.setattr(
            store, "choose", lambda problem, device, name=name, seen=seen: seen.append(problem) or Plan(**PLAN | {"implementation": name})
        )
        assert fwd(0.0) == bwd(0.0) == plain
        assert fwd(0.1) == bwd(0.1) == dropped
        assert seen[0] == Problem("fwd", 8, 32, 16, 4, torch.bfloat16)
        assert seen[1] == Problem("dx", 8, 16, 32, 4, torch.bfloat16)
        assert seen[3] == Problem("dx", 8, 16, 32, 4, torch.bfloat16, True)
    assert _registry.order("lora_linear_fwd", "cpu", ()) == _registry.LADDERS["cpu"]
