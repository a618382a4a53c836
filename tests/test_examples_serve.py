"""examples/serve_many_adapters.py on a tiny model: the whole way, that a wrong token is found, and what can be wrong with its input."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from adapters import one_thread, random_tensors, write_adapter

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import serve_many_adapters  # noqa: E402
import serving  # noqa: E402
import tiny_llama  # noqa: E402

__all__ = ["one_thread"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return tiny_llama.save(tmp_path_factory.mktemp("tiny"), hidden=64, initializer_range=0.2)


@pytest.fixture
def run(tiny):
    def call(*argv: str) -> int:
        small = ["--steps", "2", "--new-tokens", "4", "--rounds", "1", "--device", "cpu"]
        return serve_many_adapters.main(["--model", str(tiny), *small, *argv])

    return call


@pytest.fixture
def folder(tiny, tmp_path):
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    return write_adapter(tmp_path / "x", random_tensors(base, ("q_proj",), 4, 1))


def test_whole_way(run, capsys):
    assert run() == 0
    out = capsys.readouterr().out
    assert "8 of 8 rows" in out
    assert [line.split()[1] for line in out.splitlines() if line.startswith("trained")] == ["reference:", "code:", "unicode:"]
    for step in ("decode step", "prefill step"):
        table = out[out.index(step) :].splitlines()[1:6]
        assert [line[:32].strip().split(",")[0] for line in table] == ["base model", "PEFT", "PEFT", "the pool", "the pool"]
        assert all(float(line.split()[-1]) > 0 for line in table)


def test_own_adapters(run, folder, capsys):
    assert run("--adapter", f"sql={folder}", "--adapter", f"law={folder}") == 0
    assert "6 of 6 rows" in capsys.readouterr().out


def test_a_wrong_token_is_found(run, folder, capsys, monkeypatch):
    monkeypatch.setattr(serving, "one_at_a_time", lambda peft, batch, run=serving.one_at_a_time: run(peft, batch) + (torch.arange(4) == 2))
    assert run("--adapter", f"sql={folder}") == 1
    out = capsys.readouterr().out
    assert "0 of 4 rows" in out
    assert "token 3 of" in out


def test_interrupt(run, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(serving, "train_adapters", stop)
    assert run() == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, text",
    [
        (["--adapter", "x=/nowhere"], "--adapter x=/nowhere: there is no such folder"),
        (["--adapter", "x=/", "--adapter", "x=/tmp"], "--adapter x=...: given 2 times"),
        (["--adapter", "x=/"], "adapter_config.json cannot be opened"),
        (["--model", "/nowhere"], "--model /nowhere: there is no such folder"),
        (["--steps", "100000"], "--steps 100000: the text of reference has"),
    ],
    ids=["adapter", "twice", "no adapter", "model", "steps"],
)
def test_errors_are_one_clear_line(run, capsys, argv, text):
    assert run(*argv) == 2
    err = capsys.readouterr().err
    assert text in err
    assert "Traceback" not in err


def test_full_disk_is_one_clear_line(run, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(serving, "train_adapters", full)
    assert run() == 2
    assert "No space left" in capsys.readouterr().err


def test_rank_above_the_pools(run, folder, capsys):
    assert run("--adapter", f"sql={folder}", "--max-rank", "2") == 2
    assert "at most max_rank 2; fix: AdapterPool(max_rank=4)" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--steps", "0"], ["--adapter", "x"], ["--new-tokens", "many"]])
def test_bad_arguments(run, capsys, argv):
    with pytest.raises(SystemExit) as caught:
        run(*argv)
    assert caught.value.code == 2


@pytest.mark.slow
def test_smollm2(capsys):
    """The real model: same greedy tokens as PEFT, one adapter at a time."""
    assert serve_many_adapters.main(["--rounds", "1", "--device", "cpu"]) == 0
    assert "8 of 8 rows" in capsys.readouterr().out
