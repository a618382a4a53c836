"""What a PEFT adapter_config.json asks for: the rank and scaling of every module, or the reason why it cannot be served."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .._errors import LoraValueError, message
from .tensor_file import open_regular, parse_json

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

# Initialisations that leave the base weight as it was. The others (pissa, olora, corda, loftq, lora_ga) subtract from it.
KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica", None)


@dataclass(frozen=True)
class PeftConfig:
    """The part of adapter_config.json that decides what is computed."""

    r: int
    alpha: float
    rslora: bool
    lora_bias: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    targets: tuple[str, ...]  # plain names that every adapter file must cover; empty where the config selects otherwise
    named: tuple[str, ...]  # plain names, of which every module of the file has one; empty where any may be there
    excluded: tuple[str, ...] | str  # plain names that no module of the file has, or a pattern that none matches

    def rank(self, module: str) -> int:
        return self._lookup(self.rank_pattern, module, self.r)

    def scaling(self, module: str) -> float:
        """lora_alpha / r, with use_rslora lora_alpha / sqrt(r), by the module's own alpha and rank."""
        alpha, r = self._lookup(self.alpha_pattern, module, self.alpha), self.rank(module)
        return alpha / math.sqrt(r) if self.rslora else alpha / r

    def unselected(self, modules: Iterable[str]) -> list[str]:
        """Those of the modules that PEFT, reading this config, would not adapt."""

        def left_out(module: str) -> bool:
            if isinstance(self.excluded, str):
                return bool(re.fullmatch(self.excluded, module))
            return _named(module, self.excluded)

        return [m for m in modules if (self.named and not _named(m, self.named)) or left_out(m)]

    @staticmethod
    def _lookup(patterns: dict, module: str, default):
        """The first pattern that matches the module's name or an end of it, as in PEFT."""
        for pattern, value in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return default


def read_config(folder: Path) -> PeftConfig:
    """Read and judge `folder`/adapter_config.json. Only numbers and patterns are taken from it, never a path.

    Raises LoraValueError: no readable JSON object, an option that cannot be served, values that are no ranks or numbers.
    """
    with open_regular(folder / "adapter_config.json") as file:
        text = file.read(MAX_CONFIG + 1)
    if len(text) > MAX_CONFIG:
        raise LoraValueError(message("adapter_config.json is too large", f"over {MAX_CONFIG} bytes", f"at most {MAX_CONFIG}"))
    raw = parse_json(text, "adapter_config.json")
    _refuse(raw)
    return PeftConfig(
        r=_rank("r", raw.get("r", 8)),
        alpha=_finite("lora_alpha", raw.get("lora_alpha", 8)),
        rslora=_flag(raw, "use_rslora"),
        lora_bias=_flag(raw, "lora_bias"),
        rank_pattern=_patterns(raw, "rank_pattern", _rank),
        alpha_pattern=_patterns(raw, "alpha_pattern", _finite),
        targets=_targets(raw),
        named=tuple(raw["target_modules"]) if isinstance(raw.get("target_modules"), list) else (),
        excluded=_excluded(raw),
    )


def _refuse(raw: dict) -> None:
    if raw.get("peft_type") != "LORA":
        raise _bad("this is no LoRA adapter", f"peft_type {_short(raw.get('peft_type'))}", "LORA")
    for key, reason in REFUSED.items():
        if raw.get(key):
            raise _bad(f"{key} is set: {reason}", _short(raw[key]), "plain LoRA", "merge the adapter into a copy of the model")
    if raw.get("bias", "none") != "none":
        raise _bad("biases of the base model were trained", f"bias {_short(raw['bias'])}", '"none"', "train with bias='none' or lora_bias=True")
    init = raw.get("init_lora_weights", True)
    if not any(init is kept or (isinstance(init, str) and init == kept) for kept in KEEPS_BASE):
        fix = "save it in PEFT with path_initial_model_for_weight_conversion, which turns it into plain LoRA"
        raise _bad("this initialisation changes the base weights", f"init_lora_weights {_short(init)}", "one that keeps them", fix)
    for key in raw.keys() - HARMLESS - REFUSED.keys():
        if raw[key]:
            raise _bad(f"the option {_short(key)} is not known here and may change what is computed", _short(raw[key]), "unset")


def _targets(raw: dict) -> tuple[str, ...]:
    names, narrowed = raw.get("target_modules"), any(raw.get(k) for k in ("layers_to_transform", "layers_pattern", "exclude_modules"))
    if names is None or isinstance(names, str):
        return ()
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
        raise _bad("target_modules is malformed", _short(names), "a list of names, or a pattern")
    return () if narrowed else tuple(names)


def _excluded(raw: dict) -> tuple[str, ...] | str:
    given = raw.get("exclude_modules") or []
    if isinstance(given, str):
        _check_pattern("exclude_modules", given)
        return given
    if not isinstance(given, list) or not all(isinstance(n, str) and n for n in given):
        raise _bad("exclude_modules is malformed", _short(given), "a list of names, or a pattern")
    return tuple(given)


def _named(module: str, names: Iterable[str]) -> bool:
    """Whether the module's name is one of these, or ends in one."""
    return any(module == name or module.endswith("." + name) for name in names)


def _rank(key: str, value: object) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise _bad(f"{key} is no rank", _short(value), "an integer of at least 1")
    return value


def _finite(key: str, value: object) -> float:
    try:
        if type(value) in (int, float) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer beyond float64
        pass
    raise _bad(f"{key} is no finite number", _short(value), "a finite number")


def _flag(raw: dict, key: str) -> bool:
    if not isinstance(value := raw.get(key) or False, bool):
        raise _bad(f"{key} is no flag", _short(value), "true or false")
    return value


def _patterns(raw: dict, key: str, check) -> dict:
    given = raw.get(key) or {}
    if not isinstance(given, dict):
        raise _bad(f"{key} is malformed", _short(given), "an object: module pattern -> number")
    for pattern in given:
        _check_pattern(key, pattern)
    return {pattern: check(f"{key}[{_short(pattern)}]", value) for pattern, value in given.items()}


def _check_pattern(key: str, pattern: str) -> None:
    """Patterns are regular expressions out of a stranger's file: only those that cannot take exponential time are tried."""
    repeats = len(re.findall(r"(?<!\\)[*+{]", pattern))
    if len(pattern) > 500 or repeats > 3 or re.search(r"\)[*+?{]|\(\?|\\[1-9]", pattern):
        raise _bad(f"{key} holds a pattern too complex to be tried", _short(pattern), "at most 3 repetitions, none of a group")
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise _bad(f"{key} holds no valid pattern", _short(pattern), "a regular expression") from error


def missing_targets(config: PeftConfig, present: Iterable[str], known: Iterable[str]) -> list[str]:
    """Modules of the model that the config names and the file lacks."""
    present = set(present)
    wanted = [m for m in known if _named(m, config.targets)]
    return [m for m in wanted if m not in present]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _bad(what: str, got: object = None, allowed: object = None, fix: str | None = None) -> LoraValueError:
    return LoraValueError(message(f"adapter_config.json: {what}", got, allowed, fix))
