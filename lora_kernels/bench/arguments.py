"""What the command lines of `bench` and `tune` share: numbers that must make sense, and the device."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from .. import _env
from .._errors import LoraValueError, message


def at_least(low: float, kind: type = int, most: float = float("inf")) -> Callable[[str], float]:
    """For argparse: a number of at least `low` and at most `most`, not NaN."""

    def read(text: str) -> float:
        if not (value := kind(text)) >= low:
            raise argparse.ArgumentTypeError(f"{text} is not at least {low}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{text} is above {most}")
        return value

    read.__name__ = kind.__name__  # argparse: "invalid int value"
    return read


def above_0(text: str) -> float:
    """For argparse: a number above 0, not NaN."""
    if not (value := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def size(text: str) -> tuple[int, int]:
    """For argparse: a projection (K, N)."""
    try:
        k, n = (int(part) for part in text.lower().split("x"))
    except ValueError:
        k = n = 0
    if min(k, n) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no size KxN, e.g. 4096x14336")
    return k, n


def device(name: str | None) -> torch.device:
    """The device asked for, or the GPU where there is one. Raises LoraValueError for a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        why, fix = _env.gpu_missing()
        raise LoraValueError(message(f"--device cuda: {why}", fix=f"{fix}, or --device cpu"))
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
