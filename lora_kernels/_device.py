"""Facts about this machine and the environment variables that steer the package. Nothing here starts CUDA on import."""

from __future__ import annotations

import functools
import importlib.util
import os
import platform

import torch

from ._errors import LoraValueError, message

BACKENDS = ("auto", "cuda", "triton", "cpu", "reference")


def env_flag(name: str) -> bool:
    """True when the environment variable is set to something other than 0, false, no or nothing."""
    return os.environ.get(name, "").strip().lower() not in ("", "0", "false", "no", "off")


def env_backend() -> str:
    """`LORA_KERNELS_BACKEND`, checked; "auto" when it is unset."""
    name = os.environ.get("LORA_KERNELS_BACKEND", "").strip().lower() or "auto"
    if name not in BACKENDS:
        raise LoraValueError(message("LORA_KERNELS_BACKEND names no backend", repr(name), ", ".join(BACKENDS), "unset it or name one of these"))
    return name


def env_strict() -> bool:
    """`LORA_KERNELS_STRICT`: a fallback raises instead of being logged."""
    return env_flag("LORA_KERNELS_STRICT")


_NAMES = ("LORA_KERNELS_BACKEND", "LORA_KERNELS_STRICT", "LORA_KERNELS_BATCH_INVARIANT")
_BACKEND, _STRICT, _BATCH_INVARIANT = map(os.environ.encodekey, _NAMES)


def env_source() -> tuple[dict, tuple]:
    """os.environ's own dict, and the keys in it of the variables that decide how a call runs."""
    return os.environ._data, (_BACKEND, _STRICT, _BATCH_INVARIANT)


def env_state() -> tuple:
    """The variables that decide how a call runs, for a cache key: from os.environ's own dict, as its checked look-up is slow for unset names."""
    values = os.environ._data
    return values.get(_BACKEND), values.get(_STRICT), values.get(_BATCH_INVARIANT)


@functools.cache
def has_module(name: str) -> bool:
    """Whether `import name` would find a module; imports nothing."""
    return importlib.util.find_spec(name) is not None


@functools.cache
def cuda_capability(index: int) -> tuple[int, int]:
    """Compute capability of one CUDA device, e.g. (9, 0)."""
    return torch.cuda.get_device_capability(index)


@functools.cache
def sm_count(index: int) -> int:
    """Number of streaming multiprocessors of one CUDA device."""
    return torch.cuda.get_device_properties(index).multi_processor_count


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """What the kernel tells of the first processor; empty where it tells nothing."""
    try:
        with open("/proc/cpuinfo") as info:
            first = info.read().partition("\n\n")[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, colon, value in (line.partition(":") for line in first.splitlines()) if colon}


def cpu_core() -> str:
    """The generation of an AMD core, "Zen" to "Zen 5", which the name that a virtual machine shows leaves out; "" for others."""
    info = _cpuinfo()
    if info.get("vendor_id") != "AuthenticAMD":
        return ""
    family, model = int(info.get("cpu family", 0)), int(info.get("model", 0))
    zen_3_or_4 = "Zen 4" if "avx512f" in info.get("flags", "").split() else "Zen 3"
    return {23: "Zen 2" if model >= 0x30 else "Zen", 25: zen_3_or_4, 26: "Zen 5"}.get(family, "")


def cpu_name() -> str:
    """The processor's name as the kernel tells it, with the generation of its cores where the name is short: "AMD EPYC Zen 5"."""
    name, core = _cpuinfo().get("model name", ""), cpu_core()
    if not name:
        return platform.processor() or platform.machine()
    return f"{name} {core}" if core and not any(c.isdigit() for c in name) else name
