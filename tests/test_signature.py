"""Signatures of calls and the lean paths that trust them: equal where nothing differs that matters, never where something does."""

import pytest
import torch
import torch.nn.functional as F

import lora_kernels as lk
from lora_kernels import LoraValueError
from lora_kernels.native import signature as native
from lora_kernels.ops import _serving_path
from lora_kernels.ops import lora_linear as op

READERS = {"python": native._from_attributes, "native": native.signature}


def tensor(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


BASE = lambda: (tensor(4, 8), None, torch.nn.Parameter(tensor(8)))
OTHERS = {
    "shape": lambda: (tensor(5, 8), None, tensor(8)),
    "strides": lambda: (tensor(8, 4).t(), None, tensor(8)),
    "dimensions": lambda: (tensor(1, 4, 8), None, tensor(8)),
    "dtype": lambda: (tensor(4, 8, dtype=torch.int32), None, tensor(8)),
    "half-or-bfloat": lambda: (tensor(4, 8, dtype=torch.float16), None, tensor(8)),
    "none-or-tensor": lambda: (tensor(4, 8), tensor(8), tensor(8)),
    "order": lambda: (None, tensor(4, 8), tensor(8)),
    "address": lambda: (tensor(33)[1:].view(4, 8), None, tensor(8)),
}


@pytest.fixture(params=READERS)
def signature(request):
    return READERS[request.param]


def test_same_call_same_signature(signature) -> None:
    assert signature(*BASE()) == signature(*BASE())
    assert hash(signature(*BASE())) == hash(signature(*BASE()))


@pytest.mark.parametrize("other", OTHERS)
def test_what_matters_shows(signature, other) -> None:
    assert signature(*BASE()) != signature(*OTHERS[other]())


def test_half_is_not_bfloat(signature) -> None:
    assert signature(tensor(2, dtype=torch.float16)) != signature(tensor(2, dtype=torch.bfloat16))


def test_no_signature_of_what_is_no_plain_tensor(signature) -> None:
    class Mine(torch.Tensor):
        pass

    assert signature(tensor(2), tensor(2).as_subclass(Mine)) is None
    assert signature(tensor(2), torch.empty(2, device="meta")) is None


def test_more_dimensions_than_fit_have_no_signature() -> None:
    if native.signature is native._from_attributes:
        pytest.skip("the native module is not built")
    assert native.signature(*[tensor(*[1] * 20) for _ in range(10)]) is None


@pytest.mark.parametrize("values", [[3], [5, -7, 2], list(range(-40, 300))], ids=len)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_value_range(values, dtype) -> None:
    t = torch.tensor(values, dtype=dtype)
    assert native.value_range(t) == (min(values), max(values))
    assert native.value_range(torch.stack([t, t + 1], 1)[:, 1]) == (min(values) + 1, max(values) + 1)


def operands(M=6, K=16, N=12, R=4):
    torch.manual_seed(0)
    return torch.randn(M, K), torch.randn(N, K), torch.randn(R, K), torch.randn(N, R)


def naive(x, w, a, b):
    return F.linear(x, w) + 2 * F.linear(F.linear(x, a), b)


@pytest.mark.parametrize("lead", [(), (6,), (2, 3), (1, 2, 3), (0, 3)], ids=str)
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_leading_dimensions_forward_and_backward(lead, contiguous, backend) -> None:
    _, w, a, b = operands()
    x = torch.randn(*lead, 16) if contiguous else torch.randn(*lead, 32)[..., ::2]
    mine = [t.clone().requires_grad_() for t in (a, b)]
    theirs = [t.clone().requires_grad_() for t in (a, b)]
    for _ in range(2):  # the second call goes by the signature of the first
        x1, x2 = x.detach().requires_grad_(), x.detach().requires_grad_()
        y = lk.lora_linear(x1, w, None, *mine, 2.0, backend=backend)
        expected = naive(x2, w, *theirs)
        torch.testing.assert_close(y, expected)
        dy = torch.randn_like(expected)
        y.backward(dy), expected.backward(dy)
        torch.testing.assert_close(x1.grad, x2.grad)
        with torch.no_grad():
            torch.testing.assert_close(lk.lora_linear(x, w, None, *mine, 2.0, backend=backend), naive(x, w, *mine))
    for t, u in zip(mine, theirs, strict=True):
        torch.testing.assert_close(t.grad, u.grad)


def test_x_with_a_pending_sign() -> None:
    """A view of an imaginary part is its memory times -1, which kernels that read memory cannot know."""
    x, w, a, b = operands()
    for _ in range(2):
        torch.testing.assert_close(lk.lora_linear(torch._neg_view(x), w, None, a, b, 2.0), naive(-x, w, a, b))


def test_nothing_is_kept_for_backward_without_gradients(monkeypatch) -> None:
    monkeypatch.setattr(op, "_forward_runs", {})
    x, w, a, b = operands()
    a.requires_grad_()
    first = lk.lora_linear(x, w, None, a, b, 2.0)
    with torch.no_grad():
        second = lk.lora_linear(x, w, None, a, b, 2.0)
    assert len(op._forward_runs) == 2
    assert first.grad_fn is not None
    assert second.grad_fn is None
    assert torch.equal(first, second)


# ------------------------------------------------------------------------------------------------------- many adapters


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


def test_values_are_checked_in_known_calls_too(runs) -> None:
    x, (w,), (a,), (b,), ids = batch()
    ranks = torch.tensor([4, 0, 2], dtype=torch.int32)
    lk.lora_batched_linear(x, w, None, a, b, ids, ranks)
    assert len(runs) == 1
    with pytest.raises(LoraValueError, match="outside the pool"):
        lk.lora_batched_linear(x, w, None, a, b, ids + 3, ranks)
    with pytest.raises(LoraValueError, match="true rank outside the pool"):
        lk.lora_batched_linear(x, w, None, a, b, ids, ranks + 1)


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


@pytest.mark.parametrize("read", [native._pointers, native.addresses], ids=["python", "native"])
def test_addresses(read) -> None:
    a, b, c = tensor(3), tensor(4), tensor(5)
    assert read(a, None, (b, c)) == read(a, None, (b, c))
    assert len({read(a, None, (b, c)), read(a, None, (c, b)), read(a, b, (b, c)), read(a[1:], None, (b, c)), read(None, a, (b, c))}) == 5
