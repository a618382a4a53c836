"""The gate of the benchmarks: right contestants pass, wrong ones are refused and never timed."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lora_kernels.bench import contestants, contestants_batched, gate, measure, problem, shapes
from lora_kernels.bench.contestants import Bound, Contestant

CPU = torch.device("cpu")
TRAIN = shapes.Case("tiny", "q", M=24, K=48, N=40, R=4)
DROPOUT = dataclasses.replace(TRAIN, dropout=0.25)
DECODE = dataclasses.replace(TRAIN, mode="forward", L=5)


def _verdict(contestant: Contestant, case: shapes.Case) -> tuple[str | None, dict]:
    ops = problem.operands(case, CPU, seed=0)
    return gate.Gate(case, ops).refuses(contestant, contestant.bind(ops, case))


def _by_name(name: str) -> Contestant:
    return next(c for c in contestants.contestants() if c.name == name)


@pytest.mark.parametrize("case", [TRAIN, DROPOUT, dataclasses.replace(TRAIN, dtype="float32")], ids=str)
@pytest.mark.parametrize("name", ["base", "naive", "addmm", "peft", "peft_low", "ours", "ours_fp32"])
def test_right_ones_pass(name, case):
    refused, errors = _verdict(_by_name(name), case)
    assert refused is None
    assert set(errors) == ({"y", "dx"} if name == "base" else {"y", "dx", "dA", "dB"})


@pytest.mark.parametrize("name", ["base", "loop", "gather_bmm", "peft_mixed", "ours"])
def test_right_ones_pass_with_many_adapters(name):
    contestant = next(c for c in contestants_batched.contestants() if c.name == name)
    assert _verdict(contestant, DECODE)[0] is None


def _broken(change) -> Contestant:
    """The naive contestant with its result passed through `change(y, ops)`."""

    def bind(ops, case):
        bound = _by_name("naive").bind(ops, case)
        return Bound(lambda: change(bound.forward(), ops), bound.leaves)

    return Contestant("broken", "", bind)


BROKEN = {
    "no-adapter": lambda y, ops: torch.nn.functional.linear(ops.x, ops.weight) + 0 * y,
    "one-element": lambda y, ops: y + torch.nn.functional.one_hot(torch.tensor(3), y.shape[1]).to(y.dtype),
    "two-percent": lambda y, ops: y * 1.02,
    "nan": lambda y, ops: y * torch.where(torch.arange(y.shape[0])[:, None] == 7, torch.nan, 1.0).to(y.dtype),
    "half-the-rows": lambda y, ops: y[::2],
    "gradient-only": lambda y, ops: y.detach() + 1.1 * (y - y.detach()),
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_wrong_ones_are_refused(change):
    try:
        refused, _ = _verdict(_broken(change), TRAIN)
    except (RuntimeError, ValueError):  # a wrong shape may already fail in the backward
        return
    assert refused is not None


@pytest.mark.parametrize("p", [0.05, 0.3])
@pytest.mark.parametrize("name", ["naive", "addmm", "peft", "ours"])
def test_dropout_rates_that_are_no_multiple_of_65536ths_pass_in_float32(name, p):
    """Ours drops and scales by the rounded rate; in float32 that differs from 1 / (1 - p) by more than rounding errors do."""
    refused, _ = _verdict(_by_name(name), dataclasses.replace(DROPOUT, dropout=p, dtype="float32"))
    assert refused is None


def test_another_scale_than_that_of_the_rate_is_refused():
    """Scaling by 1 / (1 - p) of a p that is not drawn, told or not."""
    told = dataclasses.replace(_by_name("ours"), keep_scale=lambda p: 1.01 / (1 - p))
    assert "multiplies" in _verdict(told, dataclasses.replace(DROPOUT, dtype="float32"))[0]
    untold = dataclasses.replace(_by_name("naive"), keep_scale=lambda p: 1 / (1 - p) + 5e-6)
    assert "wrong" in _verdict(untold, dataclasses.replace(DROPOUT, dtype="float32"))[0]


@pytest.mark.parametrize("drawn", [0.0, 0.5], ids=["drops-nothing", "drops-too-much"])
def test_wrong_dropout_rate_is_refused(drawn):
    def bind(ops, case):
        return _by_name("naive").bind(ops, dataclasses.replace(case, dropout=drawn))

    refused, _ = _verdict(Contestant("liar", "", bind), DROPOUT)
    assert "drops" in refused


def test_dropout_on_the_frozen_branch_is_refused():
    def bind(ops, case):
        a, b = (t.clone().requires_grad_() for t in (ops.lora_a, ops.lora_b))

        def forward():
            dropped = torch.nn.functional.dropout(ops.x, case.dropout)
            return contestants.naive_linear(dropped, ops.weight, a, b, 0.0)

        return Bound(forward, (ops.x, a, b))

    assert "wrong" in _verdict(Contestant("everywhere", "", bind), DROPOUT)[0]


def test_refused_and_absent_ones_are_recorded_and_not_timed():
    # budget=0: always seven rounds; within 0.01 s a busy machine makes three
    who = [_by_name("base"), _by_name("naive"), _broken(BROKEN["two-percent"]), _by_name("liger")]
    results = measure.measure(TRAIN, who, CPU, budget=0)["results"]
    assert results["naive"]["us"] > 0
    assert results["naive"]["rounds"] >= 7
    assert "wrong" in results["broken"]["refused"]
    assert "us" not in results["broken"]
    assert "broken" not in results["naive"]["over"]
    assert results["liger"] == {"absent": "Liger has no LoRA kernel"}


def test_contestant_of_seconds_a_call_is_left_out(monkeypatch):
    calls = []
    slow = _broken(lambda y, ops: calls.append(1) or y)
    monkeypatch.setattr(measure, "HOPELESS", 0.0)
    results = measure.measure(TRAIN, [slow], CPU, budget=0.01)["results"]
    assert "a call takes more than" in results["broken"]["absent"]
    assert len(calls) == 2


def test_saved_bytes_tell_who_keeps_copies():
    """PEFT keeps a float32 copy of x, twice its size; the fused op keeps x itself and h."""
    who = [_by_name(name) for name in ("peft", "ours_fp32")]
    results = measure.measure(TRAIN, who, CPU, budget=0.01)["results"]
    x = 2 * TRAIN.M * TRAIN.K
    assert results["peft"]["saved_bytes"] >= 2 * x
    assert x <= results["ours_fp32"]["saved_bytes"] <= x + 4 * TRAIN.M * TRAIN.R


def test_operands_are_random_and_every_adapter_is_used():
    ops = problem.operands(DECODE, CPU, seed=3)
    assert sorted(ops.ids.unique().tolist()) == list(range(DECODE.L))
    for t in (ops.x, ops.weight, ops.lora_a, ops.lora_b):
        assert (t != 0).double().mean() > 0.99
