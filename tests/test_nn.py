"""`lk.LoraLinear`: the module against plain PyTorch and PEFT, merging, state, and errors."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import lora_kernels as lk
from lora_kernels import LoraKernelsError, LoraLinear, LoraTypeError, LoraValueError, reference
from lora_kernels.testing import relative_rmse

bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = pytest.mark.parametrize("dtype", [fp64, fp32, bf16, fp16], ids=lambda d: str(d).removeprefix("torch."))


def trained(K=13, N=9, dtype=fp32, **options) -> lk.LoraLinear:
    """A layer whose update is not zero."""
    layer = lk.LoraLinear(K, N, dtype=dtype, **({"r": 5, "lora_alpha": 7, "lora_dropout": 0.0} | options))
    nn.init.normal_(layer.lora_B.weight)
    return layer


def plain(layer: lk.LoraLinear, x: torch.Tensor) -> torch.Tensor:
    """The definition in float64."""
    w, a, b = (t.double() for t in (layer.base_layer.weight, layer.lora_A.weight, layer.lora_B.weight))
    bias = None if layer.base_layer.bias is None else layer.base_layer.bias.double()
    return F.linear(x.double(), w, bias) + layer.scaling * (x.double() @ a.t()) @ b.t()


@DTYPES
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(13,), (0, 13), (17, 13), (2, 3, 13)], ids=str)
def test_forward_is_the_definition(shape, bias, dtype):
    layer, x = trained(dtype=dtype, bias=bias), torch.randn(shape).to(dtype)
    y = layer(x)
    assert (y.shape, y.dtype) == ((*shape[:-1], 9), dtype)
    assert relative_rmse(y, plain(layer, x)) < {fp64: 1e-14, fp32: 1e-6, bf16: 1e-2, fp16: 2e-3}[dtype]


def test_from_linear_starts_at_the_linear_layer_and_shares_it():
    linear = nn.Linear(13, 9)
    layer, x = lk.LoraLinear.from_linear(linear, r=3), torch.randn(4, 13)
    torch.testing.assert_close(layer(x), linear(x), rtol=0, atol=1e-6)
    assert layer.base_layer is linear
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A.weight", "lora_B.weight"]
    assert layer.lora_A.weight.abs().max() <= 13**-0.5  # kaiming_uniform_(a=sqrt(5)), the default of nn.Linear
    assert not layer.lora_B.weight.any()


def test_both_ways_to_a_layer_have_the_same_defaults_but_for_dropout():
    names = ("r", "lora_alpha", "use_rslora", "backend", "scaling")
    direct, wrapped = lk.LoraLinear(4, 4), lk.LoraLinear.from_linear(nn.Linear(4, 4))
    assert [getattr(direct, name) for name in names] == [getattr(wrapped, name) for name in names] == [16, 32, False, "auto", 2.0]
    assert (direct.lora_dropout, wrapped.lora_dropout) == (0.0, 0.05)


def test_from_linear_keeps_mode_device_and_dtype():
    layer = lk.LoraLinear.from_linear(nn.Linear(4, 4, dtype=bf16, device="meta").eval(), lora_dropout=0.5)
    assert not layer.training
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert [p.dtype for p in layer.parameters()] == [bf16, bf16, fp32, fp32]
    assert trained(dtype=fp64).lora_A.weight.dtype is fp64


@pytest.mark.parametrize("use_rslora, scaling", [(False, 7 / 5), (True, 7 / 5**0.5)], ids=["alpha/r", "rslora"])
def test_scaling(use_rslora, scaling):
    assert trained(use_rslora=use_rslora).scaling == scaling


def test_training_moves_only_the_adapter_and_lowers_the_loss():
    layer, x = lk.LoraLinear(13, 9, r=4, lora_dropout=0.0), torch.randn(64, 13)
    target, base = torch.randn(64, 9), layer.base_layer.weight.clone()
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], 3e-2)
    losses = []
    for _ in range(40):
        loss = F.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    torch.testing.assert_close(layer.base_layer.weight, base, rtol=0, atol=0)


def test_dropout_is_the_exported_mask_in_training_and_off_in_eval():
    layer, x = trained(lora_dropout=0.3), torch.randn(6, 13)
    torch.manual_seed(11)
    y = layer(x)
    torch.manual_seed(11)
    seed = torch.randint(0, 2**62, (1,), dtype=torch.int64)
    keep = reference.unpack_bits(reference.dropout_mask(seed, 6, 13, 0.3), 13)
    dropped = torch.where(keep, x * reference.keep_scale(0.3), 0.0)
    expected = layer.base_layer(x) + layer.scaling * layer.lora_B(layer.lora_A(dropped))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(layer.eval()(x).double(), plain(layer, x), rtol=1e-5, atol=1e-5)
    assert not torch.equal(layer.train()(x), y)


# -------------------------------------------------------------------------------------------------------------------- merging


@DTYPES
def test_merge_rounds_once_and_unmerge_restores_every_bit(dtype):
    layer, x = trained(dtype=dtype), torch.randn(17, 13).to(dtype)
    weight, y = layer.base_layer.weight.clone(), layer(x)
    exact = weight.double() + layer.scaling * layer.lora_B.weight.double() @ layer.lora_A.weight.double()
    layer.merge()
    merged = layer.base_layer.weight.clone()
    assert layer.merged
    assert relative_rmse(merged, exact) < torch.finfo(dtype).eps
    assert relative_rmse(layer(x), y) < {fp64: 1e-14, fp32: 1e-6, bf16: 2e-2, fp16: 3e-3}[dtype]
    layer.merge()  # does nothing
    assert torch.equal(layer.base_layer.weight, merged)
    layer.unmerge()
    assert not layer.merged
    assert torch.equal(layer.base_layer.weight, weight)
    assert torch.equal(layer(x), y)


def test_merge_of_a_broken_adapter_changes_nothing():
    layer = trained()
    weight = layer.base_layer.weight.clone()
    layer.lora_B.weight.data[2, 1] = float("nan")
    with pytest.raises(lk.LoraValueError, match="not finite"):
        layer.merge()
    assert not layer.merged
    assert torch.equal(layer.base_layer.weight, weight)


def test_merged_layer_survives_copying_and_pickling():
    layer, x = trained(), torch.randn(3, 13)
    weight = layer.base_layer.weight.clone()
    layer.merge()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x), layer(x))
        twin.unmerge()
        assert torch.equal(twin.base_layer.weight, weight)
    assert layer.merged


@pytest.mark.parametrize("strict", [True, False])
def test_loading_into_a_merged_layer_is_refused_and_changes_nothing(strict):
    """Else `unmerge` would put the base weight from before the load back."""
    layer, x = trained(), torch.randn(3, 13)
    other = trained().state_dict()
    layer.merge()
    y = layer(x)
    for state in (other, {k: v for k, v in other.items() if "lora" in k}) if not strict else (other,):
        with pytest.raises(lk.LoraKernelsError, match=r"while the adapter is merged; got 0; fix: call unmerge\(\) first"):
            nn.Sequential(layer).load_state_dict({f"0.{k}": v for k, v in state.items()}, strict=strict)
    assert torch.equal(layer(x), y)
    layer.unmerge()
    layer.load_state_dict(other)
    layer.merge()
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, other["base_layer.weight"])


@pytest.mark.parametrize("dtypes", [(bf16,), (bf16, fp32), (torch.float8_e4m3fn, fp32)], ids=str)
def test_unmerge_of_a_layer_that_was_converted(dtypes):
    """The merged weight's bits are others then; the copy from before the merge is put back in the dtype that there is now."""
    net = nn.Sequential(trained())
    weight = net[0].base_layer.weight.clone()
    net[0].merge()
    for dtype in dtypes:
        net.to(dtype)
    net[0].unmerge()
    assert torch.equal(net[0].base_layer.weight, weight.to(dtypes[-1]))
    net[0].merge()
    net[0].base_layer.weight.data.zero_()  # by somebody else: no conversion
    with pytest.raises(LoraKernelsError, match="not the one that merge wrote"):
        net.requires_grad_(False).to("cpu")[0].unmerge()


def test_merge_into_a_weight_that_is_computed():
    """What is written into it is lost with the next call."""
    layer, x = trained(8, 8), torch.randn(3, 8)
    nn.utils.parametrizations.orthogonal(layer.base_layer)
    y = layer(x)
    with pytest.raises(LoraValueError, match="base weight is computed, not stored; got ParametrizedLinear"):
        layer.merge()
    assert torch.equal(layer(x), y)


def test_unmerge_of_an_unmerged_layer():
    with pytest.raises(lk.LoraKernelsError, match="not merged; fix: call merge"):
        trained().unmerge()


# ------------------------------------------------------------------------------------------------------------ state and PEFT


class Net(nn.Module):
    def __init__(self, wrap=lambda linear: linear):
        super().__init__()
        self.first, self.second = wrap(nn.Linear(13, 8)), wrap(nn.Linear(8, 5, bias=False))

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def test_state_maps_one_to_one_to_a_peft_adapter_file(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors.torch import load_file, save_file

    torch.manual_seed(3)
    net = Net()
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["first", "second"], init_lora_weights=False)
    peft, x = get_peft_model(copy.deepcopy(net), config).eval(), torch.randn(7, 13)
    peft.save_pretrained(tmp_path)
    prefix = "base_model.model."
    state = {name.removeprefix(prefix): tensor for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items()}

    ours = copy.deepcopy(net)
    for name, child in list(ours.named_children()):
        setattr(ours, name, lk.LoraLinear.from_linear(child, r=4, lora_alpha=6))
    assert {k for k in ours.state_dict() if ".lora_" in k} == set(state)
    missing = ours.eval().load_state_dict(state, strict=False)
    assert missing.unexpected_keys == []
    assert all(".base_layer." in key for key in missing.missing_keys)
    torch.testing.assert_close(ours(x), peft(x))

    with torch.no_grad():
        for p in ours.parameters():
            if p.requires_grad:
                p.mul_(-1.5)
    save_file({prefix + k: v for k, v in ours.state_dict().items() if ".lora_" in k}, tmp_path / "adapter_model.safetensors")
    back = PeftModel.from_pretrained(copy.deepcopy(net), tmp_path).eval()
    torch.testing.assert_close(back(x), ours(x))


def test_functional_call_sees_the_given_weights():
    layer, x = trained(), torch.randn(3, 13)
    state = {name: p.detach() * 2 for name, p in layer.named_parameters()}
    twin = copy.deepcopy(layer)
    twin.load_state_dict(state)
    assert torch.equal(torch.func.functional_call(layer, state, (x,)), twin(x))


def test_compiles_without_graph_breaks_or_recompiles_over_rows():
    layer = trained()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(torch.randn(4, 13)).sum().backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for M in (5, 30):
            x = torch.randn(M, 13)
            torch.testing.assert_close(compiled(x), layer(x))


def test_repr():
    assert "in_features=13, out_features=9, bias=True, r=5, lora_alpha=7, lora_dropout=0.0, use_rslora=False\n" in repr(trained())
    layer = trained()
    layer.merge()
    assert "use_rslora=False, merged\n" in repr(layer)


# ------------------------------------------------------------------------------------------- in other people's modules


def test_what_others_read_of_a_linear_layer():
    """T5's feed-forward casts to `wo.weight.dtype`."""
    layer, linear = trained(dtype=bf16), nn.Linear(13, 9, dtype=bf16)
    for name in ("in_features", "out_features"):
        assert getattr(layer, name) == getattr(linear, name)
    assert layer.bias is layer.base_layer.bias
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    assert (weight.shape, weight.dtype, weight.device, weight.dim()) == (linear.weight.shape, bf16, linear.weight.device, 2)
    cast = torch.compile(lambda x: layer(x.to(layer.weight.dtype)), backend="eager", fullgraph=True)
    assert torch.equal(cast(torch.ones(2, 13)), layer(torch.ones(2, 13, dtype=bf16)))


def test_computing_with_the_base_weight_is_refused():
    """It would leave the adapter out."""
    layer, x = trained(), torch.randn(2, 13)
    before = layer.base_layer.weight.clone()
    for compute in (lambda w: F.linear(x, w), lambda w: x @ w.T, lambda w: w.data, lambda w: nn.init.zeros_(w)):
        with pytest.raises(LoraKernelsError, match="weight is not all of the layer.* fix: call the layer, or read base_layer.weight"):
            compute(layer.weight)
    assert torch.equal(layer.base_layer.weight, before)


def test_attention_and_encoder_layers_do_not_bypass_the_adapter():
    """In evaluation nn.TransformerEncoderLayer hands its weights to one fused op, nn.MultiheadAttention that of out_proj always."""
    block, x = nn.TransformerEncoderLayer(12, 2, 8, dropout=0.0, batch_first=True).eval(), torch.randn(2, 5, 12)
    block.linear1 = trained(12, 8).eval()
    with torch.no_grad():
        y = block(x)
    torch.testing.assert_close(y, block.train()(x))
    block.eval().self_attn.out_proj = trained(12, 12).eval()
    with torch.no_grad(), pytest.raises(LoraKernelsError, match="weight is not all of the layer"):
        block(x)


def test_deferred_initialisation_starts_at_the_linear_layer():
    """FSDP and others call reset_parameters on all modules, children after their parents."""
    layer = LoraLinear(13, 9, r=3, device="meta").to_empty(device="cpu")
    for p in layer.parameters():
        p.data.fill_(7.0)
    for module in layer.modules():
        module.reset_parameters()
    assert not layer.lora_B.weight.any()
    assert 0 < layer.lora_A.weight.abs().max() <= 13**-0.5
    layer.lora_A.weight.data.fill_(7.0)
    nn.init.normal_(layer.lora_B.weight)
    layer.reset_parameters()
    assert not layer.lora_B.weight.any()
    assert 0 < layer.lora_A.weight.abs().max() <= 13**-0.5


BAD = {
    "rank 0": ({"r": 0}, "r is no rank; got 0; allowed: an int >= 1"),
    "rank -1": ({"r": -1}, "r is no rank"),
    "rank 2.5": ({"r": 2.5}, "r is no rank"),
    "NaN alpha": ({"lora_alpha": float("nan")}, "lora_alpha is not finite; got nan"),
    "infinite alpha": ({"lora_alpha": float("inf")}, "lora_alpha is not finite"),
    "alpha as text": ({"lora_alpha": "16"}, "lora_alpha is not finite; got '16'"),
    "alpha as a flag": ({"lora_alpha": True}, "lora_alpha is not finite; got True"),
    "dropout 1": ({"lora_dropout": 1.0}, r"lora_dropout is no dropout probability; got 1.0; allowed: a number in \[0, 1\)"),
    "dropout below 0": ({"lora_dropout": -0.1}, "lora_dropout is no"),
    "NaN dropout": ({"lora_dropout": float("nan")}, "lora_dropout is no"),
    "alpha past float32": ({"lora_alpha": 1e39}, "lora_alpha is not finite"),
    "dropout as a flag": ({"lora_dropout": False}, "lora_dropout is no"),
    "backend": ({"backend": "cudnn"}, "unknown backend"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_refused_and_leave_the_linear_layer_alone(case):
    options, text = BAD[case]
    linear = nn.Linear(4, 4)
    for make in (lambda: lk.LoraLinear(4, 4, **options), lambda: lk.LoraLinear.from_linear(linear, **options)):
        with pytest.raises(lk.LoraValueError, match=text):
            make()
    assert linear.weight.requires_grad


def test_flags_that_are_none():
    for flag in ("use_rslora", "bias"):
        with pytest.raises(lk.LoraTypeError, match=f"LoraLinear: {flag} is no flag; got 'no'"):
            lk.LoraLinear(4, 4, **{flag: "no"})
    with pytest.raises(lk.LoraTypeError, match="use_rslora is no flag"):
        lk.LoraLinear.from_linear(nn.Linear(4, 4), use_rslora=1)


def test_from_linear_takes_no_other_layer():
    class Quantised(nn.Linear):
        pass

    for layer in (Quantised(4, 4), nn.Embedding(4, 4)):
        with pytest.raises(lk.LoraTypeError, match="no plain linear layer"):
            lk.LoraLinear.from_linear(layer)


def _hook(linear: nn.Linear) -> nn.Linear:
    linear.register_forward_hook(lambda *_: None)
    return linear


def _own_forward(linear: nn.Linear) -> nn.Linear:
    linear.forward = lambda x: x
    return linear


MORE_THAN_LINEAR = {
    "hook": _hook,
    "own forward": _own_forward,
    "spectral norm": nn.utils.spectral_norm,
    "weight norm": nn.utils.weight_norm,
    "pruned": lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
    "pruned bias": lambda linear: prune.l1_unstructured(linear, "bias", 0.5),
    "parametrized": nn.utils.parametrizations.weight_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("case", MORE_THAN_LINEAR)
def test_from_linear_takes_no_layer_whose_call_is_more_than_its_weights(case):
    linear = MORE_THAN_LINEAR[case](nn.Linear(4, 4))
    with pytest.raises(LoraTypeError, match="hooks, or a weight that is computed|no plain linear layer; got ParametrizedLinear"):
        LoraLinear.from_linear(linear)
    assert all(p.requires_grad for p in linear.parameters())


def test_numpy_sizes_and_ranks():
    layer = LoraLinear(np.int64(13), np.int32(9), r=np.int64(4))
    assert type(layer.r) is int
    assert layer.lora_B.weight.shape == (9, 4)


def test_devices_that_are_none():
    for device in ("nope", "cuda:99"):
        with pytest.raises(LoraValueError, match=f"no such device; got '{device}': "):
            LoraLinear(4, 4, device=device)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_base_layer_of_a_dtype_that_cannot_be_computed_with(dtype):
    linear = torch.nn.Linear(4, 4).to(dtype)
    with pytest.raises(lk.LoraTypeError, match=f"cannot be computed with; got {dtype}; allowed: torch.bfloat16"):
        lk.LoraLinear.from_linear(linear)
    assert linear.weight.requires_grad


def test_unmerging_in_another_order_than_merging_is_refused() -> None:
    """Two adapters on one weight: each would put back the weight as it found it."""
    linear = nn.Linear(8, 8)
    before = linear.weight.clone()
    one, two = (LoraLinear.from_linear(linear) for _ in range(2))
    for layer in (one, two):
        nn.init.normal_(layer.lora_B.weight)
    one.merge(), two.merge()
    with pytest.raises(LoraKernelsError, match="not the one that merge wrote; fix: unmerge .* reverse order"):
        one.unmerge()
    two.unmerge(), one.unmerge()
    assert torch.equal(linear.weight, before)
    one.merge()
    linear.weight = nn.Parameter(torch.ones(8, 8), requires_grad=False)
    with pytest.raises(LoraKernelsError, match="not the one that merge wrote"):
        one.unmerge()
    assert torch.equal(linear.weight, torch.ones(8, 8))


CONSTRUCTIONS = {
    "int32": (dict(dtype=torch.int32), LoraTypeError, "a dtype that cannot be computed with"),
    "float8": (dict(dtype=torch.float8_e4m3fn), LoraTypeError, "a dtype that cannot be computed with"),
    "complex": (dict(dtype=torch.complex64), LoraTypeError, "a dtype that cannot be computed with"),
    "no_features": (dict(in_features=0), LoraValueError, "in_features is no size; got 0"),
    "half_features": (dict(out_features=2.5), LoraValueError, "out_features is no size; got 2.5"),
    "alpha": (dict(lora_alpha=10**400), LoraValueError, "lora_alpha is not finite"),
}


@pytest.mark.parametrize("options, error, text", CONSTRUCTIONS.values(), ids=CONSTRUCTIONS)
def test_layers_that_cannot_be(options, error, text) -> None:
    with pytest.raises(error, match=text):
        LoraLinear(**(dict(in_features=8, out_features=8) | options))
    with pytest.raises(LoraValueError, match="the weights have no memory"):
        LoraLinear(8, 8, device="meta").merge()
