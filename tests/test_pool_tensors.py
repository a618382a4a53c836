"""`AdapterPool.load_tensors`: adapters in memory, as a trainer has them, against the same adapters from a folder."""

from __future__ import annotations

import pytest
import torch
from adapters import KINDS, one_thread, peft_model, random_tensors, save_peft, tiny_llama  # noqa: F401

from lora_kernels import LoraTypeError, LoraValueError
from lora_kernels.serving import AdapterPool

peft = pytest.importorskip("peft")
IDS = torch.arange(10).view(2, 5)
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def base():
    return tiny_llama()


@pytest.fixture
def tensors(base):
    return random_tensors(base, ("q_proj", "v_proj"), 4, 1)


def logits(model, pool: AdapterPool, name: str) -> torch.Tensor:
    with pool.batch([name, None]):
        return model(IDS).logits


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT takes lora_bias for a shard
@pytest.mark.parametrize("kind", KINDS)
def test_a_trainers_adapter_is_the_one_that_it_would_save(base, tmp_path, kind):
    trainer = peft_model(base, save_peft(base, tmp_path, **KINDS[kind]))
    with AdapterPool(base, 2, 64) as pool:
        saved = pool.load("saved", tmp_path)
        held = pool.load_tensors("held", peft.get_peft_model_state_dict(trainer), trainer.peft_config["default"])
        assert (held.layers, held.max_rank, held.bytes_read) == (saved.layers, saved.max_rank, saved.bytes_read)
        assert torch.equal(logits(base, pool, "held"), logits(base, pool, "saved"))


def test_training_goes_on_and_the_next_load_replaces_the_adapter(base, tensors):
    with AdapterPool(base, 2, 4) as pool:
        pool.load_tensors("policy", tensors, CONFIG)
        before = logits(base, pool, "policy")
        for t in tensors.values():
            t.mul_(2)
        assert torch.equal(logits(base, pool, "policy"), before)
        pool.load_tensors("policy", tensors, CONFIG)
        assert not torch.equal(logits(base, pool, "policy"), before)
        assert pool.names == ("policy",)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_trainers_tensors_are_not_touched(dtype):
    """In a float16 model part of the scaling is multiplied into B."""
    model = tiny_llama(torch.float16)
    tensors = {k: torch.nn.Parameter(v.to(dtype).t().contiguous().t()) for k, v in random_tensors(model, ("q_proj", "v_proj"), 4, 1).items()}
    kept = {k: v.detach().clone() for k, v in tensors.items()}
    with AdapterPool(model, 2, 4) as pool:
        pool.load_tensors("a", tensors, CONFIG)
        assert not torch.equal(logits(model, pool, "a")[0], model(IDS).logits[0])
    assert all(torch.equal(tensors[k], kept[k]) for k in kept)


FORMS = {"tuple": ("q_proj", "v_proj"), "set": {"q_proj", "v_proj"}, "pattern": r".*\.[qv]_proj", "all-linear": "all-linear"}


@pytest.mark.parametrize("modules", FORMS.values(), ids=FORMS)
def test_target_modules_in_every_form(base, tensors, modules):
    with AdapterPool(base, 3, 4) as pool:
        pool.load_tensors("a", tensors, CONFIG)
        pool.load_tensors("b", tensors, peft.LoraConfig(r=4, lora_alpha=8, target_modules=modules))
        pool.load_tensors("c", tensors, CONFIG | {"target_modules": modules})
        assert torch.equal(logits(base, pool, "b"), logits(base, pool, "a"))
        assert torch.equal(logits(base, pool, "c"), logits(base, pool, "a"))


class Sharded(torch.Tensor):
    """Stands for a DTensor."""


def freed(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
REFUSED = {
    "a-list": (lambda t: list(t.values()), CONFIG, LoraTypeError, "tensors are no mapping; got list"),
    "the-model": (lambda t: torch.nn.Linear(1, 1), CONFIG, LoraTypeError, "fix: peft.get_peft_model_state_dict"),
    "no-tensor": (lambda t: t | {Q: [1.0]}, CONFIG, LoraTypeError, "malformed; got '.*lora_A.weight': list"),
    "no-name": (lambda t: t | {7: torch.zeros(1)}, CONFIG, LoraTypeError, "malformed; got 7: Tensor"),
    "sparse": (lambda t: t | {Q: t[Q].to_sparse()}, CONFIG, LoraTypeError, "cannot be read; got torch.sparse_coo on cpu"),
    "meta": (lambda t: t | {Q: t[Q].to("meta")}, CONFIG, LoraTypeError, "cannot be read; got torch.strided on meta"),
    "a-shard": (lambda t: t | {Q: t[Q].as_subclass(Sharded)}, CONFIG, LoraTypeError, "got Sharded; .*full_tensor"),
    "nested": (lambda t: t | {Q: torch.nested.nested_tensor([t[Q]])}, CONFIG, LoraTypeError, "cannot be read"),
    "lazy": (lambda t: t | {Q: torch.nn.UninitializedParameter()}, CONFIG, LoraTypeError, "got UninitializedParameter"),
    "freed": (lambda t: t | {Q: freed(t[Q])}, CONFIG, LoraValueError, "storage was freed or shrunk"),
    "integers": (lambda t: t | {Q: t[Q].int()}, CONFIG, LoraTypeError, "unsupported dtype; got torch.int32"),
    "none": (lambda t: {}, CONFIG, LoraValueError, "there are no tensors"),
    "a-rank-less": (lambda t: t | {Q: t[Q][:3]}, CONFIG, LoraValueError, "the adapter's tensors: .* has the wrong shape"),
    "nan": (lambda t: t | {Q: t[Q] * float("nan")}, CONFIG, LoraValueError, "not finite"),
    "no-config": (lambda t: t, None, LoraTypeError, "config is none; got NoneType"),
    "a-configs-class": (lambda t: t, peft.LoraConfig, LoraTypeError, "config is none; got type"),
    "tuples-as-keys": (lambda t: t, CONFIG | {"rank_pattern": {("q_proj",): 4}}, LoraTypeError, "config is none"),
    "an-array": (lambda t: t, CONFIG | {"use_dora": torch.zeros(2)}, LoraValueError, "DoRA"),
    "names-of-two-kinds": (lambda t: t, CONFIG | {"target_modules": {"q_proj", 1}}, LoraValueError, "target_modules is malformed"),
    "nan-alpha": (lambda t: t, CONFIG | {"lora_alpha": float("nan")}, LoraValueError, "lora_alpha is no finite number"),
    "dora": (lambda t: t, CONFIG | {"use_dora": True}, LoraValueError, "DoRA"),
    "rank-0": (lambda t: t, CONFIG | {"r": 0}, LoraValueError, "r is no rank"),
    "pissa": (lambda t: t, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa"), LoraValueError, "pissa"),
    "other-modules": (lambda t: t, peft.LoraConfig(r=4, target_modules={"k_proj"}), LoraValueError, "modules that adapter_config.json"),
}


@pytest.mark.parametrize("change, config, error, text", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_served_changes_nothing(base, tensors, change, config, error, text):
    with AdapterPool(base, 2, 4) as pool:
        pool.load_tensors("policy", tensors, CONFIG)
        before = logits(base, pool, "policy")
        with pytest.raises(error, match=f"adapter 'policy' was not loaded: .*{text}"):
            pool.load_tensors("policy", change(dict(tensors)), config)
        assert torch.equal(logits(base, pool, "policy"), before)
        assert pool.stats()["refused"] == 1
