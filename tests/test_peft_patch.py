"""`lk.patch`, `lk.unpatch`, `lk.register`: what is fused, what is left to PEFT and why, and that nothing else changes."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from peft.tuners.lora.layer import Linear
from peft_models import CallCount, adapted, assert_alike, base, batch, config, one_thread, output  # noqa: F401
from torch import nn
from torch.nn.utils import parametrize

import lora_kernels as lk
from lora_kernels import _errors
from lora_kernels.integrations.peft_layer import FusedLinear

pytestmark = pytest.mark.filterwarnings("ignore")


def layer_of(model: nn.Module) -> Linear:
    return next(m for m in model.modules() if isinstance(m, Linear))


# ------------------------------------------------------------------------------------------------------- why a layer is PEFT's


def hook(role):
    def change(model):
        inner = {"base_layer": lambda m: m.base_layer, "lora_dropout": lambda m: m.lora_dropout["default"]}
        module = inner.get(role, lambda m: getattr(m, role)["default"])(layer_of(model))
        module.register_forward_hook(lambda *_: None)

    return change


def second(model, **options):
    model.add_adapter("other", config("mlp", **options))
    model.base_model.set_adapter(["default", "other"])


def set_inner(role, make):
    def change(model):
        getattr(layer_of(model), role)["default"] = make(getattr(layer_of(model), role)["default"])

    return change


class Shifted(nn.Module):
    def forward(self, weight):
        return weight + 1


class Special(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class Quantised(torch.Tensor):
    pass


def special_base(model):
    layer_of(model).base_layer.__class__ = Special


def subclassed_weight(model):
    weight = layer_of(model).base_layer.weight.detach()
    layer_of(model).base_layer.weight = nn.Parameter(weight.as_subclass(Quantised), requires_grad=False)


def replaced_forward(model):
    inner = layer_of(model).base_layer
    inner.forward = lambda x: nn.Linear.forward(inner, x) * 2


STATES = {
    "DoRA": ({"use_dora": True}, None, "LoRA variant DoraLinearVariant"),
    "MiCA": ({"init_lora_weights": "mica"}, None, "LoRA variant MiCALinearVariant"),
    "merged": ({}, lambda m: m.merge_adapter(), "merged"),
    "disabled": ({}, lambda m: m.base_model.disable_adapter_layers(), "adapters disabled"),
    "two active adapters": ({}, second, "2 active adapters"),
    "adapter elsewhere": ({}, lambda m: (m.add_adapter("o", config("mlp", target_modules=["head"])), m.set_adapter("o")), "no active adapter"),
    "ephemeral offload": ({}, lambda m: setattr(layer_of(m), "ephemeral_gpu_offload", True), "ephemeral GPU offload"),
    "trained base weight": ({}, lambda m: layer_of(m).base_layer.weight.requires_grad_(), "base weight requires grad"),
    "hook on lora_A": ({}, hook("lora_A"), "hooks on lora_A"),
    "hook on lora_B": ({}, hook("lora_B"), "hooks on lora_B"),
    "hook on base_layer": ({}, hook("base_layer"), "hooks on base_layer"),
    "hook on lora_dropout": ({"lora_dropout": 0.5}, hook("lora_dropout"), "hooks on lora_dropout"),
    "replaced forward": ({}, replaced_forward, "hooks on base_layer"),
    "parametrized lora_A": (
        {},
        lambda m: parametrize.register_parametrization(layer_of(m).lora_A["default"], "weight", Shifted()),
        "lora_A is a ParametrizedLinear",
    ),
    "subclassed lora_B": ({}, lambda m: setattr(layer_of(m).lora_B["default"], "__class__", Special), "lora_B is a Special"),
    "subclassed base": ({}, special_base, "base_layer is a Special"),
    "quantised base weight": ({}, subclassed_weight, "base_layer holds a Quantised"),
    "lora_A with bias": ({}, set_inner("lora_A", lambda a: nn.Linear(a.in_features, a.out_features)), "lora_A has a bias"),
    "in-place dropout": ({}, set_inner("lora_dropout", lambda _: nn.Dropout(0.5, inplace=True)), "lora_dropout is a Dropout, in place"),
    "other dropout": ({}, set_inner("lora_dropout", lambda _: nn.AlphaDropout(0.5)), "lora_dropout is a AlphaDropout"),
    "flag for a scaling": ({}, lambda m: layer_of(m).scaling.update(default=True), "scaling is a bool"),
    "tensor scaling": ({}, lambda m: layer_of(m).scaling.update(default=torch.tensor(2.0)), "scaling is a Tensor"),
    "infinite scaling": ({}, lambda m: layer_of(m).scaling.update(default=float("inf")), "scaling is not finite in float32"),
    "scaling beyond float32": ({}, lambda m: layer_of(m).scaling.update(default=1e39), "scaling is not finite in float32"),
}


@pytest.mark.parametrize("state", STATES)
def test_left_to_peft_by_state(state, monkeypatch):
    options, change, reason = STATES[state]
    plain, patched = adapted("mlp", False, **options), adapted("mlp", True, **options)
    for model in (plain, patched):
        torch.manual_seed(7)
        if change is not None:
            change(model)
        model.eval()
    report = lk.patch(patched)
    assert reason in report.skipped["base_model.model.lin0"]
    assert reason in str(report)
    calls = CallCount(monkeypatch)
    assert_alike(layer_of(patched)(batch("mlp")["x"]), layer_of(plain)(batch("mlp")["x"]), tolerance=0)
    assert reason in calls.reasons[0]
    assert calls.fused == 0


CALLS = {
    "fp64 x on an fp32 base": (lambda layer: layer(torch.randn(2, 12).double()), "x torch.float64 on a base layer of torch.float32"),
    "wrong width": (lambda layer: layer(torch.randn(2, 11)), "x does not fit"),
    "0-dimensional x": (lambda layer: layer(torch.tensor(1.0)), "x does not fit"),
    "bf16 adapter on fp32": (lambda layer: (layer.lora_A.bfloat16(), layer.lora_B.bfloat16(), layer(torch.randn(2, 12)))[2], "lora_A torch.bfloat16"),
    "bf16 lora_B alone": (lambda layer: (layer.lora_B.bfloat16(), layer(torch.randn(2, 12)))[1], "lora_B torch.bfloat16"),
    "fp32 lora_B alone on bf16": (
        lambda layer: (layer.bfloat16(), layer.lora_B.float(), layer(torch.randn(2, 12).bfloat16()))[2],
        "lora_A torch.bfloat16, lora_B torch.float32",
    ),
    "mixed batch": (lambda layer: layer(torch.randn(2, 12), adapter_names=["default", "__base__"]), "extra arguments"),
    "torch.func": (lambda layer: torch.func.grad(lambda x: layer(x).sum())(torch.randn(2, 12)), "torch.func"),
    "jit trace": (lambda layer: torch.jit.trace(layer, torch.randn(2, 12), check_trace=False)(torch.ones(2, 12)), "torch.jit.trace"),
    "sparse x": (lambda layer: layer(torch.eye(12).to_sparse()), "torch.sparse_coo"),
    "meta x": (lambda layer: layer(torch.randn(2, 12, device="meta")), "different devices"),
}


@pytest.mark.parametrize("name", CALLS)
def test_left_to_peft_by_call(name, monkeypatch):
    """The same result, or the same error, as PEFT's own layer gives."""
    call, reason = CALLS[name]
    outcomes = []
    for patched in (False, True):
        layer, calls = layer_of(adapted("mlp", patched)), CallCount(monkeypatch)
        torch.manual_seed(8)
        try:
            outcomes.append(call(layer))
        except Exception as error:
            outcomes.append(f"{type(error).__name__}: {error}")
    assert_alike(outcomes[1], outcomes[0], tolerance=0)
    assert reason in calls.reasons[0]
    assert calls.fused == 0


def test_global_module_hooks_see_the_inner_modules():
    seen = []
    model = adapted("mlp", True)
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        output(model, "mlp")
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == 7  # two layers of base, A, B, and the head


def test_a_layer_is_fused_again_when_its_state_is_plain_again(monkeypatch):
    model, calls = adapted("mlp", True), CallCount(monkeypatch)
    expected = output(model, "mlp")
    assert calls.fused == 2
    with model.disable_adapter():
        output(model, "mlp")
    model.merge_adapter()
    output(model, "mlp")
    model.unmerge_adapter()
    model.add_adapter("dora", config("mlp", use_dora=True))
    model.set_adapter("dora")
    output(model.eval(), "mlp")
    assert calls.fused == 2
    model.set_adapter("default")
    torch.testing.assert_close(output(model, "mlp"), expected)
    assert calls.fused == 4


def test_adapter_added_after_patch_leaves_new_layers_to_peft_and_fuses_old_ones(monkeypatch):
    model, calls = adapted("mlp", True), CallCount(monkeypatch)
    model.add_adapter("other", config("mlp", target_modules=["lin1", "head"]))
    model.set_adapter("other")
    output(model.eval(), "mlp")
    assert calls.fused == 1
    assert type(model.base_model.model.head) is Linear
    assert lk.patch(model).patched == ["base_model.model.lin1", "base_model.model.head"]
    output(model, "mlp")
    assert calls.fused == 3


# ------------------------------------------------------------------------------------------------- the report, strict, backends


def test_report_reads_well():
    report = lk.patch(adapted("gpt2", False))
    assert str(report) == (
        "0 of 4 LoRA layers fused\n  4 left to PEFT, base_layer is a Conv1D, not nn.Linear: "
        "base_model.model.transformer.h.0.attn.c_attn, base_model.model.transformer.h.0.mlp.c_fc, "
        "base_model.model.transformer.h.1.attn.c_attn and 1 more"
    )
    assert str(lk.patch(adapted("mlp", False))) == "2 of 2 LoRA layers fused"


def test_other_lora_layers_are_reported():
    report = lk.patch(adapted("llama", False, target_modules=["embed_tokens", "q_proj"]))
    assert report.skipped == {"base_model.model.model.embed_tokens": "a lora.layer.Embedding"}
    assert len(report.patched) == 2


def test_a_forward_replaced_on_the_instance_stays_in_place():
    model = adapted("mlp", False)
    layer = layer_of(model)
    layer.forward = lambda x: torch.zeros(len(x), 20)
    assert lk.patch(model).skipped == {"base_model.model.lin0": "its forward was replaced on the instance"}
    assert not layer(torch.ones(3, 12)).any()


def test_patch_is_idempotent_and_unpatch_restores_exactly():
    model = adapted("mlp", False)
    before = {name: (type(m), list(m.__dict__)) for name, m in model.named_modules()}
    first, second = lk.patch(model, strict=True), lk.patch(model)
    assert first == second
    assert type(layer_of(model)) is FusedLinear
    assert lk.unpatch(model) == 2
    assert lk.unpatch(model) == 0
    assert {name: (type(m), list(m.__dict__)) for name, m in model.named_modules()} == before


def test_patch_changes_no_key_parameter_or_hook():
    plain, patched = adapted("llama", False), adapted("llama", True)
    for names in ("named_parameters", "named_buffers", "named_modules"):
        assert [n for n, _ in getattr(plain, names)()] == [n for n, _ in getattr(patched, names)()]
    assert repr(plain) == repr(patched)
    assert [p.requires_grad for p in plain.parameters()] == [p.requires_grad for p in patched.parameters()]


def test_strict_refuses_before_it_patches(monkeypatch):
    model = adapted("llama", False, target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(lk.BackendError, match=r"(?s)cannot be fused.*embed_tokens"):
        lk.patch(model, strict=True)
    assert not any(isinstance(m, FusedLinear) for m in model.modules())
    monkeypatch.setenv("LORA_KERNELS_STRICT", "1")
    with pytest.raises(lk.BackendError, match="cannot be fused"):
        lk.patch(model)


def test_strict_refuses_a_later_fallback_but_not_what_the_user_asked_for():
    model = adapted("mlp", False)
    lk.patch(model, strict=True, backend="reference")
    with model.disable_adapter():
        output(model, "mlp")
    model.merge_adapter()
    output(model, "mlp")
    model.unmerge_adapter()
    layer_of(model).lora_A["default"].register_forward_hook(lambda *_: None)
    with pytest.raises(lk.BackendError, match="hooks on lora_A"):
        output(model, "mlp")


def test_each_reason_is_logged_once(caplog):
    _errors.warn_once.cache_clear()
    model = adapted("mlp", True, use_dora=True)
    with caplog.at_level("WARNING", "lora_kernels"):
        for _ in range(3):
            output(model, "mlp")
    lines = [r.getMessage() for r in caplog.records if "PEFT's own forward" in r.getMessage()]
    assert lines == ["a patched LoRA layer runs PEFT's own forward: LoRA variant DoraLinearVariant"]


def test_backend_reaches_the_op(monkeypatch):
    model = adapted("mlp", False)
    lk.patch(model, backend="triton", strict=True)
    with pytest.raises(lk.BackendError, match="triton"):  # these tensors are on the CPU
        output(model, "mlp")
    again = copy.deepcopy(model)
    with pytest.raises(lk.BackendError, match="triton"):
        output(again, "mlp")
    lk.patch(model, backend="reference", strict=True)
    output(model, "mlp")


def test_bad_arguments():
    with pytest.raises(lk.LoraValueError, match="unknown backend"):
        lk.patch(adapted("mlp", False), backend="cudnn")
    with pytest.raises(lk.LoraTypeError, match="no module"):
        lk.patch("model")
    with pytest.raises(lk.LoraTypeError, match="unpatch: model is no module; got NoneType"):
        lk.unpatch(None)
    with pytest.raises(lk.LoraTypeError, match="register: config is no LoRA config; got MLP"):
        lk.register(base("mlp"))


def test_model_without_lora(caplog):
    _errors.warn_once.cache_clear()
    report = lk.patch(base("mlp"))
    assert (report.patched, report.skipped) == ([], {})
    assert "no PEFT LoRA layer" in caplog.text


# ------------------------------------------------------------------------------------------------------------------ register


def test_register_creates_fused_layers_where_they_are_plain(monkeypatch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain, self.special, self.table = nn.Linear(6, 6), Special(6, 6), nn.Embedding(9, 6)

        def forward(self, ids):
            return self.special(self.plain(self.table(ids)))

    cfg = lk.register(config("mlp", target_modules=["plain", "special", "table"], task_type=None))
    model, calls = get_peft_model(Net(), copy.deepcopy(cfg)), CallCount(monkeypatch)
    kinds = [type(getattr(model.base_model.model, name)).__name__ for name in ("plain", "special", "table")]
    assert kinds == ["FusedLinear", "Linear", "Embedding"]
    model(torch.arange(5))
    assert calls.fused == 1
    assert lk.unpatch(model) == 1


def test_registered_model_equals_a_patched_one():
    torch.manual_seed(2)
    model = get_peft_model(base("llama"), lk.register(config("llama"))).eval()
    assert lk.patch(model).skipped == {}
    torch.testing.assert_close(output(model, "llama"), output(adapted("llama", True), "llama"), rtol=0, atol=0)


def test_registered_target_parameters_are_peft_s():
    cfg = lk.register(config("mlp", target_modules=[], target_parameters=["lin0.weight"]))
    model = get_peft_model(base("mlp"), cfg)
    assert type(model.base_model.model.lin0).__name__ == "ParamWrapper"


# -------------------------------------------------------------------------------------------------------------- optional peft


def test_import_needs_no_peft_and_patch_says_how_to_get_it():
    code = """
import sys
sys.modules["peft"] = sys.modules["transformers"] = None
import lora_kernels as lk, torch
lk._device.has_module = lambda name: False
try: lk.patch(torch.nn.Linear(2, 2))
except lk.LoraKernelsError as error: print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "peft is not installed; fix: pip install" in done.stdout
