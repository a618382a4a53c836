"""The CPU engine's implementations of the ops (those of many adapters: cpu_batched.py): the plan picks a form, one call hands over pointers."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .._errors import LoraValueError
from ..reference import drop_threshold, keep_scale, unpack_bits
from ..tuning import cpu as plan
from . import cpu_batched

try:
    from .. import _C
except ImportError as error:
    _C, _IMPORT_ERROR = None, str(error)

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # lk::Dtype
_RANK_ONLY = plan.FORMS.index("torch")


@functools.cache
def unusable() -> str | None:
    """Why the native CPU kernels cannot run here, or None."""
    if _C is None:
        return f"the native module is not built ({_IMPORT_ERROR}); fix: pip install with a C++ compiler present"
    plan.reset(isa())
    return None


def isas() -> list[str]:
    """Instruction sets of this build that this CPU runs, best first."""
    return _C.cpu_isas()


def isa() -> str:
    """The instruction set in use. Raises LoraValueError when LORA_KERNELS_CPU_ISA names none of `isas()`."""
    try:
        return _C.cpu_isa()
    except ValueError as error:
        raise LoraValueError(str(error)) from None


def use_isa(name: str) -> None:
    """Switch the instruction set, for tests and tuning."""
    try:
        _C.cpu_use_isa(name)
    except ValueError as error:
        raise LoraValueError(str(error)) from None
    plan.reset(name)


def _row_major(t: Tensor) -> bool:
    return t.stride(1) == 1 or t.shape[1] == 1


def _refuses(x: Tensor, **others: Tensor) -> str | None:
    if x.dtype not in DTYPES:
        return f"the kernels take float32, bfloat16 and float16, x is {x.dtype}"
    if not _row_major(x):
        return "x's columns are not contiguous"
    for name, t in others.items():
        if not _row_major(t):
            return f"{name}'s columns are not contiguous"
    return None


def _fwd_refuses(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed) -> str | None:
    if bias is not None and bias.stride(0) != 1 and bias.shape[0] != 1:
        return "bias is not contiguous"
    return _refuses(x, weight=weight, lora_a=lora_a, lora_b=lora_b)


def _bwd_refuses(dy, x, weight, lora_a, lora_b, h, mask, scaling, dropout_p, need_dx, need_da, need_db) -> str | None:
    return _refuses(x, weight=weight, lora_a=lora_a, lora_b=lora_b, dy=dy, h=h)


def lora_linear_fwd(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed):
    """`reference.lora_linear_fwd` by the native kernels."""
    M, K = x.shape
    N, R = weight.shape[0], lora_a.shape[0]
    dtype = DTYPES[x.dtype]
    form = plan.form("fwd", dtype, M, N, K)
    threshold = drop_threshold(dropout_p)
    h = x.new_empty((M, R))
    mask = x.new_empty((M, (K + 31) // 32) if dropout_p > 0 else (0,), dtype=torch.int32)
    if form == _RANK_ONLY:
        y, y_ptr = F.linear(x, weight, bias), 0
    else:
        y = x.new_empty((M, N))
        y_ptr = y.data_ptr()
    _C.cpu_linear_fwd(
        M, N, K, R, dtype, form, torch.get_num_threads(), scaling, threshold,
        x.data_ptr(), x.stride(0), weight.data_ptr(), weight.stride(0), 0 if bias is None else bias.data_ptr(),
        lora_a.data_ptr(), lora_a.stride(0), DTYPES[lora_a.dtype], lora_b.data_ptr(), lora_b.stride(0), DTYPES[lora_b.dtype],
        0 if seed is None else seed.data_ptr(), y_ptr, h.data_ptr(), mask.data_ptr(),
    )  # fmt: skip
    if form == _RANK_ONLY:
        y.addmm_(h, lora_b.to(x.dtype).t())
    return y, h, mask


def lora_linear_bwd(dy, x, weight, lora_a, lora_b, h, mask, scaling, dropout_p, need_dx, need_da, need_db):
    """`reference.lora_linear_bwd` by the native kernels."""
    M, K = x.shape
    N, R = weight.shape[0], lora_a.shape[0]
    dtype = DTYPES[x.dtype]
    form = plan.form("bwd", dtype, M, N, K) if need_dx else 0
    by_torch = need_dx and form == _RANK_ONLY
    dx = x.new_empty((M, K) if need_dx and not by_torch else (0,))
    d_a = lora_a.new_empty((R, K) if need_da else (0,))
    d_b = lora_b.new_empty((N, R) if need_db else (0,))
    g = x.new_empty((M, R)) if by_torch else None
    _C.cpu_linear_bwd(
        M, N, K, R, dtype, form, torch.get_num_threads(), scaling, drop_threshold(dropout_p),
        dy.data_ptr(), dy.stride(0), x.data_ptr(), x.stride(0), weight.data_ptr(), weight.stride(0),
        lora_a.data_ptr(), lora_a.stride(0), DTYPES[lora_a.dtype], lora_b.data_ptr(), lora_b.stride(0), DTYPES[lora_b.dtype],
        h.data_ptr(), h.stride(0), mask.data_ptr(), g.data_ptr() if by_torch else 0,
        dx.data_ptr(), d_a.data_ptr() if need_da else 0, d_b.data_ptr() if need_db else 0,
    )  # fmt: skip
    if by_torch:
        dx = dy @ weight
        a = lora_a.to(x.dtype)
        if dropout_p > 0:
            dx += torch.where(unpack_bits(mask, K), g @ a * keep_scale(dropout_p), dx.new_zeros(()))
        else:
            dx.addmm_(g, a)
    return dx, d_a, d_b


OPS = {
    **cpu_batched.OPS,
    "lora_linear_fwd": (lora_linear_fwd, _fwd_refuses),
    "lora_linear_bwd": (lora_linear_bwd, _bwd_refuses),
}
