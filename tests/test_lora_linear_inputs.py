"""What `lora_linear` makes of operands and options at the edge: fp16's range, torch.func, operands without memory, options that are none."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import lora_kernels as lk
from lora_kernels import LoraKernelsError, LoraTypeError, LoraValueError, testing


@pytest.mark.parametrize("adapters", [torch.float16, torch.float32], ids=["fp16", "fp32"])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_fp16_keeps_its_range(backend, adapters) -> None:
    """h is 3200 and s h 102400, which fp16 does not have; y, dx, dA and dB are all well inside."""
    x, w = torch.full((2, 64), 200.0, dtype=torch.float16), torch.zeros(4, 64, dtype=torch.float16)
    a, b = torch.full((4, 64), 0.25, dtype=adapters), torch.full((4, 4), 1e-3, dtype=adapters)

    def grads(function, *operands):
        operands = [t.clone().requires_grad_(i != 1) for i, t in enumerate(operands)]
        y = function(*operands)
        return [y, *torch.autograd.grad(y, [operands[i] for i in (0, 2, 3)], torch.full_like(y, 1e-3))]

    plain = lambda x, w, a, b: F.linear(x, w) + 32.0 * F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))
    got = grads(lambda x, w, a, b: lk.lora_linear(x, w, None, a, b, 32.0, backend=backend), x, w, a, b)
    eager, exact = grads(plain, x, w, a, b), grads(plain, *(t.double() for t in (x, w, a, b)))
    for name, ours, theirs, true in zip(("y", "dx", "dA", "dB"), got, eager, exact, strict=True):
        assert testing.error_ratio(ours, theirs, true) <= testing.ALLOWED_RATIO, name


@pytest.mark.parametrize("which", range(5), ids=["x", "weight", "bias", "lora_a", "lora_b"])
def test_forward_mode_is_refused(which) -> None:
    operands = [torch.randn(s) for s in ((2, 8), (6, 8), (6,), (3, 8), (6, 3))]
    with forward_ad.dual_level():
        operands[which] = forward_ad.make_dual(operands[which], operands[which])
        with pytest.raises(LoraKernelsError, match="no forward-mode derivatives"):
            lk.lora_linear(*operands)


_x, _w, _a, _b = (torch.ones(s) for s in ((2, 8), (6, 8), (3, 8), (6, 3)))
CALLS = {
    "lora_linear": lambda a: lk.lora_linear(_x, _w, None, a, _b).square().sum(),
    "lora_batched_linear": lambda a: lk.lora_batched_linear(_x, _w, None, a[None], _b[None], torch.zeros(2, dtype=torch.int32)).square().sum(),
}


def _dual(call, a):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(call(forward_ad.make_dual(a, a))).tangent


TRANSFORMS = {
    "grad": lambda call, a: torch.func.grad(call)(a),
    "vjp": lambda call, a: torch.func.vjp(call, a)[1](torch.ones(()))[0],
    "jvp": lambda call, a: torch.func.jvp(call, (a,), (a,))[1],
    "vmap": lambda call, a: torch.func.vmap(call)(torch.stack([a, a])),
    "hessian": lambda call, a: torch.func.hessian(call)(a),
    "forward mode": _dual,
}


@pytest.mark.parametrize("fullgraph", [True, False], ids=["fullgraph", "graph breaks"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("op", CALLS)
def test_transforms_are_refused_under_compile_too(op, transform, fullgraph) -> None:
    """Dynamo traces the op as if it had no derivative, which then is zero."""
    torch.compiler.reset()
    with pytest.raises((LoraKernelsError, torch._dynamo.exc.Unsupported), match="no torch.func transforms|no forward-mode|LoraKernelsError"):
        torch.compile(lambda a: TRANSFORMS[transform](CALLS[op], a), backend="eager", fullgraph=fullgraph)(_a)


@pytest.mark.parametrize("op", CALLS)
def test_dual_numbers_given_to_a_compiled_call(op) -> None:
    torch.compiler.reset()
    call = torch.compile(CALLS[op], backend="eager", fullgraph=True)
    expected = call(_a)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="LoraKernelsError"):
        _dual(call, _a)
    assert torch.equal(call(_a), expected)


# ------------------------------------------------------------------------------------------------- operands that are not there


def _freed(t: torch.Tensor, size: int = 0) -> torch.Tensor:
    t.untyped_storage().resize_(size)
    return t


@pytest.mark.parametrize("known", [False, True], ids=["first call", "known call"])
@pytest.mark.parametrize("which", ["x", "weight", "bias", "lora_a", "lora_b", "seed"])
def test_freed_operands(which, known) -> None:
    """As FSDP1 leaves them outside the root's forward; a view of freed memory lies at its offset from null."""
    shapes = dict(x=(2, 12), weight=(6, 12), bias=(6,), lora_a=(3, 12), lora_b=(6, 3))
    operands = {name: torch.randn(shape) for name, shape in shapes.items()} | dict(dropout_p=0.25 if which == "seed" else 0.0)
    if which == "seed":
        operands["seed"] = torch.tensor([3])
    like = operands[which]
    for offset in (0, 16):
        flat = like.new_zeros(offset + like.numel())
        operands[which] = flat[offset:].view(like.shape)
        if known:
            assert lk.lora_linear(**operands).isfinite().all()
        with pytest.raises(LoraValueError, match="storage was freed"):
            _freed(flat), lk.lora_linear(**operands)


@pytest.mark.parametrize("which", ["x", "weight", "lora_a", "dy"])
def test_operands_freed_between_forward_and_backward(which) -> None:
    shapes = dict(x=(2, 12), weight=(6, 12), bias=(6,), lora_a=(3, 12), lora_b=(6, 3))
    for free in (False, True):  # the second time all is known
        operands = {name: torch.randn(shape).requires_grad_(name in ("x", "lora_a", "lora_b")) for name, shape in shapes.items()}
        y = lk.lora_linear(**operands)
        operands["dy"] = torch.randn(2, 6)
        if not free:
            y.backward(operands["dy"])
    with pytest.raises(LoraValueError, match="storage was freed"):
        _freed(operands[which].detach()), y.backward(operands["dy"])


@pytest.mark.parametrize("which", range(6), ids=["x", "weight", "bias", "pool_a", "pool_b", "ids"])
def test_freed_operands_of_many_adapters(which) -> None:
    operands = [torch.randn(s) for s in ((2, 8), (6, 8), (6,), (1, 3, 8), (1, 6, 3))] + [torch.zeros(2, dtype=torch.int32)]
    for _ in range(2):
        lk.lora_batched_linear(*operands)
    with pytest.raises(LoraValueError, match="storage was freed"):
        _freed(operands[which]), lk.lora_batched_linear(*operands)


def test_shrunk_operands() -> None:
    """F.linear refuses them as well; a known call is not looked at that closely."""
    with pytest.raises(LoraValueError, match=r"freed or shrunk; got 64 bytes for the 416 of torch.float32 \[13, 8\]; fix: gather"):
        lk.lora_linear(torch.randn(2, 8), _freed(torch.randn(13, 8), 64), None, torch.randn(3, 8), torch.randn(13, 3))


@pytest.mark.parametrize("make", [torch._efficientzerotensor, lambda s: torch._to_functional_tensor(torch.ones(s))], ids=["zero", "functional"])
def test_operands_that_never_had_memory(make) -> None:
    y = lk.lora_linear(make((2, 8)), _w, None, _a, _b)
    expected = 0.0 if make is torch._efficientzerotensor else 8.0 + 3 * 8.0
    assert torch.equal(torch._from_functional_tensor(y) if torch._is_functional_tensor(y) else y, torch.full((2, 6), expected))


RETURNED = {
    "16 bits": ("x", lambda t: t.bfloat16() if t.shape == (5, 8) else t),
    "fewer rows": ("x", lambda t: t[:3] if t.shape == (5, 8) else t),
    "fewer columns": ("x", lambda t: t[:, :4] if t.shape == (6, 8) else t),
    "another h": ("h", lambda t: t[:2] if t.shape == (5, 3) else t),
    "another mask": ("mask", lambda t: t[:2] if t.dtype is torch.int32 else t),
    "no integers": ("mask", lambda t: t.float() if t.dtype is torch.int32 else t),
    "no matrices": ("x", lambda t: t.sum()),
}


@pytest.mark.parametrize("observed", [False, True], ids=["lean path", "dispatcher"])
@pytest.mark.parametrize("case", RETURNED)
def test_saved_tensors_that_come_back_as_others(case, observed) -> None:
    """The kernels would read past their ends, or floats out of the wrong bits."""
    (name, unpack), leaf = RETURNED[case], lambda *s: torch.randn(s, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack), FlopCounterMode(display=False) if observed else contextlib.nullcontext():
        y = lk.lora_linear(leaf(5, 8), _w, None, leaf(3, 8), leaf(6, 3), 2.0, 0.25, seed=1)
        with pytest.raises(LoraKernelsError, match=f"{name}, saved for the backward, came back as another tensor"):
            y.sum().backward()


SEEDS = {
    "meta": (lambda: torch.tensor(3, device="meta"), "seed has no number that could be read; got device meta"),
    "sparse": (lambda: torch.tensor([3]).to_sparse(), "seed has no number that could be read; got torch.sparse_coo"),
    "flag": (lambda: True, "seed is no seed; got True"),
}


@pytest.mark.parametrize("make, text", SEEDS.values(), ids=SEEDS)
def test_seeds_that_are_none(make, text) -> None:
    with pytest.raises(LoraTypeError, match=text):
        lk.lora_linear(_x, _w, None, _a, _b, dropout_p=0.1, seed=make())


OPTIONS = {
    "dropout_p": (dict(dropout_p=[0.1]), LoraValueError, "dropout_p is no probability"),
    "backend": (dict(backend=["cpu"]), LoraValueError, "unknown backend"),
    "strict": (dict(strict=[]), LoraTypeError, r"strict is no flag; got \[\]"),
    "strict_text": (dict(strict="x"), LoraTypeError, "strict is no flag; got 'x'"),
    "training": (dict(training=[1]), LoraTypeError, "training is no flag"),
    "training_none": (dict(training=None), LoraTypeError, "training is no flag; got None"),
    "dropout_flag": (dict(dropout_p=True), LoraValueError, "dropout_p is no probability; got True"),
    "dropout_in_evaluation": (dict(dropout_p=7.0, training=False), LoraValueError, "no probability; got 7.0"),
    "seed_without_dropout": (dict(seed="1"), LoraTypeError, "seed is no seed; got str"),
    "scaling_past_float32": (dict(scaling=1e39), LoraValueError, r"scaling is not finite; got 1e\+39; allowed: up to 3.40282e\+38"),
    "scaling": (dict(scaling=[2.0]), LoraTypeError, "scaling is not a number; got list"),
}


@pytest.mark.parametrize("scaling", [1e39, -1e39, float("nan"), float("inf"), 10**400], ids=str)
def test_scalings_that_float32_lacks_in_known_calls(scaling) -> None:
    """The kernels would turn them into NaN; the largest that there is goes through."""
    operands = torch.ones(2, 8), torch.zeros(6, 8), None, torch.zeros(3, 8), torch.zeros(6, 3)
    assert not lk.lora_linear(*operands, 3.4028234663852886e38).any()
    with pytest.raises(LoraValueError, match="scaling is not finite"):
        lk.lora_linear(*operands, scaling)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("options, error, text", OPTIONS.values(), ids=OPTIONS)
def test_options_that_are_none(options, error, text, dtype) -> None:
    operands = [torch.zeros(s, dtype=dtype) for s in ((2, 8), (6, 8), (6,), (3, 8), (6, 3))]
    with pytest.raises(error, match=text):
        lk.lora_linear(*operands, **options)


def test_the_criterion_refuses_what_does_not_belong_together() -> None:
    """A result of the wrong shape is no small error."""
    with pytest.raises(ValueError, match="do not belong together"):
        testing.relative_rmse(torch.ones(3), torch.ones(3, 3))
    with pytest.raises(ValueError, match="do not belong together"):
        testing.error_ratio(torch.ones(3), torch.ones(2), torch.ones(3))
    for call in (lambda: testing.keep_scale(1.5), lambda: testing.dropout_mask(1, 2, 8, -0.5), lambda: testing.dropout_mask(2**63, 2, 8, 0.5)):
        with pytest.raises(LoraValueError):
            call()
    with pytest.raises(LoraTypeError, match="seed is no seed; got float"):
        testing.dropout_mask(1.9, 2, 8, 0.5)
