"""`lora-kernels bench` with arguments, folders and disks that cannot be right: one line, exit code 2, no result lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_kernels import cli
from lora_kernels._errors import LoraValueError
from lora_kernels.bench import records, roofs, run, shapes

CASE = shapes.Case("tiny", "q", 4, 8, 8, 2)
WHERE = {"device": {"type": "cpu", "name": "Test CPU"}, "versions": {"torch": "2.13.0"}, "threads": 1, "date": "2026-11-29"}


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """`bench --quick --suite linear` of one case that is not measured, into tmp_path."""
    measured = []

    def measure(suite, case, device, budget):
        measured.append(case)
        return {"case": vars(case), "floor": {"us": 1.0, "bytes": 1, "flops": 1}, "results": {}}

    monkeypatch.setitem(run.GRIDS, "quick", lambda: ([CASE], [CASE]))
    monkeypatch.setattr(run, "_measure", measure)
    monkeypatch.setattr(roofs, "bandwidth", lambda device: 1.0)
    monkeypatch.setattr(roofs, "flops", lambda device, dtype: 1.0)
    monkeypatch.setattr(roofs, "slow_16_bit", lambda device: False)

    def bench(*argv: str, out: Path = tmp_path) -> int:
        return cli.main(["bench", "--quick", "--suite", "linear", "--out", str(out), *argv])

    bench.measured = measured
    return bench


def test_a_run_writes_its_suite_alone(quick, tmp_path, capsys):
    old = {"schema": records.SCHEMA, "suite": "steps", "provenance": {}, "records": []}
    (tmp_path / "steps.json").write_text(json.dumps(old))
    assert quick("--suite", "linear") == 0
    assert quick.measured == [CASE]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"wrote {tmp_path / 'linear.json'}"
    assert json.loads((tmp_path / "linear.json").read_text())["complete"]


def test_layers_of_given_sizes(quick, tmp_path, capsys):
    argv = ["bench", "--size", "48x32", "--tokens", "2", "--tokens", "512", "--dtype", "float32", "--out", str(tmp_path)]
    assert cli.main(argv) == 0
    expected = [(48, 32, M, mode, 0) for mode in ("forward", "forward+backward") for M in (2, 512)] + [(48, 32, 2, "forward", L) for L in (8, 64)]
    assert [(c.K, c.N, c.M, c.mode, c.L) for c in quick.measured] == expected
    assert {(c.R, c.dtype) for c in quick.measured} == {(16, "float32")}
    assert f"wrote {tmp_path / 'linear.json'}, {tmp_path / 'batched.json'}" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["missing", "file", "empty", "steps alone"])
def test_nothing_to_draw(tmp_path, capsys, what):
    folder = tmp_path / "file" if what == "file" else tmp_path / "none" if what == "missing" else tmp_path
    (tmp_path / "file").touch()
    if what == "steps alone":
        text = json.dumps({"schema": records.SCHEMA, "suite": "steps", "provenance": {}, "records": []})
        (tmp_path / "steps.json").write_text(text)
    assert cli.main(["bench", "--plots", str(folder)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("lora-kernels bench: --plots: no")
    assert err.count("\n") == 1


BAD = {
    "no threads": (["--threads", "0"], "0 is not at least 1"),
    "threads of no machine": (["--threads", "1000000000000"], "1000000000000 is above 4096"),
    "no time": (["--minutes", "0"], "0 is not above 0"),
    "time that runs backwards": (["--minutes", "-1"], "-1 is not above 0"),
    "time that is no number": (["--minutes", "nan"], "nan is not above 0"),
    "both sizes": (["--quick", "--full"], "not allowed with"),
    "a size that is none": (["--size", "64"], "is no size KxN"),
    "tokens without a size": (["--tokens", "8"], "go with --size"),
    "a model of a size": (["--size", "8x8", "--suite", "steps"], "goes without --size"),
    "drawing and measuring": (["--plots", ".", "--quick"], "goes with no other option"),
}


@pytest.mark.parametrize("argv, says", BAD.values(), ids=BAD)
def test_bad_arguments(capsys, argv, says):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", *argv])
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["bench", "tune"])
def test_gpu_that_is_not_there(monkeypatch, capsys, verb):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main([verb, "--device", "cuda"]) == 2
    err = capsys.readouterr().err
    assert "--device cuda: " in err
    assert "; fix: " in err
    assert err.count("\n") == 1


def test_folder_that_cannot_be_written_is_found_before_anything_is_measured(quick, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert quick(out=tmp_path / "file") == 2
    assert "cannot be written to" in capsys.readouterr().err
    assert quick.measured == []


def test_damaged_file_of_another_suite_is_found_before_anything_is_measured(quick, tmp_path, capsys):
    (tmp_path / "batched.json").write_text("{")
    assert quick() == 2
    assert "batched.json cannot be read" in capsys.readouterr().err
    assert quick.measured == []


@pytest.mark.parametrize("content", [{"records": []}, {"provenance": {}}, {"records": {}, "provenance": {}}], ids=str)
def test_results_without_results(tmp_path, content):
    (tmp_path / "linear.json").write_text(json.dumps({"schema": records.SCHEMA, "suite": "linear"} | content))
    with pytest.raises(ValueError, match="no results file"):
        records.read_folder(tmp_path)


def _timed(**other) -> dict:
    entry = {"us": 1.0, "q20": 1.0, "q80": 2.0, "errors": {}, "over": {}} | other
    return {"case": vars(CASE), "floor": {"us": 1.0, "bytes": 1}, "results": {"ours": entry}}


DAMAGED = {
    "empty": {},
    "no case": {"results": {}},
    "a case of no kind": {"case": {"M": 1}, "results": {}},
    "tokens in words": {"case": vars(CASE) | {"M": "many"}, "floor": {"us": 1.0, "bytes": 1}, "results": {}},
    "no floor": {"case": vars(CASE), "results": {}},
    "no quantiles": {"case": vars(CASE), "floor": {"us": 1.0, "bytes": 1}, "results": {"ours": {"us": 1.0}}},
    "no time at all": _timed(us=0.0),
    "quantiles in another order": _timed(q20=3.0),
    "a ratio of nothing": _timed(over={"peft": {"median": 0.0, "q20": 0.0, "q80": 0.0}}),
    "an unknown dtype": {"case": vars(CASE) | {"dtype": "float8"}, "floor": {"us": 1.0, "bytes": 1}, "results": {}},
    "a list of results": {"case": vars(CASE), "floor": {"us": 1.0, "bytes": 1}, "results": [1]},
}


@pytest.mark.parametrize("record", DAMAGED.values(), ids=DAMAGED)
def test_damaged_record_is_named(tmp_path, capsys, record):
    whole = {"case": vars(CASE), "floor": {"us": 1.0, "bytes": 1}, "results": {}}
    data = {"schema": records.SCHEMA, "suite": "linear", "provenance": WHERE, "records": [whole, record]}
    (tmp_path / "linear.json").write_text(json.dumps(data))
    assert cli.main(["bench", "--plots", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "linear.json is damaged; got records[1]" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("key", [*WHERE])
@pytest.mark.parametrize("value", [None, {}, 0.5], ids=str)
def test_results_of_no_known_place(tmp_path, capsys, key, value):
    """Plots and figures name the device, torch's version and the date."""
    whole = {"case": vars(CASE), "floor": {"us": 1.0, "bytes": 1}, "results": {}}
    data = {"schema": records.SCHEMA, "suite": "linear", "provenance": WHERE | {key: value}, "records": [whole]}
    (tmp_path / "linear.json").write_text(json.dumps(data))
    assert cli.main(["bench", "--plots", str(tmp_path)]) == 2
    assert f"linear.json is damaged; got provenance.{key}" in capsys.readouterr().err


def test_nested_without_end(tmp_path):
    (tmp_path / "linear.json").write_text("[" * 100_000)
    with pytest.raises(LoraValueError, match=r"linear.json cannot be read; got RecursionError"):
        records.read_folder(tmp_path)


def test_layer_larger_than_memory_is_found_before_anything_is_measured(quick, tmp_path, capsys):
    argv = ["bench", "--size", "8x8", "--size", "10000000x10000000", "--suite", "linear", "--out", str(tmp_path)]
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert "10000000x10000000" in err
    assert "does not fit into memory; got 1.86e+05 GiB; allowed: " in err
    assert quick.measured == []


def test_folder_in_the_place_of_the_results_file(quick, tmp_path, capsys):
    (tmp_path / "linear.json").mkdir()
    assert quick() == 2
    assert "linear.json cannot be written; got a folder; allowed: a file" in capsys.readouterr().err
    assert quick.measured == []


@pytest.mark.parametrize("how", ["time", "ctrl-c"])
@pytest.mark.parametrize("before", ["complete", "incomplete", "damaged", "nothing"])
def test_run_that_is_cut_off_takes_the_place_of_no_complete_one(quick, monkeypatch, tmp_path, capsys, how, before):
    path, part = tmp_path / "linear.json", tmp_path / "linear.part.json"
    if before != "nothing":
        data = {"schema": records.SCHEMA, "suite": "linear", "complete": before == "complete", "provenance": {}, "records": []}
        path.write_text("{" if before == "damaged" else json.dumps(data))
    old = path.read_bytes() if path.exists() else None
    monkeypatch.setitem(run.GRIDS, "quick", lambda: ([CASE] * 3, []))
    first, clock = run._measure, []

    def measure(*args):
        clock.append(1e9)
        if how == "ctrl-c" and len(clock) == 2:
            raise KeyboardInterrupt
        return first(*args)

    monkeypatch.setattr(run, "_measure", measure)
    monkeypatch.setattr(run.time, "monotonic", lambda: sum(clock))
    assert quick(*(["--minutes", "1"] if how == "time" else [])) == (0 if how == "time" else 130)
    assert "after 1 of 3 cases" in (out := capsys.readouterr().out)
    kept = part if before == "complete" else path
    assert str(kept) in out
    assert (len(json.loads(kept.read_text())["records"]), json.loads(kept.read_text())["complete"]) == (1, False)
    assert [p.name for p in sorted(tmp_path.glob("*.json"))] == ["linear.json"] + ["linear.part.json"] * (before == "complete")
    if before == "complete":
        assert path.read_bytes() == old
        assert "beside the complete linear.json of an earlier run" in out
    monkeypatch.setattr(run, "_measure", first)
    assert quick() == 0
    assert (len(records.read(path)["records"]), records.read(path)["complete"]) == (3, True)
    assert not part.exists()


def test_time_that_is_over_before_the_first_case_costs_no_old_result(quick, tmp_path, capsys):
    (tmp_path / "linear.json").write_text(json.dumps({"schema": records.SCHEMA, "suite": "linear", "provenance": {}, "records": []}))
    before = (tmp_path / "linear.json").read_bytes()
    assert quick("--minutes", "1e-12") == 0
    assert quick.measured == []
    assert (tmp_path / "linear.json").read_bytes() == before
    out = capsys.readouterr().out
    assert "linear after 0 of 1 cases" in out
    assert "nothing was written" in out


def test_full_disk_leaves_the_old_file_and_no_half_one(quick, monkeypatch, tmp_path, capsys):
    (tmp_path / "linear.json").write_text("{}")
    write_text = Path.write_text

    def full(self, text):
        write_text(self, text[:10])
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    assert quick() == 2
    err = capsys.readouterr().err
    assert "No space left on device" in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["linear.json"]
    assert (tmp_path / "linear.json").read_text() == "{}"


@pytest.mark.parametrize("option", [[], ["--json"]], ids=["tables", "json"])
def test_reader_that_goes_away(option):
    """`lora-kernels env | head -1`."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "lora_kernels", "env", *option], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
