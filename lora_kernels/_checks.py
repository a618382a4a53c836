"""Validation of the arguments of the public ops, before anything is computed."""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from ._device import BACKENDS
from ._errors import LoraTypeError, LoraValueError, message

LARGEST = 3.4028234663852886e38  # float32's largest number: kernels take scalings as float32
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def _shape(t: Tensor) -> str:
    return "[" + ", ".join(str(s) for s in t.shape) + "]"


def check_tensors(op: str, **tensors: object) -> None:
    """Raise unless everything is a tensor of rows and columns in memory; nested, sparse and other layouts have none that could be read."""
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise LoraTypeError(message(f"{op}: {name} is no tensor", type(t).__name__, "torch.Tensor"))
        if t.is_nested or t.layout is not torch.strided:
            got = f"nested {t.layout}" if t.is_nested else t.layout
            raise LoraTypeError(message(f"{op}: {name} has an unsupported layout", got, "torch.strided", f"{name}.to_dense(); .values() if jagged"))


def check_scaling(op: str, scaling: float) -> None:
    if not isinstance(scaling, (int, float)) or isinstance(scaling, bool):
        raise LoraTypeError(message(f"{op}: scaling is not a number", type(scaling).__name__, "a Python int or float", "pass scaling.item()"))
    if not abs(scaling) <= LARGEST:  # also NaN; math.isfinite cannot be traced by torch.compile
        raise LoraValueError(message(f"{op}: scaling is not finite", scaling, f"up to {LARGEST:.6g}, as float32", "scaling is lora_alpha / r"))


def check_dropout(op: str, p: float) -> None:
    if not isinstance(p, (int, float)) or isinstance(p, bool) or not 0 <= p <= 1:
        raise LoraValueError(message(f"{op}: dropout_p is no probability", p, "a number from 0 to 1"))


def check_seed(op: str, seed: object) -> None:
    """None, an integer of 64 bits (also numpy's), or a tensor of one."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise LoraTypeError(message(f"{op}: seed is no seed", f"{seed.dtype} {list(seed.shape)}", "int, or int64 tensor of 1 element"))
    elif seed is not None:
        try:
            fits = -(2**63) <= (seed if isinstance(seed, int) else operator.index(seed)) < 2**63
        except TypeError:
            raise LoraTypeError(message(f"{op}: seed is no seed", type(seed).__name__, "int, or int64 tensor of 1 element")) from None
        if not fits:
            raise LoraValueError(message(f"{op}: seed is no seed", seed, "an int of 64 bits"))


def check_backend(op: str, backend: str) -> None:
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise LoraValueError(message(f"{op}: unknown backend", repr(backend), ", ".join(BACKENDS)))


def check_flags(op: str, **flags: object) -> None:
    """Each is True or False, or None where that stands for the environment's."""
    for name, flag in flags.items():
        if not isinstance(flag, bool) and not (flag is None and name == "batch_invariant"):
            raise LoraTypeError(message(f"{op}: {name} is no flag", repr(flag)[:80], "True or False"))


def check_options(op: str, backend: str, **flags: object) -> None:
    check_backend(op, backend)
    check_flags(op, **flags)


def check_lora_linear(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor) -> None:
    """Raise unless x [..., K], weight [N, K], bias [N], lora_a [R, K], lora_b [N, R] fit in shape, dtype and device."""
    check_tensors(op, x=x, weight=weight, lora_a=lora_a, lora_b=lora_b, **({} if bias is None else {"bias": bias}))
    if x.dim() < 1 or weight.dim() != 2 or lora_a.dim() != 2 or lora_b.dim() != 2:
        got = f"x {_shape(x)}, weight {_shape(weight)}, lora_a {_shape(lora_a)}, lora_b {_shape(lora_b)}"
        raise LoraValueError(message(f"{op}: wrong number of dimensions", got, "x [..., K], weight [N, K], lora_a [R, K], lora_b [N, R]"))
    (N, K), R = weight.shape, lora_a.shape[0]
    if x.shape[-1] != K:
        raise LoraValueError(
            message(f"{op}: x and weight disagree on K", f"x {_shape(x)}, weight {_shape(weight)}", "x.shape[-1] == weight.shape[1]")
        )
    if N < 1 or K < 1:
        raise LoraValueError(message(f"{op}: weight has no elements", f"weight {_shape(weight)}", "[N, K] with N >= 1 and K >= 1"))
    if R < 1:
        raise LoraValueError(message(f"{op}: rank 0", f"lora_a {_shape(lora_a)}", "R >= 1", "call torch.nn.functional.linear for no adapter"))
    if lora_a.shape[1] != K:
        fix = "lora_a is [R, K]; transpose it" if lora_a.shape[0] == K else None
        raise LoraValueError(message(f"{op}: lora_a does not fit x", f"lora_a {_shape(lora_a)}, x {_shape(x)}", f"lora_a [R, {K}]", fix))
    if lora_b.shape != (N, R):
        fix = "lora_b is [N, R]; transpose it" if lora_b.shape == (R, N) else None
        raise LoraValueError(message(f"{op}: lora_b does not fit weight and lora_a", f"lora_b {_shape(lora_b)}", f"[{N}, {R}]", fix))
    if bias is not None and bias.shape != (N,):
        raise LoraValueError(message(f"{op}: bias does not fit weight", f"bias {_shape(bias)}", f"[{N}] or None"))
    check_dtypes(op, x, weight, bias, lora_a, lora_b)
    check_devices(op, x=x, weight=weight, bias=bias, lora_a=lora_a, lora_b=lora_b)


def check_dtype(op: str, **tensor: Tensor) -> None:
    """x or y is of a type that can be computed with."""
    ((name, t),) = tensor.items()
    if t.dtype not in DTYPES:
        raise LoraTypeError(message(f"{op}: {name} has an unsupported dtype", t.dtype, "bfloat16, float16, float32 (float64 on the reference)"))


def check_dtypes(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor) -> None:
    check_dtype(op, x=x)
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        got = f"x {x.dtype}, weight {weight.dtype}" + ("" if bias is None else f", bias {bias.dtype}")
        raise LoraTypeError(message(f"{op}: x, weight and bias differ in dtype", got, "one dtype", "cast x, or run under torch.autocast"))
    for name, t in (("lora_a", lora_a), ("lora_b", lora_b)):
        if t.dtype != x.dtype and t.dtype != torch.float32:
            raise LoraTypeError(
                message(f"{op}: {name} has an unsupported dtype", t.dtype, f"{x.dtype} (as x) or torch.float32", f"{name}.to({x.dtype})")
            )


def check_devices(op: str, **tensors: Tensor | None) -> None:
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(devices.values())) > 1:
        got = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise LoraValueError(message(f"{op}: tensors on different devices", got, "one device", "move them with .to(x.device)"))
