"""Puts the PTX emulator where the GPU would be, if it is asked for (place.py)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from place import EMULATED

if EMULATED:
    sys.path.insert(0, str(Path(__file__).parents[1] / "ptx"))
    import as_gpu
    import emulator

    @pytest.fixture(autouse=True)
    def _another_interleaving(request: pytest.FixtureRequest) -> None:
        """Every test has its own; the same one each time."""
        emulator.reset(sum(request.node.nodeid.encode()), as_gpu.MULTIPROCESSORS)
