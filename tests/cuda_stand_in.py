"""A stand-in for the CUDA part of `_C`: computes, on the CPU, what each call of csrc/cuda/api.h asks for."""

from __future__ import annotations

import contextlib
import ctypes
from types import SimpleNamespace

import torch

from lora_kernels import _device, reference
from lora_kernels._flags import Flags
from lora_kernels.native import cuda

DTYPES = (torch.bfloat16, torch.float16)
BYTES = {torch.bfloat16: 2, torch.float16: 2, torch.int32: 4, torch.int64: 8}


def view(address: int, dtype: torch.dtype, rows: int, cols: int, pitch: int | None = None) -> torch.Tensor:
    """The matrix at an address, as a kernel sees it."""
    pitch = cols if pitch is None else pitch
    assert address % 16 == 0 or dtype == torch.int64
    count = (rows - 1) * pitch + cols
    raw = (ctypes.c_char * (count * BYTES[dtype])).from_address(address)
    return torch.frombuffer(raw, dtype=dtype).as_strided((rows, cols), (pitch, 1))


class StandIn:
    """`_C` as csrc/cuda/api.h describes it, by plain PyTorch on the addresses it is given."""

    class CudaError(RuntimeError):
        pass

    def __init__(self):
        self.calls: list[SimpleNamespace] = []

    def cuda_linear_sync_ints(self, M):
        return 1 + 2 * (-(-M // 128) + 1)

    def cuda_linear(self, element, backward, column0, masked, dependent, block_m, block_n, cluster, group_m, M, N, K, R, scale, *rest):
        x, ldx, w, ldw, a, lda, b, ldb, y, ldy, bias, h, mask, sync, stream = rest
        self.calls.append(SimpleNamespace(**{k: v for k, v in locals().items() if k not in ("self", "rest")}))
        widest = (block_m, block_n) == (128, 256)
        if not (widest or ((block_m, block_n) in ((128, 192), (128, 128), (256, 128)) and not column0 and not masked)) or (column0 and R > 64):
            raise self.CudaError(f"tile={block_m}x{block_n}: no such kernel")
        assert cluster in (1, 2)
        dtype = DTYPES[element]
        x, y = view(x, dtype, M, K, ldx), view(y, dtype, M, N, ldy)
        w = view(w, dtype, K, N, ldw) if backward else view(w, dtype, N, K, ldw).t()
        total = x.float() @ w.float()
        if R:
            b = view(b, dtype, R, N, ldb) if backward else view(b, dtype, N, R, ldb).t()
            h = view(h, dtype, M, R)
            if column0:
                a = view(a, dtype, K, R, lda) if backward else view(a, dtype, R, K, lda).t()
                h.copy_(scale * (x.float() @ a.float()))
                assert not view(sync, torch.int32, 1, self.cuda_linear_sync_ints(M)).any()
            else:
                assert (a, sync) == (0, 0)
            update = h.float() @ b.float()
            if masked:
                update = torch.where(reference.unpack_bits(view(mask, torch.int32, M, -(-N // 32)), N), update * scale, 0.0)
            total += update
        if bias:
            total += view(bias, dtype, 1, N)
        y.copy_(total)

    def cuda_shrink(self, element, backward, M, K, R, split, scale, threshold, x, ldx, a, lda, h, mask, seed, stream):
        self.calls.append(SimpleNamespace(**{k: v for k, v in locals().items() if k != "self"}))
        dtype = DTYPES[element]
        x = view(x, dtype, M, K, ldx).float()
        a = view(a, dtype, K, R, lda) if backward else view(a, dtype, R, K, lda).t()
        if mask:
            bits = reference.dropout_mask(view(seed, torch.int64, 1, 1)[0], M, K, threshold / 65536)
            view(mask, torch.int32, *bits.shape).copy_(bits)
            x = torch.where(reference.unpack_bits(bits, K), x, 0.0)
        view(h, dtype, M, R).copy_(scale * (x @ a.float()))


def install(monkeypatch) -> StandIn:
    """Make it the module behind `native.cuda`, on a machine whose CUDA parts are stood in for as well."""
    stand_in = StandIn()
    monkeypatch.setattr(cuda, "_module", lambda: stand_in)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "device", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(_device, "sm_count", lambda *_: 132)
    monkeypatch.setattr(_device, "has_module", lambda name: False)
    monkeypatch.setattr(cuda, "flags", Flags())
    return stand_in
