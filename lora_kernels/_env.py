"""What this machine offers, which backend each op gets, and for what is missing: why, and how to get it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

import torch

from . import _device, reference
from ._errors import LoraKernelsError
from .ops import _registry
from .tuning import store

EXTRAS = {  # optional packages: what they are for
    "triton": "Triton kernels on the GPU",
    "peft": "lora_kernels.patch",
    "transformers": "examples/finetune.py",
    "gguf": "reading GGUF models in examples/finetune.py",
    "matplotlib": "plots",
}
PREFIX = "LORA_KERNELS_"
AT_RUN_TIME = tuple(PREFIX + name for name in ("BACKEND", "STRICT", "CPU_ISA", "BATCH_INVARIANT", "CHECK_IDS", "CACHE"))
ELSEWHERE = ("CUDA", "ARCHS", "COMMIT", "EMULATE", "ORACLES", "BENCH_UNSLOTH", "FAILURES", "TEST_SECONDS")  # builds, tests, benchmarks
KNOWN = (*AT_RUN_TIME, *(PREFIX + name for name in ELSEWHERE), "TRITON_INTERPRET")
NVCC = "12.5"  # the oldest: OLDEST of csrc/cuda/native_build_cuda.py, which no wheel holds
NATIVE_FIX = "reinstall from source where a C++ compiler is found: pip install --force-reinstall --no-deps ."


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpus() -> list[dict]:
    if not torch.cuda.is_available():
        return []
    found = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        found.append(
            {
                "index": i,
                "name": properties.name,
                "arch": "sm_{}{}".format(*_device.cuda_capability(i)),
                "sm_count": _device.sm_count(i),
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "l2_mib": round(properties.L2_cache_size / 2**20, 1),
            }
        )
    return found


def gpu_missing() -> tuple[str, str]:
    """Why there is no GPU, and how to get one."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA", "install a CUDA build of torch (pytorch.org, Get Started)"
    return "torch finds no usable NVIDIA GPU", "check nvidia-smi and CUDA_VISIBLE_DEVICES"


def _fix(backend: str) -> str:
    if backend == "triton" and not _device.has_module("triton"):
        return "pip install triton"
    if backend in ("triton", "cuda") and not torch.cuda.is_available():
        return gpu_missing()[1]
    if backend == "cuda":
        return f"build on a machine with nvcc {NVCC} or newer: pip install --force-reinstall --no-deps ."
    return NATIVE_FIX


def _machine_lacks(backend: str) -> str | None:
    """A reason outside the provider: a GPU backend without a GPU."""
    if backend in ("cuda", "triton") and not torch.cuda.is_available():
        return gpu_missing()[0]
    return None


def backends() -> dict[str, dict]:
    """Per backend: usable, and if not, why and fix; `about` is what the backend itself tells (the CPU engine's instruction set)."""
    found: dict[str, dict] = {}
    for name in _registry.PROVIDERS:
        try:
            module = _registry.provider(name)
        except LoraKernelsError as error:  # an environment variable that cannot be used
            module = str(error)
        why = module if isinstance(module, str) else _machine_lacks(name)
        entry: dict = {"usable": why is None}
        if why is not None:
            why, _, fix = why.partition("; fix: ")  # what a message says itself is nearer to the reason
            entry |= {"why": why, "fix": fix or _fix(name)}
        elif hasattr(module, "isa"):
            entry["about"] = f"{module.isa()}, of {', '.join(module.isas())}"
        found[name] = entry
    return found


def ops() -> dict[str, dict[str, str]]:
    """Per op and device the backend that a call tries first; a measured plan may still choose another one for a shape."""
    usable = {name for name, entry in backends().items() if entry["usable"]}
    try:
        wanted = _device.env_backend()
    except LoraKernelsError:
        wanted = "auto"
    chosen: dict[str, dict[str, str]] = {}
    for op in reference.OPS:
        chosen[op] = {}
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            ladder = _registry.LADDERS[device]
            first = (wanted,) if wanted in ladder else ()
            chosen[op][device] = next(b for b in first + ladder if b in usable and op in _registry.provider(b).OPS)
    return chosen


def variables() -> dict[str, str]:
    """The environment variables that are set."""
    unknown = sorted(name for name in os.environ if name.startswith(PREFIX) and name not in KNOWN)
    return {name: os.environ[name] for name in (*KNOWN, *unknown) if name in os.environ}


def _remark(name: str) -> str:
    """Why this variable or its value is of no use, or nothing."""
    if name not in KNOWN:
        return f"nothing reads it; allowed: {', '.join(AT_RUN_TIME)}"
    try:
        if name == "LORA_KERNELS_CACHE" and store.user_folder().is_file():
            return "it is a file; allowed: a folder"
        if name == "LORA_KERNELS_BACKEND":
            _device.env_backend()
        elif name == "LORA_KERNELS_CPU_ISA":
            _registry.provider("cpu")
    except (LoraKernelsError, OSError) as error:  # OSError: a folder that may not be looked at, a name too long
        return str(error)
    return ""


def collect() -> dict:
    """Everything `lora-kernels env` shows, as plain data."""
    import lora_kernels

    why, fix = (None, None) if torch.cuda.is_available() else gpu_missing()
    return {
        "lora_kernels": lora_kernels.__version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu": {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch_isa": torch.backends.cpu.get_cpu_capability()},
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda},
        "gpus": gpus(),
        "gpu_missing": None if why is None else {"why": why, "fix": fix},
        "packages": {name: version(name) for name in EXTRAS},
        "backends": backends(),
        "ops": ops(),
        "variables": (found := variables()),
        "remarks": {name: remark for name in found if (remark := _remark(name))},
    }
