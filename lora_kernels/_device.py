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
def cpu_name() -> str:
    """The processor's name as the kernel tells it, e.g. "AMD EPYC 9654 96-Core Processor"."""
    try:
        with open("/proc/cpuinfo") as info:
            names = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
