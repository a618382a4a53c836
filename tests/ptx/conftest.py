"""The emulator's own tests need a process in which it is the GPU: LORA_KERNELS_EMULATE=1."""

from __future__ import annotations

import os

EMULATED = os.environ.get("LORA_KERNELS_EMULATE") == "1"
collect_ignore_glob = [] if EMULATED else ["test_*.py"]

if EMULATED:
    import as_gpu  # noqa: F401
