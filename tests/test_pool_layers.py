"""`AdapterPool` on the model: what changes, what must not, and what a batch accepts."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from adapters import KINDS, PREFIX, one_thread, random_tensors, save_kinds, tiny_llama, write_adapter
from torch import nn

from lora_kernels import LoraKernelsError, LoraTypeError, LoraValueError
from lora_kernels.serving import AdapterPool

ALL = ("_proj",)
__all__ = ["one_thread"]


@pytest.fixture
def base():
    return tiny_llama()


@pytest.fixture
def folders(base, tmp_path):
    """Two adapters on every layer, one on q_proj only."""
    write_adapter(tmp_path / "a", random_tensors(base, ALL, 4, 1))
    write_adapter(tmp_path / "b", random_tensors(base, ALL, 8, 2), r=8, lora_alpha=4)
    write_adapter(tmp_path / "q", random_tensors(base, ("q_proj",), 4, 3))
    return {name: tmp_path / name for name in "abq"}


@pytest.fixture
def pool(base, folders):
    with AdapterPool(base, max_loras=3, max_rank=8) as pool:
        for name, folder in folders.items():
            pool.load(name, folder)
        yield pool


IDS = torch.randint(2, 128, (3, 6), generator=torch.Generator().manual_seed(0))


def test_model_is_bitwise_the_same_outside_a_batch_and_after_close(base, folders):
    expected, keys, classes = base(IDS).logits, list(base.state_dict()), [type(m) for m in base.modules()]
    attributes = [set(m.__dict__) for m in base.modules()]
    pool = AdapterPool(base, max_loras=2, max_rank=8)
    pool.load("a", folders["a"])
    assert torch.equal(base(IDS).logits, expected)
    assert list(base.state_dict()) == keys
    with pool.batch(["a"] * 3):
        assert not torch.equal(base(IDS).logits, expected)
    assert torch.equal(base(IDS).logits, expected)
    pool.close()
    pool.close()
    assert [type(m) for m in base.modules()] == classes
    assert [set(m.__dict__) for m in base.modules()] == attributes
    assert torch.equal(base(IDS).logits, expected)
    with pytest.raises(LoraKernelsError, match="closed"):
        pool.load("a", folders["a"])
    with pytest.raises(LoraKernelsError, match="closed"):
        pool.batch(["a"])


@pytest.mark.parametrize("names", [[None, None, None], ["a", None, "b"], ["b", None, "q"]], ids=["none", "mixed", "partial"])
def test_rows_without_an_adapter_have_the_base_models_bits(base, pool, names):
    expected = base(IDS).logits
    with pool.batch(names):
        got = base(IDS).logits
    for i, name in enumerate(names):
        assert torch.equal(got[i], expected[i]) == (name is None)


@pytest.mark.parametrize("exact_base", [True, False], ids=["exact-base", "one-op"])
def test_neighbours_do_not_change_a_row(base, folders, exact_base):
    with AdapterPool(base, max_loras=3, max_rank=8, exact_base=exact_base) as pool:
        for name, folder in folders.items():
            pool.load(name, folder)
        rows = []
        for names in (["a", None, None], ["a", "b", "q"], ["a", "q", "a"], ["a", "a", "b"]):
            with pool.batch(names):
                rows.append(base(IDS).logits[0])
    assert all(torch.equal(rows[0], row) for row in rows[1:])


def test_lora_bias_leaves_rows_without_it_alone(base, tmp_path):
    folders = save_kinds(base, tmp_path)
    expected = base(IDS).logits
    with AdapterPool(base, max_loras=2, max_rank=64) as pool:
        pool.load("r4", folders["r4"])
        with pool.batch(["r4", None, None]):
            before = base(IDS).logits
        pool.load("r32-bias", folders["r32-bias"])
        with pool.batch(["r4", None, "r32-bias"]):
            got = base(IDS).logits
    assert torch.equal(got[0], before[0])
    assert torch.equal(got[1], expected[1])
    assert not torch.equal(got[2], expected[2])


def test_zeros_keep_their_sign_where_no_bias_is_added(tmp_path, monkeypatch):
    """y + 0.0 turns a -0.0 of the base model into 0.0; also in a slot that held a lora_bias before."""
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 6)).requires_grad_(False)
    tensors = lambda i, K: {f"{PREFIX}{i}.lora_A.weight": torch.ones(4, K), f"{PREFIX}{i}.lora_B.weight": torch.ones(6, 4)}
    biased = tensors("0", 8) | {f"{PREFIX}0.lora_B.bias": torch.ones(6)}
    write_adapter(tmp_path / "bias", biased, target_modules=["0"], lora_bias=True)
    write_adapter(tmp_path / "other", tensors("1", 6), target_modules=["1"])
    x = torch.ones(3, 8)
    with AdapterPool(model, max_loras=3, max_rank=4) as pool:
        pool.load("old", tmp_path / "bias")
        pool.evict("old")
        for name, folder in (("other", "other"), ("bias", "bias")):
            pool.load(name, tmp_path / folder)
        monkeypatch.setattr(nn.functional, "linear", lambda x, weight, bias=None: torch.full((x.shape[0], weight.shape[0]), -0.0))
        with pool.batch([None, "other", "bias"]):
            y = model[0](x)
    assert y[:2].signbit().all()
    assert (y[2] > 0).all()


def test_per_token_form_agrees_with_per_sequence(base, pool):
    names = ["a", None, "b"]
    with pool.batch(names):
        expected = base(IDS).logits
    per_token = [n for n in names for _ in range(IDS.shape[1])]
    with pool.batch_tokens(per_token):
        by_names = base(IDS).logits
    slots = torch.tensor([-1 if n is None else pool.slot(n) for n in per_token], dtype=torch.int32)
    with pool.batch_tokens(slots):
        by_slots = base(IDS).logits
    assert torch.equal(by_names, expected)
    assert torch.equal(by_slots, expected)


def test_update_changes_the_rows_in_place(base, pool):
    with pool.batch(["b", "q", None]):
        expected = base(IDS).logits
    with pool.batch([None, "a", "a"]) as batch:
        base(IDS)
        addresses = [meta.ids.data_ptr() for meta in batch._metas.values()]
        batch.update_(["b", "q", None])
        got = base(IDS).logits
        assert [meta.ids.data_ptr() for meta in batch._metas.values()] == addresses
        assert pool.stats()["in_use"] == 2
        with pytest.raises(LoraValueError, match="another number of rows"):
            batch.update_(["b"])
    assert torch.equal(got, expected)
    assert pool.stats()["in_use"] == 0
    with pytest.raises(LoraKernelsError, match="outside the batch"):
        batch.update_(["b", "q", None])


def test_siblings_share_one_shrink_and_give_the_same_bits(base, pool, monkeypatch):
    from lora_kernels.serving import layers

    shrinks = []
    monkeypatch.setattr(layers, "lora_shrink", lambda x, a, *rest, run=layers.lora_shrink: shrinks.append(len(a)) or run(x, a, *rest))
    with pool.batch(["a", None, "b"]), torch.inference_mode(False):
        shared = base(IDS).logits
    assert shrinks == [3, 1, 2, 1] * 2  # q/k/v, o, gate/up, down of two layers
    shrinks.clear()
    with pool.batch(["a", None, "b"]), torch.inference_mode():
        alone = base(IDS).logits  # no version counters: every layer for itself
    assert shrinks == [1] * 14
    assert torch.equal(shared, alone)


def test_siblings_do_not_share_when_x_changed_in_between(base, pool):
    attention, mlp = base.model.layers[0].self_attn, base.model.layers[0].mlp
    x, other = torch.randn(3, 6, 64), torch.randn(3, 6, 64)
    with pool.batch(["a", None, "b"]):
        expected = mlp.up_proj(2 * x), attention.k_proj(other), attention.v_proj(x)
        mlp.gate_proj(work := x.clone())
        work.mul_(2)
        got = [mlp.up_proj(work)]
        attention.q_proj(x)
        got += [attention.k_proj(other), attention.v_proj(x)]
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_batches_nest_and_close_waits_for_their_end(base, pool):
    with pool.batch(["a"] * 3):
        expected = base(IDS).logits
    with pool.batch([None] * 3) as outer:
        with pool.batch(["a"] * 3):
            assert torch.equal(base(IDS).logits, expected)
        assert not torch.equal(base(IDS).logits, expected)
        with pytest.raises(LoraKernelsError, match="running already"), outer:
            pass
        with pytest.raises(LoraKernelsError, match="while batches run"):
            pool.close()
    assert pool.stats()["in_use"] == 0


def test_an_error_inside_a_batch_releases_it(base, pool):
    with pytest.raises(ZeroDivisionError), pool.batch(["a"]):
        raise ZeroDivisionError
    assert pool.stats()["in_use"] == 0
    assert torch.is_grad_enabled()
    assert torch.equal(base(IDS).logits, tiny_llama()(IDS).logits)


@pytest.mark.parametrize("order", ["abc", "acb", "bac", "bca", "cab"])
def test_batches_left_in_any_order_leave_nothing_behind(base, pool, order):
    """As coroutines of one thread leave theirs. The last one that was entered and still runs is the one that counts."""
    expected = {}
    batches = {name: pool.batch([adapter] * 3) for name, adapter in zip("abc", "abq", strict=True)}
    for name, batch in batches.items():
        with batch:
            expected[name] = base(IDS).logits
    for batch in batches.values():
        batch.__enter__()
    for name in order:
        assert torch.equal(base(IDS).logits, expected[max(batches)])
        batches.pop(name).__exit__(None, None, None)
        assert torch.is_grad_enabled() == (not batches)
    assert torch.equal(base(IDS).logits, tiny_llama()(IDS).logits)
    assert pool.stats()["in_use"] == 0


def test_a_batch_is_left_once_and_where_it_was_entered(base, pool):
    batch, found = pool.batch(["a"] * 3), []

    def leave():
        with pytest.raises(LoraKernelsError, match="cannot be left here: it was entered in another thread"):
            batch.__exit__(None, None, None)
        found.append(True)

    with pytest.raises(LoraKernelsError, match="cannot be left here: it does not run"):
        batch.__exit__(None, None, None)
    with batch:
        thread = threading.Thread(target=leave)
        thread.start()
        thread.join()
        assert pool.stats()["in_use"] == 1
    assert found
    assert pool.stats()["in_use"] == 0


def test_an_update_that_fails_changes_nothing(base, pool):
    slots = torch.full((18,), pool.slot("a"), dtype=torch.int32)
    with pool.batch_tokens(slots) as batch:
        before = base(IDS).logits
        for bad in (slots + 99, slots.long() + 2**32):
            with pytest.raises(LoraValueError, match="slots of no loaded adapter"):
                batch.update_(bad)
        assert torch.equal(base(IDS).logits, before)
    assert pool.stats()["in_use"] == 0


def test_a_batch_warmed_up_in_inference_mode_is_updated_outside(base, pool):
    with pool.batch(["a", None, "b"]):
        expected = base(IDS).logits
    with pool.batch(["b", "b", None]) as batch:
        with torch.inference_mode():
            base(IDS)
        batch.update_(["a", None, "b"])
        assert torch.equal(base(IDS).logits, expected)
    assert pool.stats()["in_use"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pool_dtype", [None, torch.float32], ids=["as-model", "fp32"])
def test_sixteen_bit_models(tmp_path, dtype, pool_dtype):
    base, exact = tiny_llama(dtype), tiny_llama(torch.float64)
    write_adapter(tmp_path, random_tensors(base, ALL, 4, 1), r=4, lora_alpha=8)
    plain = (base(IDS).logits.double() - exact(IDS).logits).norm()
    with AdapterPool(exact.float(), max_loras=1, max_rank=4) as pool:
        pool.load("a", tmp_path)
        with pool.batch(["a"] * 3):
            expected = exact(IDS).logits
    with AdapterPool(base, max_loras=1, max_rank=4, dtype=pool_dtype) as pool:
        pool.load("a", tmp_path)
        with pool.batch(["a"] * 3):
            got = base(IDS).logits
    assert (got.double() - expected).norm() < 3 * plain


def test_autocast(base, pool):
    with pool.batch(["a", None, "b"]):
        expected = base(IDS).logits
        with torch.autocast("cpu", torch.bfloat16):
            plain_error = (base(IDS).logits.float() - expected).norm() / expected.norm()
    assert plain_error < 0.1


@pytest.mark.parametrize("exact_base", [True, False], ids=["exact-base", "one-op"])
def test_compiled_model(base, folders, exact_base):
    with AdapterPool(base, max_loras=3, max_rank=8, exact_base=exact_base) as pool:
        for name, folder in folders.items():
            pool.load(name, folder)
        layer = base.model.layers[0].mlp
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        x = torch.randn(3, 6, 64)
        torch.testing.assert_close(compiled(x), layer(x))
        for names in (["a", None, "b"], ["b", "b", None], [None, "q", "a"]):
            with pool.batch(names):
                torch.testing.assert_close(compiled(x), layer(x))
        torch.testing.assert_close(compiled(x), layer(x))


# ------------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    "rows, error, text",
    [
        (["a", "nope", None], LoraValueError, "no adapter of this name is loaded; got 'nope'.*a"),
        ("a", LoraTypeError, "one name or None per row"),
        ([], LoraValueError, "no rows"),
        ([1, None, None], LoraValueError, "no adapter of this name"),
        (torch.zeros(0, dtype=torch.int32), LoraValueError, "no rows"),
    ],
    ids=["unknown", "string", "empty", "number", "no_slots"],
)
def test_batch_refuses(base, pool, rows, error, text):
    with pytest.raises(error, match=text), pool.batch(rows):
        pass
    assert pool.stats()["in_use"] == 0


def test_batch_that_does_not_fit_the_input(base, pool):
    with pool.batch(["a", "b"]), pytest.raises(LoraValueError, match=r"2 names.*3 sequences"):
        base(IDS)
    with pool.batch_tokens(["a"] * 17), pytest.raises(LoraValueError, match="17 ids"):
        base(IDS)
    with pytest.raises(LoraTypeError, match="slots are no ids"), pool.batch_tokens(torch.zeros(3)):
        pass
    with pytest.raises(LoraValueError, match="slots of no loaded adapter"), pool.batch_tokens(torch.full((18,), 99, dtype=torch.int32)):
        base(IDS)


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"max_loras": 0}, "max_loras is no count"),
        ({"max_rank": 2.5}, "max_rank is no count"),
        ({"target_modules": ["q_proj", "qq"]}, "no linear layer of this name.*'qq'.*down_proj"),
        ({"dtype": torch.float16}, "cannot be served"),
        ({"model": "llama"}, "model is no module; got str"),
        ({"target_modules": 3}, "target_modules are no names; got 3"),
        ({"target_modules": [3]}, r"target_modules are no names; got \[3\]"),
    ],
    ids=["max_loras", "max_rank", "target", "dtype", "model", "target_number", "target_numbers"],
)
def test_pool_refuses_bad_arguments(base, arguments, text):
    with pytest.raises(LoraKernelsError, match=text):
        AdapterPool(**{"model": base, "max_loras": 2, "max_rank": 4} | arguments)
    assert all(type(m) is not nn.Linear or not hasattr(m, "_lora_target") for m in base.modules())


def test_one_pool_per_model_and_no_copies_of_a_pooled_model(base, pool):
    with pytest.raises(LoraValueError, match=r"close\(\) the pool"):
        AdapterPool(base, 1, 4, target_modules=None)
    for copying in (copy.deepcopy, pickle.dumps):
        with pytest.raises(LoraKernelsError, match="neither copied nor pickled"):
            copying(base.model.layers[0].mlp)
        with pytest.raises(LoraKernelsError, match="neither copied nor pickled"):
            copying(base)
        with pytest.raises(LoraKernelsError, match="neither copied nor pickled"):
            copying(pool)


def test_a_pool_that_is_dropped_gives_the_model_back(base, folders):
    pool = AdapterPool(base, 1, 8)
    pool.load("a", folders["a"])
    slab = weakref.ref(next(m for m in base.modules() if hasattr(m, "_lora_target"))._lora_target.group.slabs_a[0])
    batch = pool.batch(["a"] * 3)
    del pool
    gc.collect()
    with batch:  # holds its pool
        assert not torch.equal(base(IDS).logits, tiny_llama()(IDS).logits)
    del batch
    gc.collect()
    assert slab() is None
    assert torch.equal(base(IDS).logits, tiny_llama()(IDS).logits)
    AdapterPool(base, 1, 8).close()


def test_target_modules_narrow_what_is_served(base, tmp_path, folders):
    with AdapterPool(base, 1, 8, target_modules=["q_proj", "v_proj"]) as pool:
        assert pool.stats()["layers"] == 4
        pool.load("q", folders["q"])
        with pytest.raises(LoraValueError, match="the pool does not serve; got.*down_proj.*named q_proj, v_proj"):
            pool.load("a", folders["a"])
    with AdapterPool(base, 1, 8, target_modules=["lm_head", "q_proj"]) as pool:
        write_adapter(tmp_path, random_tensors(base, ("q_proj", "lm_head"), 4, 1), target_modules=["q_proj", "lm_head"])
        pool.load("head", tmp_path)
        plain = tiny_llama()(IDS).logits
        with pool.batch(["head", None, None]):
            got = base(IDS).logits
        assert torch.equal(got[1:], plain[1:])
        assert not torch.equal(got[0], plain[0])


def test_kinds_cover_ranks_4_to_64():
    assert {k["r"] for k in KINDS.values()} >= {4, 8, 16, 24, 32, 64}
