"""Text for the fine-tuning demo: documents from this machine or from a file, split so that held-out text is unseen in training."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


class UserError(Exception):
    """Something the user can put right; its text is all that is shown."""


# -------------------------------------------------------------------------------------------------------------- documents


def python_reference() -> list[str]:
    """Python's language reference, as `help()` shows it: about 0.4 MB, on every machine with Python."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def python_library() -> list[str]:
    """Source files of the standard library's top level."""
    return [path.read_text(encoding="utf-8") for path in sorted(Path(random.__file__).parent.glob("*.py"))]


BUILT_IN = {"python-reference": python_reference, "python-library": python_library}


def read_documents(source: str) -> list[str]:
    """The documents of a built-in source, of a .txt file (one document) or of a .jsonl file (one per line)."""
    if source in BUILT_IN:
        return BUILT_IN[source]()
    path = Path(source)
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"--data {source}: neither {' nor '.join(BUILT_IN)} nor a .txt or .jsonl file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--data {source}: byte {error.start} is not UTF-8; convert it: iconv -f LATIN1 -t UTF-8") from None
    except OSError as error:
        raise UserError(f"--data {source}: cannot be read: {error.strerror}") from None
    documents = [text] if path.suffix == ".txt" else [_row(source, i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not any(document.strip() for document in documents):
        raise UserError(f"--data {source}: the file holds no text")
    return documents


def _row(source: str, number: int, line: str) -> str:
    """One JSON line: {"text": ...}, {"prompt": ..., "completion": ...} or {"messages": [{"content": ...}, ...]}."""
    try:
        row = json.loads(line)
        if "text" in row:
            parts = [row["text"]]
        elif "messages" in row:
            parts = [message["content"] for message in row["messages"]]
        else:
            parts = [row["prompt"], row["completion"]]
        return "\n".join(parts)
    except (ValueError, KeyError, TypeError, AttributeError):
        allowed = '{"text": ...}, {"prompt": ..., "completion": ...} or {"messages": [{"content": ...}]}'
        raise UserError(f"--data {source}: line {number} is not one of {allowed}") from None


def split(documents: list[str], held_out: float, seed: int) -> tuple[str, str]:
    """Training and held-out text with no paragraph in common.

    Repeated paragraphs are dropped first (a fifth of Python's reference stands there twice: topics contain one another), documents
    are shuffled, and the last `held_out` of the characters, cut between paragraphs, is set aside.
    """
    documents = list(documents)
    random.Random(seed).shuffle(documents)
    seen: set[str] = set()
    paragraphs = []
    for document in documents:
        for paragraph in re.split(r"\n[ \t]*\n", document):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                paragraphs.append(paragraph.strip("\n"))
    budget = held_out * sum(map(len, paragraphs))
    cut = len(paragraphs)
    while cut > 0 and budget > 0:
        cut -= 1
        budget -= len(paragraphs[cut])
    return "\n\n".join(paragraphs[:cut]), "\n\n".join(paragraphs[cut:])


# ----------------------------------------------------------------------------------------------------------------- tokens


@dataclass(frozen=True)
class Data:
    """Token windows: train `[steps, batch, seq]`, held_out `[windows, seq]`; `epochs` the training text was read."""

    train: Tensor
    held_out: Tensor
    epochs: float


def prepare(source: str, tokenizer, *, steps: int, batch: int, seq: int, held_out_windows: int, seed: int) -> Data:
    """Cut the source into windows and deal them out to the steps, each window once before any comes again."""
    train_text, held_out_text = split(read_documents(source), held_out=0.1, seed=seed)
    windows = {}
    for name, text in (("training", train_text), ("held-out", held_out_text)):
        ids = torch.tensor(tokenizer(text)["input_ids"], dtype=torch.long)
        count = len(ids) // seq
        if count == 0:
            raise UserError(f"--data {source}: too short: {len(ids)} {name} tokens, and one window takes {seq}; give more text or a smaller --seq")
        windows[name] = ids[: count * seq].view(count, seq)
    train, held_out = windows["training"], windows["held-out"]
    needed = steps * batch
    dealer = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(len(train), generator=dealer) for _ in range(-(-needed // len(train)))]
    order = torch.cat(rounds)[:needed]
    return Data(train[order].view(steps, batch, seq), held_out[:held_out_windows], needed / len(train))
