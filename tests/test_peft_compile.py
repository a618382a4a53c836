"""Patched PEFT models in training through inductor: dropout, activation checkpointing, the numbers of eager."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft_models import adapted, batch, one_thread  # noqa: F401 (one_thread is a fixture)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WAYS = {
    "plain": lambda model, reentrant, compiled: compiled(model),
    "checkpoint inside": lambda model, reentrant, compiled: compiled(lambda x: checkpoint(model, x, use_reentrant=reentrant)),
    "checkpoint outside": lambda model, reentrant, compiled: (lambda f: lambda x: checkpoint(f, x, use_reentrant=reentrant))(compiled(model)),
}


def curve(net: Callable, model: nn.Module, x: Tensor, steps: int = 3) -> list[Tensor]:
    """Losses and the last gradient of x: every step draws new masks, and the generator has moved on when the backward runs."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.3)
    x = x.clone().requires_grad_()
    torch.manual_seed(5)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = net(x).square().mean()
        torch.rand(3)
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return [*found, x.grad]


def curves(way: str, reentrant: bool, backend: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Eager; compiled as a whole, drawing from torch's generator as eager does; compiled as it comes."""
    torch._dynamo.reset()
    x = batch("mlp", 30)["x"]
    models = [adapted("mlp", True, lora_dropout=0.4).train() for _ in range(3)]
    compiled = lambda f: torch.compile(f, backend=backend, fullgraph=True)
    expected = curve(models[0], models[0], x)
    with torch._inductor.config.patch(fallback_random=True):
        got = curve(WAYS[way](models[1], reentrant, compiled), models[1], x)
    torch._dynamo.reset()
    return expected, got, curve(WAYS[way](models[2], reentrant, compiled), models[2], x)


def assert_trains_as_eager(way: str, reentrant: bool, backend: str) -> None:
    expected, got, own = curves(way, reentrant, backend)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert len({loss.item() for loss in expected[:3]}) == 3
    if backend == "inductor":  # draws seeds of its own, which manual_seed also repeats
        assert not torch.allclose(own[0], expected[0])
        torch.testing.assert_close(curves(way, reentrant, backend)[2], own, rtol=0, atol=0)


def test_dropout_through_inductor_and_checkpointing_trains_as_eager():
    """Our masks: PEFT's own dropout would draw others from the same seed."""
    expected, got, own = curves("checkpoint inside", False, "inductor")
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert len({loss.item() for loss in expected[:3]}) == 3
    assert not torch.allclose(own[0], expected[0])  # inductor draws seeds of its own


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_through_the_compiler_trains_as_eager(way, reentrant, backend):
    assert_trains_as_eager(way, reentrant, backend)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["no checkpointing", "non-reentrant", "reentrant"])
def test_llama_through_inductor_trains_as_eager(checkpointing):
    """transformers' own checkpointing breaks the graph at the embeddings (requires_grad_ in a hook), patched or not."""

    def losses(compiled: bool) -> list[float]:
        torch._dynamo.reset()
        model = adapted("llama", True, lora_dropout=0.3).train()
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        net = torch.compile(model, fullgraph=checkpointing is None) if compiled else model
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        torch.manual_seed(5)
        found = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = net(**batch("llama")).loss
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    with torch._inductor.config.patch(fallback_random=True):
        assert losses(True) == pytest.approx(losses(False), rel=1e-5)
