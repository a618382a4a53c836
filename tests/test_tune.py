"""The tuner: what it tries, what it writes and resumes, which options and files it refuses."""

from __future__ import annotations

import json
from types import SimpleNamespace

import cuda_stand_in
import pytest
import torch

import lora_kernels as lk
from lora_kernels import _device, reference
from lora_kernels.bench import files, tune, tune_gpu
from lora_kernels.bench.tune_gpu import best, candidates, fits, label
from lora_kernels.native import cuda as cuda_ops
from lora_kernels.ops import _registry
from lora_kernels.tuning import store
from lora_kernels.tuning.plan import Plan, Problem, cuda_plans, heuristic

LARGE = Problem("fwd", 8192, 4096, 4096, 16, torch.bfloat16)


def test_candidates_start_with_the_heuristic_and_all_fit():
    plans = candidates(LARGE, 90, 232_448, cuda=True)
    assert plans[0] == heuristic(LARGE, 90)
    assert {p.implementation for p in plans} == {"cuda", "torch", "triton"}
    assert "cuda" not in {p.implementation for p in candidates(LARGE, 90, 232_448, cuda=False)}
    assert len(set(map(label, plans))) == len(plans) > 10
    assert [p for p in plans if p.implementation == "cuda"] == cuda_plans(LARGE)
    assert "cuda" not in {p.implementation for p in candidates(LARGE, 100, 232_448, cuda=True)}
    assert all(fits(p, LARGE, 232_448) for p in plans if p.implementation == "triton")


def test_quick_is_part_of_the_whole_and_keeps_the_kernels_that_matter():
    whole, few = (candidates(LARGE, 90, 232_448, True, quick) for quick in (False, True))
    assert set(few) < set(whole)
    assert {p.implementation for p in few} == {"cuda", "torch", "triton"}
    assert {p.form for p in few} == {"column0", "tma"}
    assert {p.form for p in candidates(LARGE, 80, 166_912, False, quick=True)} == {"pointer"}


def test_one_compilation_for_all_sizes_of_a_kind():
    sizes, ranks = [(4096, 4096), (4096, 14336)], (16, 64)
    jobs = tune_gpu.GpuTarget(torch.device("cuda")).jobs(sizes, (8192, 512), ranks)
    found = tune_gpu.kinds(jobs)
    assert len(found) == 2 * len(ranks) * 2
    assert len({(j["op"], j["R"], j["dropout"]) for j in found}) == len(found)
    assert found[0] == jobs[0]


def test_what_cannot_fit_is_left_out():
    assert not fits(Plan("triton", "tma", 128, 256, 64, 8, 3), LARGE, 101_376)  # 147456 bytes of tiles
    assert not fits(Plan("triton", "tma", 128, 256, 64, 4, 3), LARGE, 232_448)  # 256 accumulators a thread
    small = candidates(LARGE, 80, 101_376, cuda=False)
    assert {p.form for p in small} == {"pointer"}
    assert all(p.stages * p.block_k * (p.block_m + p.block_n) * 2 <= 101_376 for p in small if p.implementation == "triton")


@pytest.mark.parametrize("R, dropout", [(128, False), (16, True)], ids=["rank-128", "dropout"])
def test_column0_only_where_it_runs(R, dropout):
    problem = Problem("fwd", 8192, 4096, 4096, R, torch.bfloat16, dropout)
    assert "column0" not in {p.form for p in candidates(problem, 90, 232_448, cuda=False) if p.implementation == "triton"}


def test_best_keeps_the_heuristic_within_the_spread():
    assert best({"first": [1.0, 1.1, 0.9, 1.0], "other": [0.99, 1.05, 0.95, 0.98]}) == "first"
    assert best({"first": [1.0, 1.1, 0.9, 1.0], "other": [0.5, 0.55, 0.45, 0.5]}) == "other"


@pytest.mark.parametrize("op, dropout", [("fwd", False), ("dx", False), ("dx", True)], ids=["fwd", "dx", "dx-dropout"])
def test_gpu_target_times_every_cuda_kernel_and_writes_a_table_that_reads_back(monkeypatch, tmp_path, op, dropout):
    cuda_stand_in.install(monkeypatch)
    providers = {"cuda": cuda_ops, "reference": reference}
    monkeypatch.setattr(_registry, "provider", lambda name: providers.get(name, "not here"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(shared_memory_per_block_optin=232_448))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Test GPU")
    monkeypatch.setattr(_device, "cuda_capability", lambda _: (9, 0))
    kernel = "cuda tma 128x256 c1 g16"
    times = lambda calls, *_, **__: ({name: [float(call(0).isfinite().all()) / (1 + (name == kernel))] * 3 for name, call in calls.items()}, {})
    monkeypatch.setattr(tune_gpu, "time_cuda", times)
    tuned = tune_gpu.GpuTarget(torch.device("cuda"))
    tuned.device = torch.device("cpu")
    job = {"op": op, "M": 300, "N": 48, "K": 64, "R": 8, "dtype": "float16", "dropout": dropout}
    outcome = tuned.measure(job)
    problem = Problem(op, 300, 48, 64, 8, torch.float16, dropout)
    assert set(map(label, cuda_plans(problem))) <= set(outcome["us"])
    assert not any(name.startswith("cuda") for name in outcome["skipped"])
    assert outcome["chosen"] == kernel
    (tmp_path / "table.json").write_text(json.dumps({**tuned.head(), **tuned.pack([{**job, **outcome}])}))
    assert store.look_up(store.read_table(tmp_path / "table.json", "Test GPU"), problem) == Plan("cuda", "tma", 128, 256, group_m=16)


def test_a_problem_that_nobody_can_run_says_why(monkeypatch):
    tuned = tune_gpu.GpuTarget(torch.device("cuda"))
    monkeypatch.setattr(tuned, "ready", lambda *_, **__: ({}, {}, {"torch": "out of memory"}, 2))
    with pytest.raises(lk.BackendError, match="no plan runs here; got torch: out of memory"):
        tuned.measure({})


# -------------------------------------------------------------------------------------------------------------------- files


class FakeTarget:
    device, tokens = torch.device("cpu"), (1, 2)

    def __init__(self):
        self.measured: list[int] = []
        self.stop_after = 99

    def missing(self):
        return None

    def head(self):
        return {"device": "Test CPU"}

    def file_name(self):
        return "test.json"

    def pack(self, entries):
        return {"entries": entries}

    def unpack(self, data):
        return data["entries"]

    def jobs(self, sizes, tokens, ranks):
        return [{"op": "fwd", "M": M, "N": N, "K": K} for K, N in sizes for M in tokens]

    def measure(self, job):
        if len(self.measured) == self.stop_after:
            raise KeyboardInterrupt
        self.measured.append(job["M"])
        return {"chosen": "panels", "us": {}}


@pytest.fixture
def fake(monkeypatch, tmp_path):
    made = FakeTarget()
    monkeypatch.setattr(tune, "target", lambda device, quick: made)
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path))
    return made


ARGS = ["--device", "cpu", "--size", "64x32"]


def _table(folder):
    return folder / "test.json"


def test_stopped_and_resumed(fake, tmp_path):
    fake.stop_after = 1
    with pytest.raises(KeyboardInterrupt):
        tune.main(ARGS)
    assert [e["M"] for e in json.loads(_table(tmp_path).read_text())["entries"]] == [1]
    fake.stop_after = 99
    assert tune.main(ARGS) == 0
    assert fake.measured == [1, 2]
    assert tune.main(ARGS) == 0
    assert fake.measured == [1, 2]
    data = json.loads(_table(tmp_path).read_text())
    assert data["device"] == "Test CPU"
    assert data["provenance"]["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    "text, words",
    [("{", "is damaged"), ('{"entries": []}', "is damaged"), ('{"device": "Other", "entries": []}', "another device")],
    ids=["cut", "old", "foreign"],
)
def test_tuner_refuses_damaged_and_foreign_files(fake, tmp_path, text, words):
    _table(tmp_path).write_text(text)
    with pytest.raises(lk.LoraValueError, match=f"{words}.*--again"):
        tune.main(ARGS)
    assert _table(tmp_path).read_text() == text
    assert fake.measured == []
    assert tune.main([*ARGS, "--again"]) == 0
    assert fake.measured == [1, 2]


@pytest.mark.parametrize("spoil", ["nested", "unreadable", "a folder"])
def test_tuner_refuses_what_it_cannot_read(fake, monkeypatch, tmp_path, spoil):
    if spoil == "a folder":
        _table(tmp_path).mkdir()
    else:
        _table(tmp_path).write_text("[" * 100_000)
    if spoil == "unreadable":

        def fails(self, *args):
            raise PermissionError(13, "no", str(self))

        monkeypatch.setattr(type(tmp_path), "read_text", fails)
    words = {
        "nested": "is damaged; got RecursionError",
        "unreadable": "is damaged; got PermissionError",
        "a folder": "cannot be written; got a folder",
    }
    with pytest.raises(lk.LoraValueError, match=rf"test.json {words[spoil]}.*; fix: "):
        tune.main(ARGS)
    assert fake.measured == []


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--size", "8x8", "--model", "qwen3-8b"], "not allowed with"),
        (["--quick", "--model", "qwen3-8b"], "--quick has its own layers"),
        (["--compile", "2", "--again"], "--compile times and writes nothing"),
        (["--compile", "2", "--ship"], "--compile times and writes nothing"),
        (["--compile", "2", "--seconds", "9"], "--compile times and writes nothing"),
    ],
    ids=lambda v: v[0] if type(v) is list else "",
)
def test_options_of_which_one_would_go_unheard(fake, capsys, argv, words):
    with pytest.raises(SystemExit) as stop:
        tune.main(["--device", "cpu", *argv])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
    assert fake.measured == []


def test_one_process_at_a_time_writes_a_folder(fake, tmp_path):
    """Each would write the entries that it knows of over the other's."""
    with files.hold(tmp_path, ""), pytest.raises(lk.LoraValueError, match="is in use; got another process .*; fix: wait for it"):
        tune.main(ARGS)
    assert fake.measured == []
    assert tune.main(ARGS) == 0
    assert fake.measured == [1, 2]


def test_one_rank_on_a_cpu(fake):
    with pytest.raises(lk.LoraValueError, match="--rank: .*; got 8, 16; allowed: one rank"):
        tune.main([*ARGS, "--rank", "8", "--rank", "16"])
    assert fake.measured == []
    assert tune.main([*ARGS, "--rank", "8"]) == 0
    assert fake.measured == [1, 2]


def test_no_problem_starts_after_its_seconds(fake, tmp_path, capsys):
    assert tune.main([*ARGS, "--seconds", "0"]) == 0
    assert fake.measured == []
    assert "out of time" in capsys.readouterr().out
    assert tune.main([*ARGS, "--seconds", "100"]) == 0
    assert fake.measured == [1, 2]


@pytest.mark.parametrize("option", [["--quick"], ["--compile", "2"]])
def test_gpu_options_are_refused_on_a_cpu(fake, option):
    with pytest.raises(lk.LoraValueError, match="for GPUs"):
        tune.main([*ARGS, *option])
    assert fake.measured == []


@pytest.mark.parametrize("size", ["64", "axb", "1x2x3", "0x5"])
def test_size_that_is_none(fake, size, capsys):
    with pytest.raises(SystemExit, match="2"):
        tune.main(["--device", "cpu", "--size", size])
    assert "KxN, e.g. 4096x14336" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--rank", "0"], ["--tokens", "-1"], ["--seconds", "nan"], ["--compile", "0"]], ids="-".join)
def test_numbers_that_make_no_sense(fake, capsys, option):
    with pytest.raises(SystemExit) as stop:
        tune.main([*ARGS, *option])
    assert stop.value.code == 2
    assert f"{option[1]} is not at least" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_folder_that_cannot_be_written_is_found_before_anything_is_measured(fake, monkeypatch, tmp_path, place):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path / place))
    with pytest.raises(lk.LoraValueError, match="^the table.s folder: .* cannot be written to; got .*LORA_KERNELS_CACHE"):
        tune.main(ARGS)
    assert fake.measured == []


def test_cpu_target_measures_every_form(monkeypatch):
    target = tune.target(torch.device("cpu"))
    if target.missing():
        pytest.skip(target.missing())
    (job,) = [j for j in target.jobs([(64, 48)], (3,), (16, 8)) if (j["op"], j["dtype"]) == ("bwd", "float32")]
    assert target.rank == 8
    outcome = target.measure(job)
    assert set(outcome["us"]) == {"in_place", "panels", "torch"}
    assert outcome["chosen"] in outcome["us"]
    assert outcome["skipped"] == {}
