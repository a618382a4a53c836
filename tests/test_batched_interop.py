"""Other servers' metadata and pools give the same y as plain ids, and no weight is copied."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from batched_cases import Batch

from lora_kernels._errors import LoraKernelsError, LoraTypeError, LoraValueError
from lora_kernels.ops.lora_batched import lora_batched_linear
from lora_kernels.serving import interop
from lora_kernels.serving.interop import from_punica, from_sglang, from_vllm, pool_of_pointers, segment_ids, sglang_slices

MIXED = [0, 0, 3, -1, 2, 2, 2, -1, 1, 3, 3, 0]


def plain(b: Batch, ranks=None, scalings=None):
    return lora_batched_linear(b.x, b.weights[0], b.biases[0], b.pools_a[0], b.pools_b[0], b.ids, ranks, scalings)


def test_vllm_tuple_and_slabs():
    b = Batch.random(ids=MIXED, Ns=[20], K=36, R=4, L=4)
    other = torch.empty(0, dtype=torch.int32)
    meta, ranks, scalings = interop.from_vllm((b.ids, other, other, other, other, torch.zeros(1, dtype=torch.bool), other), 4)
    slab_a, slab_b = b.pools_a[0].unsqueeze(1), b.pools_b[0].unsqueeze(1)
    y = lora_batched_linear(b.x, b.weights[0], b.biases[0], slab_a, slab_b, meta, ranks, scalings)
    assert torch.equal(y, plain(b))
    with pytest.raises(LoraValueError, match="not vLLM's metadata"):
        interop.from_vllm((b.ids, other), 4)


def sglang_info(ids, ranks, scalings, base_slot):
    """LoRABatchInfo of rows sorted by adapter in chunks of two, as csgmv does; base rows use a slot of rank 0; buffers longer than used."""
    slots = [base_slot if i < 0 else i for i in ids]
    order = sorted(range(len(ids)), key=lambda m: slots[m])
    starts = [j for j in range(len(order)) if j == 0 or slots[order[j]] != slots[order[j - 1]] or j % 2 == 0]
    pad = [0, 0]
    return SimpleNamespace(
        num_segments=len(starts),
        seg_indptr=torch.tensor([*starts, len(order), *pad], dtype=torch.int32),
        weight_indices=torch.tensor([*[slots[order[j]] for j in starts], *pad], dtype=torch.int32),
        lora_ranks=torch.tensor(ranks, dtype=torch.int32),
        scalings=torch.tensor(scalings),
        permutation=torch.tensor(order, dtype=torch.int32),
    )


def test_sglang_segments_permutation_and_packed_slices():
    ranks, scalings = [8, 3, 5, 1, 0], [0.5, 2.0, 1.0, 0.25, 1.0]
    b = Batch.random(ids=MIXED, Ns=[20, 12], K=36, R=8, L=5, ranks=ranks)
    stacked_a = torch.full((5, 16, 36), float("nan"))
    for slot, r in enumerate(ranks):
        for i in range(2):
            stacked_a[slot, i * r : (i + 1) * r] = b.pools_a[i][slot, :r]
    stacked_b = torch.cat(b.pools_b, 1)
    meta, ranks_t, scalings_t = interop.from_sglang(sglang_info(MIXED, ranks, scalings, base_slot=4))
    weight, bias = torch.cat(b.weights), torch.cat(b.biases)
    pools_b = interop.sglang_slices(stacked_b, [20, 12])
    assert pools_b[1].untyped_storage().data_ptr() == stacked_b.untyped_storage().data_ptr()
    y = lora_batched_linear(b.x, weight, bias, [stacked_a] * 2, pools_b, meta, ranks_t, scalings_t, rank_packed=True)
    expected = lora_batched_linear(b.x, weight, bias, b.pools_a, b.pools_b, b.ids, b.ranks, torch.tensor(scalings))
    assert torch.equal(y, expected)


def test_rows_that_a_permutation_does_not_name_use_none():
    """As in a batch padded for a CUDA graph."""
    info = sglang_info([1, 0, 1], [2, 2], [1.0, 1.0], base_slot=1)
    assert interop.from_sglang(info, num_tokens=6).meta.ids.tolist() == [1, 0, 1, -1, -1, -1]


@pytest.mark.parametrize("layer, rows", [(-1, 4), (2, 4), (0, 0)], ids=["negative", "past_the_last", "no_rows"])
def test_no_layer_outside_the_pointers_memory(layer, rows):
    weights = torch.zeros(3, 2, 4, 8)  # [adapters, layers, R, K]
    pointers = torch.tensor([weights[2].data_ptr(), weights[1].data_ptr()])
    assert interop.pool_of_pointers(pointers, 4, 8, torch.float32, layer=1, owner=weights).pool.shape == (2, 4, 8)
    with pytest.raises(LoraValueError, match="no such layer"):
        interop.pool_of_pointers(pointers, rows, 8, torch.float32, layer=layer, owner=weights)


def test_sglang_without_permutation_needs_the_number_of_rows():
    info = sglang_info([0, 0, 1], [2, 2], [1.0, 1.0], base_slot=1)
    info.permutation = info.expected_tokens = None
    assert interop.from_sglang(info, num_tokens=4).meta.ids.tolist() == [0, 0, 1, -1]
    with pytest.raises(LoraValueError, match="number of rows is not known"):
        interop.from_sglang(info)


def test_punica_pointers_are_not_copied():
    b = Batch.random(ids=[2, 2, 0, 0, 0, 1], Ns=[20], K=36, R=4, L=3)
    layers_a, layers_b = torch.randn(3, 2, 4, 36), torch.randn(3, 2, 4, 20)  # [adapters, layers, ...]; B stored as [R, H2]
    layers_a[:, 1], layers_b[:, 1] = b.pools_a[0], b.pools_b[0].transpose(1, 2)
    slots = [2, 0, 1]
    address = lambda t: torch.tensor([t[s].data_ptr() for s in slots])
    a = interop.pool_of_pointers(address(layers_a), 4, 36, torch.float32, layer=1, owner=layers_a)
    bt = interop.pool_of_pointers(address(layers_b), 4, 20, torch.float32, layer=1, owner=layers_b)
    assert a.slots.tolist() == bt.slots.tolist() == slots
    assert a.pool.data_ptr() == layers_a[0, 1].data_ptr()
    meta, ranks, scalings = interop.from_punica(torch.tensor([0, 2, 5, 6], dtype=torch.int32), a.slots, 6, a.pool.shape[0])
    y = lora_batched_linear(b.x, b.weights[0], b.biases[0], a.pool, bt.pool.transpose(1, 2), meta, ranks, scalings)
    assert torch.allclose(y, plain(b), rtol=1e-5, atol=1e-5)


def test_punica_pointers_without_a_pitch():
    with pytest.raises(LoraValueError, match="no common pitch"):
        interop.pool_of_pointers(torch.tensor([4096, 4096 + 48, 9000]), 4, 36, torch.float32)
    with pytest.raises(LoraTypeError, match="no pointers"):
        interop.pool_of_pointers(torch.tensor([1], dtype=torch.int32), 4, 36, torch.float32)


def vector(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_segments_that_leave_rows_out():
    """Rows before the first segment and past the last use none; slots past the last segment are padding."""
    assert from_punica(vector(2, 3, 5), vector(1, 0), 6, 3).meta.ids.tolist() == [-1, -1, 1, 0, 0, -1]
    assert from_punica(vector(0, 2, 5), vector(1, 0, 2), 7, 3).meta.ids.tolist() == [1, 1, 0, 0, 0, -1, -1]


SEGMENTS = {
    "few_slots": ((vector(0, 2, 5), vector(1), 5), LoraValueError, r"indptr \[3\], slots \[1\]"),
    "backwards": ((vector(0, 4, 2), vector(1, 0), 5), LoraValueError, "indptr runs backwards"),
    "list": (([0, 2, 5], vector(1, 0), 5), LoraTypeError, "indptr is no tensor; got list"),
    "floats": ((torch.tensor([0.0, 2.0]), vector(1), 5), LoraTypeError, "indptr is no vector of integers"),
    "no_rows": ((vector(0, 2), vector(1), -1), LoraValueError, "num_tokens is no count"),
    "long_permutation": ((vector(0, 2), vector(1), 2, vector(0, 1, 2)), LoraValueError, "more rows than there are; got 3"),
    "twice": ((vector(0, 2), vector(1), 4, vector(1, 1)), LoraValueError, "the permutation is none"),
    "past_the_rows": ((vector(0, 9), vector(0), 2), LoraValueError, "indptr runs past the rows; got an end at 9; allowed: at most 2"),
    "past_the_permutation": ((vector(0, 3), vector(0), 4, vector(1, 0)), LoraValueError, "past the rows; got an end at 3; allowed: at most 2"),
    "outside": ((vector(0, 2), vector(1), 4, vector(0, 4)), LoraValueError, "the permutation is none; got rows from 0 to 4"),
}


@pytest.mark.parametrize("args, error, text", SEGMENTS.values(), ids=SEGMENTS)
def test_segments_that_are_none(args, error, text):
    with pytest.raises(error, match=text):
        segment_ids(*args)


def small_info(**changes) -> SimpleNamespace:
    fields = dict(permutation=None, num_segments=2, seg_indptr=vector(0, 2, 4), weight_indices=vector(0, 1), lora_ranks=vector(4, 4))
    return SimpleNamespace(**fields | dict(scalings=torch.ones(2), expected_tokens=4) | changes)


SGLANG = {
    "slot_past_int32": (dict(weight_indices=torch.tensor([0, 2**32])), LoraValueError, "names an adapter outside the pool"),
    "float_ranks": (dict(lora_ranks=torch.tensor([4.5, 4.0])), LoraTypeError, "lora_ranks is no vector of integers; got torch.float32"),
    "fewer_scalings": (dict(scalings=torch.ones(1)), LoraValueError, r"lora_ranks and scalings do not fit; got lora_ranks \[2\], scalings \[1\]"),
    "integer_scalings": (dict(scalings=vector(1, 1)), LoraTypeError, "scalings is no vector of numbers"),
    "more_segments": (dict(num_segments=5), LoraValueError, r"num_segments does not fit; got 5, seg_indptr \[3\]"),
    "no_segments": (dict(num_segments=None), LoraValueError, "num_segments does not fit; got None"),
    "float_segments": (dict(num_segments=2.0), LoraValueError, "num_segments does not fit; got 2.0"),
    "indptr_none": (dict(seg_indptr=None), LoraTypeError, "seg_indptr is no tensor; got NoneType"),
    "slots_list": (dict(weight_indices=[0, 1]), LoraTypeError, "weight_indices is no tensor; got list"),
    "slots_sparse": (dict(weight_indices=vector(0, 1).to_sparse()), LoraTypeError, "weight_indices has an unsupported layout"),
    "permutation_list": (dict(permutation=[0, 1, 2, 3]), LoraTypeError, "permutation is no tensor; got list"),
    "permutation_number": (dict(permutation=torch.tensor(3)), LoraTypeError, "permutation is no vector of integers"),
    "rows_text": (dict(expected_tokens="4"), LoraValueError, "num_tokens is no count; got '4'"),
}


@pytest.mark.parametrize("changes, error, text", SGLANG.values(), ids=SGLANG)
def test_sglang_metadata_that_is_none(changes, error, text):
    assert from_sglang(small_info()).meta.ids.tolist() == [0, 0, 1, 1]
    with pytest.raises(error, match=text):
        from_sglang(small_info(**changes))


def test_sglang_ranks_past_int32_stay_outside_every_pool():
    assert from_sglang(small_info(lora_ranks=torch.tensor([2**32 + 4, 4]))).ranks.tolist() == [2**31 - 1, 4]


def test_sglang_info_without_its_optional_field():
    info = small_info()
    del info.expected_tokens
    with pytest.raises(LoraValueError, match="number of rows is not known"):
        from_sglang(info)


def test_pointers_stay_inside_their_owner():
    weights = torch.zeros(3, 4, 8)
    pointers = torch.tensor([weights[2].data_ptr()])
    assert pool_of_pointers(pointers, 4, 8, torch.float32, owner=weights).pool.shape == (1, 4, 8)
    with pytest.raises(LoraValueError, match="outside their owner's memory; got 160 bytes"):
        pool_of_pointers(pointers, 5, 8, torch.float32, owner=weights)


OTHERS = {
    "vllm_none": (lambda: from_vllm(None, 3), "not vLLM's metadata; got NoneType"),
    "sglang_none": (lambda: from_sglang(None), "not SGLang's metadata; got NoneType without permutation"),
    "slices": (lambda: sglang_slices(torch.zeros(2, 6, 4), [1, 2]), "widths do not fit"),
    "slices_none": (lambda: sglang_slices(None, [1]), "pool_b is no tensor; got NoneType"),
    "slices_of_a_vector": (lambda: sglang_slices(torch.zeros(6), [6]), "wrong number of dimensions"),
    "slices_negative": (lambda: sglang_slices(torch.zeros(2, 8, 4), [-1, 9]), "widths do not fit"),
    "slices_flag": (lambda: sglang_slices(torch.zeros(2, 1, 4), [True]), "widths do not fit"),
    "pointers_unaligned": (lambda: pool_of_pointers(torch.tensor([66]), 2, 2, torch.float32), "to no matrix; got 66.*multiples of 4"),
    "pointers_most": (lambda: pool_of_pointers(torch.tensor([64]), 2, 2, torch.float32, most=None), "no shape and dtype.*most None"),
    "pointers_huge": (lambda: pool_of_pointers(torch.tensor([64]), 2**40, 2, torch.float32), "no such layer"),
    "pointers_past_all": (lambda: pool_of_pointers(torch.tensor([2**63 - 4]), 2, 2, torch.float32), "outside their owner's memory"),
    "pointers_list": (lambda: pool_of_pointers([1], 2, 2, torch.float32), "these are no pointers; got list"),
    "pointers_null": (lambda: pool_of_pointers(torch.tensor([0]), 2, 2, torch.float32), "a pointer to no matrix"),
    "pointers_dtype": (lambda: pool_of_pointers(torch.tensor([64]), 2, 2, "float32"), "no shape and dtype"),
}


@pytest.mark.parametrize("call, text", OTHERS.values(), ids=OTHERS)
def test_metadata_that_is_none(call, text):
    with pytest.raises(LoraKernelsError, match=text):
        call()
