"""The many-adapter ops: numerics against float64, neighbour invariance, autograd, metadata, library registration, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from batched_cases import Batch, Quantised
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import row_leaks
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_kernels import _batch_table, reference
from lora_kernels._errors import LoraKernelsError, LoraTypeError, LoraValueError
from lora_kernels.ops import _serving_path
from lora_kernels.ops.batch_meta import BatchMeta
from lora_kernels.ops.lora_batched import lora_batched_linear
from lora_kernels.ops.lora_expand import lora_expand
from lora_kernels.ops.lora_shrink import lora_shrink

bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
MIXED = [0, 0, 3, -1, 2, 2, 2, -1, 1, 3, 3, 0, -1, 2, 4, -1, 4]
BACKENDS = ["reference", "auto"]
CASES = {
    "no_rows": dict(ids=[], Ns=[8], K=8, R=4, L=2),
    "one_row": dict(ids=[1], Ns=[1], K=1, R=1, L=2),
    "one_row_none": dict(ids=[-1], Ns=[33], K=65, R=4, L=1),
    "mixed_ranks": dict(ids=MIXED, Ns=[47], K=31, R=24, L=5, ranks="mixed"),
    "all_none": dict(ids=[-1] * 20, Ns=[40], K=24, R=8, L=3, bias=False),
    "qkv": dict(ids=MIXED, Ns=[64, 16, 16], K=40, R=8, L=5, ranks="mixed"),
    "gate_up-no_bias": dict(ids=MIXED[::-1], Ns=[48, 48], K=72, R=64, L=5, bias=False),
    "rank_512": dict(ids=[2, 0, 1, 2], Ns=[30], K=70, R=512, L=3, ranks=[1, 100, 512]),
    "130_rows": dict(ids=[m % 9 - 1 for m in range(130)], Ns=[96], K=100, R=16, L=8),
}
DTYPES = {"fp32": (fp32, None), "bf16": (bf16, None), "bf16-fp32_pools": (bf16, fp32), "fp16": (fp16, None), "fp64": (fp64, None)}


def linear(b: Batch, ids=None, **options) -> torch.Tensor:
    one = len(b.weights) == 1
    weight, bias = torch.cat(b.weights), None if b.biases[0] is None else torch.cat(b.biases)
    pools = (b.pools_a[0], b.pools_b[0]) if one else (b.pools_a, b.pools_b)
    return lora_batched_linear(b.x, weight, bias, *pools, b.ids if ids is None else ids, b.ranks, b.scalings, **options)


# ------------------------------------------------------------------------------------------------------------ numerics


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_matches_float64(name, dtypes, backend):
    dtype, pool_dtype = DTYPES[dtypes]
    b = Batch.random(dtype=dtype, pool_dtype=pool_dtype, **CASES[name])
    y = linear(b, backend=backend)
    b.assert_close(y)
    assert torch.equal(y, linear(b, backend=backend)), "a second run gave other bits"


@pytest.mark.parametrize("name", ["mixed_ranks", "qkv", "130_rows", "no_rows"])
def test_shrink_then_expand(name):
    b = Batch.random(dtype=bf16, **CASES[name])
    meta, one = BatchMeta(b.ids, b.pools_a[0].shape[0]), len(b.weights) == 1
    h = lora_shrink(b.x, b.pools_a[0] if one else b.pools_a, meta, b.ranks, b.scalings)
    assert h.dtype == fp32
    assert h.shape == ((len(b.ids), b.pools_a[0].shape[1]) if one else (len(b.weights), len(b.ids), b.pools_a[0].shape[1]))
    assert not h[..., b.ids < 0, :].any()
    y = torch.cat([F.linear(b.x, w, bias) for w, bias in zip(b.weights, b.biases, strict=True)], 1)
    before = y.clone()
    assert lora_expand(y, h, b.pools_b[0] if one else b.pools_b, meta, b.ranks) is y
    b.assert_close(y)
    assert torch.equal(y[b.ids < 0], before[b.ids < 0])


@st.composite
def mixes(draw):
    L, R, S = draw(st.integers(1, 6)), draw(st.sampled_from([1, 4, 8, 24])), draw(st.integers(1, 3))
    ids = draw(st.lists(st.integers(-1, L - 1), max_size=40))
    ranks = draw(st.lists(st.integers(0, R), min_size=L, max_size=L))
    Ns = draw(st.lists(st.integers(1, 40), min_size=S, max_size=S))
    return dict(ids=ids, Ns=Ns, K=draw(st.integers(1, 70)), R=R, L=L, ranks=ranks, bias=draw(st.booleans()), seed=draw(st.integers(0, 99)))


@settings(max_examples=60, deadline=None)
@given(mix=mixes(), dtype=st.sampled_from([fp32, bf16, fp64]), backend=st.sampled_from(BACKENDS))
def test_any_mix(mix, dtype, backend):
    b = Batch.random(dtype=dtype, **mix)
    b.assert_close(linear(b, backend=backend))


# ---------------------------------------------------------------------------------------------------------- invariance


@pytest.mark.parametrize("dtype", [fp32, bf16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_row_bits_ignore_neighbours(backend, dtype):
    """The rows of adapter 2 keep their bits while the others change adapter, content (even to NaN) and weights (even to infinity)."""
    nan = 1e30 if backend == "reference" and row_leaks(dtype) else float("nan")
    b = Batch.random(ids=MIXED * 4, Ns=[72], K=200, R=24, L=5, dtype=dtype, ranks=[24, 3, 9, 24, 0])
    mine = b.ids == 2
    first = linear(b, backend=backend)
    g = torch.Generator().manual_seed(1)
    x, a, bb = b.x.clone(), b.pools_a[0].clone(), b.pools_b[0].clone()
    x[~mine] = nan
    a[[0, 1, 3, 4]], bb[[0, 1, 3, 4]] = float("inf"), float("nan")
    ids = torch.where(mine, b.ids, torch.tensor([-1, 0, 1, 3, 4], dtype=torch.int32)[torch.randint(0, 5, b.ids.shape, generator=g)])
    second = linear(b.replace(x=x, pools_a=[a], pools_b=[bb], ids=ids), backend=backend)
    assert torch.equal(first[mine], second[mine])


@pytest.mark.parametrize("dtype", [fp32, bf16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_invariant_ignores_M_and_place(backend, dtype):
    b = Batch.random(ids=MIXED * 3, Ns=[40], K=136, R=16, L=5, dtype=dtype)
    options = dict(backend=backend, batch_invariant=True)
    full = linear(b, **options)
    for rows in (slice(4, 5), slice(9, 42), torch.arange(50, -1, -1)):
        assert torch.equal(linear(b.replace(x=b.x[rows], ids=b.ids[rows]), **options), full[rows])


def test_environment_turns_batch_invariance_on(monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_BATCH_INVARIANT", "1")
    assert BatchMeta(torch.zeros(4, dtype=torch.int32), 1).batch_invariant
    assert not BatchMeta(torch.zeros(4, dtype=torch.int32), 1, batch_invariant=False).batch_invariant


# ------------------------------------------------------------------------------------------------------------- autograd


@pytest.mark.parametrize("dropout", [False, True], ids=["no_dropout", "dropout_per_adapter"])
def test_gradcheck(dropout):
    b = Batch.random(ids=[1, -1, 0, 1], Ns=[3, 2], K=4, R=2, L=3, dtype=fp64, ranks=[2, 1, 2])
    p = torch.tensor([0.5, 0.25, 0.0]) if dropout else None
    weight, bias = torch.cat(b.weights), torch.cat(b.biases)
    inputs = [t.requires_grad_() for t in (b.x, bias, *b.pools_a, *b.pools_b)]

    def call(x, bias, a0, a1, b0, b1):
        return lora_batched_linear(x, weight, bias, [a0, a1], [b0, b1], b.ids, b.ranks, b.scalings, dropout_p=p, seed=3, backend="reference")

    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "bf16-fp32_pools"])
def test_training_forward_has_servings_bits_and_repeats(dtypes):
    dtype, pool_dtype = DTYPES[dtypes]
    b = Batch.random(ids=MIXED, Ns=[40], K=72, R=8, L=5, dtype=dtype, pool_dtype=pool_dtype, ranks="mixed")
    with torch.no_grad():
        served = linear(b)
    grads = []
    for _ in range(2):
        leaves = [t.clone().requires_grad_() for t in (b.x, b.pools_a[0], b.pools_b[0])]
        y = linear(b.replace(x=leaves[0], pools_a=[leaves[1]], pools_b=[leaves[2]]))
        assert torch.equal(y.detach(), served)
        y.sum().backward()
        grads.append([t.grad for t in leaves])
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
    assert [g.dtype for g in grads[0]] == [dtype, b.pools_a[0].dtype, b.pools_b[0].dtype]


def test_dropout_is_each_adapters_own():
    b = Batch.random(ids=[0, 0, 1, 1, -1], Ns=[16], K=64, R=4, L=2, dtype=fp64)
    p, seed = torch.tensor([0.5, 0.0]), torch.tensor([7])
    y = linear(b, dropout_p=p, seed=7, backend="reference")
    keep = reference.unpack_bits(reference.dropout_mask(seed, 5, 64, 0.5), 64)
    dropped = torch.where(keep, b.x * reference.keep_scale(0.5), b.x.new_zeros(()))
    branch = b.replace(x=torch.where((b.ids == 0)[:, None], dropped, b.x))
    base = F.linear(b.x, b.weights[0], b.biases[0])
    assert torch.allclose(y, base + branch.expected() - F.linear(branch.x, b.weights[0], b.biases[0]), atol=1e-12)
    assert torch.equal(linear(b, dropout_p=p, training=False), linear(b))


# ------------------------------------------------------------------------------------------------- arguments and layouts


def test_slabs_strided_pools_and_leading_dimensions_are_views():
    b = Batch.random(ids=MIXED[:12], Ns=[20], K=36, R=4, L=5, ranks="mixed")
    expected = linear(b)
    weight, bias, a, bb = b.weights[0], b.biases[0], b.pools_a[0], b.pools_b[0]
    slab_a, slab_b = a.unsqueeze(1), bb.unsqueeze(1)
    assert torch.equal(lora_batched_linear(b.x, weight, bias, slab_a, slab_b, b.ids, b.ranks, b.scalings), expected)
    layers = torch.randn(5, 3, 4, 36)  # [adapters, layers, R, K], one layer of it
    layers[:, 1] = a
    wide = F.pad(bb, (0, 4))[:, :, :4]
    assert torch.equal(lora_batched_linear(b.x, weight, bias, layers[:, 1], wide, b.ids, b.ranks, b.scalings), expected)
    x3 = b.x.view(2, 3, 2, 36)
    assert torch.equal(lora_batched_linear(x3, weight, bias, a, bb, b.ids, b.ranks, b.scalings).view(12, 20), expected)
    strided = b.x.t().contiguous().t()
    b.assert_close(lora_batched_linear(strided, weight, bias, a, bb, b.ids, b.ranks, b.scalings))
    assert torch.equal(lora_batched_linear(b.x, weight, bias, a, bb, b.ids.long(), b.ranks, b.scalings), expected)


def test_weights_as_lists_give_views_of_one_y():
    b = Batch.random(ids=MIXED, Ns=[24, 8, 8], K=36, R=4, L=5)
    q, k, v = lora_batched_linear(b.x, b.weights, b.biases, b.pools_a, b.pools_b, b.ids, b.ranks, b.scalings)
    assert torch.equal(torch.cat([q, k, v], 1), linear(b))
    assert q.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()


def test_rank_packed_pool():
    b = Batch.random(ids=MIXED, Ns=[24, 40], K=72, R=16, L=5, ranks=[16, 3, 8, 0, 5])
    pool = torch.full((5, 32, 72), float("nan"))
    for slot, r in enumerate(b.ranks[0].tolist()):
        for i in range(2):
            pool[slot, i * r : (i + 1) * r] = b.pools_a[i][slot, :r]
    packed = b.replace(pools_a=[pool, pool])
    assert torch.equal(linear(packed, rank_packed=True), linear(b))
    with pytest.raises(LoraKernelsError, match="no gradients with rank_packed"):
        linear(packed.replace(x=b.x.clone().requires_grad_()), rank_packed=True)


def test_autocast():
    b = Batch.random(ids=MIXED, Ns=[24], K=36, R=4, L=5)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(b).dtype == bf16


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_dropout_does_not_depend_on_torch_s_default_dtype(default):
    b = Batch.random(ids=MIXED, Ns=[24], K=36, R=4, L=5)
    expected = linear(b, dropout_p=0.3, seed=5)
    torch.set_default_dtype(default)
    try:
        assert torch.equal(linear(b, dropout_p=0.3, seed=5), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def _case(**changes):
    b = Batch.random(ids=[0, 1, -1], Ns=[6], K=5, R=2, L=2)
    args = dict(
        x=b.x, weight=b.weights[0], bias=b.biases[0], pool_a=b.pools_a[0], pool_b=b.pools_b[0], token_lora_mapping=b.ids, ranks=None, scalings=None
    )
    return args | {k: v(args) for k, v in changes.items()}


def jagged(t: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor([t], layout=torch.jagged)


ERRORS = {
    "dropout_p_with_grad": (dict(dropout_p=lambda a: torch.full((2,), 0.5, requires_grad=True)), LoraValueError, "dropout_p requires grad"),
    "id_past_the_pool": (dict(token_lora_mapping=lambda a: torch.tensor([0, 2, -1])), LoraValueError, "outside the pool; got ids from -1 to 2"),
    "id_past_int32": (dict(token_lora_mapping=lambda a: torch.tensor([0, 2**32, -1])), LoraValueError, "outside the pool"),
    "id_below_none": (dict(token_lora_mapping=lambda a: torch.tensor([0, -2, -1])), LoraValueError, "outside the pool"),
    "float_ids": (dict(token_lora_mapping=lambda a: torch.zeros(3)), LoraTypeError, "token_lora_mapping has no usable type"),
    "sparse_ids": (dict(token_lora_mapping=lambda a: a["token_lora_mapping"].to_sparse()), LoraTypeError, "unsupported layout; got torch.sparse"),
    "jagged_ids": (dict(token_lora_mapping=lambda a: jagged(a["token_lora_mapping"])), LoraTypeError, "unsupported layout; got nested"),
    "too_few_ids": (dict(token_lora_mapping=lambda a: a["token_lora_mapping"][:2]), LoraValueError, "got 2 ids; allowed: 3"),
    "meta_of_other_pools": (dict(token_lora_mapping=lambda a: BatchMeta(a["token_lora_mapping"], 7)), LoraValueError, "built for other pools"),
    "pool_a_transposed": (dict(pool_a=lambda a: a["pool_a"].transpose(1, 2)), LoraValueError, r"allowed: \[L, R, 5\]"),
    "pool_b_transposed": (dict(pool_b=lambda a: a["pool_b"].transpose(1, 2)), LoraValueError, "pool_b does not fit pool_a"),
    "weight_shape": (dict(weight=lambda a: a["weight"][:, :4]), LoraValueError, "weight does not fit"),
    "bias_shape": (dict(bias=lambda a: a["bias"][:4]), LoraValueError, "bias does not fit"),
    "weight_dtype": (dict(weight=lambda a: a["weight"].double()), LoraTypeError, "differ in dtype"),
    "pool_dtype": (dict(pool_a=lambda a: a["pool_a"].half()), LoraTypeError, "pool_a has an unsupported dtype"),
    "rank_above_pool": (dict(ranks=lambda a: torch.tensor([3, 1])), LoraValueError, "ranks from 1 to 3; allowed: 0 to 2"),
    "rank_past_int32": (dict(ranks=lambda a: torch.tensor([1, 2**32 + 1])), LoraValueError, "a true rank outside the pool"),
    "ranks_list": (dict(ranks=lambda a: [1, 2]), LoraTypeError, "ranks is no tensor; got list"),
    "float_ranks": (dict(ranks=lambda a: torch.ones(2)), LoraTypeError, "ranks has an unsupported dtype"),
    "scalings_shape": (dict(scalings=lambda a: torch.ones(3)), LoraValueError, "scalings does not fit the pools"),
    "scalings_number": (dict(scalings=lambda a: 2.0), LoraTypeError, "scalings is no tensor; got float"),
    "scalings_trained": (dict(scalings=lambda a: torch.ones(2, requires_grad=True)), LoraValueError, "scalings requires grad"),
    "no_pools": (dict(pool_a=lambda a: [], pool_b=lambda a: []), LoraTypeError, r"pool_a is no tensor; got \[\]"),
    "pool_none": (dict(pool_a=lambda a: None), LoraTypeError, "pool_a is no tensor; got None"),
    "pool_b_numbers": (dict(pool_b=lambda a: [1.0]), LoraTypeError, "pool_b is no tensor; got float"),
    "x_list": (dict(x=lambda a: [1.0]), LoraTypeError, "x is no tensor; got list"),
    "x_number": (dict(x=lambda a: torch.ones(())), LoraValueError, "x has no dimension"),
    "x_sparse": (dict(x=lambda a: a["x"].to_sparse()), LoraTypeError, "x has an unsupported layout"),
    "weights_of_a_generator": (dict(weight=lambda a: (w for w in [a["weight"]])), LoraTypeError, "weight is no tensor; got generator"),
    "bias_number": (dict(bias=lambda a: 3.0), LoraTypeError, "bias is no tensor; got float"),
    "bias_of_numbers": (dict(weight=lambda a: [a["weight"]], bias=lambda a: [3.0]), LoraTypeError, "bias is no tensor; got float"),
    "weight_wrapped": (dict(weight=lambda a: Quantised(a["weight"])), LoraTypeError, "weight wraps other tensors; got Quantised.*lora_shrink"),
    "pool_wrapped": (dict(pool_b=lambda a: [Quantised(a["pool_b"])]), LoraTypeError, "pool_b wraps other tensors"),
    "no_outputs": (dict(weight=lambda a: a["weight"][:0], bias=lambda a: None, pool_b=lambda a: a["pool_b"][:, :0]), LoraValueError, "N >= 1"),
    "no_inputs": (dict(x=lambda a: a["x"][:, :0], pool_a=lambda a: a["pool_a"][..., :0]), LoraValueError, "K >= 1"),
    "dropout_above_1": (dict(dropout_p=lambda a: torch.tensor([0.5, 1.5])), LoraValueError, "no probability; got 0.5 to 1.5"),
    "dropout_nan": (dict(dropout_p=lambda a: torch.tensor([0.5, float("nan")])), LoraValueError, "no probability"),
    "trained_weight": (dict(weight=lambda a: a["weight"].requires_grad_()), LoraValueError, "only the adapters are trained"),
    "lists_of_different_lengths": (dict(weight=lambda a: [a["weight"]] * 2), LoraValueError, "lists of different lengths"),
    "backend": (dict(backend=lambda a: "fast"), LoraValueError, "unknown backend"),
    "training": (dict(training=lambda a: "no"), LoraTypeError, "training is no flag; got 'no'"),
    "dropout_flag": (dict(dropout_p=lambda a: True), LoraValueError, "no probability; got True"),
    "dropout_in_evaluation": (dict(dropout_p=lambda a: 7.0, training=lambda a: False), LoraValueError, "no probability; got 7.0"),
    "seed_without_dropout": (dict(seed=lambda a: "1"), LoraTypeError, "seed is no seed; got str"),
    "bias_list": (dict(bias=lambda a: [a["bias"]]), LoraTypeError, "bias is a list, weight is not; got list of 1; allowed: a tensor or None"),
    "bias_none": (dict(bias=lambda a: []), LoraTypeError, "bias is a list, weight is not; got list of 0"),
    "weight_numpy": (dict(weight=lambda a: a["weight"].numpy()), LoraTypeError, "weight is no tensor; got ndarray"),
    "pool_a_numpy": (dict(pool_a=lambda a: a["pool_a"].numpy()), LoraTypeError, "pool_a is no tensor; got ndarray"),
    "pool_b_numpy": (dict(pool_b=lambda a: a["pool_b"].numpy()), LoraTypeError, "pool_b is no tensor; got ndarray"),
    "rank_packed_tensor": (dict(rank_packed=lambda a: torch.ones(2)), LoraTypeError, "rank_packed is no flag"),
    "scalings_past_float32": (dict(scalings=lambda a: torch.tensor([1e39, 1.0], dtype=torch.float64)), LoraValueError, "scalings are not finite"),
    "dropout_table": (dict(dropout_p=lambda a: torch.ones(5)), LoraValueError, "dropout_p does not fit the pools"),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("known", [False, True], ids=["first_call", "known_signature"])
def test_bad_arguments(name, known, monkeypatch):
    changes, error, text = ERRORS[name]
    monkeypatch.setattr(_serving_path, "_runs", {})
    if known and "seed" not in changes:  # a seed that nothing reads is looked at once
        lora_batched_linear(**_case())
        lora_batched_linear(**_case(scalings=lambda a: torch.ones(2, dtype=torch.float64)))
    with pytest.raises(error, match=text):
        lora_batched_linear(**_case(**changes))


def test_results_of_collectives_that_were_not_waited_for():
    """What an all-gather gives wraps a tensor, too, but waits and lets every op through."""
    waiting = pytest.importorskip("torch.distributed._functional_collectives").AsyncCollectiveTensor
    assert torch.equal(lora_batched_linear(**_case(x=lambda a: waiting(a["x"]))), lora_batched_linear(**_case()))


def test_shrink_and_expand_refuse_gradients_and_copies():
    b = Batch.random(ids=[0, 1, -1], Ns=[6], K=5, R=2, L=2)
    with pytest.raises(LoraKernelsError, match="no gradients"):
        lora_shrink(b.x.clone().requires_grad_(), b.pools_a[0], b.ids)
    h = lora_shrink(b.x, b.pools_a[0], b.ids)
    with pytest.raises(LoraValueError, match="cannot be written in place"):
        lora_expand(torch.zeros(2, 6, 2).permute(2, 0, 1), torch.zeros(4, 2), b.pools_b[0], torch.zeros(4, dtype=torch.int32))
    with pytest.raises(LoraValueError, match="h and y do not fit"):
        lora_expand(torch.zeros(3, 7), h, b.pools_b[0], b.ids)


def test_shrink_refuses_what_is_no_pool_and_no_flag():
    b = Batch.random(ids=[0, 1, -1], Ns=[6], K=5, R=2, L=2)
    with pytest.raises(LoraTypeError, match="pool_a is no tensor; got ndarray"):
        lora_shrink(b.x, b.pools_a[0].numpy(), b.ids)
    with pytest.raises(LoraTypeError, match="rank_packed is no flag"):
        lora_shrink(b.x, b.pools_a[0], b.ids, rank_packed=torch.ones(2))


EXPAND_ERRORS = {
    "y_expanded": (dict(y=torch.zeros(1, 6).expand(3, 6)), LoraValueError, "elements of it share memory"),
    "y_overlapping": (dict(y=torch.zeros(20).as_strided((3, 6), (4, 1))), LoraValueError, "elements of it share memory"),
    "y_number": (dict(y=torch.zeros(())), LoraValueError, "y has no dimension"),
    "h_none": (dict(h=None), LoraTypeError, "h is no tensor"),
    "pool_none": (dict(pool_b=None), LoraTypeError, "pool_b is no tensor"),
    "pool_numpy": (dict(pool_b=torch.zeros(2, 6, 2).numpy()), LoraTypeError, "pool_b is no tensor; got ndarray"),
    "h_dtype": (dict(h=torch.zeros(3, 2, dtype=torch.float64)), LoraTypeError, "h has an unsupported dtype; got torch.float64"),
    "y_negated": (dict(y=torch._neg_view(torch.zeros(3, 6))), LoraValueError, "its memory holds -y.*fix: y.resolve_neg"),
    "h_sparse": (dict(h=torch.ones(3, 2).to_sparse()), LoraTypeError, "h has an unsupported layout"),
    "pool_vector": (dict(pool_b=torch.zeros(6)), LoraValueError, "pool_b has too few dimensions"),
}


@pytest.mark.parametrize("name", EXPAND_ERRORS)
def test_bad_arguments_of_expand(name):
    changes, error, text = EXPAND_ERRORS[name]
    good = dict(y=torch.zeros(3, 6), h=torch.zeros(3, 2), pool_b=torch.zeros(2, 6, 2), meta=torch.tensor([0, 1, -1], dtype=torch.int32))
    lora_expand(**good)
    with pytest.raises(error, match=text):
        lora_expand(**(good | changes))


def test_second_derivatives_say_what_to_do():
    """Also where dy is a constant, which PyTorch's once_differentiable lets pass: the gradient's part that depends on A was lost in silence."""
    b = Batch.random(ids=[0, 1, -1], Ns=[6], K=5, R=2, L=2)
    x, a = b.x.clone().requires_grad_(), b.pools_a[0].clone().requires_grad_()
    y = lora_batched_linear(x, b.weights[0], None, a, b.pools_b[0], b.ids)
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(LoraKernelsError, match="second derivatives.*fix: compute this layer in plain PyTorch"):
        grad.sum().backward()


def test_fake_tensors_have_shapes_and_no_values():
    b = Batch.random(ids=[0, 1, -1], Ns=[6], K=5, R=2, L=2, ranks=[2, 1])
    ranks = b.ranks[0].clone()
    with FakeTensorMode() as mode:
        fake = mode.from_tensor
        x, w, a, bb, ids, ranks = map(fake, (b.x, b.weights[0], b.pools_a[0], b.pools_b[0], b.ids, ranks))
        assert lora_batched_linear(x, w, None, a, bb, BatchMeta(ids, 2), ranks, dropout_p=torch.zeros(2)).shape == (3, 6)
        h = lora_shrink(x, a, ids, ranks)
        assert lora_expand(torch.zeros(3, 6), h, bb, ids, ranks).shape == (3, 6)


# ------------------------------------------------------------------------------------------------------------- metadata


def test_meta_made_in_inference_mode_is_updated_outside():
    with torch.inference_mode():
        meta = BatchMeta(torch.tensor([0, 1, -1]), 2)
    assert meta.update_(torch.tensor([1, 1, 0])).ids.tolist() == [1, 1, 0]


@pytest.mark.parametrize("count", [None, 2.0, -1])
def test_num_adapters_is_a_count(count):
    with pytest.raises(LoraValueError, match="num_adapters is no count"):
        BatchMeta(torch.tensor([-1]), count)


@settings(max_examples=80, deadline=None)
@given(ids=st.lists(st.integers(-3, 12), max_size=150), L=st.integers(1, 9), block=st.sampled_from([16, 64]))
def test_batch_table(ids, L, block):
    """Every array of the table against its definition, ids outside the pool counting as none."""
    M, at = len(ids), _batch_table.layout(len(ids), L, block)
    table = _batch_table.build(torch.tensor(ids, dtype=torch.int32), L, block, torch.full((at.size,), -7, dtype=torch.int32))
    array = lambda offset, n: table[offset : offset + n].tolist()
    valid = [i if 0 <= i < L else L for i in ids]
    order = sorted(range(M), key=lambda m: valid[m])
    present = sorted({v for v in valid if v < L})
    counts = [valid.count(slot) for slot in present]
    starts = [sum(counts[:s]) for s in range(len(present) + 1)]
    blocks = [
        (start + o, min(block, n - o), slot) for slot, start, n in zip(present, starts, counts, strict=False) for o in range(0, n, block)
    ]  # fmt: skip
    if M == 0:
        assert not table.any()
        return
    assert array(0, 3) == [len(blocks), starts[-1], len(present)]
    assert array(at.order, M) == order
    assert array(at.seg_of, M) == [present.index(valid[m]) if valid[m] < L else len(present) for m in order]
    assert array(at.seg_start, len(present) + 1) == starts
    assert array(at.seg_adapter, len(present)) == present
    assert len(blocks) <= at.max_blocks
    assert list(zip(array(at.blk_start, len(blocks)), array(at.blk_len, len(blocks)), array(at.blk_adapter, len(blocks)), strict=True)) == blocks


def test_meta_update_keeps_its_addresses():
    ids = torch.tensor([0, 1, -1, 1], dtype=torch.int32)
    meta = BatchMeta(ids, 2)
    address = meta.ids.data_ptr()
    assert address != ids.data_ptr()
    assert meta.update_(torch.tensor([1, 1, 1, -1])) is meta
    assert meta.ids.data_ptr() == address
    assert meta.ids.tolist() == [1, 1, 1, -1]
    for bad, text in ((torch.zeros(3, dtype=torch.int32), "another number of rows"), (torch.tensor([0, 0, 0, 2]), "outside the pool")):
        with pytest.raises(LoraValueError, match=text):
            meta.update_(bad)
    assert meta.ids.tolist() == [1, 1, 1, -1]


def test_ids_are_changed_by_update_alone():
    """Calls of a known signature would read other ids as int32, whatever they are."""
    meta = BatchMeta(torch.tensor([0, 1, -1]), 2)
    with pytest.raises(AttributeError, match="ids"):
        meta.ids = torch.zeros(3)
    with pytest.raises(LoraValueError, match="token_lora_mapping has no values; got a tensor on meta"):
        meta.update_(torch.zeros(3, dtype=torch.int32, device="meta"))
    for bad in (meta.ids.to_sparse(), jagged(meta.ids)):
        for call in (meta.update_, lambda ids: BatchMeta(ids, 2)):
            with pytest.raises(LoraTypeError, match="unsupported layout"):
                call(bad)
    assert meta.ids.tolist() == [0, 1, -1]


# ---------------------------------------------------------------------------------------------------------- registration


def test_opcheck():
    b = Batch.random(ids=[0, 1, -1, 1], Ns=[6, 4], K=5, R=2, L=2)
    tail = ("reference", True)
    checks = ("test_schema", "test_faketensor")
    fwd = (*b.base, None, b.scalings, torch.tensor([0.5, 0.0]), torch.tensor([3]), None, 16, False, False, *tail)
    torch.library.opcheck(torch.ops.lora_kernels.lora_batched_fwd.default, fwd, test_utils=checks)
    y, h, mask = torch.ops.lora_kernels.lora_batched_fwd(*fwd)
    bwd = (y, b.x, b.weights, b.pools_a, b.pools_b, h, mask, b.ids, None, b.scalings, fwd[8], None, 16, True, True, True, *tail)
    torch.library.opcheck(torch.ops.lora_kernels.lora_batched_bwd.default, bwd, test_utils=checks)
    shrink = (b.x, b.pools_a, b.ids, None, b.scalings, None, 16, False, False, *tail)
    torch.library.opcheck(torch.ops.lora_kernels.lora_shrink.default, shrink, test_utils=checks)
    expand = (y, h, b.pools_b, b.ids, None, None, 16, False, *tail)
    torch.library.opcheck(torch.ops.lora_kernels.lora_expand.default, expand, test_utils=checks)


def test_compiles_without_graph_breaks():
    b = Batch.random(ids=MIXED, Ns=[24], K=36, R=4, L=5)
    compiled = torch.compile(lambda x: linear(b.replace(x=x)) * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(b.x), linear(b) * 2)
