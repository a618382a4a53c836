"""`lk.lora_linear` differentiated twice: under create_graph=True its backward is plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from oracle import Case

import lora_kernels as lk


@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("trained", ["x", "lora_a", "lora_b", "x lora_a", "lora_a lora_b", "x lora_a lora_b"])
def test_gradgradcheck(trained, dropout_p):
    c = Case.random(6, 12, 33, 4, torch.float64)
    inputs = [getattr(c, name).requires_grad_(name in trained) for name in ("x", "lora_a", "lora_b")]
    call = lambda x, a, b: lk.lora_linear(x.view(2, 3, 33), c.weight, c.bias, a, b, 0.5, dropout_p, seed=7)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["no_dropout", "dropout"])
def test_create_graph_gives_the_same_gradients(dropout_p):
    c = Case.random(9, 20, 33, 4, dropout_p=dropout_p)
    inputs = [t.requires_grad_() for t in (c.x, c.lora_a, c.lora_b)]
    y = lk.lora_linear(c.x, c.weight, c.bias, c.lora_a, c.lora_b, c.scaling, dropout_p, seed=c.seed)
    ours, plain = (torch.autograd.grad(y, inputs, c.dy, retain_graph=True, create_graph=graph) for graph in (False, True))
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize(("p", "words"), [(2**-17, 0), (1.1 * 2**-17, 2)], ids=["drops-nothing", "drops"])
def test_a_mask_is_kept_only_where_p_can_drop(p, words):
    """p is rounded to 1 / 65536ths; of none the engines draw no mask, which the backward in plain PyTorch would read all the same."""
    c = Case.random(9, 20, 33, 4)
    y = lk.lora_linear(c.x.requires_grad_(), c.weight, None, c.lora_a, c.lora_b, 1.0, p)
    (mask,) = (t for t in y.grad_fn.saved_tensors if t is not None and t.dtype is torch.int32)
    assert mask.numel() == 9 * words


def test_second_derivatives_without_x():
    c = Case.random(9, 20, 33, 4)
    x, b = c.x.clone().requires_grad_(), c.lora_b.clone().requires_grad_()
    y = lk.lora_linear(x, c.weight, c.bias, c.lora_a, b, c.scaling)
    dx, db = torch.autograd.grad(y.square().sum(), (x, b), create_graph=True)
    dx.sum().backward(retain_graph=True)
    with pytest.raises(lk.LoraKernelsError, match="where lora_a is frozen.*fix: lora_a.requires_grad_"):
        db.sum().backward()


BATCHED = {
    "is_grads_batched": lambda y, inputs, dys: torch.autograd.grad(y, inputs, dys, is_grads_batched=True),
    "vmap": lambda y, inputs, dys: torch.vmap(lambda dy: torch.autograd.grad(y, inputs, dy, retain_graph=True))(dys),
}


@pytest.mark.parametrize("how", BATCHED)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("trained", ["x lora_a lora_b", "x lora_b"])
def test_many_gradients_at_once(trained, dropout_p, how):
    made = {name: torch.randn(*size) for name, size in {"x": (2, 3, 33), "lora_a": (4, 33), "lora_b": (20, 4)}.items()}
    inputs = [made[name].requires_grad_() for name in trained.split()]
    y = lk.lora_linear(made["x"], torch.randn(20, 33), None, made["lora_a"], made["lora_b"], 1.5, dropout_p, seed=3)
    dys = torch.randn(5, *y.shape)
    one_by_one = zip(*(torch.autograd.grad(y, inputs, dy, retain_graph=True) for dy in dys), strict=True)
    for got, expected in zip(BATCHED[how](y, inputs, dys), map(torch.stack, one_by_one), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_many_gradients_at_once_of_many_adapters_are_refused_with_a_fix():
    pool_a, pool_b = torch.randn(2, 4, 33).requires_grad_(), torch.randn(2, 20, 4).requires_grad_()
    y = lk.lora_batched_linear(torch.randn(3, 33), torch.randn(20, 33), None, pool_a, pool_b, torch.tensor([0, -1, 1], dtype=torch.int32))
    with pytest.raises(lk.LoraKernelsError, match="lora_batched_linear: no vmap .*fix: compute this layer in plain PyTorch"):
        torch.autograd.grad(y, (pool_a, pool_b), torch.randn(5, 3, 20), is_grads_batched=True)
