"""Serving calls that are already known take a lean path: the same results, and what depends on values is looked at again."""

import pytest
import torch
import torch.nn.functional as F

import lora_kernels as lk
from lora_kernels import LoraTypeError, LoraValueError
from lora_kernels.ops import _registry, _serving_path


def batch(M=9, K=16, N=12, R=4, L=3, S=1):
    torch.manual_seed(0)
    ids = torch.randint(-1, L, (M,), dtype=torch.int32)
    pools = [torch.randn(L, R, K) for _ in range(S)], [torch.randn(L, N + s, R) for s in range(S)]
    return torch.randn(M, K), [torch.randn(N + s, K) for s in range(S)], *pools, ids


def expected_rows(x, weights, pools_a, pools_b, ids, ranks, scalings):
    parts = []
    for w, a, b in zip(weights, pools_a, pools_b, strict=True):
        y = F.linear(x, w)
        for m, adapter in enumerate(ids.tolist()):
            if adapter >= 0:
                r = int(ranks[adapter])
                y[m] += scalings[adapter] * F.linear(F.linear(x[m], a[adapter, :r]), b[adapter, :, :r])
        parts.append(y)
    return parts


@pytest.fixture
def runs(monkeypatch) -> dict:
    found: dict = {}
    monkeypatch.setattr(_serving_path, "_runs", found)
    return found


@pytest.mark.parametrize("mapping", [lambda ids, L: ids, lk.BatchMeta], ids=["ids", "meta"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("S", [1, 3])
@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "lists"])
@pytest.mark.parametrize("lead", [(9,), (3, 3)], ids=str)
def test_known_serving_calls(runs, mapping, backend, S, stacked, lead) -> None:
    x, weights, pools_a, pools_b, ids = batch(S=S)
    bias = [torch.randn(w.shape[0]) for w in weights]
    ranks, scalings = torch.tensor([4, 0, 2], dtype=torch.int32), torch.tensor([0.5, 1.0, 2.0])
    for _ in range(3):
        x, ids = torch.randn_like(x), ids.roll(1)
        given = (torch.cat(weights), torch.cat(bias)) if stacked else (weights, bias)
        y = lk.lora_batched_linear(x.view(*lead, -1), *given, pools_a, pools_b, mapping(ids, 3), ranks, scalings, backend=backend)
        want = [y + v for y, v in zip(expected_rows(x, weights, pools_a, pools_b, ids, ranks, scalings), bias, strict=True)]
        for got, part in zip([y] if stacked else y, [torch.cat(want, 1)] if stacked else want, strict=True):
            assert got.shape[:-1] == lead
            torch.testing.assert_close(got.reshape(part.shape), part)
    assert len(runs) == 1


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_ids_of_any_shape_are_those_of_the_flattened_rows(runs, backend) -> None:
    x, (w,), (a,), (b,), ids = batch(M=8, K=8, N=8, R=8)
    flat = lk.lora_shrink(x, a, ids, backend=backend), lk.lora_batched_linear(x, w, None, a, b, ids, backend=backend)
    for _ in range(3):
        h, y = (
            call(ids.view(2, 4))
            for call in (lambda i: lk.lora_shrink(x, a, i, backend=backend), lambda i: lk.lora_batched_linear(x, w, None, a, b, i, backend=backend))
        )
        assert torch.equal(h, flat[0])
        assert torch.equal(y, flat[1])


def test_a_number_is_no_flag_in_known_calls_either(runs) -> None:
    x, (w,), (a,), (b,), ids = batch()
    calls = {
        "lora_batched_linear": lambda flag: lk.lora_batched_linear(x, w, None, a, b, ids, strict=flag),
        "lora_shrink": lambda flag: lk.lora_shrink(x, a, ids, strict=flag),
        "lora_linear": lambda flag: lk.lora_linear(x, w, None, a[0], b[0], training=flag),
    }
    for name, call in calls.items():
        for _ in range(2):
            call(True)
        with pytest.raises(LoraTypeError, match=f"{name}: .* is no flag; got 1"):
            call(1)


def test_values_are_checked_in_known_calls_too(runs) -> None:
    x, (w,), (a,), (b,), ids = batch()
    ranks = torch.tensor([4, 0, 2], dtype=torch.int32)
    lk.lora_batched_linear(x, w, None, a, b, ids, ranks)
    assert len(runs) == 1
    with pytest.raises(LoraValueError, match="outside the pool"):
        lk.lora_batched_linear(x, w, None, a, b, ids + 3, ranks)
    with pytest.raises(LoraValueError, match="true rank outside the pool"):
        lk.lora_batched_linear(x, w, None, a, b, ids, ranks + 1)


@pytest.mark.parametrize(
    "dtype, value",
    [(torch.float32, float("nan")), (torch.float64, 1e39), (torch.bfloat16, float("inf"))],
    ids=["nan", "past_float32", "inf_in_bf16"],
)
def test_scalings_written_in_place_are_looked_at_again(runs, dtype, value) -> None:
    x, (w,), (a,), (b,), ids = batch()
    scalings = torch.ones(3, dtype=dtype)
    calls = lambda: lk.lora_batched_linear(x, w, None, a, b, ids, None, scalings), lambda: lk.lora_shrink(x, a, ids, None, scalings)
    for _ in range(3):
        for call in calls:
            call()
    assert len(runs) == 2
    scalings[1] = value
    for call in calls:
        with pytest.raises(LoraValueError, match="scalings are not finite"):
            call()


def test_vectors_that_the_kernels_cannot_read_in_place(runs) -> None:
    x, (w,), (a,), (b,), ids = batch()
    ranks, scalings = torch.tensor([[4, 9], [0, 9], [2, 9]])[:, 0], torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    want = expected_rows(x, [w], [a], [b], ids, ranks, scalings.float())[0]
    for _ in range(2):
        torch.testing.assert_close(lk.lora_batched_linear(x, w, None, a, b, ids, ranks, scalings), want)


def test_batch_invariance_by_environment_is_seen(runs, monkeypatch) -> None:
    x, (w,), (a,), (b,), ids = batch()
    lk.lora_batched_linear(x, w, None, a, b, ids)
    monkeypatch.setenv("LORA_KERNELS_BATCH_INVARIANT", "1")
    one = lk.lora_batched_linear(x[:1], w, None, a, b, ids[:1])
    assert torch.equal(lk.lora_batched_linear(x, w, None, a, b, ids)[:1], one)
    assert len(runs) == 3


def test_ids_of_another_length_are_refused_in_known_calls(runs) -> None:
    x, (w,), (a,), (b,), ids = batch()
    lk.lora_batched_linear(x, w, None, a, b, ids)
    with pytest.raises(LoraValueError, match="does not fit x"):
        lk.lora_batched_linear(x, w, None, a, b, ids[:-1])


def test_training_call_after_a_serving_call(runs) -> None:
    x, (w,), (a,), (b,), ids = batch()
    y = lk.lora_batched_linear(x, w, None, a, b, ids)
    a.requires_grad_()
    z = lk.lora_batched_linear(x, w, None, a, b, ids)
    assert torch.equal(y, z)
    assert z.grad_fn is not None
    with torch.no_grad():
        assert torch.equal(lk.lora_batched_linear(x, w, None, a, b, ids), y)


@pytest.mark.parametrize("mapping", [lambda ids, L: ids, lk.BatchMeta], ids=["ids", "meta"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("S", [1, 3])
@pytest.mark.parametrize("lead", [(9,), (3, 3)], ids=str)
def test_known_shrinks_and_expands(runs, mapping, backend, S, lead) -> None:
    x, weights, pools_a, pools_b, ids = batch(S=S)
    ranks, scalings = torch.tensor([4, 0, 2], dtype=torch.int32), torch.tensor([0.5, 1.0, 2.0])
    for _ in range(3):
        x, ids = torch.randn_like(x), ids.roll(1)
        h = lk.lora_shrink(x.view(*lead, -1), pools_a, mapping(ids, 3), ranks, scalings, backend=backend)
        y = torch.cat([F.linear(x, w) for w in weights], 1).view(*lead, -1)
        assert lk.lora_expand(y, h, pools_b, mapping(ids, 3), ranks, backend=backend) is y
        torch.testing.assert_close(y.view(9, -1), torch.cat(expected_rows(x, weights, pools_a, pools_b, ids, ranks, scalings), 1))
    assert len(runs) == 2
    with pytest.raises(LoraValueError, match="true rank outside the pool"):
        lk.lora_shrink(x.view(*lead, -1), pools_a, mapping(ids, 3), ranks + 1, scalings, backend=backend)
    with pytest.raises(LoraValueError, match="true rank outside the pool"):
        lk.lora_expand(y, h, pools_b, mapping(ids, 3), ranks + 1, backend=backend)
    with pytest.raises(LoraValueError, match="outside the pool"):
        lk.lora_expand(y, h, pools_b, mapping(ids + 3, 3), ranks, backend=backend)


@pytest.mark.parametrize("mapping", [lambda ids, L: ids, lk.BatchMeta], ids=["ids", "meta"])
@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "lists"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_known_serving_calls_under_autocast(runs, monkeypatch, backend, stacked, mapping) -> None:
    """As lora_linear: cast like F.linear, the bits of the cast operands, on the lean path from the second call on; and back outside."""
    x, weights, pools_a, pools_b, ids = batch(S=2)
    bias = [torch.randn(w.shape[0]) for w in weights]
    given = (torch.cat(weights), torch.cat(bias)) if stacked else (weights, bias)
    low = [t.bfloat16() if stacked else [part.bfloat16() for part in t] for t in given]
    halves = [t.bfloat16() for t in pools_a], [t.bfloat16() for t in pools_b]

    def whole(x, base, pools=(pools_a, pools_b)):
        y = lk.lora_batched_linear(x, *base, *pools, mapping(ids, 3), backend=backend)
        return [y] if stacked else list(y)

    def split(y):
        h = lk.lora_shrink(x, pools_a, mapping(ids, 3), backend=backend)
        return [h, lk.lora_expand(y.clone(), h, pools_b, mapping(ids, 3), backend=backend)]

    wide, outside = torch.randn(9, sum(w.shape[0] for w in weights)), whole(x, given)
    want = whole(x.bfloat16(), low), whole(x.bfloat16(), low, halves), split(wide)
    runs.clear()
    found = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            found.append((whole(x, given), whole(x, given, halves), split(wide)))
            assert torch.is_autocast_enabled("cpu")
            with torch.autocast("cpu", enabled=False):
                assert all(torch.equal(y, z) for y, z in zip(whole(x, given), outside, strict=True))
        monkeypatch.setattr(_registry, "select", lambda *_: pytest.fail("through the dispatcher"))
    for got in found:
        for ours, theirs in zip(got, want, strict=True):
            assert all(y.dtype == z.dtype and torch.equal(y, z) for y, z in zip(ours, theirs, strict=True))
    assert len(runs) == 5  # two of the whole op, the halves, and outside
    assert all(torch.equal(y, z) for y, z in zip(whole(x, given), outside, strict=True))


@pytest.mark.parametrize("wrong", ["x", "weight", "pool_a"])
def test_what_is_no_tensor_is_named_under_autocast_too(wrong) -> None:
    x, (weight,), (pool_a,), (pool_b,), ids = batch()
    given = {"x": x, "weight": weight, "pool_a": pool_a} | {wrong: 3}
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(LoraTypeError, match=f"{wrong} is no tensor"):
        lk.lora_batched_linear(given["x"], given["weight"], None, given["pool_a"], pool_b, ids)
