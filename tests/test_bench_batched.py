"""`benchmarks/bench_batched.py`: a contender that is wrong or raises costs neither the others nor the cases that follow."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import bench_batched


def test_a_wrong_contender_is_left_out_and_said_to_be(tmp_path, monkeypatch, capsys):
    honest = bench_batched.contenders

    def with_bad_ones(*args):
        found = honest(*args)
        return found | {"wrong": lambda i: 1.1 * found["ours"](i), "raises": lambda i: 1 / 0}

    monkeypatch.setattr(bench_batched, "contenders", with_bad_ones)
    monkeypatch.setattr(bench_batched, "cases", lambda *_: [bench_batched.Case(M, 64, 64, 2, 8) for M in (3, 4)])
    monkeypatch.setattr(bench_batched, "BUDGET", 0)
    monkeypatch.setitem(bench_batched.ROTATE_BYTES, "cpu", 1)
    monkeypatch.setattr(sys, "argv", ["bench_batched.py", "--dtype", "float32", "--json", str(tmp_path / "found.json")])
    with torch.set_grad_enabled(True), pytest.raises(SystemExit, match="4 times"):  # main turns gradients off
        bench_batched.main()
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [row["M"] for row in rows] == [3, 4]
    for row in rows:
        assert "ours" in row["us_and_ratio"]
        assert not {"wrong", "raises"} & set(row["us_and_ratio"])
    assert "ZeroDivisionError" in capsys.readouterr().out
