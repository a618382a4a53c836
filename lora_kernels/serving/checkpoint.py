"""`Checkpoint`: a PEFT adapter, of a folder or held in memory, judged and ready to be copied tensor by tensor."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .._errors import LoraTypeError, LoraValueError, message
from .held_tensors import HeldTensors
from .peft_config import PeftConfig, held_config, read_config
from .tensor_file import TensorFile

WEIGHTS = "adapter_model.safetensors"
AGAIN = "fetch or save the adapter again, or give its own config"
_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias)")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")

# Parts of a tensor's name that tell what kind of adapter it belongs to.
_FOREIGN = {
    "lora_magnitude_vector": "DoRA",
    "lora_embedding_": "LoRA on an embedding",
    "modules_to_save": "a whole trained module",
    "base_layer": "a base weight; save with save_embedding_layers=False",
    "token_adapter": "trained token embeddings",
}


class Shape(NamedTuple):
    """What the model offers for one module: in and out features."""

    K: int
    N: int


class Pair(NamedTuple):
    """The adapter of one module: names of its tensors in the file, true rank and scaling."""

    a: str
    b: str
    bias: str | None
    rank: int
    scaling: float


class Checkpoint:
    """An adapter's config and tensors judged against `targets` (module name -> Shape); `pairs` by module name. Closes `file`; a context manager.

    Everything but the values is checked here: what the config asks for, which modules and tensors there are, shapes, ranks.

    Raises: LoraValueError, with the reason.
    """

    def __init__(self, config: PeftConfig, file: TensorFile | HeldTensors, targets: dict[str, Shape], max_rank: int) -> None:
        self.config, self.file = config, file
        try:
            self.pairs = self._pairs(targets, max_rank)
        except BaseException:
            self.close()
            raise

    @classmethod
    def of_folder(cls, folder: str | os.PathLike, targets: dict[str, Shape], max_rank: int) -> Checkpoint:
        """Only adapter_config.json and adapter_model.safetensors are ever opened."""
        folder = _folder(folder)
        return cls(read_config(folder), TensorFile(folder / WEIGHTS), targets, max_rank)

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], config: object, targets: dict[str, Shape], max_rank: int) -> Checkpoint:
        """What PEFT would have written there, still in memory."""
        return cls(held_config(config), HeldTensors(tensors), targets, max_rank)

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _pairs(self, targets: dict[str, Shape], max_rank: int) -> dict[str, Pair]:
        found: dict[str, dict[str, str]] = {}
        for key in self.file.entries:
            module, part = self._split(key)
            if part in found.setdefault(module, {}):
                raise self._bad(f"{module} has two tensors {part}", f"{found[module][part]} and {key}")
            found[module][part] = key
        if not found:
            raise self._bad("there are no tensors")
        unknown = [m for m in found if m not in targets]
        if unknown:
            kinds = ", ".join(sorted({t.rsplit(".", 1)[-1] for t in targets}))
            fix = "name them in target_modules; if transformers has renamed the model's modules since, load the adapter with PEFT and save it again"
            raise self._bad("it adapts modules that the pool does not serve", _some(unknown, 3), f"linear layers named {kinds}", fix)
        if missing := self.config.missing(found, targets):
            raise self._bad("modules that adapter_config.json names are missing", _some(missing), fix=AGAIN)
        pairs = {module: self._pair(module, parts, targets[module], max_rank) for module, parts in found.items()}
        if foreign := [m for m in pairs if m not in self.config.selected]:
            raise self._bad("it adapts modules that its adapter_config.json leaves out", _some(foreign), fix=AGAIN)
        return pairs

    def _pair(self, module: str, parts: dict[str, str], shape: Shape, max_rank: int) -> Pair:
        if missing := {"lora_A.weight", "lora_B.weight"} - parts.keys():
            raise self._bad(f"{module} lacks {' and '.join(sorted(missing))}")
        a, b, bias = parts["lora_A.weight"], parts["lora_B.weight"], parts.get("lora_B.bias")
        if (bias is not None) != self.config.lora_bias:
            raise self._bad(f"{module}: config and file disagree on lora_bias", f"config {self.config.lora_bias}, file {bias is not None}")
        rank, scaling = self.config.rank_and_scaling(module)
        expected = {a: (rank, shape.K), b: (shape.N, rank)} | ({bias: (shape.N,)} if bias else {})
        for key, wanted in expected.items():
            if (got := self.file.entries[key].shape) != wanted:
                raise self._bad(f"{key} has the wrong shape", list(got), f"{list(wanted)} by the model and the config's rank {rank}")
        if rank > max_rank:
            raise self._bad(f"{module} has a rank above the pool's", rank, f"at most max_rank {max_rank}", f"AdapterPool(max_rank={rank})")
        if not abs(scaling) <= torch.finfo(torch.float32).max:
            raise self._bad(f"{module}: the scaling by adapter_config.json is not finite in float32", f"{scaling:g}", fix="look at lora_alpha")
        return Pair(a, b, bias, rank, scaling)

    def _split(self, key: str) -> tuple[str, str]:
        """(module, lora_A.weight | lora_B.weight | lora_B.bias)"""
        if match := _KEY.fullmatch(key):
            return match["module"], match["part"]
        kind = next((kind for part, kind in _FOREIGN.items() if part in key), None)
        shown = key if len(key) <= 120 else key[:117] + "..."
        raise self._bad(f"a tensor that cannot be served{': ' + kind if kind else ''}", shown, "MODULE.lora_A.weight, .lora_B.weight, .lora_B.bias")

    def _bad(self, what: str, got: object = None, allowed: object = None, fix: str | None = None) -> LoraValueError:
        return LoraValueError(message(f"{self.file.name}: {what}", got, allowed, fix))


def _folder(folder: str | os.PathLike) -> Path:
    try:
        path, given = Path(folder), os.fspath(folder)
    except TypeError:
        raise LoraTypeError(message("the adapter's folder is no path", type(folder).__name__, "str or os.PathLike")) from None
    try:
        # Of a link that is pointed elsewhere meanwhile, config and weights are still those of one adapter.
        path = Path(os.path.realpath(path, strict=True))
        is_folder = path.is_dir() and given != ""  # Path("") is the current folder
    except (ValueError, OSError):  # a null byte; nothing there; a name too long
        is_folder = False
    if not is_folder:
        fix = f'huggingface_hub.snapshot_download("{given}") returns a folder, if that is a repository' if _HUB_ID.fullmatch(given) else None
        raise LoraValueError(message("there is no such adapter folder", repr(given), "a folder as written by PEFT's save_pretrained", fix))
    if not os.path.exists(path / WEIGHTS) and os.path.exists(path / "adapter_model.bin"):  # both False in a folder that may not be searched
        fix = "convert it where you trust it: PeftModel.save_pretrained writes safetensors"
        raise LoraValueError(message("this adapter is a pickle file, which is never opened", "adapter_model.bin", WEIGHTS, fix))
    return path


def _some(modules: list[str], most: int = 1) -> str:
    return ", ".join(modules[:most]) + (f" and {len(modules) - most} more" if len(modules) > most else "")
