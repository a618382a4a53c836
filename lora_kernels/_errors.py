"""Messages: every failure says what is wrong, what was got, what is allowed and how to fix it; every fallback is logged once."""

from __future__ import annotations

import functools
import logging

log = logging.getLogger("lora_kernels")


class LoraKernelsError(Exception):
    """Base of every error this package raises on purpose."""


class LoraValueError(LoraKernelsError, ValueError):
    """A value, shape, device or file content that cannot be used."""


class LoraTypeError(LoraKernelsError, TypeError):
    """A dtype or a Python type that cannot be used."""


class BackendError(LoraKernelsError, RuntimeError):
    """A backend that was asked for and cannot run here."""


def message(what: str, got: object = None, allowed: object = None, fix: str | None = None) -> str:
    """One line: `what; got ...; allowed ...; fix: ...`, leaving out what is None."""
    parts = [what]
    if got is not None:
        parts.append(f"got {got}")
    if allowed is not None:
        parts.append(f"allowed: {allowed}")
    if fix is not None:
        parts.append(f"fix: {fix}")
    return "; ".join(parts)


@functools.cache
def warn_once(line: str) -> None:
    """Log `line` as a warning the first time it is seen in this process."""
    log.warning("%s", line)
