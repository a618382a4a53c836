"""Which implementation runs a call: backends by name, a ladder per device, one logged reason for every step down it.

A provider is a module with `unusable() -> str | None` (why this machine cannot run it) and
`OPS: dict[op name, (run, refuses)]`, where `refuses(*args)` says why it will not take this call, or None. A run may carry
`run.prepare(*args)`: a function for every call of the same signature (`native.signature`) that need not look at it again, or None; and
`run.prepare_nd(lead, *args)`: the same for calls whose x (and dy), [M, K] or contiguous, have the leading dimensions `lead`, as y (and dx)
then has, or None; of a forward with `trained=False` nobody wants h. Of the many-adapter ops: `_serving_path`.
Providers are imported when first needed, so importing the package imports neither triton nor the native module.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType

from .. import _device
from .._errors import BackendError, message, warn_once
from ..tuning import store

PROVIDERS = {
    "cuda": "lora_kernels.native.cuda",
    "triton": "lora_kernels.kernels",
    "cpu": "lora_kernels.native.cpu",
    "reference": "lora_kernels.reference",
}
LADDERS = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}
_SERVES = {"cuda": ("cuda",), "triton": ("cuda",), "cpu": ("cpu",)}


@functools.cache
def provider(backend: str) -> ModuleType | str:
    """The backend's module, or the reason why this machine cannot use it."""
    module = importlib.import_module(PROVIDERS[backend])
    return module.unusable() or module


def order(op: str, device_type: str, args: tuple) -> tuple[str, ...]:
    """Backends to try for an "auto" call, best first: on a GPU as the op's plan says ("never slower"), else the ladder."""
    ladder = LADDERS.get(device_type, ("reference",))
    return store.order(op, args, ladder) if device_type == "cuda" and op in store.PLANNED else ladder


def why_not(op: str, backend: str, device_type: str, args: tuple) -> str | None:
    """The reason why `backend` cannot run this call, or None when it can."""
    served = _SERVES.get(backend)
    if served is not None and device_type not in served:
        return f"it serves {' and '.join(served)} tensors, these are on {device_type}"
    found = provider(backend)
    if isinstance(found, str):
        return found
    if op not in found.OPS:
        return f"it has no {op}"
    return found.OPS[op][1](*args)


def select(op: str, backend: str, strict: bool, device_type: str, args: tuple) -> Callable:
    """The function to call with `args`. Steps down the ladder, logging each reason once, or raises when strict."""
    return decide(op, backend, strict, device_type, args)[0]


def decide(op: str, backend: str, strict: bool, device_type: str, args: tuple) -> tuple[Callable, bool]:
    """`select`, and whether nothing was logged on the way, so that the answer may be remembered for calls of the same signature."""
    quiet, lacking = True, []
    if backend == "auto":
        backend = _device.env_backend()
    ladder = LADDERS.get(device_type, ("reference",))
    wanted = order(op, device_type, args) if backend == "auto" else (backend, *(b for b in ladder if b != backend))
    for name in wanted:
        reason = why_not(op, name, device_type, args)
        if reason is None:
            if name == "reference" and lacking:
                warn_once(f"no kernels on this {device_type}, plain PyTorch runs instead: {'; '.join(lacking)}; `lora-kernels env` says more")
            return provider(name).OPS[op][0], quiet
        # In auto mode a backend that this machine lacks altogether, or that has no such op, is no surprise, unless that holds for all.
        found = provider(name)
        expected = backend == "auto" and (isinstance(found, str) or op not in found.OPS)
        if (strict or _device.env_strict()) and not expected:
            fix = "drop strict / LORA_KERNELS_STRICT to fall back, or run `lora-kernels env`"
            raise BackendError(message(f"{op}: backend {name} cannot run this call", reason, fix=fix))
        if expected:
            lacking.append(f"{name}: {reason}")
        else:
            quiet = False
            warn_once(f"{op}: {name} is not used here: {reason}; falling back")
    raise AssertionError("unreachable: reference takes every call")
