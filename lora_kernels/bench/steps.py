"""End to end: training steps of a small decoder with adapters on all seven projections; tokens/s, peak memory, saved bytes.

PEFT as it comes, PEFT with adapters in the model's dtype, and the same two models after `lora_kernels.patch`. All start from the same
weights and see the same batches; the gate compares their first gradients with the model's in float64 before anything is timed.
"""

from __future__ import annotations

import copy
import gc
import time
import warnings
from dataclasses import asdict, dataclass

import torch
from torch import nn

from .. import _device, testing
from ..integrations.peft import patch
from . import memory
from .measure import _summary

STEPS = 20
LIMIT = {"bfloat16": 5e-2, "float32": 1e-3}  # relative RMSE of the gradients through the whole model


@dataclass(frozen=True)
class Model:
    """A decoder: the layer shapes of `model`, few layers, a small vocabulary. A step sees `tokens` tokens in `sequences` of equal length."""

    model: str
    hidden: int
    inter: int
    heads: int
    kv_heads: int
    layers: int
    tokens: int
    R: int = 16
    dtype: str = "bfloat16"
    steps: int = STEPS
    sequences: int = 1


QUICK = Model("2 layers of smollm2-135m", 576, 1536, 9, 3, layers=2, tokens=256)
CPU = Model("4 layers of smollm2-135m", 576, 1536, 9, 3, layers=4, tokens=512, sequences=4)
GPU = Model("2 layers of llama-3-8b", 4096, 14336, 32, 8, layers=2, tokens=8192, sequences=8, steps=10)  # attention in float64 stores tokens x length


def missing() -> str | None:
    absent = [name for name in ("transformers", "peft") if not _device.has_module(name)]
    return f"{' and '.join(absent)} not installed" if absent else None


def _peft_model(spec: Model, device: torch.device) -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=spec.hidden,
        intermediate_size=spec.inter,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        max_position_embeddings=max(2048, spec.tokens),
        use_cache=False,
    )
    with torch.device(device):  # where the weights are drawn, too: one core would take seconds for a GPU's model
        base = LlamaForCausalLM(config).to(getattr(torch, spec.dtype))
    lora = LoraConfig(r=spec.R, lora_alpha=2 * spec.R, lora_dropout=0.0, target_modules="all-linear")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a property of an older name
        model = get_peft_model(base, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # PEFT starts it at zero, which would leave half the gradients zero
                parameter.normal_(std=0.02)
    return model


def _cast_adapters(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model


def _patched(model: nn.Module) -> nn.Module:
    patch(model, strict=True)
    return model


def models(spec: Model, device: torch.device) -> dict[str, nn.Module]:
    """Contestant -> its model; those with adapters in the model's dtype ("low") only where that is not float32, as PEFT makes them."""
    first, dtype = _peft_model(spec, device), getattr(torch, spec.dtype)
    made: dict[str, nn.Module] = {"peft": first}
    if dtype != torch.float32:
        made["peft_low"] = _cast_adapters(copy.deepcopy(first), dtype)
    return made | {name.replace("peft", "ours"): _patched(copy.deepcopy(source)) for name, source in made.items()}


def _batch(spec: Model, device: torch.device, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1024, (spec.sequences, spec.tokens // spec.sequences), generator=generator).to(device)


def _loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids).loss


def _grads(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(_loss(model, ids), list(named.values())), strict=True))


def gate(spec: Model, made: dict[str, nn.Module], ids: torch.Tensor) -> dict[str, tuple[str | None, dict[str, float]]]:
    """Per contestant: why it is refused or None, and its gradients' relative RMSE against the model in float64."""
    verdicts = {}
    truth = _grads(copy.deepcopy(made["peft"]).double(), ids)
    low = _grads(copy.deepcopy(made["peft_low"]).double(), ids) if "peft_low" in made else truth
    for name, model in made.items():
        want, got = (low if name.endswith("low") else truth), _grads(model, ids)
        errors = {side: max(testing.relative_rmse(got[k], want[k]) for k in want if side in k) for side in ("lora_A", "lora_B")}
        yardstick = verdicts["peft_low" if name.endswith("low") else "peft"][1] if name.startswith("ours") else errors
        bad = [s for s, e in errors.items() if not e <= min(LIMIT[spec.dtype], testing.ALLOWED_RATIO * yardstick[s])]
        verdicts[name] = (f"gradients of {' and '.join(bad)} are wrong: relative RMSE {max(errors.values()):.1e}" if bad else None, errors)
    return verdicts


class _Trainer:
    def __init__(self, model: nn.Module, device: torch.device):
        self.model, self.device = model.train(), device
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        self.loss = torch.zeros(())

    def step(self, ids: torch.Tensor) -> float:
        """Seconds of one step, up to the moment its weights are there."""
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        loss = _loss(self.model, ids)
        loss.backward()
        self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.loss = loss.detach()
        return time.perf_counter() - start


def measure(spec: Model, device: torch.device) -> dict:
    """The record: `spec.steps` steps of every contestant, interleaved step by step, in an order that rotates."""
    made = models(spec, device)
    verdicts = gate(spec, made, _batch(spec, device, 0))
    results: dict[str, dict] = {}
    trainers: dict[str, _Trainer] = {}
    for name, model in made.items():
        entry = results[name] = {}
        refused, entry["errors"] = verdicts[name]
        if refused:
            entry["refused"] = refused
            continue
        ids, frozen = _batch(spec, device, 1), list(model.parameters())
        trainers[name] = trainer = _Trainer(model, device)
        entry["saved_bytes"] = testing.saved_bytes(lambda m=model, i=ids: _loss(m, i), weights=frozen)
        snapshot = copy.deepcopy({k: v for k, v in model.state_dict().items() if "lora_" in k})
        entry["peak_bytes"] = memory.peak(lambda t=trainer, i=ids: t.step(i), device)
        model.load_state_dict(snapshot, strict=False)
        trainers[name] = _Trainer(model, device)
    gc.collect()
    names = list(trainers)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-1, spec.steps):
        ids = _batch(spec, device, 2 + turn)
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            seconds = trainers[name].step(ids)
            if turn >= 0:
                times[name].append(seconds)
    for name, seconds in times.items():
        results[name] |= _summary(seconds, "clock", times)
        results[name] |= {"tokens_per_s": 1e6 * spec.tokens / results[name]["us"], "last_loss": trainers[name].loss.item()}
    return {"case": asdict(spec), "results": results}
