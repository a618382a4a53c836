"""Where figures come from: commit, versions, device, clocks as read, date, threads."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from .. import _device, _env
from ..ops import _registry

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "peft", "transformers", "numpy")


def _read(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str | None:
    """The commit of the checkout, with "+changes" when tracked files other than results differ from it.

    Outside a checkout (installed, or copied to a GPU machine) what LORA_KERNELS_COMMIT says, or None.
    """
    if not (ROOT / ".git").exists():  # perhaps inside somebody else's repository
        return os.environ.get("LORA_KERNELS_COMMIT")
    head = _read("git", "rev-parse", "HEAD")
    changed = _read("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!README.md")
    return head and head + ("+changes" if changed else "")


def cpu_isa() -> str:
    """The instruction set that the CPU kernels use, e.g. "avx512_bf16"; without them PyTorch's."""
    engine = _registry.provider("cpu")
    return torch.backends.cpu.get_cpu_capability().lower() if isinstance(engine, str) else engine.isa()


def _cpu() -> dict:
    info = Path("/proc/cpuinfo")
    mhz = re.search(r"^cpu MHz\s*:\s*(.*)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return {"name": _device.cpu_name(), "cores": os.cpu_count(), "isa": cpu_isa(), "mhz": mhz and mhz[1]}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _device.cpu_name()


def folder_name(device: torch.device) -> str:
    """The results folder: "nvidia-h200"; a CPU's name does not tell its instruction set, so "amd-epyc-zen-5-avx512-bf16-2-threads"."""
    name = device_name(device) if device.type == "cuda" else f"{device_name(device)} {cpu_isa()} {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def clocks(device: torch.device) -> dict | None:
    """What the GPU reports at this moment, unchanged by us."""
    if device.type != "cuda":
        return None
    fields = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu", "driver_version")
    answer = _read("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", f"--id={device.index or 0}")
    return dict(zip(fields, answer.split(", "), strict=False)) if answer else None


def collect(device: torch.device) -> dict:
    """Plain data, written into every results file."""
    versions = {name: found for name in PACKAGES if (found := _env.version(name))}
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {**versions, "torch": torch.__version__, "cuda": torch.version.cuda},
        "device": {"type": device.type, "name": device_name(device)},
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "clocks_before": clocks(device),
    }
