"""The verdict that a patched PEFT layer keeps: in use while nothing changes, void as soon as anything does."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft_models import CallCount, adapted, assert_alike, batch, config, one_thread  # noqa: F401
from test_peft_patch import CALLS, STATES, layer_of
from torch import nn

import lora_kernels as lk
from lora_kernels.integrations import peft_layer
from lora_kernels.native import signature

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not signature.tensors_shown(), reason="without the native module every call looks anew"),
]
X = batch("mlp")["x"]


class Looks:
    """How often a layer's state and its input were looked at in full."""

    def __init__(self, monkeypatch) -> None:
        self.states = self.inputs = 0
        state, given = peft_layer.plain_operands, peft_layer.input_refused

        def looked(layer):
            self.states += 1
            return state(layer)

        def looked_at(*args):
            self.inputs += 1
            return given(*args)

        monkeypatch.setattr(peft_layer, "plain_operands", looked)
        monkeypatch.setattr(peft_layer, "input_refused", looked_at)


def warm(model: nn.Module) -> nn.Module:
    for _ in range(3):
        layer_of(model)(X)
    return model


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_the_third_call_looks_no_more(train, autocast, monkeypatch) -> None:
    model, looks, calls = adapted("mlp", True, lora_dropout=0.5).train(train), Looks(monkeypatch), CallCount(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        warm(model)
        assert (looks.states, looks.inputs, calls.fused) == (2, 2, 3)
        layer_of(model)(torch.randn(5, 12))  # another input: looked at once
        layer_of(model)(torch.randn(5, 12))
    assert (looks.states, looks.inputs, calls.fused) == (3, 3, 5)


@pytest.mark.parametrize("state", STATES)
def test_a_change_to_a_state_that_is_not_plain(state, monkeypatch) -> None:
    """As `test_left_to_peft_by_state`, with the change between calls and no new `patch`."""
    options, change, reason = STATES[state]
    plain, patched = (warm(adapted("mlp", p, **options)) for p in (False, True))
    for model in (plain, patched):
        torch.manual_seed(7)
        if change is not None:
            change(model)
        model.eval()
    calls = CallCount(monkeypatch)
    assert_alike(layer_of(patched)(X), layer_of(plain)(X), tolerance=0)
    assert reason in calls.reasons[0]
    assert calls.fused == 0


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_is_not_plain(name, monkeypatch) -> None:
    call, reason = CALLS[name]
    outcomes = []
    for patched in (False, True):
        layer, calls = layer_of(warm(adapted("mlp", patched))), CallCount(monkeypatch)
        torch.manual_seed(8)
        try:
            outcomes.append(call(layer))
        except Exception as error:
            outcomes.append(f"{type(error).__name__}: {error}")
    assert_alike(outcomes[1], outcomes[0], tolerance=0)
    assert reason in calls.reasons[0]
    assert calls.fused == 0


def switched(model):
    model.add_adapter("other", config("mlp", r=2))
    model.set_adapter("other")
    model.eval()


def in_place(model):
    adapters = layer_of(model)._active_adapter
    assert isinstance(adapters, list)
    model.add_adapter("other", config("mlp", r=2))
    adapters[0] = "other"
    model.eval()


def new_parameter(role):
    def change(model):
        inner = getattr(layer_of(model), role)
        inner = inner["default"] if role != "base_layer" else inner
        inner.weight = nn.Parameter(inner.weight.detach() * 3, requires_grad=False)

    return change


def new_module(model):
    old = layer_of(model).lora_B["default"]
    layer_of(model).lora_B["default"] = nn.Linear(old.in_features, 20, bias=False)
    nn.init.constant_(layer_of(model).lora_B["default"].weight, 0.25)


def merged_and_back(model):
    model.merge_adapter()
    layer_of(model)(X)
    model.unmerge_adapter()


def disabled_and_back(model):
    with model.disable_adapter():
        layer_of(model)(X)


# still plain, with another result
CHANGES = {
    "adapter switched": switched,
    "adapter switched in the list": in_place,
    "scaling": lambda m: layer_of(m).scaling.update(default=5.0),
    "set_scale": lambda m: layer_of(m).set_scale("default", 3),
    "base weight replaced": new_parameter("base_layer"),
    "lora_A replaced": new_parameter("lora_A"),
    "lora_B replaced": new_parameter("lora_B"),
    "module replaced": new_module,
    "bias taken away": lambda m: setattr(layer_of(m).base_layer, "bias", None),
    "data replaced": lambda m: setattr(layer_of(m).lora_A["default"].weight, "data", torch.ones(4, 12)),
    "written in place": lambda m: layer_of(m).lora_B["default"].weight.data.mul_(2),
    "all in float64": lambda m: m.double(),
    "base in bfloat16": lambda m: layer_of(m).base_layer.bfloat16(),
    "merged and back": merged_and_back,
    "disabled and back": disabled_and_back,
    "trained": lambda m: layer_of(m).lora_A.requires_grad_(True),
    "frozen": lambda m: m.requires_grad_(False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_to_another_plain_state(name, monkeypatch) -> None:
    results = []
    for patched in (False, True):
        model = warm(adapted("mlp", patched))
        torch.manual_seed(7)
        CHANGES[name](model)
        x = X.to(layer_of(model).base_layer.weight.dtype)
        calls = CallCount(monkeypatch)
        results.append([layer_of(model)(x) for _ in range(3)])
    assert calls.fused == 3, calls.reasons
    assert_alike(results[1], results[0], tolerance=0.02 if results[0][0].dtype == torch.bfloat16 else 1e-5)


def test_dropout_and_training_are_what_they_are_now(monkeypatch) -> None:
    model, seen = warm(adapted("mlp", True, lora_dropout=0.5)), []
    op = peft_layer.lora_linear
    monkeypatch.setattr(peft_layer, "lora_linear", lambda *args: seen.append(args[6]) or op(*args))
    layer = layer_of(model)
    for change in (
        lambda: None,
        model.train,
        lambda: setattr(layer.lora_dropout["default"], "p", 0.25),
        lambda: layer.lora_dropout["default"].eval(),
    ):
        change()
        layer(X), layer(X), layer(X)
    assert seen == [0.0] * 3 + [0.5] * 3 + [0.25] * 3 + [0.0] * 3


def test_a_base_weight_that_comes_to_require_grad_counts_only_with_gradients(monkeypatch) -> None:
    model = warm(adapted("mlp", True))
    layer_of(model).base_layer.weight.requires_grad_()
    calls = CallCount(monkeypatch)
    with torch.no_grad():
        layer_of(model)(X)
    assert calls.fused == 1
    layer_of(model)(X)
    assert calls.reasons == ["base weight requires grad"]


def test_global_hooks_and_removed_hooks(monkeypatch) -> None:
    model, calls = warm(adapted("mlp", True)), CallCount(monkeypatch)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        layer_of(model)(X)
    finally:
        handle.remove()
    own = layer_of(model).lora_A["default"].register_forward_hook(lambda *_: None)
    layer_of(model)(X)
    assert calls.fused == 0
    own.remove()
    warm(model)
    assert calls.fused == 3


def test_copies_and_pickles_look_for_themselves_and_unpatch_leaves_nothing(monkeypatch) -> None:
    model = warm(adapted("mlp", True))
    layer = layer_of(model)
    assert vars(layer)[peft_layer._SEEN] is not None
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert vars(layer_of(other))[peft_layer._SEEN] is None
        warm(other)
        layer_of(other).lora_B["default"].weight.data.zero_()
        assert not torch.equal(layer_of(other)(X), layer(X))
    shallow = copy.copy(layer)
    shallow._modules = dict(layer._modules, base_layer=nn.Linear(12, 20))
    assert_alike(shallow(X), shallow.base_layer(X) + layer(X) - layer.base_layer(X))
    lk.unpatch(model)
    assert peft_layer._SEEN not in vars(layer)
