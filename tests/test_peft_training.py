"""Patched PEFT models in training: dropout, 16-bit base weights, autocast, checkpointing, torch.compile, Trainer."""

from __future__ import annotations

import copy

import pytest
import torch
from peft.tuners.lora.layer import Linear
from peft_models import VOCAB, CallCount, adapted, adapter_state, assert_alike, batch, compare, config, loss, one_thread, output  # noqa: F401
from torch.autograd import forward_ad as fwAD
from torch.utils.checkpoint import checkpoint

from lora_kernels import reference

pytestmark = pytest.mark.filterwarnings("ignore")
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32


def gradients(model, kind="llama"):
    model.zero_grad()
    value = loss(model, kind)
    value.backward()
    return {"loss": value.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def rms(t: torch.Tensor) -> float:
    return t.double().square().mean().sqrt().item()


# ------------------------------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("options", [{}, {"lora_bias": True}, {"use_rslora": True, "bias": "lora_only"}], ids=["plain", "lora_bias", "rslora-bias"])
def test_dropout_is_our_mask_on_peft_s_formula(options):
    """Output and every gradient equal PEFT's layer computed by hand with the mask exported from the same seed."""
    model = adapted("mlp", True, lora_dropout=0.35, **options).train()
    layer = next(m for m in model.modules() if isinstance(m, Linear))
    x = torch.randn(2, 9, 12, requires_grad=True)
    parameters = [x, *(p for p in layer.parameters() if p.requires_grad)]
    dy = torch.randn(2, 9, 20)
    torch.manual_seed(21)
    y = layer(x)
    got = [y, *torch.autograd.grad(y, parameters, dy)]

    torch.manual_seed(21)
    seed = torch.randint(0, 2**62, (1,), dtype=torch.int64)
    keep = reference.unpack_bits(reference.dropout_mask(seed, 18, 12, 0.35), 12).view(2, 9, 12)
    assert 0.5 < keep.float().mean() < 0.8
    dropped = torch.where(keep, x * reference.keep_scale(0.35), 0.0)
    expected = layer.base_layer(x) + layer.lora_B["default"](layer.lora_A["default"](dropped)) * layer.scaling["default"]
    assert_alike(got, [expected, *torch.autograd.grad(expected, parameters, dy)])


def test_dropout_follows_mode_probability_and_seed():
    model = adapted("llama", True, lora_dropout=0.5)
    quiet = output(model, "llama")
    model.train()
    torch.manual_seed(1)
    first, second = output(model, "llama"), output(model, "llama")
    torch.manual_seed(1)
    assert torch.equal(output(model, "llama"), first)
    assert not torch.equal(first, second)
    assert not torch.equal(first, quiet)
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    torch.testing.assert_close(output(model, "llama"), quiet)


# ----------------------------------------------------------------------------------------------------------- dtypes, autocast


def assert_as_exact(results, dtype):
    """Ours no farther from float64 than twice PEFT's own, plus the dtype's rounding, in PEFT's dtypes."""
    for key, exact in results["exact"].items():
        peft, ours = results["peft"][key], results["ours"][key]
        assert (ours.dtype, ours.shape) == (peft.dtype, peft.shape), key
        assert rms(ours - exact) <= 2 * rms(peft - exact) + torch.finfo(dtype).eps * rms(exact), key


@pytest.mark.parametrize("dtype", [bf16, fp16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("adapter", ["fp32 adapter", "16-bit adapter"])
@pytest.mark.parametrize("options", [{}, {"lora_bias": True}], ids=["plain", "lora_bias"])
def test_16_bit_base(adapter, dtype, options, monkeypatch):
    calls, results = CallCount(monkeypatch), {}
    x64, dy64 = torch.randn(11, 12, dtype=torch.float64).to(dtype).double(), torch.randn(11, 20, dtype=torch.float64).to(dtype).double()
    for name in ("exact", "peft", "ours"):
        layer = next(m for m in adapted("mlp", name == "ours", **options).modules() if isinstance(m, Linear))
        layer.base_layer.to(dtype)
        if adapter == "16-bit adapter":
            layer.to(dtype)
        if name == "exact":
            layer.double()
        work = layer.base_layer.weight.dtype
        x = x64.to(work).detach().clone().requires_grad_()
        y = layer(x)
        assert y.dtype is work
        y.backward(dy64.to(work))
        results[name] = {"y": y.detach(), "dx": x.grad} | {n: p.grad for n, p in layer.named_parameters() if p.requires_grad}
    assert calls.fused == 1
    assert_as_exact(results, dtype)


@pytest.mark.parametrize("base_dtype", [fp32, bf16], ids=["fp32 base", "bf16 base"])
def test_autocast(base_dtype, monkeypatch):
    calls, results = CallCount(monkeypatch), {}
    for name in ("exact", "peft", "ours"):
        model = adapted("llama", name == "ours")
        for key, p in model.named_parameters():
            if "lora_" not in key:
                p.data = p.data.to(base_dtype)
        if name == "exact":
            model.double()
        with torch.autocast("cpu", bf16, enabled=name != "exact"):
            results[name] = gradients(model)
    assert calls.fused == 14
    assert_as_exact(results, bf16)


def test_fp16_adapter_under_bf16_autocast_is_peft_s(monkeypatch):
    model, calls = adapted("mlp", True), CallCount(monkeypatch)
    for layer in (m for m in model.modules() if isinstance(m, Linear)):
        layer.lora_A.half(), layer.lora_B.half()
    with torch.autocast("cpu", bf16):
        output(model, "mlp")
    assert calls.fused == 0
    assert "lora_A torch.float16" in calls.reasons[0]


def test_lora_bias_of_a_16_bit_base_stays_in_fp32_for_the_optimizer():
    model = adapted("mlp", True, lora_bias=True)
    layer = next(m for m in model.modules() if isinstance(m, Linear))
    layer.base_layer.bfloat16()
    layer(torch.randn(4, 12, dtype=bf16)).sum().backward()
    grad = layer.lora_B["default"].bias.grad
    assert grad.dtype is fp32
    torch.testing.assert_close(grad, torch.full((20,), 4 * layer.scaling["default"]), rtol=1e-2, atol=0)


def test_lora_bias_under_autocast_is_rounded_to_its_dtype_alone():
    layer = next(m for m in adapted("mlp", True, lora_bias=True).modules() if isinstance(m, Linear))
    layer.base_layer.bfloat16()
    lora_bias = layer.lora_B["default"].bias
    lora_bias.data = torch.linspace(1, 3, 20)
    with torch.no_grad(), torch.autocast("cpu", fp16):
        y = layer(torch.zeros(4, 12, dtype=bf16))
    expected = layer.base_layer.bias.double() + layer.scaling["default"] * lora_bias.double()
    assert y.dtype is fp16
    torch.testing.assert_close(y.double(), expected.expand(4, -1), rtol=torch.finfo(fp16).eps, atol=0)


# -------------------------------------------------------------------------------------------------------------- checkpointing


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_model_checkpointing_gives_the_same_gradients(reentrant, monkeypatch):
    plain, patched = adapted("llama", False).train(), adapted("llama", True).train()
    expected, calls = gradients(plain), CallCount(monkeypatch)
    patched.enable_input_require_grads()
    patched.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_alike(gradients(patched), expected)
    assert calls.fused == 28  # once more in the recomputation


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_replays_the_dropout_mask(reentrant):
    layer = next(m for m in adapted("mlp", True, lora_dropout=0.4).train().modules() if isinstance(m, Linear))
    x = torch.randn(30, 12, requires_grad=True)
    parameters = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    torch.manual_seed(5)
    expected = layer(x)
    torch.manual_seed(5)
    got = checkpoint(layer, x, use_reentrant=reentrant)
    for p in parameters:
        p.grad = None
    expected.square().sum().backward()
    grads = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    torch.manual_seed(99)  # the recomputation must bring its own state
    got.square().sum().backward()
    assert_alike([p.grad for p in parameters], grads, tolerance=0)


# -------------------------------------------------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("kind, options", [("llama", {}), ("mlp", {"lora_dropout": 0.3, "lora_bias": True})], ids=["llama", "dropout-lora_bias"])
def test_compiles_whole(kind, options, monkeypatch):
    torch._dynamo.reset()
    model = adapted(kind, True, **options)
    expected, calls = gradients(model, kind), CallCount(monkeypatch)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_alike(gradients(compiled, kind), {f"_orig_mod.{k}" if k != "loss" else k: v for k, v in expected.items()})
    assert calls.reasons == []
    if options:
        model.train()
        loss(compiled, kind).backward()


def test_a_layer_left_to_peft_compiles_whole():
    torch._dynamo.reset()
    model = adapted("mlp", True)
    model.add_adapter("other", config("mlp"))
    model.base_model.set_adapter(["default", "other"])
    compiled = torch.compile(model.eval(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(batch("mlp")["x"]), output(model, "mlp"))


def test_compiled_model_follows_the_adapter_s_state():
    torch._dynamo.reset()
    model = adapted("mlp", True)
    compiled = torch.compile(model, backend="aot_eager")
    x = batch("mlp")["x"]
    for change in (lambda: None, model.merge_adapter, model.unmerge_adapter, model.base_model.disable_adapter_layers):
        change()
        torch.testing.assert_close(compiled(x), model(x))


# -------------------------------------------------------------------------------------------------------- Trainer, torch.func


def test_functional_call():
    def act(model, kind):
        state = {n: p.detach() * 1.5 for n, p in model.named_parameters()}
        return torch.func.functional_call(model, state, kwargs=batch(kind)).detach()

    compare(act, "mlp")


def test_per_sample_gradients_by_torch_func():
    def act(model, kind):
        state = adapter_state(model)
        one = lambda parameters, x: torch.func.functional_call(model, parameters, (x,)).square().sum()
        return torch.func.vmap(torch.func.grad(one), in_dims=(None, 0))(state, batch(kind)["x"])

    compare(act, "mlp")


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_trainer(checkpointing, tmp_path, monkeypatch):
    """transformers.Trainer: the same losses, files and reloaded checkpoint as unpatched."""
    from transformers import Trainer, TrainingArguments, logging

    logging.set_verbosity_error()
    g = torch.Generator().manual_seed(0)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, VOCAB, (12, 9), generator=g)]

    def fit(patched):
        folder = tmp_path / str(patched)
        arguments = {"max_steps": 4, "per_device_train_batch_size": 3, "logging_steps": 1, "save_steps": 4, "learning_rate": 1e-2}
        arguments |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "gradient_checkpointing": checkpointing}
        trainer = Trainer(adapted("llama", patched), TrainingArguments(folder, **arguments), train_dataset=rows)
        trainer.train()
        losses = [torch.tensor(log["loss"]) for log in trainer.state.log_history if "loss" in log]
        names = sorted(p.name for p in (folder / "checkpoint-4").iterdir())
        return losses, names, adapter_state(trainer.model)

    expected, calls = fit(False), CallCount(monkeypatch)
    assert_alike(fit(True), expected)
    assert calls.fused == 14 * 4 * (2 if checkpointing else 1)


def test_copies_train_apart():
    model = adapted("mlp", True)
    twin = copy.deepcopy(model)
    before = adapter_state(model)
    for p in twin.parameters():
        p.data.add_(1.0) if p.requires_grad else None
    assert_alike(adapter_state(model), before, tolerance=0)
    assert not torch.allclose(output(twin, "mlp"), output(model, "mlp"))


def test_second_derivatives_and_forward_mode():
    model, plain = adapted("mlp", True), adapted("mlp", False)
    x, v = torch.randn(3, 12), torch.randn(3, 12)
    for derivative in (torch.autograd.functional.hvp, torch.autograd.functional.jvp, forward_mode):
        expected = derivative(lambda t: output_sum(plain, t), x, v)[1]
        torch.testing.assert_close(derivative(lambda t: output_sum(model, t), x, v)[1], expected)


def output_sum(model, x):
    return model(x).square().sum()


def forward_mode(f, x, v):
    with fwAD.dual_level():
        return fwAD.unpack_dual(f(fwAD.make_dual(x, v)))
