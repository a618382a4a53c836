"""adapter_config.json: what is honoured, what is refused and why."""

from __future__ import annotations

import itertools
import json
import math
import os
import time

import pytest
import torch
from adapters import by_hand, one_thread, random_tensors, tiny_llama, write_adapter

from lora_kernels import LoraKernelsError, LoraTypeError, LoraValueError
from lora_kernels.serving import AdapterPool, checkpoint, name_patterns
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
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | changes))
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
    "pattern-many": ({"rank_pattern": {".*a.*b.*c.*d.*e": 4}}, "too complex"),
    "pattern-alternatives": ({"rank_pattern": {"(?:.|.)" * 30 + "!": 4}}, "too complex"),
    "pattern-begins-another": ({"target_modules": "(?:a|ab|abc)" * 30}, "too complex"),
    "pattern-optional": ({"exclude_modules": ".?" * 40 + "!"}, "too complex"),
    "pattern-optional-group": ({"target_modules": "(?:a|b)?" * 30}, "too complex"),
    "pattern-nested": ({"target_modules": "(?:(?:.{0,9}){0,9}){0,9}!"}, "too complex"),
    "pattern-reference": ({"target_modules": r"(?P<a>.*)(?P=a)"}, "too complex"),
    "pattern-classes": ({"target_modules": r"[\x01-\uffff]" * 5000}, "too complex"),
    "patterns-501": ({"rank_pattern": {f"{i}.*": 4 for i in range(501)}}, "too many patterns; got 501; allowed: 500"),
    "targets-empty": ({"target_modules": []}, "names no modules"),
    "targets-broken": ({"target_modules": "("}, "target_modules holds no valid pattern"),
    "targets-pattern": ({"target_modules": r".*\.0\..*q_proj"}, "leaves out; got model.layers.1.self_attn.q_proj;"),
    "targets-pattern-missing": ({"target_modules": r".*\.[qk]_proj"}, "are missing; got model.layers.0.self_attn.k_proj and 1 more"),
    "excluded-missing": ({"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*\.0\..*k_proj"}, "got model.layers.1.self_attn.k_proj;"),
    "layers": ({"layers_to_transform": [0]}, "leaves out; got model.layers.1.self_attn.q_proj;"),
    "layers-one": ({"layers_to_transform": 1}, "leaves out; got model.layers.0.self_attn.q_proj;"),
    "layers-99": ({"layers_to_transform": [99]}, "leaves out; got model.layers.0.self_attn.q_proj and 1 more"),
    "layers-missing": ({"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [0, 1]}, "are missing"),
    "layers-elsewhere": ({"layers_to_transform": [0, 1], "layers_pattern": ["h"]}, "leaves out; got model.layers.0.self_attn.q_proj and 1 more"),
    "layers-text": ({"layers_to_transform": "x"}, "layers_to_transform is malformed"),
    "layers-bool": ({"layers_to_transform": [True]}, "layers_to_transform is malformed"),
    "layers-of-a-pattern": ({"target_modules": ".*q_proj", "layers_to_transform": [0, 1]}, "go with a list of target_modules"),
    "layers-pattern-alone": ({"layers_pattern": "layers"}, "without layers_to_transform"),
    "layers-pattern-broken": ({"layers_to_transform": [0, 1], "layers_pattern": "("}, "layers_pattern holds no valid pattern"),
    "layers-pattern-number": ({"layers_to_transform": [0, 1], "layers_pattern": 7}, "layers_pattern is malformed"),
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
    assert found.rank_and_scaling(module) == (rank, scaling)
    rslora = config(tmp_path, rank_pattern=patterns, use_rslora=True)
    assert rslora.rank_and_scaling(module) == (rank, 8 / math.sqrt(rank))


@pytest.mark.parametrize(
    "patterns",
    [
        {},
        {"q_proj": 16},
        {r"layers\.[01]\..*_proj": 7, "q_proj": 2},
        {"q_proj": 2, r"layers\.[01]\..*_proj": 7},
        {"^model.layers.0.mlp.up_proj": 9, r"^model\.layers\.1\.mlp\.up_proj": 8, "^q_proj": 7},
        {"0.mlp.up_proj": 3},
        {"mlp.up_proj": 5, r"mlp\.up_proj": 6, "up_proj": 7},
        {r"mlp\.up_proj": 6, "mlp.up_proj": 5},
        {r".*layers\.\d+\.self_attn\..*_proj.*": 3, "a+b": 4},
        {r"layers(?=\.).*q_proj": 3, "k_proj|v_proj": 5, "q_proj$": 6, "": 7},
    ],
)
def test_patterns_are_looked_up_as_peft_does(base, tmp_path, patterns):
    other = pytest.importorskip("peft.utils.other")
    found = config(tmp_path, rank_pattern=patterns)
    for module in (*(name for name, _ in base.named_modules()), "mlp_up_proj", "model.mlp_up_proj", "x.mlp.up_proj", "a+b", "q_proj"):
        assert found.rank_and_scaling(module)[0] == patterns.get(other.get_pattern_key(patterns.keys(), module), 4), module


UNSLOTH = (
    r"(?:.*?(?:vision|language|text|model).*?(?:self_attn|attention|attn|mlp|ffn|dense).*?(?:q_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj)))"
)
SELECTIONS = {
    "names": {},
    "whole-names": {"target_modules": [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]},
    "a-whole-name-needs-no-layer": {"target_modules": ["model.layers.0.self_attn.q_proj", "1.self_attn.q_proj"], "layers_to_transform": [1]},
    "pattern": {"target_modules": r".*layers\.\d+\.self_attn\.q_.*roj.*"},
    "lookahead": {"target_modules": r"^(model(?=\.).*\.(q_proj))$"},
    "forbidden": {"target_modules": r"^(?!.*visual).*(?:q_proj).*"},
    "unsloth": {"target_modules": UNSLOTH},
    "all-linear": {"target_modules": "all-linear"},
    "null": {"target_modules": None},
    "layers": {"layers_to_transform": [0, 1, 7], "layers_pattern": None},
    "layers-empty": {"layers_to_transform": [], "layers_pattern": []},
    "layers-pattern": {"layers_to_transform": [0, 1], "layers_pattern": ["h", "lay.*"]},
    "excluded": {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["self_attn.k_proj"]},
}


@pytest.mark.parametrize("changes", SELECTIONS.values(), ids=SELECTIONS.keys())
def test_what_the_config_selects_is_served(base, pool, tmp_path, changes):
    pool.load("x", write_adapter(tmp_path, random_tensors(base, ("q_proj",), 4, 1), **changes))


MODULES = [
    f"{p}{i}.{m}" for p in ("layers.", "model.layers.", "a.h.") for i in (0, 1, 10) for m in ("attn.q", "attn.k", "experts.1.q", "k_q", "q.0.x")
]


PARENTS = (None, [], "layers", ["experts", "layers"], ["h", "q"], "a|layers", r"a\.h", ".*r.")
LAYERS = (None, [], 0, [1, 10], [99])
EXCLUDED = (None, ["k"], ["1.attn.q", "x"], r".*\.1\..*")


@pytest.mark.parametrize("targets", [["q"], ["attn.q", "layers.0.attn.k", "x"], ["k", "model.layers.1.attn.q"], r".*\.(q|k)", r"model.*q|a.*\.0\..*"])
def test_modules_are_selected_as_peft_does(tmp_path, targets):
    tuners, peft = pytest.importorskip("peft.tuners.tuners_utils"), pytest.importorskip("peft")
    for parents, layers, excluded in itertools.product(PARENTS, LAYERS, EXCLUDED):
        given = {"target_modules": targets, "layers_to_transform": layers, "layers_pattern": parents, "exclude_modules": excluded}
        try:
            theirs = peft.LoraConfig(**given)
        except ValueError:
            with pytest.raises(LoraValueError, match="layers_"):
                config(tmp_path, **given)
            continue
        found = config(tmp_path, **given)
        for module in (*MODULES, "q", "layers"):
            answer = tuners.check_target_module_exists(theirs, module)
            assert (module in found.selected) == (bool(answer) and not isinstance(answer, tuners._ExcludedModule)), (given, module)


@pytest.fixture
def soon():
    start = time.process_time()
    yield
    assert time.process_time() - start < 10


def test_a_rank_for_each_of_many_modules(tmp_path, soon):
    ranks = {f"model.layers.{i}.{part}_proj": i % 7 + 1 for i in range(300) for part in ("self_attn.q", "self_attn.k", "mlp.up")}
    found = config(tmp_path, rank_pattern=ranks, alpha_pattern=ranks)
    assert {module: found.rank_and_scaling(module) for module in ranks} == {module: (rank, 1.0) for module, rank in ranks.items()}


def test_a_key_that_stands_twice_among_many(tmp_path, soon):
    (tmp_path / "adapter_config.json").write_text("{" + "".join(f'"{i}":0,' for i in range(70_000)) + '"69999":1}')
    with pytest.raises(LoraValueError, match="'69999' stands there twice"):
        read_config(tmp_path)


def test_patterns_that_take_too_long_together(base, pool, tmp_path, monkeypatch):
    monkeypatch.setattr(name_patterns, "MAX_SECONDS", 0.1)
    write_adapter(tmp_path, random_tensors(base, ("q_proj",), 4, 1), alpha_pattern={f".*.*.*.*{i}!": 4 for i in range(400)})
    with pytest.raises(LoraValueError, match=r"take too long to be tried; got over 0\.1 s"):
        pool.load("x", tmp_path)


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


def test_a_link_that_is_pointed_elsewhere_while_its_adapter_is_read(base, pool, tmp_path, monkeypatch):
    old = write_adapter(tmp_path / "old", random_tensors(base, ("q_proj",), 4, 1))
    new = write_adapter(tmp_path / "new", random_tensors(base, ("q_proj",), 4, 2), lora_alpha=32)
    link = tmp_path / "link"
    link.symlink_to(old)

    def read_and_swap(folder):
        found = read_config(folder)
        (tmp_path / "next").symlink_to(new)
        (tmp_path / "next").replace(link)
        return found

    monkeypatch.setattr(checkpoint, "read_config", read_and_swap)
    pool.load("x", link)
    with pool.batch(["x", "x"]):
        got = base(IDS).logits
    torch.testing.assert_close(got.double(), by_hand(old, 2.0, IDS), rtol=0, atol=2e-5)


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs a file that opens and cannot be read")
def test_a_config_that_cannot_be_read(base, pool, tmp_path):
    write_adapter(tmp_path, random_tensors(base, ("q_proj",), 4, 1))
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "adapter_config.json").symlink_to("/proc/self/mem")
    with pytest.raises(LoraValueError, match=r"adapter_config.json cannot be read; got Input/output error; allowed: .*; fix: "):
        pool.load("x", tmp_path)
    assert pool.stats()["refused"] == 1


def test_a_folder_that_may_be_a_repository(pool, tmp_path):
    with pytest.raises(LoraValueError, match=r'fix: huggingface_hub.snapshot_download\("user/some-lora_v1.0"\)'):
        pool.load("x", "user/some-lora_v1.0")
    for folder in ("./adapters", "../some/adapter", "/user/adapter", "adapter", "a/b/c", tmp_path / "none"):
        with pytest.raises(LoraValueError, match="no such adapter folder") as caught:
            pool.load("x", folder)
        assert "huggingface_hub" not in str(caught.value)


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
