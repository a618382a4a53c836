"""The protocol's arithmetic, and what is written, read, printed and drawn from results files."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import time
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import lora_kernels as lk
from lora_kernels.bench import figures, plots, problem, provenance, records, report, roofs, run, shapes, timing


@pytest.mark.parametrize("values, q, expected", [([3.0, 1.0, 2.0], 0.5, 2.0), ([0.0, 10.0], 0.2, 2.0), ([5.0], 0.8, 5.0)], ids=str)
def test_quantile(values, q, expected):
    assert timing.quantile(values, q) == pytest.approx(expected)


def test_ratio_is_paired_by_round():
    """A machine that slows down threefold in the middle leaves the ratio alone."""
    ratio = timing.Ratio.of([1.0, 3.0, 1.0], [2.0, 6.0, 2.0])
    assert [ratio.median, ratio.q20, ratio.q80] == [0.5] * 3
    assert str(ratio) == "0.50"


def test_ratio_wider_than_its_effect_is_not_printed():
    ratio = timing.Ratio.of([1.0, 1.1, 1.2, 0.9, 1.02], [1.0] * 5)
    assert not ratio.resolved
    assert str(ratio) == f"({ratio.q20:.2f} to {ratio.q80:.2f})"


def test_rounds_interleave_and_rotate():
    seen: dict[str, list[int]] = {"a": [], "b": []}
    order: list[str] = []

    def call(name):
        def body(i):
            seen[name].append(i)
            order.append(name)

        return body

    times = timing.time_cpu({name: call(name) for name in seen}, sets=3, budget=0.0)
    assert len(times["a"]) == len(times["b"]) == timing.MIN_ROUNDS
    assert {i % 3 for i in seen["a"]} == {0, 1, 2}
    changes = sum(x != y for x, y in itertools.pairwise(order))
    assert len(order) > changes >= timing.MIN_ROUNDS  # neither ran all its rounds in a row


def test_what_waits_for_the_device_is_known_before_a_capture(monkeypatch):
    """CUDA stood in for: a capture that fails would leave torch in a state that spoils what is measured after it."""
    captured, mode = [], ["default"]
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: captured.append(graph) or contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda new: mode.__setitem__(0, new))

    def waits(i):
        if mode[0] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    assert timing._Replay(waits, 2).timer == "events"
    assert not captured
    assert mode == ["default"]
    assert timing._Replay(lambda i: None, 2).timer == "graph"
    assert len(captured) == 1


def test_slow_contestants_do_not_eat_the_budget():
    """Seven rounds of them would take fourteen budgets: three rounds, and no warm-up over all sets."""
    calls: list[int] = []

    def slow(i):
        calls.append(i)
        time.sleep(0.01)

    times = timing.time_cpu({"slow": slow}, sets=16, budget=0.005)
    assert len(times["slow"]) == timing.SLOW_ROUNDS
    assert len(calls) == 1 + timing.SLOW_ROUNDS


# ------------------------------------------------------------------------------------------------------------------ ceilings


@pytest.fixture
def slow_bfloat16(monkeypatch):
    """A CPU whose bfloat16 product takes a hundred times its float32 product; no call takes real time."""
    sizes = []

    def product(a, b):
        sizes.append((str(a.dtype), a.shape[0]))
        clock[0] += 2 * a.shape[0] ** 3 / (1e9 if a.dtype == torch.bfloat16 else 1e11)

    clock = [0.0]
    monkeypatch.setattr(roofs.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(roofs, "_by_library", product)
    monkeypatch.setattr(roofs, "_by_us", product)
    roofs.product.cache_clear(), roofs.flops.cache_clear()
    yield sizes, clock
    roofs.product.cache_clear(), roofs.flops.cache_clear()


def test_ceiling_is_what_the_cpu_can_do_and_found_in_bounded_time(slow_bfloat16):
    sizes, clock = slow_bfloat16
    cpu = torch.device("cpu")
    assert roofs.flops(cpu, "bfloat16") == pytest.approx(1e11)
    assert ("torch.bfloat16", 1536) not in sizes  # 7 s a call
    assert ("torch.float32", 1536) in sizes
    assert clock[0] < 6
    assert roofs.slow_16_bit(cpu)


def test_busy_moment_at_the_small_product_does_not_become_the_ceiling(slow_bfloat16, monkeypatch):
    """Every call loses 12 ms to another process: a product of 256 then seems to run at 2.8 GFLOP/s, and one of 1536 to take seconds."""
    _, clock = slow_bfloat16

    def disturbed(a, b):
        clock[0] += 0.012 + 2 * a.shape[0] ** 3 / 1e11

    monkeypatch.setattr(roofs, "_by_library", disturbed)
    monkeypatch.setattr(roofs, "_by_us", disturbed)
    assert roofs.flops(torch.device("cpu"), "float32") > 8e10


def test_grid_of_a_cpu_without_a_fast_16_bit_product():
    for grid in (shapes.quick, shapes.cpu):
        linear, batched = grid()
        turned = shapes.in_float32(linear)
        assert len(set(turned)) == len(turned)
        assert {c.M for c in turned if c.dtype == "bfloat16"} == {64}
        assert len([c for c in turned if c.dtype == "float32"]) == len([c for c in linear if c.dtype == "bfloat16"])
        assert {c.dtype for c in shapes.in_float32(batched)} == {"float32"}


@pytest.mark.parametrize("grid", [shapes.quick, shapes.cpu, shapes.gpu, shapes.full], ids=lambda g: f"{g.__name__}-grid")
def test_grids_hold_distinct_valid_cases(grid):
    linear, batched = grid()
    assert len(set(linear)) == len(linear)
    assert len(set(batched)) == len(batched)
    assert all(c.L == 0 and shapes.projections(c.model)[c.projection] == (c.K, c.N) for c in linear)
    assert all(0 < c.L <= max(c.M, 8) and c.mode == "forward" for c in batched)


def test_floor_counts_every_operand_once():
    case = shapes.Case("tiny", "q", M=2, K=3, N=5, R=1, dtype="float32", mode="forward")
    assert problem.floor_bytes(case) == 4 * (6 + 15 + 8 + 10)
    assert problem.floor_flops(case) == 2 * 30 + 2 * 2 * 8
    both = dataclasses.replace(case, mode="forward+backward")
    assert problem.floor_bytes(both) == 4 * ((6 + 15 + 8 + 10) + (10 + 15 + 6 + 8) + (6 + 8))
    assert problem.floor_flops(both) == 3 * (2 * 2 * 8) + 2 * (2 * 30)


# ------------------------------------------------------------------------------------------------------------------ records


def _entry(us: float, base: float) -> dict:
    over = {
        name: {"median": us / t, "q20": us / t * 0.99, "q80": us / t * 1.01} for name, t in (("base", base), ("naive", 2 * base), ("peft", 4 * base))
    }
    errors = {"y": 1e-3}
    return {"us": us, "q20": us, "q80": us, "rounds": 9, "timer": "clock", "over": over, "errors": errors, "peak_bytes": 1 << 20, "saved_bytes": 512}


def _results(folder, ours: float = 120.0):
    """Synthetic results files: made-up figures, in a temporary folder only."""
    where = {"date": "2026-01-02T03:04:05+00:00", "commit": "0123456789ab", "threads": 2, "versions": {"torch": "2.x"}}
    where |= {"device": {"type": "cpu", "name": "Some CPU"}, "cpu": {"isa": "sse9"}}
    linear, batched = shapes.quick()
    for suite, cases in (("linear", linear), ("batched", batched)):
        writer = records.Writer(folder, suite, where, {})
        for case in cases:
            names = (
                ("base", "loop", "gather_bmm", "peft_mixed", "ours")
                if case.L
                else ("base", "naive", "compile", "peft", "peft_low", "ours", "ours_fp32")
            )
            results = {name: _entry(ours if name.startswith("ours") else 100.0 + 50 * i, 100.0) for i, name in enumerate(names)}
            results["liger"] = {"absent": "Liger has no LoRA kernel"}
            results["broken"] = {"refused": "y is wrong"}
            writer.add({"case": case.as_dict(), "sets": 2, "floor": {"bytes": 10**6, "flops": 10**9, "us": 90.0}, "results": results})
        writer.close()
    return records.read_folder(folder)


def test_file_of_a_run_that_is_cut_off_is_whole_and_says_so(tmp_path):
    writer = records.Writer(tmp_path, "linear", provenance.collect(torch.device("cpu")), {})
    writer.add({"case": vars(shapes.quick()[0][0]), "floor": {"us": 1, "bytes": 1}, "results": {}})
    assert records.read(tmp_path / "linear.json")["complete"] is False
    writer.close(clocks_after=None)
    assert records.read(tmp_path / "linear.json")["complete"] is True
    assert [p.name for p in tmp_path.iterdir()] == ["linear.json"]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"schema": 99, "suite": "linear"}', '{"schema": 1, "suite": "other"}'], ids=["cut", "list", "schema", "suite"]
)
def test_foreign_results_file_is_refused(tmp_path, text):
    (tmp_path / "linear.json").write_text(text)
    with pytest.raises(lk.LoraValueError, match="linear.json .*fix: "):
        records.read_folder(tmp_path)


def test_tables_name_everyone(tmp_path):
    files = _results(tmp_path)
    out = Console(file=io.StringIO(), width=200)
    for suite, data in files.items():
        report.print_record(out, suite, data["records"][0])
    report.print_end(out, files, ("linear", "batched"))
    text = out.file.getvalue()
    summaries = ("linear, over the frozen layer alone", "batched, over the frozen layer alone")
    for words in ("naive", "peft_mixed", "% of roofline", "absent: liger (linear, batched): Liger", "refused: broken", "fastest", *summaries):
        assert words in text


def test_losses_are_named(tmp_path):
    assert report.losses(_results(tmp_path, ours=110.0)) == []
    slow = report.losses(_results(tmp_path, ours=900.0))
    assert len(slow) == sum(map(len, shapes.quick()))


def test_busy_machine_is_told(tmp_path):
    files = _results(tmp_path)
    assert report.disturbed(files) == (0, sum(map(len, shapes.quick())))
    files["linear"]["records"][0]["results"]["base"]["q80"] *= 2
    assert report.disturbed(files)[0] == 1


def test_plots_come_from_files_alone(tmp_path):
    pytest.importorskip("matplotlib")
    _results(tmp_path)
    made = plots.draw(tmp_path)
    assert {p.name for p in made} == {"speedup_over_peft.png", "overhead_over_base.png", "decode_over_adapters.png"}
    assert all(p.read_bytes()[:4] == b"\x89PNG" and p.stat().st_size > 10_000 for p in made)


def test_bench_refuses_a_damaged_folder_with_one_line(tmp_path, capsys):
    from lora_kernels import cli

    (tmp_path / "linear.json").write_text("{")
    assert cli.main(["bench", "--plots", str(tmp_path)]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_quick_results_never_overwrite_full_ones():
    assert len({run.default_folder(torch.device("cpu"), grid) for grid in ("cpu", "quick", "sizes")}) == 3


def test_instruction_sets_of_one_cpu_name_do_not_share_a_folder(monkeypatch):
    folders = set()
    for isa in ("avx2", "avx512_bf16"):
        monkeypatch.setattr(provenance, "cpu_isa", lambda isa=isa: isa)
        folders.add(provenance.folder_name(torch.device("cpu")))
    assert len(folders) == 2
    assert any("-avx512-bf16-" in name for name in folders)


# ------------------------------------------------------------------------------------------------------------------ figures

PAGE = "# Title\n<!-- figure cpu linear speedup -->\nold\n<!-- /figure -->\ntext\n<!-- figure cpu batched decode --><!-- /figure -->\n"


def test_figures_follow_the_results(tmp_path):
    _results(tmp_path / "cpu")
    page = figures.filled(PAGE, tmp_path)
    assert "3.33×" in page  # 400 / 120
    assert "old" not in page
    assert "Some CPU, sse9, 2 threads" in page
    assert page.startswith("# Title\n") and "\ntext\n" in page  # noqa: PT018
    assert figures.filled(page, tmp_path) == page
    data = json.loads((tmp_path / "cpu" / "linear.json").read_text())
    over = data["records"][0]["results"]["ours_fp32"]["over"]
    over["peft"] = {name: 1.5 * value for name, value in over["peft"].items()}
    (tmp_path / "cpu" / "linear.json").write_text(json.dumps(data))
    assert figures.filled(page, tmp_path) != page


def test_figures_of_a_float32_run(tmp_path):
    """Where all is float32, ours with adapters in x's dtype is ours with PEFT's adapters."""
    _results(tmp_path / "cpu")
    path = tmp_path / "cpu" / "linear.json"
    data = json.loads(path.read_text())
    for record in data["records"]:
        record["case"]["dtype"] = "float32"
        record["results"]["ours_fp32"] = {"absent": "the same"}
        record["results"]["ours"]["over"]["peft"] = {"median": 0.2, "q20": 0.2, "q80": 0.2}
    path.write_text(json.dumps(data))
    assert "5.00×" in figures.filled(PAGE, tmp_path)
    pytest.importorskip("matplotlib")
    assert "speedup_over_peft.png" in {p.name for p in plots.draw(tmp_path / "cpu")}


def test_figure_without_results_says_so(tmp_path):
    assert figures.filled(PAGE, tmp_path).count("Not measured yet.") == 2


def test_figure_of_an_unknown_producer_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="unknown figure"):
        figures.filled("<!-- figure cpu linear nonsense --><!-- /figure -->", tmp_path)


@pytest.mark.parametrize("argv", [[], ["--check"]], ids=["write", "check"])
def test_figures_without_pages(tmp_path, monkeypatch, capsys, argv):
    """As from an installed package."""
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    assert figures.main(argv) == 2
    assert "no page to fill" in capsys.readouterr().err


def test_a_copy_without_git_is_told_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.commit() is None
    monkeypatch.setenv("LORA_KERNELS_COMMIT", "0123abc")
    assert provenance.commit() == "0123abc"


def test_pages_equal_the_committed_results(capsys):
    """Fails when README.md or docs/performance.md shows a figure that the results files do not hold (make readme-figures)."""
    assert figures.main(["--check"]) == 0, capsys.readouterr().out
