"""What a PEFT adapter_config.json asks for: the rank and scaling of every module, or the reason why it cannot be served."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .._errors import LoraTypeError, LoraValueError, message
from .name_patterns import Overrides, Selection, Trials, bad, short
from .tensor_file import open_regular, parse_json, reading

MAX_CONFIG = 1_000_000  # bytes
MAX_RANK = 1_000_000

# Options that say nothing about what the trained adapter computes on a plain base model.
HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias",
    "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "use_rslora", "corda_config", "lora_ga_config",
}  # fmt: skip

# Options that change what is computed; a value that is set cannot be served, for this reason.
REFUSED = {
    "use_dora": "DoRA rescales the base weight's columns",
    "modules_to_save": "whole modules were trained and replace the base model's",
    "target_parameters": "it adapts bare parameters (mixture-of-experts weights), not linear layers",
    "layer_replication": "it repeats layers of the base model",
    "alora_invocation_tokens": "aLoRA is active for part of a sequence only",
    "trainable_token_indices": "token embeddings were trained",
    "fan_in_fan_out": "the base layers keep their weights transposed (Conv1D)",
    "use_qalora": "QA-LoRA pools the input before the update",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
    "arrow_config": "Arrow routes between adapters",
    "kasa_config": "KaSA adds singular values to the update",
    "monteclora_config": "MonteCLoRA samples its factors",
    "velora_config": "VeLoRA compresses activations",
    "megatron_config": "it is for Megatron's parallel layers",
}

_ANY_PARENT = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")  # of a layer's index, where layers_pattern does not name it

# Initialisations that leave the base weight as it was. The others (pissa, olora, corda, loftq, lora_ga) subtract from it.
KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica", None)


@dataclass(frozen=True)
class PeftConfig:
    """The part of adapter_config.json that decides what is computed."""

    r: int
    alpha: float
    rslora: bool
    lora_bias: bool
    ranks: Overrides
    alphas: Overrides
    selected: Selection  # the modules that PEFT adapts

    def rank_and_scaling(self, module: str) -> tuple[int, float]:
        """Scaling: lora_alpha / r, with use_rslora lora_alpha / sqrt(r), by the module's own alpha and rank."""
        rank = self.ranks.get(module, self.r)
        return rank, self.alphas.get(module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)

    def missing(self, present: Collection[str], known: Iterable[str]) -> list[str]:
        """Modules that the file lacks. "all-linear" asks for none: PEFT never saves it, and others do for a part of the layers."""
        return [m for m in known if m not in present and m in self.selected] if self.selected.targets is not None else []


def read_config(folder: Path) -> PeftConfig:
    """Read and judge `folder`/adapter_config.json. Only numbers and patterns are taken from it, never a path.

    Raises LoraValueError: no readable JSON object, an option that cannot be served, values that are no ranks or numbers.
    """
    with open_regular(folder / "adapter_config.json") as file, reading("adapter_config.json"):
        text = file.read(MAX_CONFIG + 1)
    if len(text) > MAX_CONFIG:
        raise LoraValueError(message("adapter_config.json is too large", f"over {MAX_CONFIG} bytes", f"at most {MAX_CONFIG}"))
    return judged(parse_json(text, "adapter_config.json"))


def held_config(config: object) -> PeftConfig:
    """As read_config, of a `peft.LoraConfig`, or of what its file would hold, as a dict. Goes through JSON as the file does.

    Raises LoraTypeError: neither of them. LoraValueError: as read_config.
    """
    try:
        raw = dict(config if isinstance(config, Mapping) else config.to_dict())
        text = json.dumps(raw, default=_as_json)
    except Exception as error:
        got = type(config).__name__ if isinstance(config, (Mapping, type(None))) else f"{type(config).__name__}: {error}"[:120]
        raise LoraTypeError(message("the adapter's config is none", got, "a peft.LoraConfig, or a dict as its file holds")) from error
    return judged(parse_json(text.encode(), "the adapter's config"))


def _as_json(value: object) -> object:
    """Sets as PEFT writes them; what no JSON file could hold as the text that a refusal shows."""
    return list(value) if isinstance(value, (set, frozenset)) else repr(value)


def judged(raw: dict) -> PeftConfig:
    """Raises LoraValueError: an option that cannot be served, values that are no ranks or numbers."""
    _refuse(raw)
    trials = Trials()
    return PeftConfig(
        r=_rank("r", raw.get("r", 8)),
        alpha=_finite("lora_alpha", raw.get("lora_alpha", 8)),
        rslora=_flag(raw, "use_rslora"),
        lora_bias=_flag(raw, "lora_bias"),
        ranks=_overrides(raw, "rank_pattern", _rank, trials),
        alphas=_overrides(raw, "alpha_pattern", _finite, trials),
        selected=_selection(raw, trials),
    )


def _refuse(raw: dict) -> None:
    if raw.get("peft_type") != "LORA":
        raise bad("this is no LoRA adapter", f"peft_type {short(raw.get('peft_type'))}", "LORA")
    for key, reason in REFUSED.items():
        if raw.get(key):
            raise bad(f"{key} is set: {reason}", short(raw[key]), "plain LoRA", "merge the adapter into a copy of the model")
    if raw.get("bias", "none") != "none":
        raise bad("biases of the base model were trained", f"bias {short(raw['bias'])}", '"none"', "train with bias='none' or lora_bias=True")
    init = raw.get("init_lora_weights", True)
    if not any(init is kept or (isinstance(init, str) and init == kept) for kept in KEEPS_BASE):
        fix = "save it in PEFT with path_initial_model_for_weight_conversion, which turns it into plain LoRA"
        raise bad("this initialisation changes the base weights", f"init_lora_weights {short(init)}", "one that keeps them", fix)
    for key in raw.keys() - HARMLESS - REFUSED.keys():
        if raw[key]:
            raise bad(f"the option {short(key)} is not known here and may change what is computed", short(raw[key]), "unset")


def _selection(raw: dict, trials: Trials) -> Selection:
    """As PEFT reads it. Where target_modules is null, which PEFT fills in by the kind of model when it trains, the file alone tells."""
    targets, layers, parents = (raw.get(key) for key in ("target_modules", "layers_to_transform", "layers_pattern"))
    if targets is None:
        targets = "all-linear"
    if not targets:
        allowed = 'a list of names, a pattern, or "all-linear"'
        raise bad("target_modules names no modules", short(targets), allowed, "write the names of the adapted modules there")
    if isinstance(targets, str) and not (layers is None and parents is None):
        raise bad("layers_to_transform and layers_pattern go with a list of target_modules", short(targets), fix="say it all in the pattern")
    if parents and layers is None:
        raise bad("layers_pattern is set without layers_to_transform", short(parents), fix="set both, or neither")
    layers = [] if layers is None else [layers] if type(layers) is int else layers
    if not isinstance(layers, list) or not all(type(i) is int for i in layers):
        raise bad("layers_to_transform is malformed", short(layers), "a layer's index, or a list of them")
    parents = [parents] if isinstance(parents, str) and parents else _names("layers_pattern", parents or [])
    return Selection(
        targets=None if isinstance(targets, str) and targets.lower() == "all-linear" else _names_or_pattern("target_modules", targets, trials),
        excluded=_names_or_pattern("exclude_modules", raw.get("exclude_modules") or [], trials),
        layers=frozenset(layers),
        layer_index=tuple(trials.compile("layers_pattern", p, r"(?:^|.*?\.)PATTERN\.(?P<idx>\d+)\.") for p in parents) or (_ANY_PARENT,),
        trials=trials,
    )


def _names_or_pattern(key: str, given: object, trials: Trials) -> frozenset[str] | re.Pattern:
    return trials.compile(key, given) if isinstance(given, str) else frozenset(_names(key, given))


def _names(key: str, given: object) -> list[str]:
    if not isinstance(given, list) or not all(isinstance(n, str) and n for n in given):
        raise bad(f"{key} is malformed", short(given), "a list of names, or a pattern")
    return given


def _rank(key: str, value: object) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise bad(f"{key} is no rank", short(value), "an integer of at least 1")
    return value


def _finite(key: str, value: object) -> float:
    try:
        if type(value) in (int, float) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer beyond float64
        pass
    raise bad(f"{key} is no finite number", short(value), "a finite number")


def _flag(raw: dict, key: str) -> bool:
    if not isinstance(value := raw.get(key) or False, bool):
        raise bad(f"{key} is no flag", short(value), "true or false")
    return value


def _overrides(raw: dict, key: str, check, trials: Trials) -> Overrides:
    given = raw.get(key) or {}
    if not isinstance(given, dict):
        raise bad(f"{key} is malformed", short(given), "an object: module pattern -> number")
    return Overrides(key, {pattern: check(f"{key}[{short(pattern)}]", value) for pattern, value in given.items()}, trials)
