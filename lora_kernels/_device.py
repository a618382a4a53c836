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
        with open("/proc/cpuinfo", errors="replace") as info:
            first = info.read().partition("\n\n")[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, colon, value in (line.partition(":") for line in first.splitlines()) if colon}


def cpu_core() -> str:
    """The generation of an AMD core, "Zen" to "Zen 5", which the name that a virtual machine shows leaves out; "" for others.

    By family and model, as Linux's arch/x86/kernel/cpu/amd.c has them. "Zen 5 mobile": those that multiply 256 bits at a time.
    """
    info = _cpuinfo()
    try:
        family, model = int(info["cpu family"], 0), int(info["model"], 0)
    except (KeyError, ValueError):
        return ""
    if info.get("vendor_id") != "AuthenticAMD":
        return ""
    if family == 23:
        return "Zen 2" if model >= 0x30 else "Zen"
    if family == 25:
        return "Zen 4" if model >= 0x60 or 0x10 <= model < 0x20 else "Zen 3"
    if family == 26 and (model < 0x30 or 0x40 <= model < 0x50 or 0x60 <= model < 0x80):
        return "Zen 5 mobile" if model & 0xF0 in (0x20, 0x60) else "Zen 5"
    return ""


def cpu_name() -> str:
    """The processor's name as the kernel tells it, with the generation of its cores where the name is short: "AMD EPYC Zen 5"."""
    name, core = _cpuinfo().get("model name", ""), cpu_core()
    if not name:
        return platform.processor() or platform.machine()
    return f"{name} {core}" if core and not any(c.isdigit() for c in name) else name
