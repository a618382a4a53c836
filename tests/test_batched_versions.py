"""Operands of the many-adapter ops that change in place: autograd hears of it, a backward refuses it, what was checked is checked again."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lora_kernels import LoraKernelsError, LoraValueError, lora_batched_linear, lora_expand, lora_shrink
from lora_kernels.ops.batch_meta import BatchMeta

IDS = torch.tensor([0, 0, 1, -1], dtype=torch.int32)


@pytest.mark.parametrize("calls", [1, 3], ids=["first_call", "lean_path"])
def test_expand_counts_as_a_write(calls) -> None:
    """A backward that needs what was there before raises, as after any in-place op of PyTorch."""
    h, pool_b = torch.ones(4, 2), torch.ones(2, 6, 2)
    with torch.no_grad():
        for _ in range(calls - 1):
            lora_expand(torch.zeros(4, 6), h, pool_b, IDS)
    y = torch.randn(4, 6, requires_grad=True)
    e = y.exp()
    with torch.no_grad():
        lora_expand(e, h, pool_b, IDS)
    assert e._version == 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        e.sum().backward()


def test_expand_of_a_tensor_of_inference_mode() -> None:
    with torch.inference_mode():
        y = torch.zeros(4, 6)
        lora_expand(y, torch.ones(4, 2), torch.ones(2, 6, 2), IDS)
    assert y.tolist() == [[2.0] * 6] * 3 + [[0.0] * 6]
    with pytest.raises(LoraKernelsError, match="y was made in inference mode"):
        lora_expand(y, torch.ones(4, 2), torch.ones(2, 6, 2), IDS)


RETURNED = {
    "16 bits": ("x", lambda t: t.bfloat16() if t.shape == (4, 8) else t),
    "fewer rows": ("x", lambda t: t[:3] if t.shape == (4, 8) else t),
    "another weight": (r"weight\[0\]", lambda t: t.half() if t.shape == (6, 8) else t),
    "fewer adapters": (r"pool_b\[0\]", lambda t: t[:1] if t.shape == (2, 6, 3) else t),
    "another h": ("h", lambda t: t[:, :2] if t.dim() == 3 and t.shape[:2] == (1, 4) else t),
    "no integers": ("mask", lambda t: t.float() if t.dtype is torch.int32 else t),
}


@pytest.mark.parametrize("case", RETURNED)
def test_saved_tensors_that_come_back_as_others(case) -> None:
    """The kernels would read past their ends, or floats out of the wrong bits."""
    (name, unpack), leaf = RETURNED[case], lambda *s: torch.randn(s, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        y = lora_batched_linear(leaf(4, 8), torch.randn(6, 8), None, leaf(2, 3, 8), leaf(2, 6, 3), IDS, dropout_p=0.25, seed=1)
        with pytest.raises(LoraKernelsError, match=f"{name}, saved for the backward, came back as another tensor"):
            y.sum().backward()


def test_create_graph_under_a_checkpoint() -> None:
    """Which gives out a saved tensor once."""
    leaf = lambda *s: torch.randn(s, requires_grad=True)
    x, a, b, w = leaf(4, 8), leaf(2, 3, 8), leaf(2, 6, 3), torch.randn(6, 8)
    call = lambda x: lora_batched_linear(x, w, None, a, b, IDS).square()
    plain = torch.autograd.grad(call(x).sum(), (x, a, b))
    again = torch.autograd.grad(checkpoint(call, x, use_reentrant=False).sum(), (x, a, b), create_graph=True)
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other)


CHANGES = {
    "ids": lambda o: o["token_lora_mapping"].fill_(1),
    "meta": lambda o: o["token_lora_mapping"].update_(IDS.flip(0)),
    "ranks": lambda o: o["ranks"].fill_(1),
    "scalings": lambda o: o["scalings"].mul_(10),
    "dropout_p": lambda o: o["dropout_p"].fill_(0.25),
}


@pytest.mark.parametrize("what", CHANGES)
def test_backward_refuses_what_changed_since_the_forward(what) -> None:
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(6, 8)
    a, b = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 6, 3, requires_grad=True)
    ids = BatchMeta(IDS, 2) if what == "meta" else IDS.clone()
    options = dict(token_lora_mapping=ids, ranks=torch.tensor([3, 2], dtype=torch.int32), scalings=torch.tensor([0.5, 2.0]))
    options["dropout_p"] = torch.full((2,), 0.5)
    y = lora_batched_linear(x, w, None, a, b, **options)
    torch.autograd.grad(y.sum(), [x, a, b], retain_graph=True)
    CHANGES[what](options)
    with pytest.raises(LoraKernelsError, match="was changed in place between forward and backward"):
        torch.autograd.grad(y.sum(), [x, a, b])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scalings_are_finite(bad) -> None:
    """Looked at in every call, also where nothing else of the call is new; in place of a tensor that was fine, and written into one."""
    x, pool_a, fine = torch.randn(4, 8), torch.ones(2, 3, 8), torch.tensor([0.5, 2.0])
    with torch.no_grad():
        for _ in range(3):
            lora_shrink(x, pool_a, IDS, None, fine)
            lora_shrink(x, pool_a, IDS, None, torch.tensor([0.5, 2.0]))
        for scalings in (torch.tensor([bad, 1.0]), fine.fill_(bad), torch.tensor([[1.0, bad]])):
            with pytest.raises(LoraValueError, match="lora_shrink: scalings are not finite"):
                lora_shrink(x, pool_a, IDS, None, scalings)
            with pytest.raises(LoraValueError, match="lora_batched_linear: scalings are not finite"):
                lora_batched_linear(x, torch.ones(6, 8), None, pool_a, torch.ones(2, 6, 3), IDS, None, scalings)
