"""`lora-kernels bench`: measure, print, write JSON, draw."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import torch
from rich.console import Console

from .. import _device
from .._console import console
from .._errors import LoraValueError, message
from . import arguments, contestants, contestants_batched, files, plots, problem, provenance, records, report, roofs, shapes, steps
from .measure import measure

GRIDS = {"quick": shapes.quick, "cpu": shapes.cpu, "gpu": shapes.gpu, "full": shapes.full}
BUDGET = {"quick": 0.7, "cpu": 2.0, "gpu": 0.6, "full": 1.0, "sizes": 1.0}  # seconds of timing per case
MOST_THREADS = 4096  # beyond, OpenMP ends the process rather than say no
MATPLOTLIB = "pip install matplotlib"
MODELS = {"quick": (steps.QUICK,), "cpu": (steps.QUICK, steps.CPU), "gpu": (steps.GPU,), "full": (steps.GPU,)}


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lora-kernels bench", description="Speed and memory against PyTorch and PEFT, each checked against float64."
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="one projection of a small model: under 90 s on 2 cores")
    size.add_argument("--full", action="store_true", help="every model, projection, rank, token count and mode; hours")
    size.add_argument(
        "--size", type=arguments.size, metavar="KxN", action="append", help="a layer from K to N features, instead of a model's; may be repeated"
    )
    parser.add_argument("--tokens", type=arguments.at_least(1), action="append", help="with --size: an M, may be repeated; default 1, 64, 1024")
    parser.add_argument("--rank", type=arguments.at_least(1), action="append", help="with --size: an R, may be repeated; default 16")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--suite", choices=records.SUITES, action="append", help="only this one; may be repeated")
    parser.add_argument(
        "--out", type=Path, help="folder for JSON and PNG; default benchmarks/results/<device> in a checkout, else ./lora-kernels-bench/<device>"
    )
    parser.add_argument("--threads", type=arguments.at_least(1, most=MOST_THREADS), help="CPU threads of torch")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="of most cases, with --size of all; default bfloat16, with --size both, on a CPU for which PyTorch has no fast 16-bit product float32",
    )
    parser.add_argument("--minutes", type=arguments.above_0, help="start no further case after this time; what was measured is kept")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="only draw the plots of an existing results folder")
    args = parser.parse_args(argv)
    if args.plots and any(value for name, value in vars(args).items() if name != "plots"):
        parser.error("--plots only draws: it goes with no other option")
    if (args.tokens or args.rank) and not args.size:
        parser.error("--tokens and --rank go with --size")
    if args.size and "steps" in (args.suite or ()):
        parser.error("--suite steps trains a model: it goes without --size")
    args.suite = args.suite or [suite for suite in records.SUITES if suite != "steps" or not args.size]
    return args


def default_folder(device: torch.device, grid: str) -> Path:
    """A quick run and one of sizes go beside the full results of their device, never over them."""
    checkout = provenance.ROOT / "benchmarks"
    root = checkout / "results" if checkout.is_dir() else Path("lora-kernels-bench")
    return root / (provenance.folder_name(device) + (f"-{grid}" if grid in ("quick", "sizes") else ""))


SHARES = {"linear": 5, "batched": 3, "steps": 2}  # of the time that is left, among the suites that are still to run


class _Clock:
    """Deals out `--minutes`: no suite starves the next."""

    def __init__(self, minutes: float | None, suites: list[str]):
        self.end = time.monotonic() + 60 * minutes if minutes is not None else None
        self.suites = list(suites)

    def deadline(self, suite: str) -> float:
        """When the last case of this suite may start; call it as the suite begins."""
        if self.end is None:
            return float("inf")
        rest = self.suites[self.suites.index(suite) :]
        now = time.monotonic()
        return now + (self.end - now) * SHARES[suite] / sum(SHARES[s] for s in rest)


def _cases(suite: str, grid: str, dtype: str, args: argparse.Namespace) -> list:
    if suite == "steps":
        return [dataclasses.replace(model, dtype=dtype) for model in MODELS[grid]]
    if grid == "sizes":
        dtypes = (dtype,) if args.dtype or dtype == "float32" else ("bfloat16", "float32")
        linear, batched = shapes.sized(args.size, tuple(args.tokens or (1, 64, 1024)), tuple(args.rank or (16,)), dtypes)
    else:
        linear, batched = GRIDS[grid]() if dtype == "bfloat16" else map(shapes.in_float32, GRIDS[grid]())
    return linear if suite == "linear" else batched


def _measure(suite: str, case, device: torch.device, budget: float) -> dict:
    if suite == "steps":
        return steps.measure(case, device)
    who = contestants.contestants() if suite == "linear" else contestants_batched.contestants()
    return measure(case, who, device, budget)


def _only_draw(folder: Path, out: Console) -> int:
    if not _device.has_module("matplotlib"):
        raise LoraValueError(message("--plots: matplotlib is not installed", fix=MATPLOTLIB))
    if not (found := records.read_folder(folder)):
        allowed = f"a folder with {' or '.join(f'{suite}.json' for suite in records.SUITES)}"
        raise LoraValueError(message(f"--plots: no results in {folder}", allowed=allowed, fix="run lora-kernels bench --out FOLDER first"))
    files.check_writable(folder, "--plots", "copy it to a place of yours")
    drawn = plots.draw(folder)
    for path in drawn:
        out.print(f"wrote {path}")
    if not drawn:
        got = ", ".join(f"{len(data['records'])} cases of {suite}" for suite, data in found.items())
        raise LoraValueError(message("--plots: nothing to draw", got, "two token counts, ranks or adapter counts of one layer at least"))
    return 0


def main(argv: list[str] | None = None) -> int:
    args = _arguments(sys.argv[1:] if argv is None else argv)
    out = console()
    if args.plots:
        return _only_draw(args.plots, out)
    device = arguments.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    grid = "quick" if args.quick else "full" if args.full else "sizes" if args.size else "gpu" if device.type == "cuda" else "cpu"
    folder, suites = args.out or default_folder(device, grid), list(dict.fromkeys(args.suite))
    files.check_writable(folder, "--out", "name another one with --out")
    for suite in suites:
        files.check_replaceable(folder / f"{suite}.json", "move it away, or name another folder with --out")
    records.read_folder(folder, [suite for suite in records.SUITES if suite not in suites])  # a damaged one is better found before the work
    dtype = args.dtype or ("float32" if roofs.slow_16_bit(device) else "bfloat16")
    cases = {suite: _cases(suite, grid, dtype, args) for suite in suites}
    if args.size:
        for case in (case for suite in suites for case in cases[suite]):
            problem.check_room(case, device)
    out.print(f"{provenance.device_name(device)}, {torch.get_num_threads()} CPU threads; every contestant is checked against float64 first")
    where = provenance.collect(device)
    ceilings = {"bytes_per_s": roofs.bandwidth(device), "flops_per_s": {d: roofs.flops(device, d) for d in ("bfloat16", "float32")}}
    tera = ", ".join(f"{dtype} {rate / 1e12:.3g} TFLOP/s" for dtype, rate in ceilings["flops_per_s"].items())
    out.print(f"ceilings measured here: {ceilings['bytes_per_s'] / 1e9:.0f} GB/s, {tera}")

    if not args.dtype and dtype == "float32":
        out.print("PyTorch has no fast 16-bit product here: most cases in float32 (--dtype bfloat16 forces the others)")
    clock, cut, wrote, measured = _Clock(args.minutes, suites), [], [], {}
    for suite in suites:
        why = steps.missing() if suite == "steps" else None
        if why:
            out.print(f"{suite}: left out, {why}")
            continue
        writer, deadline, every = records.Writer(folder, suite, where, ceilings), clock.deadline(suite), len(cases[suite])
        try:
            for done, case in enumerate(cases[suite]):
                if time.monotonic() > deadline:
                    cut.append(f"{suite} after {done} of {every} cases")
                    break
                record = _measure(suite, case, device, BUDGET[grid])
                writer.add(record)
                report.print_record(out, suite, record)
        except KeyboardInterrupt:
            if writer.data["records"]:
                out.print(f"{suite} after {len(writer.data['records'])} of {every} cases: {writer.where()}")
            raise
        if not writer.data["records"]:  # what an earlier run measured stays
            continue
        writer.close(complete=len(writer.data["records"]) == every, clocks_after=provenance.clocks(device))
        wrote.append(writer.where())
        measured[suite] = writer.data
    report.print_end(out, records.read_folder(folder) | measured, suites)
    if cut:
        out.print(f"cut off by --minutes {args.minutes:g}: {'; '.join(cut)}; what was measured is kept (complete: false)")
    if _device.has_module("matplotlib"):
        for path in plots.draw(folder):
            out.print(f"wrote {path}")
    else:
        out.print(f"no plots: matplotlib is not installed ({MATPLOTLIB})")
    out.print(f"wrote {', '.join(wrote)}" if wrote else "nothing was measured, nothing was written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
