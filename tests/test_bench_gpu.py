"""The benchmarks' GPU path: graphs, events, rotating operands, the tuner. Not run in CI."""

from __future__ import annotations

import pytest
import torch

from lora_kernels.bench import contestants, contestants_batched, measure, problem, provenance, roofs, shapes, timing

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
TRAIN = shapes.Case("tiny", "q", M=512, K=1024, N=1024, R=16)


@pytest.mark.parametrize("dropout", [0.0, 0.05], ids=["plain", "dropout"])
def test_linear_contestants_are_replayed_from_graphs(dropout):
    case = shapes.Case("tiny", "q", M=512, K=1024, N=1024, R=16, dropout=dropout)
    results = measure.measure(case, contestants.contestants(), GPU, budget=0.05)["results"]
    for name in ("base", "naive", "addmm", "peft", "ours"):
        assert results[name].get("refused") is None, results[name]["refused"]
        assert results[name]["timer"] == "graph"
        assert 0 < results[name]["q20"] <= results[name]["us"] <= results[name]["q80"]


def test_what_cannot_be_captured_is_timed_by_events():
    def waits(i):
        return torch.ones(8, device=GPU).sum().item()

    calls, stream = {"plain": lambda i: torch.ones(8, device=GPU), "waits": waits}, torch.cuda.current_stream()
    times, timers = timing.time_cuda(calls, sets=2, budget=0.01)
    assert timers == {"plain": "graph", "waits": "events"}
    assert all(t > 0 for t in times["waits"])
    assert torch.cuda.current_stream() == stream
    torch.rand(8, device=GPU)  # a generator that takes itself for captured would raise


def test_decode_contestants():
    case = shapes.Case("tiny", "q", M=16, K=1024, N=1024, R=16, mode="forward", L=4)
    results = measure.measure(case, contestants_batched.contestants(), GPU, budget=0.05)["results"]
    for name in ("base", "loop", "gather_bmm", "ours"):
        assert results[name].get("refused") is None, results[name]["refused"]
        assert results[name]["us"] > 0


def test_operand_sets_overflow_the_cache():
    sets = problem.count_sets(TRAIN, GPU)
    cache = torch.cuda.get_device_properties(GPU).L2_cache_size
    assert sets == problem.MAX_SETS or sets * problem.floor_bytes(TRAIN) >= problem.ROTATE_CACHES * cache


def test_ceilings_and_provenance():
    assert roofs.bandwidth(GPU) > 1e11
    assert roofs.flops(GPU, "bfloat16") > 1e13
    where = provenance.collect(GPU)
    assert where["device"] == {"type": "cuda", "name": torch.cuda.get_device_name()}


@pytest.mark.parametrize("op", ["fwd", "dx"])
def test_tuner_measures_a_problem(op):
    from lora_kernels.bench.tune_gpu import GpuTarget

    job = {"op": op, "M": 512, "N": 1024, "K": 1024, "R": 16, "dtype": "bfloat16", "dropout": False}
    outcome = GpuTarget(GPU, quick=True).measure(job)  # the tiles that a run of the tuner has compiled before
    assert outcome["chosen"] in outcome["us"]
    assert "torch" in outcome["us"]
    assert not any("wrong" in why for why in outcome["skipped"].values()), outcome["skipped"]
