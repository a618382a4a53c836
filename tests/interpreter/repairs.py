"""Repairs of Triton's interpreter (faults seen in 3.6.0), for tests only: bf16 products, bf16 rounding, numpy >= 2.4, integer division.

Unrepaired, a bf16 `tl.dot` multiplies bit patterns (errors of 1e10) and fp32 -> bf16 truncates (twice the rounding error).
"""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _values(handle: TensorHandle) -> np.ndarray:
    """The numbers of a handle in fp32; bf16 is kept as its bits in uint16."""
    data = handle.data
    return (data.astype(np.uint32) << 16).view(np.float32) if _is_bf16(handle) else data.astype(np.float32)


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    return TensorHandle(np.matmul(_values(a), _values(b)) + d.data, d.dtype.scalar)


def _rounds_to_bf16(src: TensorHandle, dst_type) -> bool:
    return src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16


def _round(src: TensorHandle) -> TensorHandle:
    """fp32 -> bf16, to nearest even as the GPU does."""
    rounded = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16)
    return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)


def install() -> None:
    """Patch the interpreter of this process."""
    cast, fp_to_fp, patch_tensor = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp, interpreter._patch_lang_tensor

    def cast_impl(self, src, dst_type):
        return _round(src) if _rounds_to_bf16(src, dst_type) else cast(self, src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        return _round(src) if _rounds_to_bf16(src, dst_type) else fp_to_fp(self, src, dst_type, rounding_mode)

    def patch_lang_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))

    InterpreterBuilder.create_dot = _dot
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_trunc = InterpreterBuilder.create_fp_ext = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    interpreter._patch_lang_tensor = patch_lang_tensor
