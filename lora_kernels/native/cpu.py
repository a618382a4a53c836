"""The CPU engine's implementations of the ops (those of many adapters: cpu_batched.py): the plan picks a form, one call hands the tensors over."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .._errors import LoraValueError
from ..reference import drop_threshold, keep_scale, unpack_bits
from ..tuning import cpu as plan
from . import cpu_batched
from .cpu_batched import DTYPES
from .signature import tensors_shown

try:
    from .. import _C
except ImportError as error:
    _C, _IMPORT_ERROR = None, str(error)

_RANK_ONLY = plan.FORMS.index("torch")
with torch.inference_mode(False):  # this module may be imported by a first call in inference mode; autograd would not save its tensors
    _NO_MASK = torch.empty(0, dtype=torch.int32, device="cpu")
_threads = torch.get_num_threads


@functools.cache
def unusable() -> str | None:
    """Why the native CPU kernels cannot run here, or None."""
    if _C is None:
        return f"the native module is not built ({_IMPORT_ERROR}); fix: pip install with a C++ compiler present"
    if not tensors_shown():
        return f"torch {torch.__version__} does not show its tensors to C (DLPack's exchange interface); fix: torch 2.11 or newer"
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


def _prepare_fwd(lead, x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed, trained=True):
    """`lora_linear_fwd` for every call of this signature: what shapes and dtypes decide is decided here.

    The call's x has the leading dimensions `lead`, [M] or contiguous ones that multiply to M; y gets the same. h is None unless `trained`.
    """
    (M, K), (N, R) = x.shape, lora_b.shape
    dtype, threshold, words = DTYPES[x.dtype], drop_threshold(dropout_p), (K + 31) // 32

    def run(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed):
        form = plan.form("fwd", dtype, M, N, K)
        y = F.linear(x, weight, bias) if form == _RANK_ONLY else x.new_empty(*lead, N)  # unpacked: 0.7 us cheaper than a tuple
        h = x.new_empty(M, R) if trained or form == _RANK_ONLY else None
        mask = _NO_MASK if dropout_p == 0 else x.new_empty(M, words, dtype=torch.int32)
        _C.cpu_linear_fwd(form, _threads(), scaling, threshold, x, weight, bias, lora_a, lora_b, seed, y, h, mask)
        if form == _RANK_ONLY:
            y.view(M, N).addmm_(h, lora_b.to(x.dtype).t())
        return y, h, mask

    return run


def _prepare_bwd(lead, dy, x, weight, lora_a, lora_b, h, mask, scaling, dropout_p, need_dx, need_da, need_db):
    """`lora_linear_bwd` for every call of this signature; `lead` as in `_prepare_fwd`, of dy, x and dx."""
    M, (N, K), R = x.shape[0], weight.shape, lora_b.shape[1]
    dtype, threshold = DTYPES[x.dtype], drop_threshold(dropout_p)
    unneeded = x.new_empty(0), lora_a.new_empty(0), lora_b.new_empty(0)

    def run(dy, x, weight, lora_a, lora_b, h, mask, scaling, dropout_p, *_):
        form = plan.form("bwd", dtype, M, N, K) if need_dx else 0
        by_torch = form == _RANK_ONLY
        dx = None if not need_dx else dy @ weight if by_torch else x.new_empty(*lead, K)
        d_a, d_b = lora_a.new_empty(R, K) if need_da else None, lora_b.new_empty(N, R) if need_db else None
        g = x.new_empty(M, R) if by_torch else None
        _C.cpu_linear_bwd(form, _threads(), scaling, threshold, dy, x, weight, lora_a, lora_b, h, mask, g, None if by_torch else dx, d_a, d_b)
        if by_torch and threshold:
            dx.view(M, K).add_(torch.where(unpack_bits(mask, K), g @ lora_a.to(x.dtype) * keep_scale(dropout_p), dx.new_zeros(())))
        elif by_torch:
            dx.view(M, K).addmm_(g, lora_a.to(x.dtype))
        return unneeded[0] if dx is None else dx, unneeded[1] if d_a is None else d_a, unneeded[2] if d_b is None else d_b

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
