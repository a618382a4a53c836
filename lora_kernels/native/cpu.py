"""The CPU engine's implementations of the ops."""

from __future__ import annotations


def unusable() -> str | None:
    """Why the native CPU kernels cannot run here, or None."""
    return "the native module is not built"


OPS: dict = {}
