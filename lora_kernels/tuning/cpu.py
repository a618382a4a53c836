"""The CPU plan: which form of the large product runs a (op, dtype, M, N, K), from a measured table or a rule of thumb."""

from __future__ import annotations

import functools

FORMS = ("in_place", "panels", "torch")  # lk::Form; torch: PyTorch computes the large product, the kernels the rank-R parts


def reset() -> None:
    form.cache_clear()


@functools.lru_cache(maxsize=4096)
def form(op: str, dtype: int, M: int, N: int, K: int) -> int:
    """The form's index in FORMS for op "fwd" or "bwd"."""
    few = 32 if op == "fwd" else 8
    return 0 if M <= few else 1
