"""`lora-kernels env | check | bench | tune`."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import sys
import time

import torch

from ._console import console, table
from ._errors import LoraKernelsError, message
from ._version import __version__

# verb -> the module whose `main(argv) -> int` does it, with arguments of its own
ELSEWHERE = {"bench": "lora_kernels.bench.run", "tune": "lora_kernels.bench.tune"}


# -------------------------------------------------------------------------------------------------------------------- env


def env(args: argparse.Namespace) -> int:
    from . import _env

    facts = _env.collect()
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    out = console()
    machine = table("This machine", "what", "found", "how to get what is missing or wrong")
    cpu, torch_ = facts["cpu"], facts["torch"]
    machine.add_row("lora_kernels", f"{facts['lora_kernels']}, Python {facts['python']}, {facts['platform']}")
    machine.add_row("torch", f"{torch_['version']}, CUDA {torch_['cuda'] or 'none'}")
    machine.add_row("CPU", f"{cpu['machine']}, {cpu['torch_isa']} (as torch sees it), {cpu['threads']} threads")
    for gpu in facts["gpus"]:
        about = f"{gpu['name']}, {gpu['arch']}, {gpu['sm_count']} SMs, {gpu['memory_gib']} GiB, L2 {gpu['l2_mib']} MiB"
        machine.add_row(f"GPU {gpu['index']}", about)
    if facts["gpu_missing"]:
        machine.add_row("GPU", f"none: {facts['gpu_missing']['why']}", facts["gpu_missing"]["fix"])
    for name, version in facts["packages"].items():
        machine.add_row(name, version or "missing", "" if version else f"pip install {name} (for {_env.EXTRAS[name]})")
    for name, value in facts["variables"].items():
        machine.add_row(name, value, facts["remarks"].get(name, ""))
    out.print(machine)

    backends = table("Backends", "backend", "usable", "about, or why not", "how to get it")
    for name, entry in facts["backends"].items():
        backends.add_row(name, "yes" if entry["usable"] else "no", str(entry.get("about", entry.get("why", ""))), entry.get("fix", ""))
    out.print(backends)

    devices = sorted({device for chosen in facts["ops"].values() for device in chosen})
    ops = table("Backend of each op", "op", *devices)
    for op, chosen in facts["ops"].items():
        ops.add_row(op, *(chosen.get(device, "") for device in devices))
    out.print(ops)
    return 0


# ------------------------------------------------------------------------------------------------------------------ check


def check(args: argparse.Namespace) -> int:
    from . import _env, _selfcheck, testing

    wanted = [t for t in _selfcheck.targets() if args.backend in (None, t[1]) and args.device in (None, t[2])]
    if not wanted:
        asked = f"backend {args.backend or 'any'}, device {args.device or 'any'}"
        lacks = _env.backends().get("triton" if args.device == "cuda" else args.backend, {})
        what = f"check: nothing to check, {lacks['why']}" if "why" in lacks else "check: nothing to check"
        print(message(what, asked, "what `lora-kernels env` shows as usable", lacks.get("fix")), file=sys.stderr)
        return 2
    start = time.perf_counter()
    results = []
    shown = table(
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
            shown.add_row(op, backend, device, dtypes, str(len(cases)), str(len(refused)), f"{error:.1e}", f"{ratio:.2f}", verdict)
    failed = [r for r in results if not r.ok]
    seconds = time.perf_counter() - start
    if args.json:
        rows = [{**vars(r), "ok": r.ok, **{k: None for k in ("relative_rmse", "ratio") if not math.isfinite(vars(r)[k])}} for r in results]
        print(json.dumps({"ok": not failed, "seconds": seconds, "unchecked": _selfcheck.unchecked(), "results": rows}, indent=2))
        return 1 if failed else 0
    out = console()
    out.print(shown)
    for reason in sorted({f"{r.backend}: {r.refused}" for r in results if r.refused is not None}):
        out.print(f"refused by {reason}")
    for r in failed:
        out.print(f"FAILED {r.op} on {r.backend}/{r.device}: {r.tensor} of {r.case}: relative RMSE {r.relative_rmse:.2e}, ratio {r.ratio:.2f}")
    for op in _selfcheck.unchecked():
        out.print(f"no check covers {op}")
    out.print(f"{len(results)} tensors in {seconds:.1f} s: " + (f"{len(failed)} FAILED" if failed else "all within the limit"))
    return 1 if failed else 0


# ------------------------------------------------------------------------------------------------------------------ main


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 fine, 1 a check failed, 2 cannot be done as asked, 130 interrupted, 141 nobody reads the output."""
    parser = argparse.ArgumentParser(prog="lora-kernels", description="LoRA kernels: what runs here, whether it is right, how fast it is.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="env | check | bench | tune")
    one = verbs.add_parser("env", help="what is usable here, the backend of each op, and how to get what is missing")
    one.add_argument("--json", action="store_true", help="plain data, for bug reports and scripts")
    one = verbs.add_parser("check", help="numerics of every usable backend on this machine against float64")
    one.add_argument("--json", action="store_true", help="every tensor's error, as data")
    one.add_argument("--backend", choices=("cuda", "triton", "cpu", "reference"), help="only this backend")
    one.add_argument("--device", choices=("cpu", "cuda"), help="only this device")
    verbs.add_parser("bench", help="speed and memory against PyTorch and PEFT", add_help=False)
    verbs.add_parser("tune", help="measure and store the best plans for this device", add_help=False)
    if sys.stdout is None:  # closed by the caller, `>&-`: nobody reads, but files are still written
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    elif hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # an ASCII terminal shows "?" for "µ" and "→"
    args, rest = parser.parse_known_args(argv)
    if rest and args.verb not in ELSEWHERE:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if args.verb in ELSEWHERE:
            code = importlib.import_module(ELSEWHERE[args.verb]).main(rest)
        else:
            code = {"env": env, "check": check}[args.verb](args)
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
    except (MemoryError, RuntimeError) as error:  # a CPU's allocator has no exception of its own
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        got = (str(error) or "MemoryError").splitlines()[0]
        print(message(f"lora-kernels {args.verb}: out of memory", got, fix="fewer features, tokens or ranks"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
