"""What `make gpu` runs: build, GPU tests, sanitizer subset, benchmarks, in one go under nine minutes.

No virtual environment and no network: the interpreter at hand (torch 2.11 or newer with CUDA, triton 3.6), wheels it lacks from WHEELS=folder.
Every step has a limit of its own and of what is left; a step that fails or runs out of time does not stop the next. Logs and the
summary are written as it goes, and benchmark files after every case, so that whatever cuts the run off, the finished part is kept.
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
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SANITIZED = "sanitize"  # tests with this word in their name run under compute-sanitizer
CUDA_TESTS = "tests/gpu/test_cuda_kernels.py"
WORKERS = "8"  # test processes: most of their time goes to Triton's compiler; a device fault ends only the process that met it
HAS_KERNELS = "from lora_kernels import _C; print(len(_C.cuda_kernels()), 'CUDA kernels')"


@dataclass(frozen=True)
class Step:
    name: str
    command: list[str]
    limit: int  # seconds
    none_is_fine: bool = False  # pytest's "no test selected" (5) counts as skipped


def steps(python: str, out: Path, wheels: Path | None, bench_minutes: float) -> list[Step]:
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "--continue-on-collection-errors", "-m", "gpu"]
    found = []
    if wheels is not None:
        names = sorted(str(wheel) for wheel in wheels.glob("*.whl"))
        options = ["--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(out / "site")]
        found.append(Step("wheels", [python, "-m", "pip", "install", "-q", *options, *names], 60))
    found += [
        Step("build", [python, "setup.py", "-q", "build_ext", "--inplace"], 150),
        Step("native", [python, "-c", HAS_KERNELS], 20),  # setup.py ends well without a module, and its tests would skip
        Step("env", [python, "-m", "lora_kernels", "env"], 30),
        Step("tests", [*tests, "-n", WORKERS, "--ignore", CUDA_TESTS, "tests"], 150, none_is_fine=True),
        Step("cuda-tests", [*tests, "-n", WORKERS, CUDA_TESTS], 100, none_is_fine=True),
        Step("cuda-forms", [python, "benchmarks/cuda_forms.py", "--seconds", "40"], 60),
    ]
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer:
        for tool in ("memcheck", "racecheck"):
            watched = [sanitizer, "--tool", tool, "--target-processes", "all", "--error-exitcode", "86", *tests, "-k", SANITIZED, "tests/gpu"]
            found.append(Step(tool, watched, 60, none_is_fine=True))
    bench = [python, "-m", "lora_kernels", "bench", "--out", str(out / "results"), "--minutes", f"{bench_minutes:g}"]
    return [*found, Step("bench", bench, int(60 * bench_minutes) + 45)]


def run(step: Step, out: Path, limit: float, env: dict[str, str]) -> dict:
    """Run one step into its own log; it and what it started are ended at the limit."""
    start = time.monotonic()
    with open(out / f"{step.name}.log", "w") as log:
        child = subprocess.Popen(step.command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = child.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGINT)  # pytest then still reports the failures it has seen
            try:
                child.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
            code = 124
    outcome = "ok" if code == 0 else "nothing to run" if code == 5 and step.none_is_fine else "out of time" if code == 124 else f"failed ({code})"
    return {"step": step.name, "outcome": outcome, "seconds": round(time.monotonic() - start, 1), "command": step.command}


def summary_line(entry: dict, out: Path) -> str:
    lines = [line for line in (out / f"{entry['step']}.log").read_text(errors="replace").splitlines() if line.strip()]
    return f"{entry['step']:10} {entry['outcome']:16} {entry['seconds']:6.1f} s  {lines[-1][:110] if lines else ''}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "out" / "gpu"), help="logs, summary.json, results/")
    parser.add_argument("--wheels", type=Path, default=os.environ.get("WHEELS"), help="folder of wheels to use beside the interpreter's packages")
    parser.add_argument("--minutes", type=float, default=8.7, help="for everything together")
    parser.add_argument("--bench-minutes", type=float, default=3.5, help="no benchmark case starts after this")
    parser.add_argument("--only", action="append", metavar="STEP", help="only this step; may be repeated")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    paths = [str(args.out / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    end = time.monotonic() + 60 * args.minutes
    done: list[dict] = []
    for step in steps(sys.executable, args.out, args.wheels and Path(args.wheels), args.bench_minutes):
        left = end - time.monotonic()
        if args.only and step.name not in args.only:
            continue
        if left < 5:
            done.append({"step": step.name, "outcome": "not started", "seconds": 0.0, "command": step.command})
            (args.out / f"{step.name}.log").write_text("no time left\n")
        else:
            done.append(run(step, args.out, min(step.limit, left), env))
        print(summary_line(done[-1], args.out), flush=True)
        (args.out / "summary.json").write_text(json.dumps(done, indent=1) + "\n")
    return 0 if all(entry["outcome"] in ("ok", "nothing to run") for entry in done) else 1


if __name__ == "__main__":
    sys.exit(main())
