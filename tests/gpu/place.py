"""Where these tests run: on a GPU, or with LORA_KERNELS_EMULATE=1 in the PTX emulator (tests/ptx), whose kernels take CPU tensors.

`hardware` marks what only a GPU has or is fast enough for: streams, graphs, memory, model sizes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

EMULATED = os.environ.get("LORA_KERNELS_EMULATE") == "1"
DEVICE = "cpu" if EMULATED else "cuda"
hardware = pytest.mark.skipif(EMULATED, reason="needs a GPU")


def repeats(on_a_gpu: int) -> range:
    """Every repetition in the emulator is another interleaving of all threads and asynchronous copies; a few say what many do on a GPU."""
    return range(3 if EMULATED else on_a_gpu)


def all_equal(first: Iterable[Tensor], again: Iterable[Iterable[Tensor]]) -> bool:
    """Whether all of `again` equal the first, tensor by tensor. Without a wait in between: the calls that make them run close together."""
    first, differ = list(first), []
    for results in again:
        differ += [(got != want).any() for got, want in zip(results, first, strict=True)]
    return not torch.stack(differ).any()


def fitting(cases: dict[str, dict]) -> dict[str, dict]:
    """Of cases (ids, Ns, K) of many adapters, in the emulator, those of less than a billion products and a few million weights."""

    def fits(ids: list[int], Ns: list[int], K: int, **_: object) -> bool:
        return sum(Ns) * K <= 4e6 and len(ids) * sum(Ns) * K <= 1e9

    return {name: case for name, case in cases.items() if not EMULATED or fits(**case)}
