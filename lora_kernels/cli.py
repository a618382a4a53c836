"""`lora-kernels env | check | bench | tune`."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import os
import sys
import time

from rich.console import Console
from rich.table import Table

from ._errors import LoraKernelsError, message

# verb -> module whose `main(argv) -> int` does it, and where that module comes from
ELSEWHERE = {
    "bench": ("lora_kernels.bench.run", "this build has no benchmarks"),
    "tune": ("lora_kernels.bench.tune", "this build has no tuner"),
}


def _console() -> Console:
    """Colours and box lines on a terminal; plain text, wide enough not to fold, into a pipe or file."""
    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=160, no_color=True, safe_box=True)


def _table(title: str, *columns: str) -> Table:
    from rich import box

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD if sys.stdout.isatty() else box.ASCII2, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


# -------------------------------------------------------------------------------------------------------------------- env


def env(args: argparse.Namespace) -> int:
    from . import _env

    facts = _env.collect()
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    console = _console()
    table = _table("This machine", "what", "found", "how to get what is missing or wrong")
    cpu, torch_ = facts["cpu"], facts["torch"]
    table.add_row("lora_kernels", f"{facts['lora_kernels']}, Python {facts['python']}, {facts['platform']}")
    table.add_row("torch", f"{torch_['version']}, CUDA {torch_['cuda'] or 'none'}")
    table.add_row("CPU", f"{cpu['machine']}, {cpu['torch_isa']} (as torch sees it), {cpu['threads']} threads")
    for gpu in facts["gpus"]:
        about = f"{gpu['name']}, {gpu['arch']}, {gpu['sm_count']} SMs, {gpu['memory_gib']} GiB, L2 {gpu['l2_mib']} MiB"
        table.add_row(f"GPU {gpu['index']}", about)
    if facts["gpu_missing"]:
        table.add_row("GPU", f"none: {facts['gpu_missing']['why']}", facts["gpu_missing"]["fix"])
    for name, version in facts["packages"].items():
        table.add_row(name, version or "missing", "" if version else f"pip install {name} (for {_env.EXTRAS[name]})")
    for name, value in facts["variables"].items():
        table.add_row(name, value, facts["remarks"].get(name, ""))
    console.print(table)

    table = _table("Backends", "backend", "usable", "about, or why not", "how to get it")
    for name, entry in facts["backends"].items():
        table.add_row(name, "yes" if entry["usable"] else "no", str(entry.get("about", entry.get("why", ""))), entry.get("fix", ""))
    console.print(table)

    devices = sorted({device for chosen in facts["ops"].values() for device in chosen})
    table = _table("Backend of each op", "op", *devices)
    for op, chosen in facts["ops"].items():
        table.add_row(op, *(chosen.get(device, "") for device in devices))
    console.print(table)
    return 0


# ------------------------------------------------------------------------------------------------------------------ check


def check(args: argparse.Namespace) -> int:
    from . import _selfcheck, testing

    wanted = [t for t in _selfcheck.targets() if args.backend in (None, t[1]) and args.device in (None, t[2])]
    if not wanted:
        asked = f"backend {args.backend or 'any'}, device {args.device or 'any'}"
        print(message("check: nothing to check", asked, "what `lora-kernels env` shows as usable"), file=sys.stderr)
        return 2
    start = time.perf_counter()
    results = []
    table = _table(
        f"Against float64: error over eager PyTorch's in the same dtype, {testing.ALLOWED_RATIO:g} allowed",
        *("op", "backend", "device", "dtypes", "cases", "refused", "worst relative RMSE", "worst ratio", "result"),
    )
    for op, backend, device in wanted:
        found, _ = _selfcheck.check(op, backend, device)
        results += found
        groups: dict[str, list] = {}
        for r in found:
            groups.setdefault(r.case.split(" | ")[0], []).append(r)
        for dtypes, group in groups.items():
            ran = [r for r in group if r.refused is None]
            error, ratio = max((r.relative_rmse for r in ran), default=math.nan), max((r.ratio for r in ran), default=math.nan)
            cases = {r.case for r in group}
            refused = {r.case for r in group if r.refused is not None}
            verdict = "not run" if not ran else "ok" if all(r.ok for r in ran) else "FAILED"
            table.add_row(op, backend, device, dtypes, str(len(cases)), str(len(refused)), f"{error:.1e}", f"{ratio:.2f}", verdict)
    failed = [r for r in results if not r.ok]
    seconds = time.perf_counter() - start
    if args.json:
        rows = [{**vars(r), "ok": r.ok, **{k: None for k in ("relative_rmse", "ratio") if not math.isfinite(vars(r)[k])}} for r in results]
        print(json.dumps({"ok": not failed, "seconds": seconds, "unchecked": _selfcheck.unchecked(), "results": rows}, indent=2))
        return 1 if failed else 0
    console = _console()
    console.print(table)
    for reason in sorted({f"{r.backend}: {r.refused}" for r in results if r.refused is not None}):
        console.print(f"refused by {reason}")
    for r in failed:
        console.print(f"FAILED {r.op} on {r.backend}/{r.device}: {r.tensor} of {r.case}: relative RMSE {r.relative_rmse:.2e}, ratio {r.ratio:.2f}")
    for op in _selfcheck.unchecked():
        console.print(f"no check covers {op}")
    console.print(f"{len(results)} tensors in {seconds:.1f} s: " + (f"{len(failed)} FAILED" if failed else "all within the limit"))
    return 1 if failed else 0


# ------------------------------------------------------------------------------------------------------------ bench, tune


def elsewhere(verb: str, argv: list[str]) -> int:
    """Hand the rest of the line to the module that does it."""
    module, without = ELSEWHERE[verb]
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        print(message(f"{verb}: {module} is not here", fix=without), file=sys.stderr)
        return 2
    return importlib.import_module(module).main(argv) or 0


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 fine, 1 a check failed, 2 cannot be done as asked, 130 interrupted, 141 nobody reads the output."""
    parser = argparse.ArgumentParser(prog="lora-kernels", description="LoRA kernels: what runs here, whether it is right, how fast it is.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="env | check | bench | tune")
    one = verbs.add_parser("env", help="what is usable here, the backend of each op, and how to get what is missing")
    one.add_argument("--json", action="store_true", help="plain data, for bug reports and scripts")
    one = verbs.add_parser("check", help="numerics of every usable backend on this machine against float64")
    one.add_argument("--json", action="store_true", help="every tensor's error, as data")
    one.add_argument("--backend", choices=("cuda", "triton", "cpu", "reference"), help="only this backend")
    one.add_argument("--device", choices=("cpu", "cuda"), help="only this device")
    verbs.add_parser("bench", help="speed and memory against PyTorch and PEFT", add_help=False)
    verbs.add_parser("tune", help="measure and store the best plans for this GPU", add_help=False)
    args, rest = parser.parse_known_args(argv)
    if rest and args.verb not in ELSEWHERE:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        code = elsewhere(args.verb, rest) if args.verb in ELSEWHERE else {"env": env, "check": check}[args.verb](args)
        sys.stdout.flush()
        return code
    except LoraKernelsError as error:
        print(f"lora-kernels {args.verb}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `lora-kernels ... | head`: who read it has gone, and so would Python's own flush at the end find out
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # the disk is full or gone
        print(f"lora-kernels {args.verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
