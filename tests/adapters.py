"""A tiny Llama, PEFT adapter folders for it, and PEFT's own answers: what the tests of the adapter pool compare with."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_kernels as lk

PREFIX = "base_model.model."
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Ranks 4 to 64 mixed, with everything that the pool serves beyond one rank and one alpha.
KINDS = {
    "r4": dict(r=4, lora_alpha=8),
    "r8-qv": dict(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"]),
    "r16-rslora": dict(r=16, lora_alpha=16, use_rslora=True),
    "r24-patterns": dict(r=24, rank_pattern={"q_proj": 5, r"layers\.1\.mlp\.up_proj": 48}, alpha_pattern={"k_proj": 3, "1.mlp.up_proj": 30}),
    "r32-bias": dict(r=32, lora_alpha=16, lora_bias=True, target_modules=["k_proj", "o_proj", "down_proj"]),
    "r64": dict(r=64, lora_alpha=64),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Layers this small run 10 times as fast on one thread where other processes want the cores too. Import it to use it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_llama(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = dict(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.2, pad_token_id=0, eos_token_id=None, bos_token_id=1)).eval()
    return model.to(dtype).requires_grad_(False)


def save_peft(base: nn.Module, folder: Path, seed: int = 0, **options) -> Path:
    """An adapter written by PEFT itself, with random weights in A and B (and in lora_bias)."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    options = {"target_modules": list(LINEARS)} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that lora_bias cannot be merged, and of its 1-D tensors
        model = get_peft_model(copy.deepcopy(base), LoraConfig(init_lora_weights=False, **options))
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B.default.bias"):
                parameter.data.normal_(std=0.3)
        model.save_pretrained(folder)
    return folder


def save_kinds(base: nn.Module, folder: Path) -> dict[str, Path]:
    return {name: save_peft(base, folder / name, seed=i, **options) for i, (name, options) in enumerate(KINDS.items(), 1)}


def peft_model(base: nn.Module, folder: Path):
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def write_adapter(folder: Path, tensors: dict[str, Tensor], **config) -> Path:
    """An adapter folder as PEFT lays it out, without PEFT (fast), and with whatever is wrong in the arguments."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted({key.split(".")[-3] for key in tensors if key.endswith(".lora_A.weight")}) or ["q_proj"]
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": names} | config))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def random_tensors(base: nn.Module, names: tuple[str, ...], r: int, seed: int, spread: float = 0.1) -> dict[str, Tensor]:
    """lora_A and lora_B for every layer of `base` whose name ends in one of `names`."""
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, m in base.named_modules():
        if name.endswith(names) and isinstance(m, nn.Linear):
            tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(r, m.in_features, generator=g) * spread
            tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(m.out_features, r, generator=g) * spread
    return tensors


def pooled(model: nn.Module, folder: Path, modules: list[str], **options) -> lk.AdapterPool:
    """A pool with adapters "a" and "b" of these modules."""
    pool = lk.AdapterPool(model, max_loras=2, max_rank=4, **options)
    for seed, name in enumerate("ab"):
        tensors = random_tensors(model, tuple(modules), 4, seed + 1, spread=0.5)
        pool.load(name, write_adapter(folder / name, tensors, target_modules=modules))
    return pool


def by_hand(folder: Path, scaling: float, ids: Tensor) -> Tensor:
    """The tiny Llama's logits with the adapter's tensors, as the safetensors library reads them, added to its weights in float64."""
    model, tensors = tiny_llama().double(), load_file(folder / "adapter_model.safetensors")
    for key, a in tensors.items():
        if key.endswith("lora_A.weight"):
            module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            model.get_submodule(module).weight += scaling * tensors[key.replace("lora_A", "lora_B")].double() @ a.double()
    return model(ids).logits
