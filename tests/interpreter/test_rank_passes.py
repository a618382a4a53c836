"""The benchmark of the passes over x, on CPU tensors: every call that it would time runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def test_every_pass_runs():
    path = Path(__file__).parents[2] / "benchmarks" / "rank_passes.py"
    spec = importlib.util.spec_from_file_location("rank_passes", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = {name: (masked, call) for name, masked, call in module.passes(40, 64, 8, "cpu")}
    plain = {"triton shrink", "triton dA", "triton dB"}
    assert set(found) == plain | {"triton shrink with dropout", "triton dA with dropout"}
    assert {name for name, (masked, _) in found.items() if not masked} == plain
    for _, call in found.values():
        assert call() is None
