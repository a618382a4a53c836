"""Guards against slowdowns that hold on a noisy machine: Python calls, dispatched ops and bytes per call; one generous ratio inside one run.

No absolute time. The counts are exact and repeat; a bound is about one and a half times what was counted when it was written.
"""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import lora_kernels as lk
from lora_kernels import testing

M, K, N, R = 4, 64, 48, 8


def _layer(dtype=torch.bfloat16, tokens: int = M, features: int = K, out: int = N) -> tuple:
    x = torch.randn(tokens, features, dtype=dtype, requires_grad=True)
    a, b = (torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((R, features), (out, R)))
    return x, torch.randn(out, features, dtype=dtype), a, b


def _python_calls(run) -> int:
    """Python and C function calls made by `run`, once it has made and remembered what it needs."""
    for _ in range(3):
        run()
    count = 0

    def tick(_frame, event, _arg):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(tick)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


class _Dispatched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad, bound", [(False, 80), (True, 130)], ids=["inference", "training"])
def test_host_calls_per_forward(grad, bound):
    x, w, a, b = _layer()
    with torch.set_grad_enabled(grad):
        assert _python_calls(lambda: lk.lora_linear(x, w, None, a, b, 2.0)) <= bound


@pytest.mark.parametrize("p", [0.0, 0.25], ids=["plain", "dropout"])
def test_host_calls_per_training_step(p):
    x, w, a, b = _layer()
    dy = torch.randn(M, N, dtype=x.dtype)
    step = lambda: torch.autograd.grad(lk.lora_linear(x, w, None, a, b, 2.0, dropout_p=p), [x, a, b], dy)
    assert _python_calls(step) <= 340


def test_one_op_each_way():
    x, w, a, b = _layer()
    dy = torch.randn(M, N, dtype=x.dtype)
    with _Dispatched() as seen:
        torch.autograd.grad(lk.lora_linear(x, w, None, a, b, 2.0), [x, a, b], dy)
    assert seen.ops == ["lora_kernels.lora_linear_fwd.default", "lora_kernels.lora_linear_bwd.default"]


@pytest.mark.parametrize("p, extra", [(0.0, 0), (0.25, M * (K // 8))], ids=["plain", "dropout"])
def test_saved_for_backward(p, extra):
    """x itself, h, and with dropout one bit per element of x."""
    x, w, a, b = _layer()
    saved = testing.saved_bytes(lambda: lk.lora_linear(x, w, None, a, b, 2.0, dropout_p=p), weights=(w, a, b))
    assert saved == x.element_size() * (M * K + M * R) + extra


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_never_twice_as_slow_as_plain_pytorch(dtype):
    """Both are timed in turns in one run, and the best rounds compared: other load only makes rounds worse."""
    x, w, a, b = _layer(dtype, tokens=256, features=512, out=768)
    dy = torch.randn(256, 768, dtype=dtype)
    plain = lambda: torch.autograd.grad(F.linear(x, w) + 2.0 * F.linear(F.linear(x, a), b), [x, a, b], dy)
    ours = lambda: torch.autograd.grad(lk.lora_linear(x, w, None, a, b, 2.0), [x, a, b], dy)
    times = testing.time_interleaved({"plain": plain, "ours": ours}, rounds=25)
    assert min(times["ours"]) <= 2 * min(times["plain"])
