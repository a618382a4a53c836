"""The Triton implementations of `lora_linear_fwd` and `lora_linear_bwd`: a few launches, chosen once per call signature."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _device, reference
from ..tuning import store
from ..tuning.plan import POINTER_TILE, Plan, Problem, fit
from ._launch import PerStream, guarded, maker, on_device, regular, tf32_allowed
from .column0 import Column0
from .shrink import Shrink
from .tall_skinny import TallSkinny
from .update import Update

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MAX_SIGNATURES = 4096
# Float32 adapters of a larger rank are cast before the launch: in the kernel they cost 32 registers and more, which spill at R = 64, and as
# wgmma's A operand they would sit in registers. TMA (column0's A) cannot cast either.
_CAST_RANK = 32
_KEPT_BYTES = 1 << 15  # of an h that nobody wants, kept per signature; of larger calls the kernel takes longer than the host
_forwards: dict[tuple, Forward] = {}
_backwards: dict[tuple, Backward] = {}


def _alignment(*tensors: Tensor | None) -> tuple | None:
    """What Triton compiles in about addresses: None when all are 16-byte aligned, as nearly always, else one flag each."""
    together = 0
    for t in tensors:
        if t is not None:
            together |= t.data_ptr()
    return tuple(t is None or t.data_ptr() % 16 == 0 for t in tensors) if together & 15 else None


def _cast(adapter: Tensor, x: Tensor, wanted: bool) -> Tensor:
    """A rank-sized operand in x's dtype, rows contiguous, where the kernel cannot cast as it loads; else as it is."""
    return adapter.to(x.dtype).contiguous() if wanted else adapter


def _put(cache: dict, key: tuple, made: object) -> object:
    if len(cache) >= _MAX_SIGNATURES:
        cache.clear()
    cache[key] = made
    return made


class Forward:
    """lora_linear_fwd for one call signature. x is given as its rows; calls may have it, contiguous, with the leading dimensions `lead`, as y then.

    Unless `trained`, nobody wants h: then it may be memory that the next launch on the stream overwrites.
    """

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, dropout_p: float, lead=None, trained=True):
        (M, K), (N, R) = x.shape, lora_b.shape
        problem = Problem("fwd", M, N, K, R, x.dtype, dropout_p > 0)
        plan = store.choose(problem, x.device)
        self.torch_gemm = plan.implementation == "torch" and dropout_p > 0
        self.new_y, self.new_h, self.kept_h = maker(x, *((M,) if lead is None else lead), N), maker(x, M, R), None
        self.mask_shape = (M, -(-K // 32)) if dropout_p > 0 else None
        with torch.inference_mode(False):  # kept: made by a first call in inference mode, autograd would not save it later
            self.no_mask = x.new_empty(0, dtype=torch.int32)
        cast_a = lora_a.dtype != x.dtype
        plan = fit(plan, problem, N % 8 == 0 and regular(x, weight), K % 8 == 0 if cast_a else regular(lora_a))
        self.column0 = self.shrink = self.update = None
        self.cast_a = cast_a and (plan.form == "column0" or R > _CAST_RANK)
        self.cast_b = R > _CAST_RANK and lora_b.dtype != x.dtype
        if plan.form == "column0":
            self.column0 = Column0(plan, x, weight.t(), bias, _cast(lora_b, x, self.cast_b).t())
            if not trained and M * R * x.element_size() <= _KEPT_BYTES:  # one launch makes and uses h: none comes between on its stream
                self.kept_h = PerStream(x.device, lambda _: self.new_h())
            return
        self.shrink = Shrink(x, _cast(lora_a, x, self.cast_a), dropout_p)
        if not self.torch_gemm:
            self.update = Update(plan, x, weight.t(), bias, _cast(lora_b, x, self.cast_b).t())

    def __call__(self, stream: int, x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed) -> tuple[Tensor, Tensor, Tensor]:
        h = self.kept_h.on(stream) if self.kept_h else self.new_h()
        if self.cast_a:
            lora_a = _cast(lora_a, x, True)
        if self.cast_b:
            lora_b = _cast(lora_b, x, True)
        if self.column0:
            y = self.new_y()
            self.column0.__call__(stream, x, weight, bias, lora_a, lora_b, y, h, scaling)
            return y, h, self.no_mask
        mask = x.new_empty(*self.mask_shape, dtype=torch.int32) if self.mask_shape else self.no_mask
        self.shrink(stream, x, lora_a, h, mask, seed, scaling)
        if self.update is None:
            y = torch.nn.functional.linear(x, weight, bias)
            y.view(-1, y.shape[-1]).addmm_(h, lora_b.t().to(x.dtype))
            return y, h, mask
        y = self.new_y()
        self.update(stream, x, weight, bias, h, lora_b, None, y)
        return y, h, mask


class Backward:
    """lora_linear_bwd for one call signature. dy and x are given as their rows; `lead` as in `Forward`, of dy, x and dx."""

    def __init__(self, dy: Tensor, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, dropout_p: float, need_dx, need_da, need_db, lead=None):
        M, (N, K), R = x.shape[0], weight.shape, lora_b.shape[1]
        problem = Problem("dx", M, K, N, R, x.dtype, dropout_p > 0)
        plan = store.choose(problem, x.device)
        self.torch_gemm = plan.implementation == "torch" and dropout_p > 0
        cast_b = lora_b.dtype != x.dtype
        plan = fit(plan, problem, K % 8 == 0 and regular(dy, weight), R % 8 == 0 if cast_b else regular(lora_b))
        self.new_g, self.new_dx = maker(dy, M, R), maker(x, *((M,) if lead is None else lead), K)
        self.new_da, self.new_db = maker(lora_a, R, K), maker(lora_b, N, R)
        self.unneeded = x.new_empty(0), lora_a.new_empty(0), lora_b.new_empty(0)
        self.column0 = self.update = self.shrink = None
        self.cast_a = R > _CAST_RANK and lora_a.dtype != x.dtype
        self.cast_b = cast_b and (plan.form == "column0" or R > _CAST_RANK)
        a = _cast(lora_a, x, self.cast_a)
        if need_dx and plan.form == "column0":
            self.column0 = Column0(plan, dy, weight, None, a)
        elif need_dx or need_da:
            self.shrink = Shrink(dy, _cast(lora_b, x, self.cast_b).t())
        if need_dx and self.column0 is None:
            # With cuBLAS as the GEMM, this launch has K = 0 and writes the masked rank product alone.
            inner = dy[:, :0] if self.torch_gemm else dy
            plan = Plan("torch", "pointer", *POINTER_TILE) if self.torch_gemm and plan.form != "pointer" else plan
            self.update = Update(plan, inner, weight, None, a, dropout_p)
        self.da = TallSkinny(x, R, transposed=True, dropout_p=dropout_p) if need_da else None
        self.db = TallSkinny(dy, R, transposed=False) if need_db else None

    def __call__(self, stream: int, dy, x, weight, lora_a, lora_b, h, mask, scaling, *_) -> tuple[Tensor, Tensor, Tensor]:
        dx, da, db = self.unneeded
        g = self.new_g()
        a, b = _cast(lora_a, x, self.cast_a), _cast(lora_b, x, self.cast_b)
        if self.column0 is not None:
            dx = self.new_dx()
            self.column0(stream, dy, weight, None, b, a, dx, g, scaling)
        elif self.shrink is not None:
            self.shrink(stream, dy, b, g, None, None, scaling)
        if self.update is not None:
            dx = self.new_dx()
            self.update(stream, dy, weight, None, g, a, mask, dx)
            if self.torch_gemm:
                dx.view(-1, dx.shape[-1]).addmm_(dy.view(-1, dy.shape[-1]), weight)
        if self.da is not None:
            da = self.new_da()
            self.da(stream, x, g, mask, da)
        if self.db is not None:
            db = self.new_db()
            self.db(stream, dy, h, None, db)
        return dx, da, db


def lora_linear_fwd(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed):
    """See `reference.lora_linear_fwd`."""
    if x.shape[0] == 0:
        return reference.lora_linear_fwd(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed)
    bias = bias if bias is None else bias.contiguous()
    key = (x.shape, x.stride(), x.dtype, x.device, weight.shape, weight.stride(), bias is None, lora_a.stride(), lora_a.dtype, lora_b.shape)
    key += (lora_b.stride(), lora_b.dtype, dropout_p, _alignment(x, weight, bias, lora_a, lora_b), _tf32(x))
    forward = _forwards.get(key) or _put(_forwards, key, Forward(x, weight, bias, lora_a, lora_b, dropout_p))
    return on_device(x, forward, x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed)


def lora_linear_bwd(dy, x, weight, lora_a, lora_b, h, mask, scaling, dropout_p, need_dx, need_da, need_db):
    """See `reference.lora_linear_bwd`."""
    if x.shape[0] == 0:
        args = (dy, x, weight, lora_a, lora_b, h, mask, scaling, dropout_p, need_dx, need_da, need_db)
        return reference.lora_linear_bwd(*args)
    h, mask = h.contiguous(), mask.contiguous()
    key = (dy.stride(), x.shape, x.stride(), x.dtype, x.device, weight.shape, weight.stride(), lora_a.stride(), lora_a.dtype, lora_b.shape)
    key += (lora_b.stride(), lora_b.dtype, dropout_p, need_dx, need_da, need_db, _alignment(dy, x, weight, lora_a, lora_b, h, mask), _tf32(x))
    backward = _backwards.get(key)
    if backward is None:
        backward = _put(_backwards, key, Backward(dy, x, weight, lora_a, lora_b, dropout_p, need_dx, need_da, need_db))
    return on_device(x, backward, dy, x, weight, lora_a, lora_b, h, mask, scaling)


def _tf32(x: Tensor) -> bool:
    return x.dtype == torch.float32 and tf32_allowed()


def _prepare_fwd(lead, x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed, trained):
    """`lora_linear_fwd` for every call of this signature, without looking it up again; None where addresses or settings matter too."""
    if x.shape[0] == 0 or not regular(x) or _alignment(x, weight, bias, lora_a, lora_b) or (bias is not None and not bias.is_contiguous()):
        return None
    return guarded(x.device, Forward(x, weight, bias, lora_a, lora_b, dropout_p, lead, trained).__call__)


def _prepare_bwd(lead, dy, x, weight, lora_a, lora_b, h, mask, scaling, dropout_p, need_dx, need_da, need_db):
    """`lora_linear_bwd` for every call of this signature (h and mask as the forward made them)."""
    if x.shape[0] == 0 or not regular(x, dy) or _alignment(dy, x, weight, lora_a, lora_b, h, mask):
        return None
    return guarded(x.device, Backward(dy, x, weight, lora_a, lora_b, dropout_p, need_dx, need_da, need_db, lead))


lora_linear_fwd.prepare_nd, lora_linear_bwd.prepare_nd = _prepare_fwd, _prepare_bwd


def refuses(x: Tensor, *rest: object) -> str | None:
    """Why the Triton kernels will not take this call: x, or dy, and the other arguments of the op."""
    if x.dtype not in _DTYPES:
        return f"dtype {x.dtype} (it serves bfloat16, float16 and float32)"
    sizes = [n for t in (x, *rest) if isinstance(t, Tensor) for n in t.shape]
    if max(sizes) >= 2**31:
        return f"a size of {max(sizes)} (32-bit indices)"
    if x.is_cuda and _device.cuda_capability(x.device.index) < (8, 0):
        return "compute capability {}.{} (8.0 or newer is needed)".format(*_device.cuda_capability(x.device.index))
    return None


OPS = {"lora_linear_fwd": (lora_linear_fwd, refuses), "lora_linear_bwd": (lora_linear_bwd, refuses)}
