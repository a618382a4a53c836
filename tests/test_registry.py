"""Choosing a backend: the ladder, the environment variables, one logged reason per step down, strict."""

from __future__ import annotations

import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import lora_kernels as lk
from lora_kernels import _errors
from lora_kernels.ops import _registry

ARGS = (torch.ones(2, 8), torch.ones(4, 8), None, torch.ones(2, 8), torch.ones(4, 2))


@pytest.fixture(autouse=True)
def _fresh_warnings(monkeypatch):
    monkeypatch.delenv("LORA_KERNELS_BACKEND", raising=False)
    monkeypatch.delenv("LORA_KERNELS_STRICT", raising=False)
    _errors.warn_once.cache_clear()


def test_a_backend_that_cannot_run_is_logged_once(caplog):
    with caplog.at_level(logging.WARNING, "lora_kernels"):
        for _ in range(3):
            lk.lora_linear(*ARGS, backend="triton")
    assert len([r for r in caplog.records if "lora_linear_fwd: triton is not used here: it serves cuda tensors" in r.message]) == 1


def test_strict_raises_instead(monkeypatch):
    with pytest.raises(lk.BackendError, match="backend triton cannot run this call.*fix:"):
        lk.lora_linear(*ARGS, backend="triton", strict=True)
    monkeypatch.setenv("LORA_KERNELS_STRICT", "1")
    with pytest.raises(lk.BackendError, match="backend cuda cannot run this call"):
        lk.lora_linear(*ARGS, backend="cuda")
    lk.lora_linear(*ARGS)


def test_a_machine_without_kernels_is_told_once(monkeypatch, caplog):
    provider = _registry.provider
    monkeypatch.setattr(_registry, "provider", lambda backend: "the native module is not built" if backend == "cpu" else provider(backend))
    x, w, a, b = torch.randn(2, 3), torch.randn(4, 3), torch.randn(1, 3), torch.randn(4, 1)
    with caplog.at_level(logging.WARNING, "lora_kernels"):
        for _ in range(2):
            _registry.decide("lora_linear_fwd", "auto", True, "cpu", (x, w, None, a, b, 1.0, 0.0, None))
            _registry.decide("lora_linear_bwd", "auto", False, "cpu", (x, x, w, a, b, x, None, 1.0, 0.0, True, True, True))
    assert [r.message for r in caplog.records] == [
        "no kernels on this cpu, plain PyTorch runs instead: cpu: the native module is not built; `lora-kernels env` says more"
    ]


def test_a_backend_without_the_op_is_passed_by_in_silence(monkeypatch, caplog):
    """As the CUDA kernels by the many-adapter ops: the choice may be remembered, and strict does not mind, unless that backend was asked for."""
    run = object()
    providers = {"cuda": SimpleNamespace(OPS={}), "triton": SimpleNamespace(OPS={"lora_batched_fwd": (run, lambda *args: None)})}
    monkeypatch.setattr(_registry, "provider", providers.__getitem__)
    with caplog.at_level(logging.WARNING, "lora_kernels"):
        for strict in (False, True):
            assert _registry.decide("lora_batched_fwd", "auto", strict, "cuda", ()) == (run, True)
    assert not caplog.records
    assert _registry.decide("lora_batched_fwd", "cuda", False, "cuda", ()) == (run, False)
    with pytest.raises(lk.BackendError, match="it has no lora_batched_fwd"):
        _registry.decide("lora_batched_fwd", "cuda", True, "cuda", ())


def test_environment_chooses(monkeypatch, caplog):
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "triton")
    with caplog.at_level(logging.WARNING, "lora_kernels"):
        lk.lora_linear(*ARGS)
    assert "triton is not used here" in caplog.text
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "rocm")
    with pytest.raises(lk.LoraValueError, match="LORA_KERNELS_BACKEND names no backend; got 'rocm'"):
        lk.lora_linear(*ARGS)


def test_import_is_light():
    """Importing the package starts no CUDA and imports neither triton, peft nor transformers."""
    code = (
        "import sys, torch, lora_kernels; assert not torch.cuda.is_initialized();"
        "bad = {'triton', 'peft', 'transformers'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_works_without_triton_and_native_module():
    code = (
        "import sys; sys.modules['triton'] = None; sys.modules['lora_kernels._C'] = None\n"
        "import torch, lora_kernels as lk\n"
        "assert lk.lora_linear(torch.ones(2, 8), torch.ones(4, 8), None, torch.ones(2, 8), torch.ones(4, 2)).tolist() == [[24.0] * 4] * 2"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_first_call_in_inference_mode_leaves_training_as_it_is():
    """Evaluate, then train: nothing that the first call keeps may be an inference tensor, which autograd refuses to save."""
    code = (
        "import torch, lora_kernels as lk\n"
        "x, w, a, b = torch.ones(2, 8), torch.ones(4, 8), torch.ones(2, 8), torch.ones(4, 2)\n"
        "ids = torch.zeros(2, dtype=torch.int32)\n"
        "with torch.inference_mode():\n"
        "    lk.lora_linear(x, w, None, a, b); lk.lora_batched_linear(x, w, None, a[None], b[None], ids)\n"
        "a.requires_grad_(); b.requires_grad_()\n"
        "lk.lora_linear(x, w, None, a, b).sum().backward()\n"
        "lk.lora_batched_linear(x, w, None, a[None], b[None], ids).sum().backward()\n"
        "assert a.grad.abs().sum() > 0 and b.grad.abs().sum() > 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
