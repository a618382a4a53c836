"""Triton kernels and their launchers, one family per file."""

from __future__ import annotations

import importlib

from .. import _device

# Modules of this package with an OPS dict of their own; imported only when the kernels can run, as they import triton.
FAMILIES = ("lora_linear", "batched")


def unusable() -> str | None:
    """Why the Triton kernels cannot run here, or None."""
    return None if _device.has_module("triton") else "triton is not installed (pip install triton)"


def __getattr__(name: str) -> dict:
    if name != "OPS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    ops: dict = {}
    for family in FAMILIES:
        ops |= importlib.import_module(f".{family}", __name__).OPS
    globals()["OPS"] = ops
    return ops
