"""Tables of plans: what a lookup finds in them, and which ones it and the tuner refuse."""

from __future__ import annotations

import builtins
import io
import json
import logging
import platform

import pytest
import torch

import lora_kernels as lk
from lora_kernels import _device, _errors
from lora_kernels.bench import tune, tune_gpu
from lora_kernels.tuning import cpu, store
from lora_kernels.tuning.plan import Problem

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


def test_a_core_with_its_own_table_takes_that_first_but_the_users_before(lookups, monkeypatch):
    at = lambda N: cpu.FORMS[cpu.form("fwd", 0, 4, N, 64)]
    monkeypatch.setattr(cpu, "_isa", "avx512_bf16")
    monkeypatch.setattr(store, "SHIPPED", lookups / "shipped")
    store.SHIPPED.mkdir()
    row = lambda N, form: {**ROW, "N": N, "forms": [[4, form]]}
    tables = {
        lookups / cpu.table_name("avx512_bf16"): [row(32, "torch")],
        store.SHIPPED / cpu.table_name("avx512_bf16", "Zen 5"): [row(32, "panels"), row(5000, "torch")],
        store.SHIPPED / cpu.table_name("avx512_bf16"): [row(5000, "panels"), row(100000, "panels")],
    }
    assert len(tables) == 3
    for path, rows in tables.items():
        path.write_text(json.dumps({"isa": "avx512_bf16", "rows": rows}))
    found = {}
    for core in ("Zen 5", "Zen 5 mobile", "Zen 4", ""):
        monkeypatch.setattr(cpu._device, "cpu_core", lambda core=core: core)
        cpu._tables.cache_clear()
        cpu.form.cache_clear()
        found[core] = [at(32), at(5000), at(100000)]
    assert found.pop("Zen 5") == ["torch", "torch", "panels"]
    assert set(map(tuple, found.values())) == {("torch", "panels", "panels")}


AMD = "vendor_id : AuthenticAMD\ncpu family : {}\nmodel : {}\nmodel name : {}\nflags : avx2"
CORES = {
    "zen5": (AMD.format(26, 2, "AMD EPYC"), "Zen 5", "AMD EPYC Zen 5"),
    "zen5_mobile": (AMD.format(26, 36, "AMD Ryzen AI 9 HX 370"), "Zen 5 mobile", "AMD Ryzen AI 9 HX 370"),
    "later": (AMD.format(26, 80, "AMD EPYC"), "", "AMD EPYC"),
    "zen4": (AMD.format(25, 17, "AMD EPYC 9654"), "Zen 4", "AMD EPYC 9654"),
    "zen3": (AMD.format(25, 1, "AMD EPYC"), "Zen 3", "AMD EPYC Zen 3"),
    "zen2": (AMD.format(23, 49, "AMD EPYC"), "Zen 2", "AMD EPYC Zen 2"),
    "odd_numbers": (AMD.format("unknown", "", "AMD EPYC"), "", "AMD EPYC"),
    "hex": (AMD.format("0x1a", "0x2", "AMD EPYC"), "Zen 5", "AMD EPYC Zen 5"),
    "intel": (AMD.replace("AuthenticAMD", "GenuineIntel").format(6, 207, "Intel(R) Xeon(R) Processor"), "", "Intel(R) Xeon(R) Processor"),
    "arm": ("processor : 0\nBogoMIPS : 50.00\nCPU implementer : 0x41", "", None),
    "nothing": ("", "", None),
}


@pytest.mark.parametrize("info, core, name", CORES.values(), ids=CORES)
def test_cores_are_told_apart_where_the_name_does_not(monkeypatch, info, core, name):
    monkeypatch.setattr(builtins, "open", lambda *args, **options: io.StringIO(info + "\n\nprocessor : 1\ncpu family : 1\n"))
    _device._cpuinfo.cache_clear()
    found = _device.cpu_core(), _device.cpu_name()
    _device._cpuinfo.cache_clear()
    assert found == (core, name or platform.processor() or platform.machine())


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


@pytest.mark.parametrize("isa", ["avx2", "avx512_bf16", "amx_bf16"])
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


def test_user_without_a_home_gets_the_shipped_tables(lookups, monkeypatch):
    """As in a container: HOME is unset, and /etc/passwd does not name the user."""
    for name in ("HOME", "XDG_CACHE_HOME", "LORA_KERNELS_CACHE"):
        monkeypatch.delenv(name, raising=False)

    def nobody(uid):
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.setattr(cpu, "_isa", "avx2")
    assert cpu.form("fwd", 0, 500, 32, 64) in range(len(cpu.FORMS))
    assert cpu._tables("avx2")
    with pytest.raises(lk.LoraValueError, match="fix: set LORA_KERNELS_CACHE"):
        store.user_folder()


def test_cpu_table_is_packed_as_it_is_read(lookups):
    target = tune.target(torch.device("cpu"))
    entries = [{**ROW, "M": M, "chosen": form} for M, form in ((64, "torch"), (1, "panels"))]
    packed = target.pack(entries)
    assert packed["rows"] == [{**ROW, "forms": [[1, "panels"], [64, "torch"]]}]
    assert sorted(target.unpack(packed), key=lambda e: -e["M"]) == entries
    _cpu_table(lookups, packed["rows"])
    assert cpu.read_rows(lookups / cpu.table_name("avx2"), "avx2") == packed["rows"]
