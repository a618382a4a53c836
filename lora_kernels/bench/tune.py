"""`lora-kernels tune`: measure the plans that fit this device and write the fastest ones into a table; can be stopped and resumed."""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .._console import console
from .._errors import LoraValueError, message
from ..tuning import store
from . import arguments, provenance, shapes
from .files import check_replaceable, check_writable, hold, write_whole

DEFAULT_MODELS = ("llama-3-8b", "qwen3-8b", "smollm2-135m")
QUICK = {"size": [(4096, 4096), (4096, 14336), (14336, 4096)], "tokens": [8192], "rank": [16, 64]}  # q, gate_up and down of Llama-3-8B


class Target(Protocol):
    """One kind of device and its plans. A job is the JSON form of a problem; a table entry is the job and its outcome."""

    device: torch.device
    tokens: tuple[int, ...]  # default M

    def missing(self) -> str | None: ...

    def head(self) -> dict[str, str]:
        """What the table says of its owner, {key: name}; a table that says otherwise is another device's."""
        ...

    def file_name(self) -> str: ...

    def jobs(self, sizes: list[tuple[int, int]], tokens: tuple[int, ...], ranks: tuple[int, ...]) -> list[dict]: ...

    def measure(self, job: dict) -> dict:
        """What is added to the job to make a table entry."""
        ...

    def pack(self, entries: list[dict]) -> dict:
        """The body of the table file; `unpack` is its inverse."""
        ...

    def unpack(self, data: dict) -> list[dict]: ...


def target(device: torch.device, quick: bool = False) -> Target:
    if device.type == "cuda":
        from .tune_gpu import GpuTarget

        return GpuTarget(device, quick)
    from .tune_cpu import CpuTarget

    return CpuTarget()


def sizes_of(models: list[str]) -> list[tuple[int, int]]:
    """The distinct (K, N) of these models' projections."""
    return sorted({size for model in models for size in shapes.projections(model).values()})


class TableFile:
    """The table being written: entries already there are kept, each new one is saved at once."""

    def __init__(self, path: Path, tuned: Target, again: bool):
        self.path, self.tuned = path, tuned
        check_replaceable(path, "move it away, or name another folder in LORA_KERNELS_CACHE")
        self.entries = self._read() if path.is_file() and not again else []

    def _read(self) -> list[dict]:
        fix = "move it away, or pass --again to write it anew"
        try:
            data = json.loads(self.path.read_text())
            owner = {key: data[key] for key in self.tuned.head()}
            entries = self.tuned.unpack(data)
        except store.DAMAGED as error:
            got = f"{type(error).__name__}: {error}".partition("; fix: ")[0]
            raise LoraValueError(message(f"{self.path} is damaged", got, fix=fix)) from error
        if owner != self.tuned.head():
            raise LoraValueError(message(f"{self.path} belongs to another device", owner, self.tuned.head(), fix))
        return entries

    def has(self, job: dict) -> bool:
        return any(all(entry.get(key) == value for key, value in job.items()) for entry in self.entries)

    def add(self, entry: dict, where: dict) -> None:
        self.entries.append(entry)
        write_whole(self.path, json.dumps({**self.tuned.head(), "provenance": where, **self.tuned.pack(self.entries)}, indent=1) + "\n")


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lora-kernels tune", description="Measure which plan is fastest on this device, and remember it.")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", choices=sorted(shapes.MODELS), action="append", help=f"whose projections; default {', '.join(DEFAULT_MODELS)}")
    which.add_argument(
        "--size", type=arguments.size, metavar="KxN", action="append", help="a projection from K to N features, instead of a model's; may be repeated"
    )
    parser.add_argument("--tokens", type=arguments.at_least(1), action="append", help="an M to measure; may be repeated")
    parser.add_argument("--rank", type=arguments.at_least(1), action="append", help="an R to measure; may be repeated on a GPU")
    parser.add_argument("--ship", action="store_true", help="write into the package (tuning/configs) instead of the user's cache folder")
    parser.add_argument("--quick", action="store_true", help="GPU: few large problems and Triton tiles")
    parser.add_argument(
        "--compile", type=arguments.at_least(1), metavar="N", help="GPU: only compile the Triton candidates, in N processes, and time nothing"
    )
    parser.add_argument(
        "--seconds",
        type=arguments.at_least(0, float),
        default=float("inf"),
        help="start no further problem after this time; what was measured is kept",
    )
    parser.add_argument("--again", action="store_true", help="forget what the table holds and measure anew")
    args = parser.parse_args(argv)
    if args.quick and args.model:
        parser.error("--quick has its own layers: it goes with --size or alone, without --model")
    if args.compile and (args.again or args.ship or args.seconds != float("inf")):
        parser.error("--compile times and writes nothing: it goes without --again, --ship and --seconds")
    if args.quick:
        for name, default in QUICK.items():
            setattr(args, name, getattr(args, name) or default)
    return args


def _compile(device: torch.device, quick: bool, jobs: list[dict], processes: int) -> None:
    """What a later run finds in Triton's cache. For processes started anew: a forked one cannot use CUDA."""
    from . import tune_gpu

    found = tune_gpu.kinds(jobs)
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for job, failed in zip(found, pool.map(partial(tune_gpu.compile_kind, device, quick), found), strict=True):
            print(*(f"{key} {value}" for key, value in job.items()), failed or "compiled", flush=True)


def main(argv: list[str] | None = None) -> int:
    with contextlib.ExitStack() as at_end:
        return _tune(_arguments(sys.argv[1:] if argv is None else argv), at_end)


def _tune(args: argparse.Namespace, at_end: contextlib.ExitStack) -> int:
    out = console()
    device = arguments.device(args.device)
    if device.type != "cuda" and (args.quick or args.compile):
        raise LoraValueError(message("--quick and --compile are for GPUs", device.type, "cuda", "name --size and --tokens instead"))
    if device.type != "cuda" and len(set(args.rank or ())) > 1:
        got = ", ".join(map(str, args.rank))
        raise LoraValueError(message("--rank: a CPU's forms hardly depend on the rank", got, "one rank on a CPU", "name one --rank"))
    tuned = target(device, args.quick)
    why = tuned.missing()
    if why:
        print(f"lora-kernels tune: nothing to tune on {device.type}: {why}", file=sys.stderr)
        return 2
    name = provenance.device_name(device)
    path = (store.SHIPPED if args.ship else store.user_folder()) / tuned.file_name()
    if not args.compile:
        check_writable(path.parent, "the table's folder", "name another one in LORA_KERNELS_CACHE")
        # two would write their entries over each other's
        at_end.enter_context(hold(path.parent, "wait for it, or name another folder in LORA_KERNELS_CACHE"))
    table = TableFile(path, tuned, args.again)
    sizes = args.size or sizes_of(args.model or list(DEFAULT_MODELS))
    jobs = tuned.jobs(sizes, tuple(args.tokens or tuned.tokens), tuple(args.rank or shapes.RANKS))
    todo = [job for job in jobs if not table.has(job)]
    if args.compile:
        _compile(device, args.quick, jobs, args.compile)
        return 0
    end = time.monotonic() + args.seconds
    out.print(f"{name}: {len(jobs)} problems, {len(jobs) - len(todo)} of them already in {path}")
    where = provenance.collect(device)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out, disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task("measuring", total=len(todo))
        for job in todo:
            if time.monotonic() > end:
                out.print(f"out of time: {path} lacks some of it; the same command goes on from here")
                return 0
            progress.update(task, description=" ".join(f"{key} {value}" for key, value in job.items()))
            outcome = tuned.measure(job)
            table.add({**job, **outcome}, where)
            progress.advance(task)
            if not sys.stdout.isatty():
                out.print(" ".join(f"{key} {value}" for key, value in job.items()), "->", outcome.get("chosen", ""))
    out.print(f"wrote {path}" if todo else f"nothing new: {path} has all of it (--again measures anew)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
