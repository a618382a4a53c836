"""The serving demo's parts: adapters trained on the spot, the mixed batch, PEFT's answers, what a step costs."""

from __future__ import annotations

import math
import unicodedata
import warnings
from pathlib import Path

import torch
from models import loss_of, twin
from rich.console import Console
from text import UserError, read_documents
from torch import nn

import lora_kernels as lk
from lora_kernels.serving import AdapterPool
from lora_kernels.testing import timer


def unicode_names() -> list[str]:
    """Characters and their Unicode names, one a line."""
    named = ((c, unicodedata.name(chr(c), "")) for c in range(0xA1, 0x1800))
    return ["\n".join(f"U+{c:04X} {chr(c)} {name}" for c, name in named if name)]


WINDOW = 64  # tokens of a training sequence

# name: (text, LoRA options, two prompts)
TASKS = {
    "reference": (
        lambda: read_documents("python-reference"),
        dict(r=8, lora_alpha=16, target_modules="all-linear"),
        ("The with statement", "An object's type determines"),
    ),
    "code": (
        lambda: read_documents("python-library"),
        dict(r=16, lora_alpha=16, use_rslora=True, target_modules="all-linear", rank_pattern={"down_proj": 4}),
        ("import os\n\ndef", "class Reader:\n    def __init__(self"),
    ),
    "unicode": (unicode_names, dict(r=64, lora_alpha=64, target_modules=["q_proj", "v_proj"]), ("U+00E9 é", "U+0416 Ж")),
}
BASE_PROMPTS = ("The capital of France is", "Water boils at")


def train_adapters(model: nn.Module, tokenizer, steps: int, folder: Path, console: Console) -> dict[str, Path]:
    """One small adapter per task, trained with PEFT and `lora_kernels.patch`, saved by PEFT: the folders by name."""
    from peft import LoraConfig, get_peft_model

    folders = {}
    for seed, (name, (documents, options, _)) in enumerate(TASKS.items()):
        torch.manual_seed(seed)
        ids = torch.tensor(tokenizer("\n\n".join(documents())[:200_000])["input_ids"], device=model.device)
        windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
        windows = windows[torch.randperm(len(windows))]
        if len(windows) < 2 * steps:
            raise UserError(f"--steps {steps}: the text of {name} has {len(windows)} windows of {WINDOW} tokens, {2 * steps} are needed")
        peft = get_peft_model(twin(model), LoraConfig(task_type="CAUSAL_LM", **options)).train()
        lk.patch(peft)
        adamw = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.0)
        before = None
        for i in range(steps):
            loss = loss_of(peft, windows[2 * i : 2 * i + 2])
            before = loss.item() if before is None else before
            loss.backward()
            adamw.step()
            adamw.zero_grad()
        with torch.no_grad():
            after = loss_of(peft.eval(), windows[:2]).item()
        if not math.isfinite(after):
            raise UserError(f"--dtype {model.dtype}: training {name} diverged; take bfloat16 or float32")
        lk.unpatch(peft)
        peft.save_pretrained(folders.setdefault(name, folder / name))
        console.print(f"trained  {name}: rank {options['r']}, {steps} steps, loss on its first text {before:.2f} -> {after:.2f}")
    return folders


class MixedBatch:
    """Two prompts for every adapter and two for none, left-padded, in an order that mixes them."""

    def __init__(self, tokenizer, adapters: list[str], new_tokens: int, device: str) -> None:
        rows = [(name, TASKS[name][2] if name in TASKS else BASE_PROMPTS) for name in adapters] + [(None, BASE_PROMPTS)]
        self.names = [name for name, _ in rows] * 2
        self.prompts = [prompts[i] for i in range(2) for _, prompts in rows]
        encoded = [tokenizer(p)["input_ids"] for p in self.prompts]
        width, self.pad = max(map(len, encoded)), tokenizer.eos_token_id or 0
        self.ids = torch.tensor([[self.pad] * (width - len(e)) + e for e in encoded], device=device)
        self.mask = torch.tensor([[0] * (width - len(e)) + [1] * len(e) for e in encoded], device=device)
        self.new_tokens = new_tokens

    def rows(self, name: str | None) -> list[int]:
        return [i for i, n in enumerate(self.names) if n == name]

    def generate(self, model: nn.Module, rows: list[int] | None = None) -> torch.Tensor:
        """Greedy tokens `[rows, new_tokens]`; all rows at once when None."""
        pick = slice(None) if rows is None else rows
        options = {"max_new_tokens": self.new_tokens, "min_new_tokens": self.new_tokens, "do_sample": False, "use_cache": True}
        return model.generate(self.ids[pick], attention_mask=self.mask[pick], pad_token_id=self.pad, **options)[:, self.ids.shape[1] :]


class Peft:
    """PEFT with all adapters on one model; `alone` picks one, or none."""

    def __init__(self, base: nn.Module, folders: dict[str, Path]) -> None:
        from peft import PeftModel

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, folder in folders.items():
                if not hasattr(self, "model"):
                    self.model = PeftModel.from_pretrained(base, folder, adapter_name=name).eval()
                else:
                    self.model.load_adapter(folder, adapter_name=name)

    def alone(self, name: str | None, run):
        if name is None:
            with self.model.disable_adapter():
                return run(self.model)
        self.model.set_adapter(name)
        return run(self.model)


def one_at_a_time(peft: Peft, batch: MixedBatch) -> torch.Tensor:
    """The batch's greedy tokens, from PEFT with one adapter active at a time."""
    found = torch.empty(len(batch.names), batch.new_tokens, dtype=torch.long, device=batch.ids.device)
    for name in dict.fromkeys(batch.names):
        rows = batch.rows(name)
        found[rows] = peft.alone(name, lambda model, rows=rows: batch.generate(model, rows))
    return found


def show(batch: MixedBatch, tokenizer, got: torch.Tensor, expected: torch.Tensor, console: Console) -> list[str]:
    """Print every row's continuation; what is wrong with the tokens, as lines."""
    wrong = []
    for name, prompt, mine, theirs in zip(batch.names, batch.prompts, got.tolist(), expected.tolist(), strict=True):
        text = f"{prompt!r} -> {tokenizer.decode(mine)!r}"
        console.print(f"{name or '(none)':<10} {text if len(text) < 140 else text[:137] + '...'}", markup=False)
        if mine != theirs:
            at = next(i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b)
            wrong.append(f"{name}: token {at + 1} of {prompt!r} is {tokenizer.decode(mine[at])!r}, PEFT gives {tokenizer.decode(theirs[at])!r}")
    console.print(f"greedy tokens as PEFT's, one adapter at a time: {len(got) - len(wrong)} of {len(got)} rows, {batch.new_tokens} tokens each")
    return wrong


@torch.no_grad()
def measure(
    batch: MixedBatch, model: nn.Module, peft: Peft, pools: dict[str, tuple[nn.Module, AdapterPool]], rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds of one decode and one prefill step of the whole batch, by step and way, measured in turns."""
    peft_names = [name or "__base__" for name in batch.names]
    split = {name: batch.rows(name) for name in dict.fromkeys(batch.names)}
    last = batch.ids[:, -1:]

    def pooled(served: nn.Module, pool: AdapterPool, step):
        with pool.batch(batch.names):
            return step(served, slice(None))

    def ways(step) -> dict:
        found = {
            "base model": lambda: step(model, slice(None)),
            "PEFT, mixed batch (adapter_names)": lambda: step(peft.model, slice(None), adapter_names=peft_names),
            "PEFT, one adapter after the other": lambda: [peft.alone(n, lambda m, rows=rows: step(m, rows)) for n, rows in split.items()],
        }
        return found | {line: lambda pair=pair: pooled(*pair, step) for line, pair in pools.items()}

    def prefill(m, rows, **more):
        return m(input_ids=batch.ids[rows], attention_mask=batch.mask[rows], use_cache=True, **more)

    caches: dict = {}

    def decode(m, rows, **more):
        """One more token on a cache of the prompt, which is cut back afterwards. Whose cache it is does not matter for the time."""
        key = str(rows)
        if key not in caches:
            caches[key] = model(input_ids=batch.ids[rows], use_cache=True).past_key_values
        m(input_ids=last[rows], past_key_values=caches[key], use_cache=True, **more)
        caches[key].crop(-1)

    run = timer(batch.ids.device)
    return {"decode step": run(ways(decode), rounds=rounds, warmup=1), "prefill step": run(ways(prefill), rounds=rounds, warmup=1)}
