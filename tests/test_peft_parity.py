"""A patched PEFT model behaves as the unpatched one: every option of plain LoRA, and every behaviour of PEFT's models, in float32."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale
from peft.tuners.lora.layer import Linear
from peft.utils.hotswap import hotswap_adapter
from peft_models import FUSED, CallCount, adapted, adapter_state, base, batch, compare, config, loss, one_thread, output  # noqa: F401

import lora_kernels as lk

pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = ["mlp", "llama", "gpt2", "t5"]

# ------------------------------------------------------------------------------------------------------ options of LoraConfig

OPTIONS = {
    "default init": {"init_lora_weights": True},
    "gaussian init": {"init_lora_weights": "gaussian"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "eva without data": {"init_lora_weights": "eva"},
    "lora_ga without data": {"init_lora_weights": "lora_ga"},
    "r 1": {"r": 1},
    "r above K": {"r": 24},
    "alpha 0": {"lora_alpha": 0},
    "negative alpha": {"lora_alpha": -3},
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"lin0": 7}},
    "alpha_pattern": {"alpha_pattern": {"lin1": 11}, "use_rslora": True},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "lora_bias and bias all": {"lora_bias": True, "bias": "none"},
    "fan_in_fan_out on nn.Linear": {"fan_in_fan_out": True},
    "exclude_modules": {"exclude_modules": ["lin1"]},
    "target regex": {"target_modules": r".*lin\d"},
    "all-linear": {"target_modules": "all-linear"},
    "modules_to_save": {"modules_to_save": ["head"]},
    "inference_mode": {"inference_mode": True},
    "dora": {"use_dora": True},
    "mica": {"init_lora_weights": "mica"},
}
LLAMA_OPTIONS = {
    "layers_to_transform": {"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]},
    "layers_pattern": {"layers_to_transform": [0], "layers_pattern": "layers", "target_modules": ["q_proj", "down_proj"]},
    "layer_replication": {"layer_replication": [[0, 2], [1, 2]]},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "modules_to_save": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "v_proj"]},
    "embedding and linear": {"target_modules": ["embed_tokens", "v_proj"]},
    "target_parameters": {"target_modules": ["v_proj"], "target_parameters": ["q_proj.weight"]},
    "tied head": {"target_modules": ["lm_head", "embed_tokens"]},
}


def forward(model, kind):
    return output(model, kind).detach()


def train(model, kind, steps=4, checkpointing=None):
    """Losses and trained parameters."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-2) if parameters else None
    losses = []
    for _ in range(steps if optimizer else 0):
        value = loss(model, kind)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.detach())
    return losses, adapter_state(model), output(model.eval(), kind).detach()


def merge_unmerge(model, kind):
    def merged():
        model.merge_adapter()
        return forward(model, kind)

    try:
        outputs = [forward(model, kind), merged()]
    except RuntimeError as error:  # lora_bias on a base layer without a bias
        return str(error)
    model.unmerge_adapter()
    return outputs + [forward(model, kind)]


def save_load(model, kind, folder):
    """The saved files and the outputs of reloading them, patched as the model is."""
    folder = folder / type(next(m for m in model.modules() if isinstance(m, Linear))).__name__
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(base(kind), folder)
    if "Fused" in folder.name:
        lk.patch(again)
    state = get_peft_model_state_dict(model)
    return sorted(p.name for p in folder.iterdir()), state, get_peft_model_state_dict(again), forward(again.eval(), kind)


ACTS = {"forward": forward, "train": train, "merge_unmerge": merge_unmerge}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("option", OPTIONS)
def test_option(option, act):
    compare(ACTS[act], "mlp", **OPTIONS[option])


@pytest.mark.parametrize("option", LLAMA_OPTIONS)
def test_option_of_transformers(option):
    compare(train, "llama", **LLAMA_OPTIONS[option])


@pytest.mark.parametrize("option", OPTIONS)
def test_option_saves_and_loads(option, tmp_path):
    if OPTIONS[option].get("init_lora_weights") in ("pissa", "pissa_niter", "pissa_niter_4", "olora"):
        pytest.skip("these change the base weights, which an adapter file does not carry")
    compare(save_load, "mlp", tmp_path, **OPTIONS[option])


def test_empty_batch_and_dropout_in_eval():
    compare(lambda model, kind: model(torch.zeros(0, 12)).detach(), "mlp")
    compare(forward, "mlp", lora_dropout=0.4)


# --------------------------------------------------------------------------------------------------------- behaviours of PEFT


def second_adapter(model, kind, **options):
    torch.manual_seed(5)
    model.add_adapter("other", config(kind, **({"r": 3, "lora_alpha": 5, "use_rslora": True} | options)))
    return model.eval()


def several_adapters(model, kind):
    """Each alone, both at once, deleting one."""
    second_adapter(model, kind)
    outputs = [forward(model, kind)]
    model.set_adapter("other")
    outputs.append(train(model, kind, 2))
    model.base_model.set_adapter(["default", "other"])
    outputs += [forward(model, kind), model.active_adapters]
    model.delete_adapter("default")
    return outputs + [forward(model, kind), model.active_adapters, sorted(model.peft_config)]


def adapter_on_other_layers(model, kind):
    """Layers that the first adapter does not have, and layers that the second does not have."""
    names = {"mlp": ["lin1", "head"], "llama": ["v_proj", "lm_head"], "gpt2": ["c_proj"], "t5": ["k", "wo"]}[kind]
    second_adapter(model, kind, target_modules=names)
    model.set_adapter("other")
    outputs = [forward(model, kind)]
    model.base_model.set_adapter(["default", "other"])
    return outputs + [forward(model, kind)]


def weighted_adapters(model, kind):
    second_adapter(model, kind)
    outputs = {}
    for how in ("svd", "linear", "cat", "ties", "ties_svd", "dare_linear", "dare_ties", "magnitude_prune"):
        if "linear" in how or how in ("ties", "dare_ties", "magnitude_prune"):
            second = "same_rank"
            if second not in model.peft_config:
                model.add_adapter(second, config(kind, lora_alpha=9))
        else:
            second = "other"
        torch.manual_seed(6)
        density = None if how in ("svd", "linear", "cat") else 0.5
        model.add_weighted_adapter(["default", second], [0.7, -0.4], how, combination_type=how, density=density)
        model.set_adapter(how)
        outputs[how] = forward(model.eval(), kind)
    return outputs


def disable(model, kind):
    with model.disable_adapter():
        alone = forward(model, kind)
    model.merge_adapter()
    with model.disable_adapter():
        unmerged_for_good = forward(model, kind)
    return alone, unmerged_for_good, forward(model, kind)


def merge_one_of_two(model, kind):
    second_adapter(model, kind)
    model.merge_adapter(["other"], safe_merge=True)
    outputs = [forward(model, kind)]
    model.unmerge_adapter()
    return outputs + [forward(model, kind)]


def merge_and_unload(model, kind):
    merged = model.merge_and_unload(safe_merge=True)
    return merged.state_dict(), forward(merged, kind)


def unload(model, kind):
    plain = model.unload()
    return plain.state_dict(), forward(plain, kind)


def mixed_batch(model, kind):
    second_adapter(model, kind)
    return output(model, kind, adapter_names=["default", "other", "__base__"]).detach()


def scaled(model, kind):
    layers = [m for m in model.modules() if isinstance(m, Linear)]
    outputs = []
    for change in (lambda m: m.set_scale("default", 3.0), lambda m: m.scale_layer(0.5), lambda m: m.unscale_layer()):
        for layer in layers:
            change(layer)
        outputs.append(forward(model, kind))
    with rescale_adapter_scale(model, 0.25):
        outputs.append(forward(model, kind))
    return outputs, [layer.scaling for layer in layers]


def deepcopied(model, kind):
    twin = copy.deepcopy(model)
    outputs = train(twin, kind, 2)
    return outputs, forward(model, kind)


def pickled(model, kind):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return train(torch.load(file, weights_only=False), kind, 2)


def state_dict(model, kind):
    state = model.state_dict()
    other = adapted(kind, False)
    for p in other.parameters():
        torch.nn.init.zeros_(p)
    return state, str(other.load_state_dict(state)), forward(other, kind), get_peft_model_state_dict(model)


def adapter_state_swapped(model, kind):
    new = {name: value * 0.5 + 0.1 for name, value in get_peft_model_state_dict(model).items()}
    return str(set_peft_model_state_dict(model, new)), forward(model, kind)


def status(model, kind):
    second_adapter(model, kind)
    fields = [layer.__dict__ | {"module_type": ""} for layer in model.get_layer_status()]
    return model.get_model_status().__dict__ | {"adapter_model_type": ""}, fields, model.get_nb_trainable_parameters()


def requires_grad(model, kind):
    names = lambda: [n for n, p in model.named_parameters() if p.requires_grad]
    found = [names()]
    second_adapter(model, kind)
    model.set_adapter("other", inference_mode=True)
    found.append(names())
    model.set_requires_grad("default", requires_grad=True)
    return found + [names()]


def frozen(model, kind):
    """An adapter in inference mode, and gradients to the inputs only."""
    model.requires_grad_(False)
    with torch.inference_mode():
        return output(model, kind).clone()


def delta_weights(model, kind):
    return [m.get_delta_weight("default").detach() for m in model.modules() if isinstance(m, Linear)]


def float64(model, kind):
    model.double()
    inputs = {name: t.double() if t.is_floating_point() else t for name, t in batch(kind).items()}
    result = model(**inputs)
    return (result if kind == "mlp" else result.logits).detach()


def wrong_input(model, kind):
    """The same error text, whether a layer is patched or not."""
    layer = next(m for m in model.modules() if isinstance(m, Linear))
    errors = []
    for x in (torch.randn(2, 3), torch.randn(2, layer.in_features, dtype=torch.float64), torch.ones(2, layer.in_features, dtype=torch.long)):
        with pytest.raises(RuntimeError) as caught:
            layer(x)
        errors.append(str(caught.value))
    return errors


def unknown_adapter(model, kind):
    errors = []
    for call in (lambda: model.set_adapter("nobody"), lambda: model.delete_adapter("nobody")):
        with pytest.raises((ValueError, KeyError)) as caught:
            call()
        errors.append(str(caught.value))
    return errors


def cast_disabled(model, kind):
    with disable_input_dtype_casting(model):
        return forward(model, kind)


BEHAVIOURS = {
    act.__name__: act
    for act in (forward, train, merge_unmerge, several_adapters, adapter_on_other_layers, weighted_adapters, disable, merge_one_of_two)
    + (merge_and_unload, unload, mixed_batch, scaled, deepcopied, pickled, state_dict, adapter_state_swapped, status, requires_grad)
    + (frozen, delta_weights, float64, wrong_input, unknown_adapter, cast_disabled)
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("act", BEHAVIOURS)
def test_behaviour(act, kind):
    compare(BEHAVIOURS[act], kind)


@pytest.mark.parametrize("kind", KINDS)
def test_saves_and_loads(kind, tmp_path):
    compare(save_load, kind, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_every_plain_layer_runs_fused(kind, monkeypatch):
    model, calls = adapted(kind, True), CallCount(monkeypatch)
    output(model, kind)
    assert calls.fused == FUSED[kind]
    assert calls.reasons == []


def loaded_adapter(model, kind, folder):
    """An adapter loaded into the model after it was patched."""
    second_adapter(model, kind).save_pretrained(folder, selected_adapters=["other"])
    model.delete_adapter("other")
    model.load_adapter(folder / "other", "third", low_cpu_mem_usage=True)
    model.set_adapter("third")
    return forward(model.eval(), kind)


def hotswapped(model, kind, folder):
    model.save_pretrained(folder)
    before = forward(model, kind)
    for p in model.parameters():
        torch.nn.init.constant_(p, 0.1) if p.requires_grad else None
    hotswap_adapter(model, folder, "default")
    return before, forward(model, kind)


@pytest.mark.parametrize("kind", ["mlp", "llama"])
@pytest.mark.parametrize("act", [loaded_adapter, hotswapped], ids=lambda f: f.__name__)
def test_files_into_a_patched_model(act, kind, tmp_path):
    compare(act, kind, tmp_path)


def generate(model, kind):
    ids = batch(kind)["input_ids"]
    return model.generate(input_ids=ids, max_new_tokens=5, do_sample=False), model.generate(input_ids=ids, max_new_tokens=4, num_beams=2)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_generate(kind):
    compare(generate, kind)


def test_injected_adapter_without_peft_model():
    def act(patched):
        torch.manual_seed(4)
        model = inject_adapter_in_model(config("mlp"), base("mlp"))
        if patched:
            assert lk.patch(model).patched == ["lin0", "lin1"]
        return list(model.state_dict()), output(model, "mlp").detach()

    (keys, y), (plain_keys, plain_y) = act(True), act(False)
    assert keys == plain_keys
    torch.testing.assert_close(y, plain_y, rtol=1e-5, atol=1e-5)


def test_config_is_saved_as_ever(tmp_path):
    model = get_peft_model(base("mlp"), lk.register(config("mlp")))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert LoraConfig.from_pretrained(tmp_path).r == 4
