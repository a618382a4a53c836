"""Patched PEFT layers among others' doings: accelerate's hooks, FSDP2's classes, meta tensors, checkpoints, export of what is trained."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft.tuners.lora.layer import Linear
from peft_models import CallCount, adapted, output
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk
from lora_kernels.integrations.peft_layer import FusedLinear

pytestmark = pytest.mark.filterwarnings("ignore")


def layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, Linear)]


@pytest.mark.parametrize("removed", ["before unpatch", "after unpatch"])
def test_accelerate_s_hooks_on_a_fused_layer(removed, monkeypatch):
    model, expected = adapted("mlp", True), output(adapted("mlp", False), "mlp")
    for layer in layers(model):
        add_hook_to_module(layer, ModelHook())
    torch.testing.assert_close(output(model, "mlp"), expected)
    if removed == "before unpatch":
        for layer in layers(model):
            remove_hook_from_module(layer)
        assert len(lk.patch(model).patched) == 2  # the forward that is left on the instance is the layer's own
    assert lk.unpatch(model) == 2
    for layer in layers(model):
        remove_hook_from_module(layer)
    assert torch.equal(output(model, "mlp"), expected)
    assert len(lk.patch(model).patched) == 2
    count = CallCount(monkeypatch)
    torch.testing.assert_close(output(model, "mlp"), expected)
    assert count.fused == 2


@pytest.mark.parametrize("removed", ["before patch", "never"])
def test_accelerate_s_hooks_on_the_base_layer(removed, monkeypatch):
    model = adapted("mlp", False)
    expected = output(model, "mlp")
    for layer in layers(model):
        add_hook_to_module(layer.base_layer, ModelHook())
        if removed == "before patch":
            remove_hook_from_module(layer.base_layer)
    lk.patch(model)
    count = CallCount(monkeypatch)
    torch.testing.assert_close(output(model, "mlp"), expected)
    assert count.fused == (2 if removed == "before patch" else 0)


@pytest.fixture
def mesh(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("first", ["patch", "shard"])
def test_fsdp2_by_lora_layers(mesh, first):
    model, expected = adapted("mlp", first == "patch"), output(adapted("mlp", False), "mlp")
    for layer in layers(model):
        fully_shard(layer, mesh=mesh)
    assert len(lk.patch(model).patched) == 2
    torch.testing.assert_close(output(model, "mlp"), expected)
    assert lk.unpatch(model) == 2
    assert not any(isinstance(layer, FusedLinear) for layer in layers(model))
    torch.testing.assert_close(output(model, "mlp"), expected)
    assert lk.unpatch(model) == 0


def test_meta_tensors():
    model = adapted("mlp", True).to("meta")
    assert model(torch.empty(3, 12, device="meta")).shape == output(adapted("mlp", False), "mlp").shape


def test_a_first_call_under_another_default_device():
    """In a process of its own: what the engine keeps is made at its first import."""
    code = """
import torch, lora_kernels as lk
x, w, a, b = torch.randn(3, 8), torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
with torch.device("meta"):
    y = lk.lora_linear(x, w, None, a, b)
    pools = [t.unsqueeze(0) for t in (a, b)]
    z = lk.lora_batched_linear(x, w, None, *pools, torch.zeros(3, dtype=torch.int32, device="cpu"))
torch.testing.assert_close(y, x @ w.t() + x @ a.t() @ b.t())
torch.testing.assert_close(z, y)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


TAKEN_AWAY = {
    "delete_adapter": lambda model: model.delete_adapter("default"),
    "to_meta": lambda model: model.to("meta"),
    "load_assign": lambda model: model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True),
}


@pytest.mark.parametrize("how", TAKEN_AWAY)
def test_tensors_that_a_layer_loses_are_freed(how):
    def alive(patched: bool) -> int:
        model = adapted("mlp", patched)
        for _ in range(3):
            output(model, "mlp")
        watched = [weakref.ref(p) for p in model.parameters()]
        TAKEN_AWAY[how](model)
        gc.collect()
        return sum(ref() is not None for ref in watched)

    assert alive(True) == alive(False)


def test_checkpoint_with_dropout_on_a_base_weight_that_is_trained():
    """A reentrant checkpoint's first forward is without gradients, its second with: both must draw the same mask."""
    model = adapted("mlp", True, lora_dropout=0.5).train()
    layer, outputs = layers(model)[0], []
    layer.base_layer.weight.requires_grad_(True)
    layer.register_forward_hook(lambda *call: outputs.append(call[2].detach()))
    checkpoint(layer, torch.randn(4, 12, requires_grad=True), use_reentrant=True).sum().backward()
    assert torch.equal(*outputs)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_an_exported_program_can_be_trained(strict):
    model = adapted("mlp", True)
    x = torch.randn(3, 12)
    program = torch.export.export(model.base_model.model, (x,), strict=strict).module()
    program(x).square().sum().backward()
    got = {name: p.grad for name, p in program.named_parameters() if p.grad is not None}
    plain = adapted("mlp", False).base_model.model
    plain(x).square().sum().backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    torch.testing.assert_close(got, expected)
