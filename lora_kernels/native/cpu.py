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
_PANELS, _RANK_ONLY = plan.FORMS.index("panels"), plan.FORMS.index("torch")
with torch.inference_mode(False):  # this module may be imported by a first call in inference mode; autograd would not save its tensors
    _NO_MASK = torch.empty(0, dtype=torch.int32)
_threads = torch.get_num_threads


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


def _prepare_fwd(lead, x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed):
    """`lora_linear_fwd` for every call of this signature: what the shapes, strides and dtypes decide is decided here.

    The call's x has the leading dimensions `lead`, [M] or contiguous ones that multiply to M; y gets the same.
    """
    M, K = x.shape
    N, R = weight.shape[0], lora_a.shape[0]
    dtype, a_type, b_type = DTYPES[x.dtype], DTYPES[lora_a.dtype], DTYPES[lora_b.dtype]
    ldx, ldw, lda, ldb = x.stride(0), weight.stride(0), lora_a.stride(0), lora_b.stride(0)
    threshold = drop_threshold(dropout_p)
    mask_shape = (M, (K + 31) // 32)

    def run(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed):
        form = plan.form("fwd", dtype, M, N, K)
        y = F.linear(x, weight, bias) if form == _RANK_ONLY else x.new_empty(*lead, N)  # unpacked: 0.7 us cheaper than a tuple
        h = x.new_empty(M, R)
        mask = _NO_MASK if dropout_p == 0 else x.new_empty(*mask_shape, dtype=torch.int32)
        _C.cpu_linear_fwd(
            M, N, K, R, dtype, form, _threads(), scaling, threshold,
            x.data_ptr(), ldx, weight.data_ptr(), ldw, 0 if bias is None else bias.data_ptr(),
            lora_a.data_ptr(), lda, a_type, lora_b.data_ptr(), ldb, b_type, 0 if seed is None else seed.data_ptr(),
            y.data_ptr(), h.data_ptr(), mask.data_ptr(),
        )  # fmt: skip
        if form == _RANK_ONLY:
            y.view(M, N).addmm_(h, lora_b.to(x.dtype).t())
        return y, h, mask

    return run


def _prepare_bwd(lead, dy, x, weight, lora_a, lora_b, h, mask, scaling, dropout_p, need_dx, need_da, need_db):
    """`lora_linear_bwd` for every call of this signature; `lead` as in `_prepare_fwd`, of dy, x and dx."""
    M, K = x.shape
    N, R = weight.shape[0], lora_a.shape[0]
    dtype, a_type, b_type = DTYPES[x.dtype], DTYPES[lora_a.dtype], DTYPES[lora_b.dtype]
    lddy, ldx, ldw, lda, ldb = dy.stride(0), x.stride(0), weight.stride(0), lora_a.stride(0), lora_b.stride(0)
    threshold = drop_threshold(dropout_p)
    dx_shape, a_shape, b_shape = (*lead, K) if need_dx else (0,), (R, K) if need_da else (0,), (N, R) if need_db else (0,)

    def run(dy, x, weight, lora_a, lora_b, h, mask, scaling, dropout_p, *_):
        form = plan.form("bwd", dtype, M, N, K) if need_dx else 0
        by_torch = form == _RANK_ONLY
        dx = dy @ weight if by_torch else x.new_empty(*dx_shape)
        d_a, d_b = lora_a.new_empty(*a_shape), lora_b.new_empty(*b_shape)
        g = x.new_empty(M, R) if by_torch else None
        _C.cpu_linear_bwd(
            M, N, K, R, dtype, form, _threads(), scaling, threshold, dy.data_ptr(), lddy, x.data_ptr(), ldx, weight.data_ptr(), ldw,
            lora_a.data_ptr(), lda, a_type, lora_b.data_ptr(), ldb, b_type, h.data_ptr(), h.stride(0), mask.data_ptr(),
            g.data_ptr() if by_torch else 0, 0 if by_torch or not need_dx else dx.data_ptr(),
            d_a.data_ptr() if need_da else 0, d_b.data_ptr() if need_db else 0,
        )  # fmt: skip
        if by_torch and threshold:
            dx.view(M, K).add_(torch.where(unpack_bits(mask, K), g @ lora_a.to(x.dtype) * keep_scale(dropout_p), dx.new_zeros(())))
        elif by_torch:
            dx.view(M, K).addmm_(g, lora_a.to(x.dtype))
        return dx, d_a, d_b

    return run


def _rows_only(prepare_nd):
    def prepare(*args):
        return prepare_nd(args[0].shape[:1], *args)

    return prepare


def lora_linear_fwd(*args):
    """`reference.lora_linear_fwd` by the native kernels."""
    return lora_linear_fwd.prepare(*args)(*args)


def lora_linear_bwd(*args):
    """`reference.lora_linear_bwd` by the native kernels."""
    return lora_linear_bwd.prepare(*args)(*args)


lora_linear_fwd.prepare_nd, lora_linear_bwd.prepare_nd = _prepare_fwd, _prepare_bwd
lora_linear_fwd.prepare, lora_linear_bwd.prepare = map(_rows_only, (_prepare_fwd, _prepare_bwd))


OPS = {
    **cpu_batched.OPS,
    "lora_linear_fwd": (lora_linear_fwd, _fwd_refuses),
    "lora_linear_bwd": (lora_linear_bwd, _bwd_refuses),
}
