"""What `make gpu` runs: build, GPU tests, sanitizers, plans and benchmarks (gpu_steps.py), in one go under nine minutes.

No virtual environment and no network: the interpreter at hand (torch 2.11 or newer with CUDA, triton 3.6), wheels it lacks from WHEELS=folder.
A step that fails does not stop the next. Each has its own limit, and the limits together fit the whole; what a step leaves over goes to the next.
After every step all that is there goes into one archive (gpu_pack.py): whatever cuts the run off, the finished part is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import gpu_pack
from gpu_steps import ROOT, Step, steps

MARGIN = 12  # seconds for a step to import torch, and to finish the case it is in; one that is ended all the same keeps its earlier cases
RESERVE = 8  # seconds for the last archive


def card() -> tuple[str, str]:
    """Name and compute capability of the first GPU, as the driver tells them."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader", "--id=0"]
    try:
        name, _, capability = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.strip().rpartition(", ")
    except (OSError, subprocess.SubprocessError):
        return "no GPU", ""
    return name, capability


def groups(found: list[Step]) -> list[list[Step]]:
    """Steps that run at the same time."""
    made: list[list[Step]] = []
    for step in found:
        if step.beside and made:
            made[-1].append(step)
        else:
            made.append([step])
    return made


def limit(group: list[Step]) -> int:
    return max(step.limit for step in group)


def run(group: list[Step], out: Path, seconds: float, env: dict[str, str]) -> list[dict]:
    """Run steps at the same time, each into its own log; they and what they started are ended at the limit."""
    start, children = time.monotonic(), []
    for step in group:
        has = max(1, seconds - MARGIN)
        command = [word.replace("{seconds}", f"{has:.0f}").replace("{minutes}", f"{has / 60:.2f}") for word in step.command]
        with open(out / f"{step.name}.log", "w") as log:
            options = {"cwd": ROOT, "env": env | step.env, "stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
            # A shell's background job ignores SIGINT, and so would its children.
            children.append(subprocess.Popen(command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options))
    ended = [0.0] * len(group)
    while True:
        now = time.monotonic() - start
        for i, child in enumerate(children):
            if not ended[i] and child.poll() is not None:
                ended[i] = now
        if all(ended) or now >= seconds:
            break
        time.sleep(0.05)
    late = [child for child in children if child.poll() is None]
    for child in late:
        os.killpg(child.pid, signal.SIGINT)  # pytest then still reports the failures it has seen
    patience = time.monotonic() + 5
    for child in late:
        try:
            child.wait(max(0.1, patience - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    entries = []
    for step, child, end in zip(group, children, ended, strict=True):
        code = 124 if child in late else child.returncode
        outcome = "ok" if code == 0 else "nothing to run" if code == 5 and step.none_is_fine else "out of time" if code == 124 else f"failed ({code})"
        entries.append({"step": step.name, "outcome": outcome, "seconds": round(end or time.monotonic() - start, 1), "command": step.command})
    return entries


def not_started(group: list[Step], out: Path) -> list[dict]:
    for step in group:
        (out / f"{step.name}.log").write_text("no time left\n")
    return [{"step": step.name, "outcome": "not started", "seconds": 0.0, "command": step.command} for step in group]


def summary_line(entry: dict, out: Path) -> str:
    lines = [line for line in (out / f"{entry['step']}.log").read_text(errors="replace").splitlines() if line.strip()]
    return f"{entry['step']:13} {entry['outcome']:14} {entry['seconds']:6.1f} s  {lines[-1][:110] if lines else ''}"


def environment(work: Path, capability: str) -> dict[str, str]:
    paths = [str(work / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    env["LORA_KERNELS_CACHE"] = str(work / "plans")  # the measured plans: the benchmarks after them use them
    env["LORA_KERNELS_FAILURES"] = str(work / "failures.log")  # of tests, as they happen: whoever is ended in the midst of work says no more
    env["LORA_KERNELS_TEST_SECONDS"] = "90"  # for one test of several processes; all of them have 140
    if capability not in ("", "9.0"):
        env["LORA_KERNELS_CUDA"] = "0"  # the CUDA kernels are for sm_90a
    return env


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "out"), help="where the archive goes, and nothing else")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "gpu", help="logs, results/, plans/")
    parser.add_argument("--wheels", type=Path, default=os.environ.get("WHEELS"), help="folder of wheels to use beside the interpreter's packages")
    parser.add_argument("--minutes", type=float, default=8.8, help="for everything together")
    parser.add_argument("--only", action="append", metavar="STEP", help="only this step; may be repeated")
    parser.add_argument("--list", action="store_true", help="say what would run and for how long at most, and run nothing")
    args = parser.parse_args()
    found = steps(sys.executable, args.work, args.work / "results", args.wheels and Path(args.wheels))
    todo = groups([step for step in found if step.name in (args.only or [step.name])])
    if args.list:
        for group in todo:
            print("\n".join(f"{'beside' if step.beside else '':6} {step.name:13} {step.limit:4} s  {' '.join(step.command)}" for step in group))
        print(f"together at most {sum(map(limit, todo)) + RESERVE} s of {60 * args.minutes:.0f} s")
        return 0
    shutil.rmtree(args.work / "results", ignore_errors=True)
    for log in args.work.glob("*.log"):  # an earlier run's
        log.unlink()
    (args.work / "results").mkdir(parents=True)
    gpu, capability = card()
    env, done = environment(args.work, capability), []
    archive = args.out / f"gpu-run-{gpu_pack.folder_name(gpu)}.tar.gz"
    end = time.monotonic() + 60 * args.minutes - RESERVE
    for i, group in enumerate(todo):
        left = end - time.monotonic()
        granted = max(min(limit(group), left), left - sum(map(limit, todo[i + 1 :])))
        entries = run(group, args.work, granted, env) if left >= 5 else not_started(group, args.work)
        done += entries
        (args.work / "summary.json").write_text(json.dumps({"gpu": gpu, "minutes": args.minutes, "steps": done}, indent=1) + "\n")
        size = gpu_pack.pack(args.work, archive, gpu)
        print("\n".join(summary_line(entry, args.work) for entry in entries), flush=True)
    print(f"{archive}: {size / 1e6:.1f} MB; in a checkout: tar xzf {archive.name}")
    return 0 if all(entry["outcome"] in ("ok", "nothing to run") for entry in done) else 1


if __name__ == "__main__":
    sys.exit(main())
