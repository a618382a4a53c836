"""The steps of `make gpu`, in order: what is worth most comes first. Correctness, the targets of the kernels, plans, layers, many adapters, hosts.

Limits are seconds. "{seconds}" or "{minutes}" in a command is replaced by the time that the step has, less a margin to start and to finish in.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SANITIZED = "sanitize"  # tests with this word in their name run under compute-sanitizer
CUDA_TESTS = "tests/gpu/test_cuda_kernels.py"
# Goes on with a build that was cut off, first: finished objects are kept.
HAS_KERNELS = """import runpy
runpy.run_path("csrc/native_build.py", run_name="__main__")
from lora_kernels import _C
print(len(_C.cuda_kernels()), "CUDA kernels")"""


@dataclass(frozen=True)
class Step:
    name: str
    command: list[str]
    limit: int
    none_is_fine: bool = False  # pytest's "no test selected" (5) counts as skipped
    beside: bool = False  # runs at the same time as the step before it; never beside a step that takes times
    env: dict[str, str] = field(default_factory=dict)


def gpu_tests() -> list[str]:
    """The files that hold tests for a GPU, but for the CUDA kernels' own: collecting the others takes longer than running these."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    found = [str(path.relative_to(ROOT)) for path in files if "mark.gpu" in path.read_text()]
    return [name for name in found if name != CUDA_TESTS]


def kernel_names() -> list[str]:
    """Our kernels, Triton and CUDA: a sanitizer checks these and lets PyTorch's run at full speed."""
    sources = [*(ROOT / "lora_kernels" / "kernels").glob("*.py"), *(ROOT / "csrc" / "cuda").glob("*.cuh")]
    return sorted({name for path in sources for name in re.findall(r"(?:def |\) )(\w+_kernel)\(", path.read_text())})


def sanitizer_steps(python: str, tests: list[str]) -> list[Step]:
    places = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer", "/usr/local/cuda/compute-sanitizer/compute-sanitizer")
    tool = next(filter(None, map(shutil.which, places)), None)
    if tool is None:  # a gap in the results, to be seen in them
        return [Step("sanitizers", [python, "-c", f"raise SystemExit('none of {', '.join(places)} is here')"], 140, beside=True)]
    only = [word for name in kernel_names() for word in ("--kernel-name", f"kns={name}")]
    # By default a tool gives up on a process whose first CUDA call comes after 10 s, and 16 processes import torch at once here.
    options = ["--target-processes", "application-only", "--launch-timeout", "120", "--error-exitcode", "86", "--num-cuda-barriers", "64", *only]
    tools = {
        "memcheck": ["--report-api-errors", "no", "--padding", "4096"],  # calls that PyTorch tries and does without are no errors
        "racecheck": ["--racecheck-num-workers", "2"],  # by default as many threads as there are cores
        "synccheck": [],
    }
    # Inside PyTorch's blocks of 2 MiB and more a tensor's end is no border that memcheck knows.
    envs = {"memcheck": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}}
    return [
        Step(name, [tool, "--tool", name, "--port", port, *own, *options, *tests, "-k", SANITIZED, "tests/gpu"], 140, True, True, envs.get(name, {}))
        for port, (name, own) in zip(("49152", "49252", "49352"), tools.items(), strict=True)
    ]


def steps(python: str, out: Path, results: Path, wheels: Path | None) -> list[Step]:
    """16 processes of tests and sanitizers fill 16 cores: most of the tests' time goes to Triton's compiler."""
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "--durations=12", "--continue-on-collection-errors", "-m", "gpu"]
    ours = [python, "-m", "lora_kernels"]
    tune = [*ours, "tune", "--device", "cuda", "--quick"]
    bench = [*ours, "bench", "--device", "cuda", "--out", str(results), "--minutes", "{minutes}"]
    batched = [python, "benchmarks/bench_batched.py", "--device", "cuda", "--seconds", "{seconds}", "--json"]
    host = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/bench_host_overhead.py", "--benchmark-columns=min,median"]
    host += ["-k", "not cpu and not piece"]  # half of all; pytest-benchmark keeps nothing of a run that is cut off
    found = []
    if wheels is not None:
        names = sorted(str(wheel) for wheel in wheels.glob("*.whl"))
        options = ["--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(out / "site")]
        found.append(Step("wheels", [python, "-m", "pip", "install", "-q", *options, *names], 8))
    return [
        *found,
        Step("build", [python, "csrc/native_build.py"], 66),
        Step("plans-compile", ["nice", "-n", "5", *tune, "--compile", "8"], 66, beside=True),
        Step("native", [python, "-c", HAS_KERNELS], 15),  # a build without CUDA is no failure, and its tests would skip
        Step("env", [*ours, "env"], 15, beside=True),
        Step("cuda-tests", [*tests, "-n", "4", CUDA_TESTS], 140, none_is_fine=True),
        Step("tests", [*tests, "-n", "9", *gpu_tests()], 140, none_is_fine=True, beside=True),
        *sanitizer_steps(python, tests),
        Step("cuda-forms", [python, "benchmarks/cuda_forms.py", "--seconds", "{seconds}"], 35),
        Step("plans", [*tune, "--seconds", "{seconds}"], 56),
        Step("layers", [*bench, "--suite", "linear"], 82),
        Step("batched", [*batched, str(results / "batched_grid.json")], 54),
        Step("passes", [python, "benchmarks/rank_passes.py"], 14),
        Step("host", [*host, f"--benchmark-json={results / 'host.json'}"], 16),
        Step("training", [*bench, "--suite", "steps", "--suite", "batched"], 34),
    ]
