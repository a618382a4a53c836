"""adapter_config.json: what is honoured, what is refused and why."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch
from adapters import by_hand, one_thread, random_tensors, tiny_llama, write_adapter

from lora_kernels import LoraKernelsError, LoraTypeError, LoraValueError
from lora_kernels.serving import AdapterPool
from lora_kernels.serving.peft_config import read_config

__all__ = ["one_thread"]
IDS = torch.randint(2, 128, (2, 5), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def base():
    return tiny_llama()


@pytest.fixture
def pool(base):
    with AdapterPool(base, max_loras=2, max_rank=8) as pool:
        yield pool


def config(folder, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8} | changes))
    return read_config(folder)


CHANGE_BASE = ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")
REFUSALS = {
    "dora": ({"use_dora": True}, "DoRA"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "whole modules were trained"),
    "target_parameters": ({"target_parameters": ["mlp.experts"]}, "bare parameters"),
    "layer_replication": ({"layer_replication": [[0, 2], [1, 2]]}, "repeats layers"),
    "alora": ({"alora_invocation_tokens": [5]}, "aLoRA"),
    "trainable-tokens": ({"trainable_token_indices": [1, 2]}, "token embeddings"),
    "bias-all": ({"bias": "all"}, "biases of the base model.*lora_bias=True"),
    "fan_in_fan_out": ({"fan_in_fan_out": True}, "transposed"),
    "qalora": ({"use_qalora": True}, "QA-LoRA"),
    "bdlora": ({"use_bdlora": {"x": 1}}, "block-diagonal"),
    "megatron": ({"megatron_config": {"x": 1}}, "Megatron"),
    **{
        f"init-{init}": ({"init_lora_weights": init}, "changes the base weights")
        for init in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")
    },
    "init-number": ({"init_lora_weights": 1}, "changes the base weights"),
    "unknown-option": ({"use_quantum_lora": True}, "'use_quantum_lora' is not known"),
    "ia3": ({"peft_type": "IA3"}, "no LoRA adapter; got peft_type 'IA3'"),
    "no-type": ({"peft_type": None}, "no LoRA adapter"),
    "r-0": ({"r": 0}, "r is no rank"),
    "r-text": ({"r": "16"}, "r is no rank"),
    "r-true": ({"r": True}, "r is no rank"),
    "alpha-nan": ({"lora_alpha": math.nan}, "lora_alpha is no finite number"),
    "alpha-huge": ({"lora_alpha": 10**400}, "lora_alpha is no finite number"),
    "alpha-beyond-float32": ({"lora_alpha": 1e300}, "the scaling by adapter_config.json is not finite in float32"),
    "alpha-text": ({"lora_alpha": "8"}, "lora_alpha is no finite number"),
    "rslora-text": ({"use_rslora": "yes"}, "use_rslora is no flag"),
    "patterns-list": ({"rank_pattern": ["q"]}, "rank_pattern is malformed"),
    "pattern-rank-0": ({"rank_pattern": {"q": 0}}, "rank_pattern.* is no rank"),
    "pattern-broken": ({"alpha_pattern": {"q[": 1}}, "no valid pattern"),
    "pattern-exponential": ({"rank_pattern": {"(a+)+x": 4}}, "too complex"),
    "pattern-many": ({"rank_pattern": {".*a.*b.*c.*d": 4}}, "too complex"),
    "pattern-lookahead": ({"rank_pattern": {"(?=x)y": 4}}, "too complex"),
    "targets-object": ({"target_modules": {"q": 1}}, "target_modules is malformed"),
    "targets-others": ({"target_modules": ["other_proj"]}, "adapter_config.json leaves out; got model.layers.0.self_attn.q_proj and 1 more"),
    "excluded": ({"exclude_modules": ["q_proj"]}, "adapter_config.json leaves out"),
    "excluded-pattern": ({"exclude_modules": r".*\.1\..*q_proj"}, "adapter_config.json leaves out; got model.layers.1.self_attn.q_proj;"),
    "excluded-number": ({"exclude_modules": [3]}, "exclude_modules is malformed"),
}


@pytest.mark.parametrize("changes, reason", REFUSALS.values(), ids=REFUSALS.keys())
def test_refused_with_the_reason(base, pool, tmp_path, changes, reason):
    write_adapter(tmp_path, random_tensors(base, ("q_proj",), 4, 1), **changes)
    before = pool.stats()
    with pytest.raises(LoraValueError, match=reason) as caught:
        pool.load("x", tmp_path)
    assert len(str(caught.value)) < 600
    assert pool.stats() == before | {"refused": before["refused"] + 1}


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_inits_that_keep_the_base_are_served(base, pool, tmp_path, init):
    write_adapter(tmp_path, random_tensors(base, ("q_proj",), 4, 1), init_lora_weights=init)
    pool.load("x", tmp_path)
    with pool.batch(["x", "x"]):
        got = base(IDS).logits
    torch.testing.assert_close(got.double(), by_hand(tmp_path, 2.0, IDS), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "module, rank, scaling",
    [
        ("model.layers.0.self_attn.q_proj", 16, 8 / 16),
        ("model.layers.1.self_attn.q_proj", 2, 8 / 2),
        ("model.layers.0.mlp.up_proj", 4, 3 / 4),
        ("model.layers.10.mlp.up_proj", 4, 3 / 4),
        ("model.layers.0.mlp.down_proj", 4, 8 / 4),
    ],
)
def test_patterns_take_the_first_that_matches_an_end_of_the_name(tmp_path, module, rank, scaling):
    patterns = {r"1\.self_attn\.q_proj": 2, "q_proj": 16, "proj": 32, "layers.0": 64}
    found = config(tmp_path, rank_pattern=patterns, alpha_pattern={r"layers\.\d+\.mlp\.up_proj": 3})
    assert found.rank(module) == rank
    assert found.scaling(module) == scaling
    rslora = config(tmp_path, rank_pattern=patterns, use_rslora=True)
    assert rslora.scaling(module) == 8 / math.sqrt(rank)


@pytest.mark.parametrize(
    "patterns", [{}, {"q_proj": 16}, {r"layers\.[01]\..*_proj": 7, "q_proj": 2}, {"^model.layers.0.mlp.up_proj": 9}, {"0.mlp.up_proj": 3}]
)
def test_patterns_are_looked_up_as_peft_does(base, tmp_path, patterns):
    other = pytest.importorskip("peft.utils.other")
    found = config(tmp_path, rank_pattern=patterns)
    for module, _ in base.named_modules():
        assert found.rank(module) == patterns.get(other.get_pattern_key(patterns.keys(), module), 4)


def test_paths_in_the_config_are_never_followed(base, pool, tmp_path, monkeypatch):
    elsewhere = str(tmp_path / "secret")
    changes = {"base_model_name_or_path": "../../../etc/passwd", "revision": elsewhere, "auto_mapping": {"parent_library": "os.system"}}
    folder = write_adapter(tmp_path / "x", random_tensors(base, ("q_proj",), 4, 1), **changes)
    opened = []
    monkeypatch.setattr(os, "open", lambda path, *a, run=os.open, **k: opened.append(os.path.basename(path)) or run(path, *a, **k))
    pool.load("x", folder)
    assert opened == ["adapter_config.json", "adapter_model.safetensors"]


def test_pickle_files_are_never_opened(base, pool, tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "opened"), "w"))

    write_adapter(tmp_path, random_tensors(base, ("q_proj",), 4, 1))
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({"x": Trap()}, tmp_path / "adapter_model.bin")
    with pytest.raises(LoraValueError, match="a pickle file, which is never opened"):
        pool.load("x", tmp_path)
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize(
    "text, reason",
    [
        (b"", "no valid JSON"),
        (b"[]", "no JSON object"),
        (b'{"r": 4, "r": 8}', "'r' stands there twice"),
        (b"\xff\xfe", "no valid JSON"),
        (b"[" * 100_000, "no valid JSON"),
        (b'{"r": ' + b"9" * 5000 + b"}", "no valid JSON|no rank|no LoRA"),
        (b" " * 1_000_001, "too large"),
    ],
    ids=["empty", "list", "twice", "utf8", "deep", "digits", "large"],
)
def test_config_files_that_are_no_config(base, pool, tmp_path, text, reason):
    write_adapter(tmp_path, random_tensors(base, ("q_proj",), 4, 1))
    (tmp_path / "adapter_config.json").write_bytes(text)
    with pytest.raises(LoraValueError, match=reason):
        pool.load("x", tmp_path)


def test_folders_that_are_none(pool, tmp_path):
    for folder, reason in (
        (tmp_path / "none", "no such adapter folder"),
        ("a\0b", "no such adapter folder"),
        ("a" * 5000, "no such"),
        (tmp_path, "cannot be opened"),
    ):
        with pytest.raises(LoraValueError, match=reason):
            pool.load("x", folder)
    with pytest.raises(LoraTypeError, match="no path"):
        pool.load("x", 7)
    os.mkfifo(tmp_path / "adapter_config.json")  # opening it the plain way would wait for ever
    with pytest.raises(LoraValueError, match="no regular file"):
        pool.load("x", tmp_path)
    for name in ("", None, 3):
        with pytest.raises(LoraKernelsError, match="is no name"):
            pool.load(name, tmp_path)
