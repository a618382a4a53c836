"""What all ops share: running an implementation outside autocast, remembering it by signature, rows, seeds, refused transforms."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _checks
from .._errors import LoraKernelsError, LoraTypeError, LoraValueError, message
from . import _registry

MAX_SIGNATURES = 4096
PLAIN = "compute this layer in plain PyTorch: F.linear(x, W, b) + s * F.linear(F.linear(x, A), B)"
any_autocast = torch._C._is_any_autocast_enabled  # of any device: the quick question


def records_grad() -> bool:
    """Whether autograd records: never in inference mode, also where `torch.enable_grad` was entered inside."""
    return torch.is_grad_enabled() and (torch.compiler.is_compiling() or not torch.is_inference_mode_enabled())


def autocasts(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def in_autocast_dtype(x, weight, bias):
    """Under torch.autocast, operands in its dtype, as F.linear takes them; weight and bias also as lists."""
    device = x.device.type
    if not autocasts(device):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)
    if x.dtype is not dtype:
        if not x.is_floating_point() or x.dtype is torch.float64:
            return x, weight, bias
        x = x.to(dtype)
    return x, _to(weight, dtype), _to(bias, dtype)


def _to(t, dtype: torch.dtype):
    if isinstance(t, Tensor):
        floats = t.is_floating_point() and t.dtype not in (dtype, torch.float64)  # the others are refused, as without autocast
        return t.to(dtype) if floats else t
    return [_to(each, dtype) for each in t] if isinstance(t, (list, tuple)) else t


def check_kept(op: str, name: str, t: Tensor, shape: Sequence[int], dtypes: Sequence[torch.dtype], device: torch.device) -> None:
    """Raise where what autograd kept came back as another: hooks on saved tensors may return anything, and kernels read as far as its shape was."""
    if t.shape != tuple(shape) or t.dtype not in dtypes or (t.device != device and t.numel()) or (name == "mask" and not t.is_contiguous()):
        got, allowed = f"{t.dtype} {list(t.shape)} on {t.device}", f"{dtypes[0]} {list(shape)} on {device}, contiguous"
        fix = "look at torch.autograd.graph.saved_tensors_hooks: they must return what they were given"
        raise LoraKernelsError(message(f"{op}: {name}, saved for the backward, came back as another tensor", got, allowed, fix))


def outside_autocast(run: Callable, device_type: str, *args):
    """`run(*args)` with the device's autocast off: dtypes are settled by now, and it must not touch the inner products."""
    if not autocasts(device_type):
        return run(*args)
    torch.set_autocast_enabled(device_type, False)
    try:
        return run(*args)
    finally:
        torch.set_autocast_enabled(device_type, True)


def run_op(op: str, device_type: str, backend: str, strict: bool, args: tuple):
    run = _registry.select(op, backend, strict, device_type, args)
    return outside_autocast(run, device_type, *args)


def keep(runs: dict, key: tuple, run: Callable, quiet: bool) -> Callable:
    """`run`, remembered unless a reason was logged when it was decided."""
    if quiet:
        if len(runs) >= MAX_SIGNATURES:
            runs.clear()
        runs[key] = run
    return run


def dense(t: Tensor) -> Tensor:
    """The matrix `t` with rows that are contiguous and lie apart, a copy where they do not: the only ones that every kernel reads.

    y.sum().backward() gives a dy of one element, y.sum(0) one of one row, y.t() one by columns.
    """
    return t if (t.stride(1) == 1 and t.stride(0) != 0) or t.shape[1] == 1 else t.clone(memory_format=torch.contiguous_format)


def draw_seed(seed: int | Tensor | None, device: torch.device, op: str = "lora_linear") -> Tensor:
    """A 1-element int64 seed on `device`: drawn from torch's generator when None, so manual_seed and checkpointing replay it."""
    if seed is None:
        return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device)
    _checks.check_seed(op, seed)
    if isinstance(seed, Tensor):
        if seed.layout is not torch.strided or (seed.is_meta and device.type != "meta"):
            got = "device meta" if seed.is_meta else seed.layout
            raise LoraTypeError(message(f"{op}: seed has no number that could be read", got, "int, or int64 tensor of 1 element"))
        return seed.to(device).reshape(1)
    if type(seed) is not int:
        if isinstance(seed, bool):
            raise LoraTypeError(message(f"{op}: seed is no seed", seed, "int, or int64 tensor of 1 element"))
        seed = operator.index(seed)  # numpy's integers
    return torch.full((1,), seed, dtype=torch.int64, device=device)  # a fill: torch.tensor would copy from the host and wait


def exporting() -> bool:
    """Whether torch.export traces this call. `torch.compiler.is_exporting` says so of every torch.compile in torch 2.11."""
    flag = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_exporting() if flag is None else flag


def check_memory(op: str, *tensors: object) -> None:
    """Raise where a tensor of its own is larger than its storage: freed (FSDP1, ZeRO-3) or shrunk. Kernels would read past the end."""
    for t in tensors:
        if type(t) not in (Tensor, torch.nn.Parameter) or t.numel() == 0 or t._is_zerotensor() or torch._is_functional_tensor(t):
            continue
        last = t.storage_offset() + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        needed, there = (last + 1) * t.element_size(), t.untyped_storage().nbytes()
        if there < needed:
            got = f"{there} bytes for the {needed} of {t.dtype} {list(t.shape)}"
            raise LoraValueError(message(f"{op}: a tensor's storage was freed or shrunk", got, fix="gather it (FSDP, ZeRO-3) before the call"))


def is_batched(dy: Tensor) -> bool:
    """Whether vmap runs the backward: torch.autograd.grad(..., is_grads_batched=True), jacobian(vectorize=True), torch.vmap around autograd.grad."""
    return torch._C._functorch.is_legacy_batchedtensor(dy) or torch._C._functorch.is_batchedtensor(dy)


def refuse_transforms(op: str, *tensors: Tensor | None) -> None:
    """Raise under a torch.func transform, and for tensors that carry a forward-mode derivative: the kernels know of neither.

    Also while torch.compile traces, whose stand-ins for tensors show no derivative: there the level alone decides.
    """
    if torch._C._are_functorch_transforms_active():
        raise LoraKernelsError(message(f"{op}: no torch.func transforms (grad, vmap, jvp)", allowed="torch.autograd", fix=PLAIN))
    if forward_ad._current_level < 0:
        return
    if torch.compiler.is_compiling() or any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise LoraKernelsError(message(f"{op}: no forward-mode derivatives", allowed="backward", fix=PLAIN))
