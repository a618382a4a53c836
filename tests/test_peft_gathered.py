"""Patched layers whose weights are freed between uses, as ZeRO-3 and FSDP1 do: by hooks like theirs, who runs the layer and with which numbers."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora.layer import Linear
from peft_models import CallCount, adapted, assert_alike, batch, one_thread  # noqa: F401 (one_thread is a fixture)
from torch import nn

import lora_kernels as lk


class Freed:
    """The parameters of `module` (with `recurse` also those below it) have no elements but while its forward or backward runs."""

    def __init__(self, module: nn.Module, recurse: bool) -> None:
        self.kept = [(p, p.data) for p in module.parameters(recurse)]
        self.free()
        module.register_forward_pre_hook(self.gather)
        module.register_forward_hook(self.free)
        module.register_full_backward_pre_hook(self.gather)

    def gather(self, *_) -> None:
        for p, data in self.kept:
            p.data = data

    def free(self, *_) -> None:
        for p, _data in self.kept:
            p.data = p.data.new_empty(0)


def gradients(model: nn.Module) -> dict:
    model.zero_grad()
    found = {}
    for _ in range(3):  # what a first call found is remembered for the next
        found["loss"] = model(**batch("mlp")).square().mean()
        found["loss"].backward()
    return found | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("owners, fused", [("every module", False), ("LoRA layers", True)])
def test_weights_that_hooks_gather(owners, fused, monkeypatch):
    """A hook on each part: PEFT's forward calls the parts. One on the layer as a whole (a ZeRO-3 leaf module): fused."""
    expected, model = gradients(adapted("mlp", False)), adapted("mlp", True)
    layers = [m for m in model.modules() if isinstance(m, Linear)]
    for layer in layers:
        for module in layer.modules() if owners == "every module" else [layer]:
            if next(module.parameters(owners != "every module"), None) is not None:
                Freed(module, owners != "every module")
    calls = CallCount(monkeypatch)
    assert_alike(gradients(model), expected)
    assert calls.fused == (6 if fused else 0)
    assert set(calls.reasons) == (set() if fused else {"hooks on base_layer"})


@pytest.mark.parametrize("part", ["base_layer", "lora_A", "lora_B"])
@pytest.mark.parametrize("shape", [(0,), (60,)], ids=["no shape", "flat"])
def test_weights_that_nobody_gathered(part, shape):
    """The report names them, a call runs PEFT's forward (whose own error is what PEFT users know), and strict says why."""
    model = adapted("mlp", False)
    owner = model.base_model.model.lin0.get_submodule(part if part == "base_layer" else f"{part}.default")
    data = owner.weight.data
    owner.weight.data = torch.zeros(shape)
    report = lk.patch(model)
    assert report.skipped["base_model.model.lin0"] == f"{part}'s weight is not gathered, its shape is {list(shape)}"
    with pytest.raises(RuntimeError, match="matrix|shape|size|dimension"):
        model(**batch("mlp"))
    with pytest.raises(lk.BackendError, match=f"{part}'s weight is not gathered"):
        lk.patch(model, strict=True)
    owner.weight.data = data
    assert len(lk.patch(model, strict=True).patched) == 2
    owner.weight.data = torch.zeros(shape)
    with pytest.raises(lk.BackendError, match=f"{part}'s weight is not gathered"):
        model(**batch("mlp"))


@pytest.mark.parametrize("part", ["base_layer", "lora_A", "lora_B"])
def test_weights_that_kept_their_shape_but_not_their_memory(part):
    """Views into FSDP1's flat parameter, outside the root's forward."""
    model = adapted("mlp", True)
    owner = model.base_model.model.lin0.get_submodule(part if part == "base_layer" else f"{part}.default")
    for _ in range(3):
        model(**batch("mlp"))
    flat = torch.cat([torch.zeros(7), owner.weight.data.flatten()])
    owner.weight.data = flat[7:].view_as(owner.weight)
    model(**batch("mlp"))
    flat.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="setStorage"):  # F.linear's own
        model(**batch("mlp"))
    assert lk.patch(model).skipped == {"base_model.model.lin0": f"{part}'s weight is not gathered, its storage is empty"}
