"""What a pool refuses: sizes, models, folders, slots of nobody, a closed pool; and an update in the midst of a forward."""

from __future__ import annotations

import os

import pytest
import torch
from adapters import peft_model, random_tensors, save_peft, tiny_llama, write_adapter
from batched_cases import Quantised
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


class Twice(nn.Module):
    """One layer at two places: as such, or as part of a block."""

    def __init__(self, block: bool):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(8, 8)) if block else nn.Linear(8, 8)
        self.second, self.last = self.first, nn.Linear(8, 8)

    def forward(self, x):
        return self.last(self.second(self.first(x).relu()))


def test_layers_that_are_registered_twice_are_not_served(tmp_path):
    """PEFT puts its own in the first place alone."""
    write_adapter(tmp_path, random_tensors(Twice(block=False), ("first", "last"), 4, 1), target_modules=["first", "last"])
    with AdapterPool(Twice(block=False), 2, 4) as pool, pytest.raises(LoraValueError, match="modules that the pool does not serve; got first"):
        pool.load("a", tmp_path)
    for name in ("first", "second"):
        with pytest.raises(LoraValueError, match="no linear layer of this name; .* none that is registered twice"):
            AdapterPool(Twice(block=False), 2, 4, target_modules=["last", name])


def test_blocks_that_are_registered_twice_are_served_as_by_peft(tmp_path):
    pytest.importorskip("peft")
    x, model = torch.randn(2, 8), Twice(block=True)
    save_peft(model, tmp_path, r=4, target_modules=["0", "last"])
    with torch.no_grad(), AdapterPool(model, 2, 4) as pool:
        pool.load("a", tmp_path)
        with pool.batch(["a", "a"]):
            torch.testing.assert_close(model(x), peft_model(Twice(block=True), tmp_path)(x))


def test_gpt2s_layers_are_named_as_the_reason():
    from transformers.pytorch_utils import Conv1D

    model = nn.ModuleDict({"c_attn": Conv1D(8, 8)})
    for names in (None, ["c_attn"]):
        with pytest.raises(LoraValueError, match=r"none of transformers' Conv1D \(GPT-2\), which .* is not served$"):
            AdapterPool(model, 2, 4, target_modules=names)


def test_a_model_without_values_is_refused(base):
    with pytest.raises(LoraValueError, match=r"weight has no values; got model.layers.0.self_attn.q_proj on meta"):
        AdapterPool(base.to("meta"), 2, 4)


def test_layers_of_a_subclass_alone_are_named():
    class Scaled(nn.Linear):
        """As Falcon's FalconLinear, with a forward of its own."""

    with pytest.raises(
        LoraValueError, match="no linear layers to serve; got Sequential; allowed: plain torch.nn.Linear layers; none of a subclass.*: Scaled"
    ):
        AdapterPool(nn.Sequential(Scaled(4, 4)), max_loras=1, max_rank=4)


def test_quantised_weights_are_served_beside_their_own_product_alone(base, folder):
    layer = base.model.layers[0].self_attn.q_proj
    plain = AdapterPool(base, 2, 4)
    plain.load("a", folder)
    with plain.batch(["a", None]):
        expected = base(IDS).logits
    plain.close()
    layer.weight = nn.Parameter(Quantised(layer.weight.detach()), requires_grad=False)
    with pytest.raises(LoraTypeError, match=r"fused op cannot read; got model.layers.0.self_attn.q_proj, a Quantised.*fix: exact_base=True"):
        AdapterPool(base, 2, 4, exact_base=False)
    with AdapterPool(base, 2, 4) as pool:
        pool.load("a", folder)
        with pool.batch(["a", None]):
            assert torch.equal(base(IDS).logits, expected)


@pytest.fixture
def mesh():
    distributed = pytest.importorskip("torch.distributed")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_layers_that_are_split_over_ranks_are_refused(base, mesh):
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    parallelize_module(base.model.layers[1], mesh, {"mlp.up_proj": ColwiseParallel()})
    with pytest.raises(LoraTypeError, match=r"split over ranks; got model.layers.1.mlp.up_proj, a DTensor.*lora_shrink and lora_expand"):
        AdapterPool(base, 2, 4)


def test_layers_that_fsdp2_gathers_are_served(base, folder, mesh):
    with AdapterPool(base, 2, 4) as pool:
        pool.load("a", folder)
        with pool.batch(["a", None]):
            expected = base(IDS).logits
    for layer in base.model.layers:
        torch.distributed.fsdp.fully_shard(layer, mesh=mesh)
    with AdapterPool(base, 2, 4) as pool:
        pool.load("a", folder)
        with pool.batch(["a", None]):
            assert torch.equal(base(IDS).logits, expected)


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
