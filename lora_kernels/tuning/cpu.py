"""The CPU plan: which form of the large product runs a (op, dtype, M, N, K), from a measured table or a rule of thumb."""

from __future__ import annotations

import functools

from . import cpu_table

FORMS = ("in_place", "panels", "torch")  # lk::Form; torch: PyTorch computes the large product, the kernels the rank-R parts
_DTYPES = ("float32", "bfloat16", "float16")  # lk::Dtype


def reset() -> None:
    form.cache_clear()


@functools.lru_cache(maxsize=4096)
def form(op: str, dtype: int, M: int, N: int, K: int) -> int:
    """The form's index in FORMS for op "fwd" or "bwd"."""
    measured = cpu_table.look_up(op, _DTYPES[dtype], M, N, K, FORMS)
    if measured is not None:
        return FORMS.index(measured)
    few = 32 if op == "fwd" else 8
    return 0 if M <= few else 1
