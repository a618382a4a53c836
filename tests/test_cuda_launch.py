"""What Python hands to the CUDA kernels: the real launchers over a stand-in module that computes, on the CPU, what each call asks for."""

from __future__ import annotations

import contextlib
import ctypes
from types import SimpleNamespace

import pytest
import torch
from oracle import Case, assert_close

import lora_kernels as lk
from lora_kernels import _device, reference
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

    def cuda_linear(self, element, backward, column0, masked, dependent, block_n, cluster, group_m, M, N, K, R, scale, *rest):
        x, ldx, w, ldw, a, lda, b, ldb, y, ldy, bias, h, mask, sync, stream = rest
        self.calls.append(SimpleNamespace(**{k: v for k, v in locals().items() if k not in ("self", "rest")}))
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


@pytest.fixture
def module(monkeypatch):
    stand_in = StandIn()
    monkeypatch.setattr(cuda, "_module", lambda: stand_in)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(_device, "sm_count", lambda *_: 132)
    monkeypatch.setattr(_device, "has_module", lambda name: False)
    monkeypatch.setattr(cuda, "_sync", {})
    return stand_in


def forward_backward(c: Case) -> dict[str, torch.Tensor]:
    seed = torch.tensor([c.seed])
    y, h, mask = cuda.lora_linear_fwd(c.x, c.weight, c.bias, c.lora_a, c.lora_b, c.scaling, c.dropout_p, seed)
    grads = cuda.lora_linear_bwd(c.dy, c.x, c.weight, c.lora_a, c.lora_b, h, mask, c.scaling, c.dropout_p, True, True, True)
    return dict(zip(("y", "dx", "da", "db"), (y, *grads), strict=True))


@pytest.mark.parametrize("p", [0.0, 0.3], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("R", [8, 64, 72, 256])
@pytest.mark.parametrize("dtype, adapter", [(torch.bfloat16, torch.float32), (torch.float16, torch.float16)], ids=["bf16-fp32", "fp16"])
def test_calls_compute_the_op(module, dtype, adapter, R, p):
    c = Case.random(130, 72, 264, R, dtype, adapter, bias=R != 8, dropout_p=p)
    assert_close(forward_backward(c), c)
    launches = [(call.backward, getattr(call, "column0", "shrink")) for call in module.calls]
    one = R <= 64 and p == 0
    assert launches == ([(False, True), (True, True)] if one else [(False, "shrink"), (False, False), (True, "shrink"), (True, False)])
    assert all(getattr(call, "dependent", False) == (not one) for call in module.calls if hasattr(call, "block_n"))


def test_only_what_is_needed_runs(module):
    c = Case.random(64, 72, 80, 16, torch.bfloat16)
    _, h, mask = cuda.lora_linear_fwd(c.x, c.weight, c.bias, c.lora_a, c.lora_b, c.scaling, 0.0, None)
    module.calls.clear()
    dx, da, db = cuda.lora_linear_bwd(c.dy, c.x, c.weight, c.lora_a, c.lora_b, h, mask, c.scaling, 0.0, False, False, True)
    assert not module.calls
    assert dx.numel() == da.numel() == 0
    assert_close({"db": db}, c)
    *_, da, _ = cuda.lora_linear_bwd(c.dy, c.x, c.weight, c.lora_a, c.lora_b, h, mask, c.scaling, 0.0, False, True, False)
    assert [hasattr(call, "split") for call in module.calls] == [True]


def test_row_pitches_are_passed_on(module):
    c = Case.random(40, 72, 80, 16, torch.bfloat16)
    wide = lambda t: torch.nn.functional.pad(t, (16, 24))[:, 16:-24]
    c = c._replace(x=wide(c.x), weight=wide(c.weight), lora_a=wide(c.lora_a), lora_b=wide(c.lora_b), dy=wide(c.dy))
    assert cuda.refuses_fwd(c.x, c.weight, c.bias, c.lora_a, c.lora_b, 1.0, 0.0, None) is None
    assert_close(forward_backward(c), c)
    assert module.calls[0].ldx == c.x.stride(0) == 120


def test_adapters_that_tma_cannot_describe_are_copied(module):
    c = Case.random(40, 72, 80, 16, torch.bfloat16)
    odd = torch.empty(16 * 80 + 1, dtype=torch.bfloat16)[1:].view(16, 80).copy_(c.lora_a)
    assert odd.data_ptr() % 16
    c = c._replace(lora_a=odd, lora_b=c.lora_b.t().contiguous().t())
    assert_close(forward_backward(c), c)


REFUSED = {
    "rank": (dict(R=12), "R = 12"),
    "wide_rank": (dict(R=264), "R = 264"),
    "odd_columns": (dict(N=68), "N = 68"),
    "dtype": (dict(dtype=torch.float32), "dtype torch.float32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_why(name):
    changes, reason = REFUSED[name]
    sizes = dict(M=16, N=72, K=80, R=16, dtype=torch.bfloat16) | changes
    c = Case.random(**sizes)
    assert reason in cuda.refuses_fwd(c.x, c.weight, c.bias, c.lora_a, c.lora_b, 1.0, 0.0, None)
    assert reason in cuda.refuses_bwd(c.dy, c.x, c.weight, c.lora_a, c.lora_b, None, None, 1.0, 0.0, True, True, True)


def test_layouts_refused():
    c = Case.random(16, 72, 80, 16, torch.bfloat16)
    transposed = c.weight.t().contiguous().t()
    assert "weight with strides [1, 72]" in cuda.refuses_fwd(c.x, transposed, c.bias, c.lora_a, c.lora_b, 1.0, 0.0, None)
    expanded = torch.ones((), dtype=torch.bfloat16).expand(16, 72)
    assert "dy with strides [0, 0]" in cuda.refuses_bwd(expanded, c.x, c.weight, c.lora_a, c.lora_b, None, None, 1.0, 0.0, True, True, True)


def test_an_error_names_the_kernel_and_drops_the_flags(module, monkeypatch):
    c = Case.random(16, 72, 80, 16, torch.bfloat16)

    def fails(*_):
        raise StandIn.CudaError("linear<bf16> M=16 N=72: launch failed; CUDA error cudaErrorLaunchFailure (unspecified launch failure)")

    monkeypatch.setattr(module, "cuda_linear", fails)
    with pytest.raises(
        lk.BackendError, match=r"CUDA kernel failed; got linear<bf16> M=16 N=72: launch failed; CUDA error cudaErrorLaunchFailure.*fix:"
    ):
        cuda.lora_linear_fwd(c.x, c.weight, c.bias, c.lora_a, c.lora_b, 1.0, 0.0, None)
    assert not cuda._sync


def test_forms_are_ones_the_launcher_takes():
    for M in (1, 128, 129, 1000, 8192):
        for N in (8, 1024, 4096, 28672):
            for R, masked, given in ((16, False, False), (64, False, False), (72, False, True), (256, False, True), (16, True, True)):
                how = cuda.form(M, N, R, masked, given, 132)
                assert how.cluster == (2 if M > 128 else 1)
                assert how.block_n in ((256,) if how.column0 or masked else (256, 192, 128))
                assert how.column0 == (not masked and not given)
        for K in (8, 256, 4096, 28672):
            s = cuda.split(M, K, 132)
            assert s in (1, 2, 4, 8)
            assert s == 1 or 4 * s <= -(-K // 64)
