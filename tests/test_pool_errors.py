"""What a pool refuses: sizes, models, folders, slots of nobody, a closed pool; and an update in the midst of a forward."""

from __future__ import annotations

import os

import pytest
import torch
from adapters import random_tensors, tiny_llama, write_adapter
from torch import nn

from lora_kernels import LoraKernelsError, LoraTypeError, LoraValueError
from lora_kernels.serving import AdapterPool

IDS = torch.arange(10).view(2, 5)


@pytest.fixture
def base():
    return tiny_llama()


@pytest.fixture
def folder(base, tmp_path):
    return write_adapter(tmp_path / "a", random_tensors(base, ("q_proj", "k_proj", "v_proj"), 4, 1))


SIZES = {
    "max_loras": (dict(max_loras=2**40, max_rank=4), LoraValueError, "max_loras is no count; got 1099511627776; allowed: an int from 1 to 65535"),
    "max_rank": (dict(max_loras=2, max_rank=2**63), LoraValueError, "max_rank is no count"),
    "memory": (dict(max_loras=65535, max_rank=1_000_000), LoraKernelsError, "memory cannot be allocated"),
    "exact_base": (dict(max_loras=2, max_rank=4, exact_base="no"), LoraTypeError, "exact_base is no flag; got 'no'"),
}


@pytest.mark.parametrize("options, error, text", SIZES.values(), ids=SIZES)
def test_sizes_that_cannot_be_had(base, options, error, text):
    before = base(IDS).logits
    with pytest.raises(error, match=text):
        AdapterPool(base, **options)
    assert torch.equal(base(IDS).logits, before)


def test_a_model_with_adapters_is_refused(base):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(LoraValueError, match=r"has adapters already.*fix: AdapterPool\(peft_model.unload\(\)"):
        AdapterPool(model, 2, 4)


def test_a_compiled_model_has_its_layers_own_names(base, folder):
    compiled = torch.compile(base, backend="eager")
    with AdapterPool(compiled, 2, 4) as pool:
        pool.load("a", folder)
        with pool.batch(["a", None]):
            assert not torch.equal(base(IDS).logits[0], tiny_llama()(IDS).logits[0])


def test_layers_that_are_not_called_are_not_served(tmp_path):
    """`nn.TransformerEncoderLayer` may run a fused kernel on its layers' weights: an adapter would do nothing there."""
    encoder = nn.Sequential(nn.Linear(16, 16), nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))
    write_adapter(tmp_path, random_tensors(encoder, ("linear1",), 4, 1))
    with AdapterPool(encoder, 2, 4) as pool, pytest.raises(LoraValueError, match=r"modules that the pool does not serve; got 1.linear1"):
        pool.load("a", tmp_path)
    with pytest.raises(LoraValueError, match="none of nn.TransformerEncoderLayer"):
        AdapterPool(encoder, 2, 4, target_modules=["linear1"])


def test_folders_that_are_none(base, folder, monkeypatch):
    monkeypatch.chdir(folder)
    with AdapterPool(base, 2, 4) as pool:
        with pytest.raises(LoraValueError, match="no such adapter folder; got ''"):
            pool.load("a", "")
        monkeypatch.setattr(os, "open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
        with pytest.raises(LoraValueError, match="cannot be opened; got Permission denied"):
            pool.load("a", folder)
        assert pool.names == ()


def test_slots_of_evicted_adapters_are_refused(base, folder):
    with AdapterPool(base, 2, 4) as pool:
        pool.load("kept", folder), pool.load("gone", folder)
        slot = pool.slot("gone")
        slots = torch.full((10,), slot, dtype=torch.int32)
        with pool.batch_tokens(slots):
            base(IDS)
        pool.evict("gone")
        with pytest.raises(LoraValueError, match=rf"slots of no loaded adapter; got \[{slot}\]"), pool.batch_tokens(slots):
            pass
        assert pool.stats()["in_use"] == 0


def test_a_closed_pool_holds_nothing(base, folder):
    pool = AdapterPool(base, 2, 4)
    pool.load("a", folder)
    pool.close()
    assert (pool.names, len(pool), pool.stats()["loaded"]) == ((), 0, 0)
    for call in (pool.evict, pool.pin, pool.unpin, pool.slot):
        with pytest.raises(LoraKernelsError, match="this AdapterPool is closed"):
            call("a")


@pytest.mark.parametrize("exact_base", [True, False], ids=["exact-base", "one-op"])
def test_an_update_between_siblings_reaches_the_next(base, folder, tmp_path, exact_base):
    """q_proj computes for k_proj and v_proj what depends on x; that is gone when the adapters change in between."""
    other = write_adapter(tmp_path / "b", random_tensors(base, ("q_proj", "k_proj", "v_proj"), 4, 2))
    layer, x = base.model.layers[0].self_attn, torch.randn(2, 3, 64)
    with AdapterPool(base, 2, 4, exact_base=exact_base) as pool:
        pool.load("a", folder), pool.load("b", other)
        with pool.batch(["b", "b"]):
            expected = layer.k_proj(x.clone())
        with pool.batch(["a", "a"]) as batch:
            layer.q_proj(x)
            batch.update_(["b", "b"])
            assert torch.equal(layer.k_proj(x), expected)


@pytest.mark.parametrize("exact_base", [True, False], ids=["exact-base", "one-op"])
def test_fp16_keeps_its_range(tmp_path, exact_base):
    """h is 3200 and s h 102400, which fp16 does not have."""
    model = nn.Sequential(nn.Linear(64, 4, bias=False, dtype=torch.float16))
    a, b = torch.full((4, 64), 0.25), torch.full((4, 4), 1e-3)
    write_adapter(tmp_path, {"base_model.model.0.lora_A.weight": a, "base_model.model.0.lora_B.weight": b}, r=4, lora_alpha=128)
    x = torch.full((2, 64), 200.0, dtype=torch.float16)
    with torch.no_grad(), AdapterPool(model, 2, 4, exact_base=exact_base) as pool:
        pool.load("a", tmp_path)
        with pool.batch(["a", None]):
            y = model(x)
        expected = x.double() @ model[0].weight.double().t()
        expected[0] += 32.0 * 3200.0 * 4 * 1e-3
        torch.testing.assert_close(y.double(), expected, rtol=2e-3, atol=0.1)
