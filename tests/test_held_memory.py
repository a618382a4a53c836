"""What is remembered of a call's signature holds on to none of its tensors, nor to a graph."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import lora_kernels as lk

BACKENDS = ["reference", "auto"]


def strided(x: torch.Tensor, how: str) -> torch.Tensor:
    if how == "by_columns":
        return x.t().contiguous().t()
    return x.new_empty(x.shape[0], 1).normal_().expand_as(x) if how == "one_column" else x


def alive(refs: list[weakref.ref]) -> int:
    gc.collect()
    return sum(ref() is not None for ref in refs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["rows", "by_columns", "one_column"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "no_gradient"])
def test_linear_lets_go_of_its_operands(trained, how, backend) -> None:
    w, a, b = torch.randn(6, 8), torch.randn(3, 8, requires_grad=trained), torch.randn(6, 3, requires_grad=trained)
    refs = []
    for M in range(40, 44):
        x = strided(torch.randn(M, 8), how)
        y = lk.lora_linear(x, w, None, a, b, 0.5, 0.25 if trained else 0.0, backend=backend)
        refs += [weakref.ref(x), weakref.ref(y)]
        if trained:
            dy = strided(torch.randn(M, 6), how)
            y.backward(dy)
            refs.append(weakref.ref(dy))
            del dy
        del x, y
    assert alive(refs) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_batched_ops_let_go_of_their_operands(backend) -> None:
    w, a, b = torch.randn(6, 8), torch.randn(2, 3, 8), torch.randn(2, 6, 3)
    refs = []
    for M in range(40, 44):
        for how in ("rows", "by_columns"):
            x, ids = strided(torch.randn(M, 8), how), torch.zeros(M, dtype=torch.int32)
            y = lk.lora_batched_linear(x, w, None, a, b, ids, backend=backend)
            h = lk.lora_shrink(x, a, ids, backend=backend)
            lk.lora_expand(y, h, b, ids, backend=backend)
            refs += map(weakref.ref, (x, ids, y, h))
            del x, ids, y, h
    assert alive(refs) == 0


class Held:
    count = 0

    def __init__(self) -> None:
        Held.count += 1

    def __del__(self) -> None:
        Held.count -= 1


class Watched(torch.autograd.Function):
    """The identity; its node in the graph holds a `Held`."""

    @staticmethod
    def forward(ctx, t):
        ctx.held = Held()
        return t.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy


@pytest.mark.parametrize("frozen", ["x", "a", "b"])
def test_create_graph_keeps_no_graph(frozen) -> None:
    """One gradient of three is not needed: the empty tensor in its place serves all calls, and belongs to no graph."""
    w, a, b = torch.randn(6, 8), torch.randn(3, 8, requires_grad=frozen != "a"), torch.randn(6, 3, requires_grad=frozen != "b")
    for M in range(1, 6):
        x = torch.randn(M, 8) if frozen == "x" else Watched.apply(torch.randn(M, 8, requires_grad=True))
        a_, b_ = (Watched.apply(t) if t.requires_grad else t for t in (a, b))
        y = lk.lora_linear(x, w, None, a_, b_)
        torch.autograd.grad(y, [t for t in (x, a_, b_) if t.requires_grad], torch.ones(M, 6), create_graph=True)
    del x, y, a_, b_
    gc.collect()
    assert Held.count == 0
