"""Triton kernels and their launchers, one family per file."""

from __future__ import annotations

from .. import _device


def unusable() -> str | None:
    """Why the Triton kernels cannot run here, or None."""
    return None if _device.has_module("triton") else "triton is not installed (pip install triton)"


OPS: dict = {}
