"""The tuner: what it tries, what it writes and resumes, which files it and the lookup refuse."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import cuda_stand_in
import pytest
import torch

import lora_kernels as lk
from lora_kernels import _device, _errors, reference
from lora_kernels.bench import tune, tune_gpu
from lora_kernels.bench.tune_gpu import best, candidates, fits, label
from lora_kernels.native import cuda as cuda_ops
from lora_kernels.ops import _registry
from lora_kernels.tuning import cpu, store
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


# ------------------------------------------------------------------------------------------------------------------- lookup

GOOD = {"op": "fwd", "N": 32, "K": 64, "R": 16, "dtype": "bfloat16", "dropout": False}
PLAN = {"implementation": "triton", "form": "tma", "block_m": 128, "block_n": 128, "block_k": 64, "warps": 8, "stages": 4, "group_m": 8}
CUDA = {"implementation": "cuda", "form": "tma", "block_m": 128, "block_n": 192, "group_m": 8, "cluster": 2}


@pytest.fixture
def lookups(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path))
    caches = (store.tables, cpu._tables, cpu.form, _errors.warn_once)
    for cache in caches:
        cache.cache_clear()
    yield tmp_path
    for cache in caches:
        cache.cache_clear()


def _gpu_table(folder, device, entries):
    (folder / store.table_name("Test GPU")).write_text(json.dumps({"device": device, "entries": entries}))


@pytest.mark.parametrize("M, block_m", [(64, 64), (4096, 256), (256, 64), (1024, 256), (1, 64)], ids=lambda v: str(v))
def test_lookup_is_exact_then_nearest_in_log_space(lookups, M, block_m):
    _gpu_table(lookups, "Test GPU", [{**GOOD, "M": m, "plan": {**PLAN, "block_m": b}} for m, b in ((64, 64), (4096, 256))])
    (table, *_) = store.tables("Test GPU")
    assert store.look_up(table, Problem("fwd", M, 32, 64, 16, torch.bfloat16)).block_m == block_m
    assert store.look_up(table, Problem("fwd", M, 32, 64, 17, torch.bfloat16)) is None


BAD = {
    "foreign": ("Other GPU", [], "another device"),
    "unknown-field": ("Test GPU", [{**GOOD, "M": 1, "plan": {**PLAN, "colour": 1}}], "unknown plan field"),
    "unknown-form": ("Test GPU", [{**GOOD, "M": 1, "plan": {**PLAN, "form": "spiral"}}], "unknown plan"),
    "no-block-k": ("Test GPU", [{**GOOD, "M": 1, "plan": {**PLAN, "block_k": 0}}], "no kernel does this plan"),
    "cuda-tile": ("Test GPU", [{**GOOD, "M": 1, "plan": {**CUDA, "block_m": 192}}], "no kernel does this plan"),
    "cuda-cluster": ("Test GPU", [{**GOOD, "M": 1, "plan": {**CUDA, "cluster": 4}}], "no kernel does this plan"),
    "cuda-group": ("Test GPU", [{**GOOD, "M": 1, "plan": {**CUDA, "group_m": 0}}], "no kernel does this plan"),
    "cuda-column0-rank-128": ("Test GPU", [{**GOOD, "M": 1, "R": 128, "plan": {**CUDA, "form": "column0", "block_n": 256}}], "no kernel does"),
    "cuda-masked-tile": ("Test GPU", [{**GOOD, "M": 1, "op": "dx", "dropout": True, "plan": CUDA}], "no kernel does this plan"),
    "no-plan": ("Test GPU", [{**GOOD, "M": 1}], "KeyError"),
    "no-tokens": ("Test GPU", [{**GOOD, "M": 0, "plan": PLAN}], "M is no number of tokens"),
    "block-of-100": ("Test GPU", [{**GOOD, "M": 1, "plan": {**PLAN, "block_m": 100}}], "no kernel does this plan"),
    "warps-in-words": ("Test GPU", [{**GOOD, "M": 1, "plan": {**PLAN, "warps": "8"}}], "no kernel does this plan"),
}


@pytest.mark.parametrize("device, entries, words", BAD.values(), ids=BAD)
def test_bad_gpu_table_is_left_out_with_one_line(lookups, caplog, device, entries, words):
    _gpu_table(lookups, device, entries)
    with caplog.at_level(logging.WARNING, "lora_kernels"):
        assert store.tables("Test GPU") == ()
    assert len(caplog.records) == 1
    assert words in caplog.text
    assert "is not used" in caplog.text


ROW = {"op": "fwd", "dtype": "float32", "N": 32, "K": 64}


def _cpu_table(folder, rows, isa="avx2"):
    (folder / cpu.table_name("avx2")).write_text(json.dumps({"isa": isa, "rows": rows}))


def test_cpu_forms_come_from_the_users_table(lookups, monkeypatch):
    monkeypatch.setattr(cpu, "_isa", "avx2")
    _cpu_table(lookups, [{**ROW, "forms": [[1, "in_place"], [64, "torch"]]}])
    assert [cpu.FORMS[cpu.form("fwd", 0, M, 32, 64)] for M in (1, 2, 200)] == ["in_place", "in_place", "torch"]


def test_users_rows_go_before_the_shipped_ones_and_hide_no_other(lookups, monkeypatch):
    monkeypatch.setattr(cpu, "_isa", "avx2")
    monkeypatch.setattr(store, "SHIPPED", lookups / "shipped")
    store.SHIPPED.mkdir()
    _cpu_table(lookups, [{**ROW, "forms": [[4, "torch"]]}])
    _cpu_table(store.SHIPPED, [{**ROW, "forms": [[1, "panels"], [64, "in_place"]]}, {**ROW, "N": 5000, "forms": [[4, "panels"]]}])
    at = lambda M, N: cpu.FORMS[cpu.form("fwd", 0, M, N, 64)]
    assert [at(4, 32), at(64, 32), at(4, 5000)] == ["torch", "in_place", "panels"]


@pytest.mark.parametrize(
    "M, N, K, near",
    [
        (64, 128, 64, True),
        (64, 129, 64, False),
        (64, 8, 64, True),
        (64, 7, 64, False),
        (64, 32, 256, True),
        (64, 32, 257, False),
        (64, 32, 16, True),
        (64, 32, 15, False),
        (64, 64, 129, False),
        (64, 8, 256, True),
        (64, 4, 512, False),
        (256, 32, 64, True),
        (257, 32, 64, False),
        (16, 32, 64, True),
        (15, 32, 64, False),
    ],
)
def test_a_row_speaks_for_what_is_within_a_factor_of_4(lookups, monkeypatch, M, N, K, near):
    monkeypatch.setattr(cpu, "_isa", "avx2")
    monkeypatch.setattr(store, "SHIPPED", lookups / "none")
    _cpu_table(lookups, [{**ROW, "forms": [[64, "torch"]]}])
    assert (cpu.FORMS[cpu.form("fwd", 0, M, N, K)] == "torch") == near


def test_a_row_of_many_rows_speaks_for_all_above(lookups, monkeypatch):
    monkeypatch.setattr(cpu, "_isa", "avx2")
    monkeypatch.setattr(store, "SHIPPED", lookups / "none")
    _cpu_table(lookups, [{**ROW, "forms": [[1024, "torch"], [2048, "in_place"]]}])
    assert [cpu.FORMS[cpu.form("fwd", 0, M, 32, 64)] for M in (255, 256, 1024, 100_000)] == ["panels", "torch", "torch", "in_place"]


@pytest.mark.parametrize("op, K, last", [("fwd", 129, 32), ("fwd", 128, 15), ("fwd", 64, 15), ("bwd", 64, 2)])
def test_rule_of_thumb(lookups, monkeypatch, op, K, last):
    """Up to so many rows the weight is read in place."""
    monkeypatch.setattr(store, "SHIPPED", lookups / "none")
    assert [cpu.FORMS[cpu.form(op, 0, M, 4096, K)] for M in (last, last + 1)] == ["in_place", "panels"]


@pytest.mark.parametrize("isa", ["avx2", "avx512_bf16"])
def test_no_shipped_row_speaks_for_short_rows_of_the_weight(lookups, monkeypatch, isa):
    """(1536, 576) was measured, and N * K of (4096, 64) is within 4 of it."""
    monkeypatch.setattr(cpu, "_isa", isa)
    assert cpu.FORMS[cpu.form("fwd", 1, 16, 1536, 576)] == ("in_place" if isa == "avx512_bf16" else "panels")
    assert [cpu.FORMS[cpu.form("fwd", dtype, 16, 4096, 64)] for dtype in (0, 1)] == ["panels", "panels"]


BAD_ROWS = {
    "foreign": ("avx512", [], "another instruction set"),
    "unknown-form": ("avx2", [{**ROW, "forms": [[1, "spiral"]]}], "spiral"),
    "size-0": ("avx2", [{**ROW, "N": 0, "forms": [[1, "torch"]]}], "'N': 0"),
    "no-forms": ("avx2", [ROW], "KeyError"),
    "empty-forms": ("avx2", [{**ROW, "forms": []}], "a row cannot be used"),
    "no-op": ("avx2", [{key: value for key, value in ROW.items() if key != "op"} | {"forms": [[1, "torch"]]}], "KeyError: 'op'"),
    "other-dtype": ("avx2", [{**ROW, "dtype": "int8", "forms": [[1, "torch"]]}], "a row cannot be used"),
    "size-nan": ("avx2", [{**ROW, "K": float("nan"), "forms": [[1, "torch"]]}], "a row cannot be used"),
}


@pytest.mark.parametrize("rows", [rows for _, rows, words in BAD_ROWS.values() if rows] + [[{**ROW, "forms": 3}], [3], 3], ids=str)
def test_tuner_refuses_rows_that_the_lookup_would_refuse(tmp_path, rows):
    target, path = tune.target(torch.device("cpu")), tmp_path / "table.json"
    if target.missing():
        pytest.skip(target.missing())
    path.write_text(json.dumps({**target.head(), "rows": rows}))
    with pytest.raises(lk.LoraValueError, match="is damaged; got .*; fix: move it away"):
        tune.TableFile(path, target, again=False)


@pytest.mark.parametrize("entries", [entries for _, entries, _ in BAD.values() if entries] + [[3], 3], ids=lambda v: str(v)[:60])
def test_tuner_refuses_entries_that_the_lookup_would_refuse(monkeypatch, tmp_path, entries):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Test GPU")
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"device": "Test GPU", "entries": entries}))
    with pytest.raises(lk.LoraValueError, match="is damaged; got .*; fix: move it away"):
        tune.TableFile(path, tune_gpu.GpuTarget(torch.device("cuda")), again=False)


@pytest.mark.parametrize("isa, rows, words", BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_cpu_table_is_left_out_with_one_line(lookups, monkeypatch, caplog, isa, rows, words):
    monkeypatch.setattr(cpu, "_isa", "avx2")
    monkeypatch.setattr(store, "SHIPPED", lookups / "none")
    _cpu_table(lookups, rows, isa)
    with caplog.at_level(logging.WARNING, "lora_kernels"):
        assert cpu.FORMS[cpu.form("fwd", 0, 500, 32, 64)] == "panels"  # the rule of thumb
    assert len(caplog.records) == 1
    assert words in caplog.text


@pytest.mark.parametrize("spoil", ["unreadable", "a folder", "nested"])
def test_table_that_cannot_even_be_read(lookups, monkeypatch, caplog, spoil):
    """Neither the file system nor the JSON may stop a layer."""
    monkeypatch.setattr(cpu, "_isa", "avx2")
    monkeypatch.setattr(store, "SHIPPED", lookups / "none")
    path = lookups / cpu.table_name("avx2")
    path.write_text("[" * 100_000 if spoil == "nested" else "")
    if spoil != "nested":
        method, error = {"unreadable": ("is_file", PermissionError), "a folder": ("read_text", IsADirectoryError)}[spoil]

        def fails(self, *args):
            raise error(13, "no", str(self))

        monkeypatch.setattr(type(path), method, fails)
    with caplog.at_level(logging.WARNING, "lora_kernels"):
        assert cpu.FORMS[cpu.form("fwd", 0, 500, 32, 64)] == "panels"
    assert "is not used" in caplog.text


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


def test_cpu_table_is_packed_as_it_is_read(lookups):
    target = tune.target(torch.device("cpu"))
    entries = [{**ROW, "M": M, "chosen": form} for M, form in ((64, "torch"), (1, "panels"))]
    packed = target.pack(entries)
    assert packed["rows"] == [{**ROW, "forms": [[1, "panels"], [64, "torch"]]}]
    assert sorted(target.unpack(packed), key=lambda e: -e["M"]) == entries
    _cpu_table(lookups, packed["rows"])
    assert cpu.read_rows(lookups / cpu.table_name("avx2"), "avx2") == packed["rows"]


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
