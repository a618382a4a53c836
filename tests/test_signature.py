"""Signatures of calls and the lean paths that trust them: equal where nothing differs that matters, never where something does."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import lora_kernels as lk
from lora_kernels.native import signature as native
from lora_kernels.ops import _call
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
    assert signature(tensor(2), tensor(2).to_sparse()) is None


def test_no_signature_of_what_has_no_memory(signature) -> None:
    """A view of freed memory is shown at its offset; where there are no elements, none are needed."""
    freed = tensor(100_000)
    views = freed[:4], freed[8:].view(-1, 8), freed[99_999:]
    assert all(signature(view) is not None for view in views)
    freed.untyped_storage().resize_(0)
    assert all(signature(tensor(2), view) is None for view in views)
    assert signature(freed[8:8], tensor(0, 4)) is not None


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("last, finite", [(-0.0, True), (3e38, True), (math.inf, False), (-math.inf, False), (math.nan, False)], ids=str)
def test_all_finite(last, finite, dtype) -> None:
    t = torch.tensor([1.0, -2.0, last], dtype=dtype)
    assert native.all_finite(t) == finite
    assert native.all_finite(torch.stack([t, torch.full_like(t, math.nan)], 1)[:, 0]) == finite
    assert native.all_finite(t[:2])
    assert native.all_finite(t[:0])


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


@pytest.mark.parametrize("which", range(4), ids=["x", "weight", "lora_a", "lora_b"])
def test_an_operand_with_a_pending_sign(which) -> None:
    """A view of an imaginary part is its memory times -1, which kernels that read memory cannot know."""
    mine = list(operands())
    theirs = [-t if i == which else t for i, t in enumerate(mine)]
    mine[which] = torch._neg_view(mine[which])
    for _ in range(2):
        x, w, a, b = mine
        torch.testing.assert_close(lk.lora_linear(x, w, None, a, b, 2.0), naive(*theirs))


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


# ------------------------------------------------------------------------------------------------------------ autocast


def to(dtype, *tensors):
    return [t.detach().to(dtype) for t in tensors]


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "no_gradient"])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=["adapter_fp32", "adapter_bf16"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_known_calls_under_autocast(monkeypatch, backend, adapter, trained) -> None:
    """Cast as F.linear casts, by the second call too; the bits of the cast operands, so nothing inside is cast again; and back outside."""
    monkeypatch.setattr(op, "_forward_runs", {})
    monkeypatch.setattr(op, "_backward_runs", {})
    x, w, a, b = operands()
    bias, a, b = torch.randn(12), *(t.to(adapter).requires_grad_(trained) for t in (a, b))
    low = to(torch.bfloat16, x, w, bias)
    want = lk.lora_linear(*low, a, b, 2.0, backend=backend)
    outside = lk.lora_linear(x, w, bias, *to(torch.float32, a, b), 2.0, backend=backend)
    op._forward_runs.clear()
    dispatched = []
    monkeypatch.setattr(op, "_fwd", lambda *args: dispatched.append("forward"))
    monkeypatch.setattr(op, "_bwd", lambda *args: dispatched.append("backward"))
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            y = lk.lora_linear(x, w, bias, a, b, 2.0, backend=backend)
            assert torch.is_autocast_enabled("cpu")
            with torch.autocast("cpu", enabled=False):
                assert torch.equal(lk.lora_linear(x, w, bias, *to(torch.float32, a, b), 2.0, backend=backend), outside)
            grads = torch.autograd.grad(y, (a, b), torch.ones_like(y)) if trained else ()
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, want)
        if trained:
            expected = torch.autograd.grad(want, (a, b), torch.ones_like(y), retain_graph=True)
            assert all(torch.equal(g, e) for g, e in zip(grads, expected, strict=True))
        assert torch.equal(lk.lora_linear(x, w, bias, *to(torch.float32, a, b), 2.0, backend=backend), outside)
    assert dispatched == []
    assert len(op._forward_runs) == 2  # within and without


def test_autocast_is_on_again_after_a_failure() -> None:

    def fails(*_):
        assert not torch.is_autocast_enabled("cpu")
        raise RuntimeError("no")

    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(RuntimeError, match="no"):
            _call.outside_autocast(fails, "cpu")
        assert torch.is_autocast_enabled("cpu")


def test_autocast_of_another_device_changes_nothing() -> None:
    x, w, a, b = operands()
    want = lk.lora_linear(x, w, None, a, b, 2.0)
    torch.set_autocast_enabled("cuda", True)  # torch.autocast wants to see a GPU first
    try:
        for _ in range(2):
            assert torch.equal(lk.lora_linear(x, w, None, a, b, 2.0), want)
            assert torch.is_autocast_enabled("cuda")
            assert not torch.is_autocast_enabled("cpu")
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_signatures_do_not_pile_up(monkeypatch) -> None:
    monkeypatch.setattr(_call, "MAX_SIGNATURES", 4)
    monkeypatch.setattr(op, "_forward_runs", {})
    _, w, a, b = operands()
    for M in range(1, 10):
        lk.lora_linear(torch.zeros(M, w.shape[1]), w, None, a, b)
        assert 1 <= len(op._forward_runs) <= 4


# ------------------------------------------------------------------------------------------------------- many adapters


@pytest.mark.parametrize("read", [native._pointers, native.addresses], ids=["python", "native"])
def test_addresses(read) -> None:
    a, b, c = tensor(3), tensor(4), tensor(5)
    assert read(a, None, (b, c)) == read(a, None, (b, c))
    assert len({read(a, None, (b, c)), read(a, None, (c, b)), read(a, b, (b, c)), read(a[1:], None, (b, c)), read(None, a, (b, c))}) == 5


@pytest.mark.parametrize("read", [native._pointers, native.addresses], ids=["python", "native"])
def test_addresses_with_numbers_and_lists(read) -> None:
    a, b = tensor(3), tensor(4)
    base = read(7, (0.5,), [a, (b, None)], ())
    assert read(7, (0.5,), [a, (b, None)], ()) == base
    others = (
        read(8, (0.5,), [a, (b, None)], ()),
        read(7, (0.25,), [a, (b, None)], ()),
        read(7, (0.5,), [b, (b, None)], ()),
        read(2**63, (0.5,), [a, (b, None)]),
    )
    assert len({base, *others}) == 5


@contextlib.contextmanager
def forward_ad_level():
    with torch.autograd.forward_ad.dual_level():
        yield


@contextlib.contextmanager
def functorch_transform():
    level = torch._C._functorch._vmap_increment_nesting(2, "error")
    try:
        yield level
    finally:
        torch._C._functorch._vmap_decrement_nesting()


class Listening(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


LISTENERS = {
    "dispatch mode": Listening,
    "forward AD": forward_ad_level,
    "functorch": functorch_transform,
}


@pytest.fixture(params=["python", "native"])
def unobserved(request):
    return {"python": native._unobserved_from_attributes, "native": native.unobserved_signature}[request.param]


@pytest.mark.parametrize("listener", LISTENERS)
def test_no_signature_while_somebody_listens(unobserved, listener) -> None:
    before = unobserved(*BASE())
    assert before is not None
    with LISTENERS[listener]():
        assert unobserved(*BASE()) is None
    assert unobserved(*BASE()) == before


@pytest.mark.parametrize("name", ["LORA_KERNELS_BACKEND", "LORA_KERNELS_STRICT", "LORA_KERNELS_BATCH_INVARIANT"])
def test_the_environment_shows(unobserved, name, monkeypatch) -> None:
    monkeypatch.delenv(name, raising=False)
    found = {unobserved(*BASE())}
    for value in ("", "1", "cpu", "reference", "a name of more than a word"):
        monkeypatch.setenv(name, value)
        found.add(unobserved(*BASE()))
        assert unobserved(*BASE()) in found
    assert None not in found
    assert len(found) == 6
    monkeypatch.setenv(name, "no name is as long as this" * 100)
    assert unobserved(*BASE()) not in found


def test_no_unobserved_signature_with_a_pending_sign_or_of_what_is_no_plain_tensor(unobserved) -> None:
    assert unobserved(torch._neg_view(tensor(4, 8))) is None
    assert unobserved(torch.empty(2, device="meta")) is None
    assert unobserved(tensor(5, 8)) != unobserved(tensor(4, 8))
