"""The Hopper engine's implementations of the ops: hand-written sm_90a kernels (csrc/cuda) behind `_C.cuda_linear` and `_C.cuda_shrink`.

Forward: column-0 form (one launch, also gives h) where R <= 64 and no dropout, else shrink and base + rank update (two launches; the
second starts early and waits just before it needs h). Backward: dx likewise with (x, W, A, B) -> (dy, W^T, B^T, A^T); dA and dB by the
tall-skinny reductions of the Triton kernels, or torch where Triton is missing. A measured plan names form, tile and cluster; else `form` does.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _device, reference
from .._errors import BackendError, message
from .._flags import Flags
from ..tuning import store

_ELEMENTS = {torch.bfloat16: 0, torch.float16: 1}
TILE_M, BLOCK_K = 128, 64
# Width of the output tile -> time per column against the widest: a narrow tile reads x more often. From bytes per FLOP; not measured.
_COLUMN_COST = {256: 1.0, 192: 1.04, 128: 1.15}


@functools.cache
def _module() -> ModuleType | str:
    try:
        from lora_kernels import _C
    except ImportError as error:
        return f"the native module is not built ({error})"
    return _C if hasattr(_C, "cuda_linear") else "the native module was built without CUDA (no nvcc was found, or LORA_KERNELS_CUDA=0)"


def unusable() -> str | None:
    """Why the native CUDA kernels cannot run here, or None."""
    module = _module()
    if isinstance(module, str):
        return module
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


# -------------------------------------------------------------------------------------------------------------------- form and tile


class Form(NamedTuple):
    """How one GEMM [M, N] over K with a rank-R update is launched."""

    column0: bool
    block_m: int
    block_n: int
    cluster: int
    group_m: int = 8


def form(M: int, N: int, R: int, masked: bool, given_h: bool, sms: int) -> Form:
    """Column-0 form where it exists; the tile with the least columns times waves; clusters of 2 as soon as there are two rows of tiles."""
    rows = -(-M // TILE_M)
    cluster = 2 if rows > 1 else 1
    column0 = not masked and not given_h and R <= 64
    if column0 or masked:
        return Form(column0, TILE_M, 256, cluster)
    rows_of_units = -(-rows // cluster)

    def cost(block_n: int) -> float:
        waves = -(-rows_of_units * -(-N // block_n) // max(1, sms // cluster))
        return waves * block_n * _COLUMN_COST[block_n]

    return Form(False, TILE_M, min(_COLUMN_COST, key=cost), cluster)


def planned(op: str, args: tuple) -> Form | None:
    """What the plan of this call of an op says, where a table has measured a CUDA kernel for it."""
    plan = store.choose(*store.problem_of(op, args))
    if plan.implementation != "cuda":
        return None
    return Form(plan.form == "column0", plan.block_m, plan.block_n, plan.cluster, plan.group_m)


def split(M: int, K: int, sms: int) -> int:
    """CTAs that share the K loop of 128 rows in the shrink: the most that still fit in one wave, with at least 4 blocks of 64 each."""
    tiles, best = -(-M // TILE_M), 1
    for s in (2, 4, 8):
        if tiles * s <= sms and 4 * s <= -(-K // BLOCK_K):
            best = s
    return best


# ------------------------------------------------------------------------------------------------------------------------ launching

flags = Flags()


def _call(function: str, *args: object) -> None:
    module = _module()
    try:
        getattr(module, function)(*args)
    except module.CudaError as error:
        flags.forget()
        raise BackendError(message("CUDA kernel failed", str(error), fix="lora-kernels env; backend='triton' avoids these kernels")) from error


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def shrink(x: Tensor, a: Tensor, scale: float, backward: bool, mask: Tensor | None = None, seed: Tensor | None = None, p: float = 0.0) -> Tensor:
    """h [M, R] = scale * keep * x a^T / (1 - p) with a [R, K], or with `backward` a [K, R]; draws keep and fills `mask` where one is given."""
    (M, K), R = x.shape, a.shape[1 if backward else 0]
    h = x.new_empty(M, R)
    stream, sms = torch.cuda.current_stream(x.device).cuda_stream, _device.sm_count(x.device.index)
    numbers = (_ELEMENTS[x.dtype], backward, M, K, R, split(M, K, sms), scale * reference.keep_scale(p), reference.drop_threshold(p))
    _call("cuda_shrink", *numbers, x.data_ptr(), x.stride(0), a.data_ptr(), a.stride(0), h.data_ptr(), _address(mask), _address(seed), stream)
    return h


def linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    h: Tensor | None,
    scale: float,
    backward: bool,
    mask: Tensor | None = None,
    dependent: bool = False,
    how: Form | None = None,
) -> tuple[Tensor, Tensor | None]:
    """x w + bias + h b and h; h = scale * x a is made in the same launch when it is None. No b: the base product alone.

    Layouts as in csrc/cuda/api.h: w [N, K], b [N, R], a [R, K], or with `backward` all three transposed. With `mask`, the rank product is masked and
    multiplied by `scale`. `dependent`: the kernel just launched makes h.
    """
    M, K = x.shape
    N, R = w.shape[1 if backward else 0], 0 if b is None else b.shape[0 if backward else 1]
    device = x.device
    stream, sms = torch.cuda.current_stream(device).cuda_stream, _device.sm_count(device.index)
    how = how or form(M, N, R, mask is not None, h is not None or b is None, sms)
    y, sync = x.new_empty(M, N), None
    if how.column0:
        h = x.new_empty(M, R)
        sync = flags.on(device, stream, _module().cuda_linear_sync_ints(M))
    switches = (_ELEMENTS[x.dtype], backward, how.column0, mask is not None, dependent, how.block_m, how.block_n, how.cluster, how.group_m)
    matrices = [v for t in (x, w, a, b, y) for v in ((0, 0) if t is None else (t.data_ptr(), t.stride(0)))]
    _call("cuda_linear", *switches, M, N, K, R, scale, *matrices, _address(bias), _address(h), _address(mask), _address(sync), stream)
    return y, h


# ------------------------------------------------------------------------------------------------------------------------------ ops


def _describable(t: Tensor) -> bool:
    """Whether TMA can describe this matrix: rows contiguous, pitch and address multiples of 16 bytes."""
    return t.stride(1) == 1 and t.stride(0) % 8 == 0 and t.stride(0) >= t.shape[1] and t.data_ptr() % 16 == 0


def _adapter(t: Tensor, dtype: torch.dtype) -> Tensor:
    """An adapter in x's dtype that TMA can describe; a copy of a rank-sized tensor where it is not so already."""
    t = t.detach().to(dtype)
    return t if _describable(t) else t.clone(memory_format=torch.contiguous_format)


def _forward(how: Form | None, x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed):
    with torch.cuda.device(x.device):
        a, b = _adapter(lora_a, x.dtype), _adapter(lora_b, x.dtype)
        mask = x.new_empty((x.shape[0], -(-x.shape[1] // 32)) if dropout_p > 0 else (0,), dtype=torch.int32)
        if dropout_p > 0 or a.shape[0] > 64 or (how and not how.column0):
            drop = dict(mask=mask, seed=seed, p=dropout_p) if dropout_p > 0 else {}
            h = shrink(x, a, scaling, backward=False, **drop)
            y, _ = linear(x, weight, bias, None, b, h, 1.0, backward=False, dependent=True, how=how)
        else:
            y, h = linear(x, weight, bias, a, b, None, scaling, backward=False, how=how)
        return y, h, mask


def _backward(how: Form | None, dy, x, weight, lora_a, lora_b, h, mask, scaling, dropout_p, need_dx, need_da, need_db):
    dx, da, db = x.new_empty(0), lora_a.new_empty(0), lora_b.new_empty(0)
    with torch.cuda.device(x.device):
        a, b = _adapter(lora_a, x.dtype), _adapter(lora_b, x.dtype)
        mask = mask.contiguous() if dropout_p > 0 else None
        g = None
        if need_dx and mask is None and a.shape[0] <= 64 and (how is None or how.column0):
            dx, g = linear(dy, weight, None, b, a, None, scaling, backward=True, how=how)
        elif need_dx or need_da:
            g = shrink(dy, b, scaling, backward=True)
            if need_dx:
                dx, _ = linear(dy, weight, None, None, a, g, reference.keep_scale(dropout_p), backward=True, mask=mask, dependent=True, how=how)
        if need_da:
            da = lora_a.new_empty(lora_a.shape)
            _reduce(x, g, mask, dropout_p, da, transposed=True)
        if need_db:
            db = lora_b.new_empty(lora_b.shape)
            _reduce(dy, h.contiguous(), None, 0.0, db, transposed=False)
    return dx, da, db


def lora_linear_fwd(*args):
    """See `reference.lora_linear_fwd`."""
    return reference.lora_linear_fwd(*args) if args[0].shape[0] == 0 else _forward(planned("lora_linear_fwd", args), *args)


def lora_linear_bwd(*args):
    """See `reference.lora_linear_bwd`."""
    return reference.lora_linear_bwd(*args) if args[0].shape[0] == 0 else _backward(planned("lora_linear_bwd", args), *args)


def _prepare_fwd(*args):
    """`lora_linear_fwd` for every call of this signature, its plan looked up once."""
    return functools.partial(_forward, planned("lora_linear_fwd", args)) if args[0].shape[0] else None


def _prepare_bwd(*args):
    """`lora_linear_bwd` for every call of this signature, its plan looked up once."""
    return functools.partial(_backward, planned("lora_linear_bwd", args)) if args[0].shape[0] else None


lora_linear_fwd.prepare = _prepare_fwd
lora_linear_bwd.prepare = _prepare_bwd


def _reduce(x: Tensor, g: Tensor, mask: Tensor | None, p: float, out: Tensor, transposed: bool) -> None:
    """out [P, R] = drop(x)^T g, or its transpose: the Triton kernel, or torch where Triton is missing."""
    if not _device.has_module("triton"):
        kept = x if mask is None else torch.where(reference.unpack_bits(mask, x.shape[1]), x * reference.keep_scale(p), x.new_zeros(()))
        out.copy_(g.t() @ kept if transposed else kept.t() @ g)
        return
    key = (x.shape, x.stride(), x.dtype, x.device, g.shape[1], x.data_ptr() % 16, g.data_ptr() % 16, out.dtype, transposed, p)
    if key not in _reducers:
        from ..kernels.tall_skinny import TallSkinny

        if len(_reducers) >= 1024:
            _reducers.clear()
        _reducers[key] = TallSkinny(x, g.shape[1], transposed, p)
    _reducers[key](torch.cuda.current_stream(x.device).cuda_stream, x, g, mask, out)


_reducers: dict[tuple, object] = {}  # the launches of one signature; what they compile depends on the whole key


def _refuses(x: Tensor, weight: Tensor, R: int, described: dict[str, Tensor], bias: Tensor | None = None) -> str | None:
    if x.dtype not in _ELEMENTS:
        return f"dtype {x.dtype} (it serves bfloat16 and float16)"
    if x.is_cuda and _device.cuda_capability(x.device.index) != (9, 0):
        return "compute capability {}.{} (its kernels are for 9.0)".format(*_device.cuda_capability(x.device.index))
    (N, K), M = weight.shape, x.shape[0]
    if N % 8 or K % 8 or R % 8 or R > 256:
        return f"N = {N}, K = {K}, R = {R} (N, K and R must be multiples of 8, R at most 256)"
    if max(M, N, K) >= 2**31 - 512:  # a cluster of two 256-row tiles may start that far past the end
        return f"M = {M}, N = {N}, K = {K} (32-bit indices)"
    for name, t in described.items():
        if not _describable(t):
            return f"{name} with strides {list(t.stride())} (TMA wants contiguous rows, 16-byte aligned)"
    if bias is not None and (bias.stride(0) != 1 or bias.data_ptr() % 4):
        return "a bias that is not contiguous and 4-byte aligned"
    return None


def refuses_fwd(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed) -> str | None:
    """Why these kernels will not take this forward call, or None."""
    return _refuses(x, weight, lora_a.shape[0], {"x": x, "weight": weight}, bias)


def refuses_bwd(dy, x, weight, lora_a, lora_b, h, mask, scaling, dropout_p, need_dx, need_da, need_db) -> str | None:
    """Why these kernels will not take this backward call, or None."""
    return _refuses(x, weight, lora_a.shape[0], {"dy": dy, "weight": weight})


OPS = {"lora_linear_fwd": (lora_linear_fwd, refuses_fwd), "lora_linear_bwd": (lora_linear_bwd, refuses_bwd)}
