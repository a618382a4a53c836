"""Kernel tests in Triton's interpreter, on CPU tensors. They need a process of their own: `TRITON_INTERPRET=1 pytest tests/interpreter`."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from pathlib import Path

import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
EMULATING = os.environ.get("LORA_KERNELS_EMULATE") == "1"
collect_ignore_glob = [] if INTERPRETING or EMULATING else ["test_*.py"]

if INTERPRETING:
    sys.path.insert(0, str(Path(__file__).parent))
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="triton")
    import repairs

    repairs.install()

elif EMULATING:
    sys.path.insert(0, str(Path(__file__).parents[1] / "ptx"))
    import emulator

    emulator.as_triton_driver()

if INTERPRETING or EMULATING:
    from lora_kernels.kernels import _launch

    _launch.PROGRAMS = 3  # persistent grids of three programs, so that each walks several tiles


@pytest.fixture
def eager_sums():
    """A context in which PyTorch's products are summed as where the kernels run: on the emulated GPU in one chain, else as on this CPU."""
    if not EMULATING:
        return contextlib.nullcontext()
    from chain import ChainedProducts

    return ChainedProducts()
