"""`lk.lora_linear` on the reference: the definition against float64, autograd, torch.library, compile, checkpointing, errors."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
import torch.nn.functional as F
from oracle import Case, assert_close
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lora_kernels as lk
from lora_kernels import reference
from lora_kernels.ops import _serving_path, lora_linear

bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

SHAPES = [(0, 8, 8, 4), (1, 1, 1, 1), (1, 33, 65, 4), (17, 31, 47, 8), (64, 96, 100, 24), (5, 40, 72, 64), (130, 50, 70, 128), (3, 300, 290, 256)]
DTYPES = [(fp32, fp32), (bf16, bf16), (bf16, fp32), (fp16, fp16), (fp16, fp32), (fp64, fp64)]


def shape_id(shape):
    return "M{}-N{}-K{}-R{}".format(*shape)


def dtype_id(pair):
    names = [str(d).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf") for d in pair]
    return "x_{}-adapter_{}".format(*names)


def run(c: Case, **options) -> dict[str, torch.Tensor]:
    x, a, b = (t.clone().requires_grad_() for t in (c.x, c.lora_a, c.lora_b))
    bias = None if c.bias is None else c.bias.clone().requires_grad_()
    y = lk.lora_linear(x, c.weight, bias, a, b, c.scaling, c.dropout_p, seed=c.seed, **options)
    y.backward(c.dy)
    return {"y": y.detach(), "dx": x.grad, "da": a.grad, "db": b.grad} | ({} if bias is None else {"dbias": bias.grad})


# ------------------------------------------------------------------------------------------------------------ numerics


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["no_dropout", "dropout"])
def test_matches_float64(shape, dtypes, dropout_p):
    c = Case.random(*shape, *dtypes, bias=shape[0] % 2 == 1, dropout_p=dropout_p)
    assert_close(run(c, backend="reference"), c)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["no_dropout", "dropout"])
def test_gradcheck(dropout_p):
    c = Case.random(5, 12, 33, 4, fp64)
    inputs = [t.requires_grad_() for t in (c.x, c.bias, c.lora_a, c.lora_b)]
    call = lambda x, bias, a, b: lk.lora_linear(x, c.weight, bias, a, b, 0.5, dropout_p, seed=7)
    assert torch.autograd.gradcheck(call, inputs)


def test_leading_dimensions_and_strides():
    c = Case.random(24, 20, 36, 4)
    expected = run(c)["y"]
    assert torch.equal(lk.lora_linear(c.x.view(2, 3, 4, 36), c.weight, c.bias, c.lora_a, c.lora_b, c.scaling).view(24, 20), expected)
    assert lk.lora_linear(c.x[0], c.weight, c.bias, c.lora_a, c.lora_b, c.scaling).shape == (20,)
    strided = torch.empty(36, 24).t().copy_(c.x)
    got = lk.lora_linear(strided, c.weight.t().contiguous().t(), c.bias, c.lora_a.t().contiguous().t(), c.lora_b, c.scaling)
    torch.testing.assert_close(got, expected)


LOSSES = {
    "sum": lambda y: y.sum(),
    "mean of 3-D": lambda y: y.view(2, 8, -1).mean(),
    "sum over rows": lambda y: y.sum(0).square().sum(),
    "sum over columns": lambda y: y.sum(1).square().sum(),
    "transposed": lambda y: (y.t() @ torch.ones(y.shape[0], 3)).square().sum(),
}


@pytest.mark.parametrize("observed", [False, True], ids=["lean path", "dispatcher"])
@pytest.mark.parametrize("loss", LOSSES)
def test_kernels_get_contiguous_rows_whatever_the_gradient_s_strides(loss, observed, monkeypatch):
    """A dy of one element or by columns is made rows once, so that no backend has a reason to refuse it; x likewise."""
    strides, ops = [], dict(reference.OPS)
    for module, remembered in ((lora_linear, "_forward_runs"), (lora_linear, "_backward_runs"), (_serving_path, "_runs")):
        monkeypatch.setattr(module, remembered, {})
    for name, wide in (("lora_linear_fwd", 1), ("lora_linear_bwd", 2), ("lora_batched_fwd", 1), ("lora_batched_bwd", 2)):
        run = ops[name][0]
        seen = lambda *args, run=run, wide=wide: (strides.extend(t.stride() for t in args[:wide]), run(*args))[1]
        monkeypatch.setitem(reference.OPS, name, (seen, lambda *_: None))
    c, ids = Case.random(16, 8, 12, 4), torch.zeros(16, dtype=torch.int32)
    calls = {
        "one adapter": lambda x, a, b: lk.lora_linear(x, c.weight, None, a, b, backend="reference"),
        "many": lambda x, a, b: lk.lora_batched_linear(x, c.weight, None, a[None], b[None], ids, backend="reference"),
    }
    for call in calls.values():
        for x in (c.x, c.x.t().contiguous().t()):
            leaves = [t.detach().requires_grad_() for t in (x, c.lora_a, c.lora_b)]
            strides.clear()
            with FlopCounterMode(display=False) if observed else contextlib.nullcontext():
                got = torch.autograd.grad(LOSSES[loss](call(*leaves)), leaves)
            assert strides == [(12, 1), (8, 1), (12, 1)]
            plain = F.linear(leaves[0], c.weight) + F.linear(F.linear(leaves[0], leaves[1]), leaves[2])
            for mine, theirs in zip(got, torch.autograd.grad(LOSSES[loss](plain), leaves), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
            with torch.no_grad():
                torch.testing.assert_close(call(*leaves), plain.detach())
            assert strides[3:] == [(12, 1)]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("columns", ["contiguous", "strided"])
def test_y_may_be_written_in_place(columns, backend) -> None:
    """As F.linear's may: `y += residual`, ReLU(inplace=True). Each form of the call: first, remembered, seen by a dispatch mode."""
    c = Case.random(6, 20, 36, 4)
    x = (c.x if columns == "contiguous" else c.x.repeat_interleave(2, 1)[:, ::2]).view(2, 3, 36)
    for observer in (contextlib.nullcontext(), contextlib.nullcontext(), FlopCounterMode(display=False)):
        with observer:
            x, a, b = (t.detach().requires_grad_() for t in (x, c.lora_a, c.lora_b))
            y = lk.lora_linear(x, c.weight, c.bias, a, b, c.scaling, backend=backend)
            grads = torch.autograd.grad(y.clone().mul_(3).sum(), (x, a, b))
            y = lk.lora_linear(x, c.weight, c.bias, a, b, c.scaling, backend=backend)
            assert all(map(torch.equal, torch.autograd.grad(y.mul_(3).sum(), (x, a, b)), grads))


def test_same_bits_every_run():
    c = Case.random(37, 50, 70, 16, bf16, fp32, dropout_p=0.2)
    first = run(c)
    for _ in range(20):
        again = run(c)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("needed", ["x", "lora_a", "lora_b"])
def test_only_the_needed_gradient(needed):
    c = Case.random(9, 20, 30, 4)
    tensors = {name: getattr(c, name).clone() for name in ("x", "lora_a", "lora_b")}
    tensors[needed].requires_grad_()
    lk.lora_linear(tensors["x"], c.weight, c.bias, tensors["lora_a"], tensors["lora_b"], c.scaling).backward(c.dy)
    expected = run(c)[{"x": "dx", "lora_a": "da", "lora_b": "db"}[needed]]
    assert torch.equal(tensors[needed].grad, expected)


# ------------------------------------------------------------------------------------------------------------- dropout


def test_mask_is_philox4x32_7():
    """Against an independent scalar Philox4x32-7 in Python integers."""

    def philox(counter, key):
        for _ in range(7):
            p0, p1 = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
            counter = [(p1 >> 32) ^ counter[1] ^ key[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ counter[3] ^ key[1], p0 & 0xFFFFFFFF]
            key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
        return counter

    M, K, p, seed = 5, 45, 0.37, 0x1234_5678_9ABC_DEF0
    mask = reference.dropout_mask(torch.tensor([seed]), M, K, p)
    assert mask.shape == (M, 2)
    assert mask.dtype == torch.int32
    keep = reference.unpack_bits(mask, 64)
    for m in range(M):
        for k in range(64):
            word = philox([k // 8, m, 0, 0], [seed & 0xFFFFFFFF, seed >> 32])[k % 8 // 2]
            lane = word >> 16 if k % 2 else word & 0xFFFF
            assert keep[m, k].item() == (k < K and lane >= round(p * 65536))


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.9999, 1.0])
def test_kept_share_and_scale(p):
    keep = reference.unpack_bits(reference.dropout_mask(torch.tensor([3]), 400, 500, p), 500)
    assert keep.float().mean().item() == pytest.approx(1 - p, abs=4 * (p * (1 - p) / 200_000) ** 0.5 + 1e-5)
    assert reference.keep_scale(p) == (pytest.approx(1 / (1 - p), rel=1e-4 / (1 - p)) if p < 1 else 0.0)


def test_dropout_follows_torch_generator_and_training_flag():
    c = Case.random(16, 20, 64, 4)
    call = lambda **o: lk.lora_linear(c.x, c.weight, c.bias, c.lora_a, c.lora_b, c.scaling, 0.5, **o)
    torch.manual_seed(5)
    first, second = call(), call()
    torch.manual_seed(5)
    assert torch.equal(call(), first)
    assert not torch.equal(first, second)
    plain = lk.lora_linear(c.x, c.weight, c.bias, c.lora_a, c.lora_b, c.scaling)
    assert torch.equal(call(training=False), plain)
    everything_dropped = lk.lora_linear(c.x, c.weight, c.bias, c.lora_a, c.lora_b, c.scaling, 1.0)
    torch.testing.assert_close(everything_dropped, F.linear(c.x, c.weight, c.bias))


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_checkpointing_replays_the_mask(use_reentrant):
    c = Case.random(16, 20, 64, 4)
    grads = []
    for wrap in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=use_reentrant)):
        torch.manual_seed(11)
        x, a, b = (t.clone().requires_grad_() for t in (c.x, c.lora_a, c.lora_b))
        wrap(lambda x, a, b: lk.lora_linear(x, c.weight, c.bias, a, b, c.scaling, 0.4), x, a, b).backward(c.dy)
        grads.append((x.grad, a.grad, b.grad))
    assert all(torch.equal(p, q) for p, q in zip(*grads, strict=True))


def test_backward_lets_go_of_all_tensors():
    """A weight cast by autocast is as large as the layer: it must not live as long as the graph's nodes do."""
    c = Case.random(9, 20, 33, 4)
    with torch.autocast("cpu", bf16):
        y = lk.lora_linear(c.x, c.weight, c.bias, c.lora_a.requires_grad_(), c.lora_b, c.scaling, 0.5)
    kept = [v for value in vars(y.grad_fn).values() for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, torch.Tensor)]
    assert vars(y.grad_fn)
    assert kept == []


def test_saves_only_x_h_and_the_bits():
    c = Case.random(64, 96, 128, 8, bf16, fp32)
    x, a, b = (t.clone().requires_grad_() for t in (c.x, c.lora_a, c.lora_b))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lk.lora_linear(x, c.weight, c.bias, a, b, c.scaling, 0.1)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    for own in (x, a, b, c.weight):
        storages.pop(own.untyped_storage().data_ptr(), None)
    assert sum(storages.values()) == 64 * 8 * 2 + 64 * 128 // 8


# ------------------------------------------------------------------------------------------------------- torch surfaces


@pytest.mark.parametrize("layout", ["compact", "permuted"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25], ids=["no_dropout", "dropout"])
def test_opcheck(layout, dropout_p):
    c = Case.random(9, 12, 33, 4)
    permute = (lambda t: t.t().contiguous().t()) if layout == "permuted" else (lambda t: t)
    x, weight, a, b, dy = (permute(t) for t in (c.x, c.weight, c.lora_a, c.lora_b, c.dy))
    seed = torch.tensor([3]) if dropout_p else None
    fwd, bwd = torch.ops.lora_kernels.lora_linear_fwd.default, torch.ops.lora_kernels.lora_linear_bwd.default
    torch.library.opcheck(fwd, (x, weight, c.bias, a, b, 0.5, dropout_p, seed, "auto", False))
    _, h, mask = fwd(x, weight, c.bias, a, b, 0.5, dropout_p, seed, "auto", False)
    for needs in ((True, True, True), (False, True, False)):
        torch.library.opcheck(bwd, (dy, x, weight, a, b, h, mask, 0.5, dropout_p, *needs, "auto", False))


def test_compiles_whole_without_recompiling_over_m():
    c = Case.random(1, 20, 33, 4)
    torch._dynamo.reset()
    compiled = torch.compile(lk.lora_linear, fullgraph=True, dynamic=True)
    for i, M in enumerate((3, 7, 33)):
        x = torch.randn(2, M, 33, requires_grad=True)
        a, b = c.lora_a.clone().requires_grad_(), c.lora_b.clone().requires_grad_()
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            y = compiled(x, c.weight, c.bias, a, b, 0.5)
        y.sum().backward()
        eager = lk.lora_linear(x, c.weight, c.bias, c.lora_a, c.lora_b, 0.5)
        torch.testing.assert_close(y, eager)
        assert a.grad.abs().sum() > 0


@pytest.mark.parametrize("adapter_dtype", [fp32, bf16], ids=["adapter_fp32", "adapter_bf16"])
def test_autocast_casts_as_f_linear_does(adapter_dtype):
    c = Case.random(9, 20, 33, 4)
    x, a, b = c.x.clone().requires_grad_(), c.lora_a.to(adapter_dtype).requires_grad_(), c.lora_b.to(adapter_dtype).requires_grad_()
    with torch.autocast("cpu", bf16):
        y = lk.lora_linear(x, c.weight, c.bias, a, b, c.scaling)
    assert y.dtype == bf16
    y.backward(c.dy.to(bf16))
    assert (x.grad.dtype, a.grad.dtype, b.grad.dtype) == (fp32, adapter_dtype, adapter_dtype)
    low = c.to(bf16)
    assert torch.equal(y, lk.lora_linear(low.x, low.weight, low.bias, a.to(bf16), b.to(bf16), c.scaling))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float64], ids=str)
def test_autocast_takes_no_weight_that_f_linear_would_refuse(dtype):
    """Quantised codes, cast like numbers, would be served as weights."""
    c = Case.random(9, 20, 33, 4)
    pools = c.lora_a[None], c.lora_b[None], torch.zeros(9, dtype=torch.int32)
    with torch.autocast("cpu", bf16):
        with pytest.raises(lk.LoraTypeError, match="differ in dtype"):
            lk.lora_linear(c.x, c.weight.to(dtype), None, c.lora_a, c.lora_b)
        with pytest.raises(lk.LoraTypeError, match="differ in dtype"):
            lk.lora_batched_linear(c.x, c.weight.to(dtype), None, *pools)
        with pytest.raises(lk.LoraTypeError, match="differ in dtype"):
            lk.lora_linear(c.x, c.weight, c.bias.to(dtype), c.lora_a, c.lora_b)


def test_no_grad_and_inference_mode():
    c = Case.random(9, 20, 33, 4)
    expected = run(c)["y"]
    with torch.no_grad():
        assert torch.equal(lk.lora_linear(c.x, c.weight, c.bias, c.lora_a.requires_grad_(), c.lora_b, c.scaling), expected)
    with torch.inference_mode():
        assert torch.equal(lk.lora_linear(c.x, c.weight, c.bias, c.lora_a, c.lora_b, c.scaling), expected)
        with torch.enable_grad():  # records nothing here, as of eager's products
            x = c.x.clone()
            assert torch.equal(lk.lora_linear(x, c.weight, c.bias, c.lora_a, c.lora_b, c.scaling), expected)
            pools = c.lora_a[None], c.lora_b[None]
            y = lk.lora_batched_linear(x, c.weight, c.bias, *pools, torch.zeros(9, dtype=torch.int32), scalings=torch.tensor([c.scaling]))
            torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_x_is_kept_for_lora_a_alone(compiled):
    """LoRA-FA, which freezes A to save x; dy here is by columns."""
    c = Case.random(6, 20, 33, 4, dropout_p=0.5)
    expected = run(c._replace(dy=c.dy.view(20, 6).t()))
    layer = torch.compile(lk.lora_linear, backend="aot_eager", fullgraph=True) if compiled else lk.lora_linear
    for frozen in ("", "lora_a", "lora_b", "lora_a lora_b"):
        x = c.x.clone().view(2, 3, 33).requires_grad_()
        a, b = (getattr(c, name).clone().requires_grad_(name not in frozen) for name in ("lora_a", "lora_b"))
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.data_ptr()) or t, lambda t: t):
            y = layer(x, c.weight, c.bias, a, b, c.scaling, 0.5, True, c.seed)
        assert (x.data_ptr() in kept) == ("lora_a" not in frozen)
        y.view(6, 20).t().backward(c.dy.view(20, 6))
        for got, name in ((x.grad.view(6, 33), "dx"), (a.grad, "da"), (b.grad, "db")):
            assert got is None or torch.equal(got, expected[name]), name


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "vmap": lambda f, x: torch.func.vmap(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
}


def _forward_mode(f, x):
    with torch.autograd.forward_ad.dual_level():
        f(torch.autograd.forward_ad.make_dual(x, x))


@pytest.mark.parametrize("name", [*TRANSFORMS, "forward mode"])
@pytest.mark.parametrize("op", ["lora_linear", "lora_batched_linear", "lora_shrink"])
def test_transforms_are_refused_with_a_fix(name, op) -> None:
    x, w, a, b = torch.randn(3, 8), torch.randn(6, 8), torch.randn(4, 8), torch.randn(6, 4)
    ids = torch.zeros(1 if name == "vmap" else 3, dtype=torch.int32)
    call = {
        "lora_linear": lambda x: lk.lora_linear(x, w, None, a, b),
        "lora_batched_linear": lambda x: lk.lora_batched_linear(x, w, None, a[None], b[None], ids),
        "lora_shrink": lambda x: lk.lora_shrink(x, a[None], ids),
    }[op]
    call(x[:1] if name == "vmap" else x)  # a known signature
    with pytest.raises(lk.LoraKernelsError, match=f"{op}: no .*fix: compute this layer in plain PyTorch"):
        TRANSFORMS.get(name, _forward_mode)(call, x)


def test_a_forward_level_around_plain_tensors_is_no_matter() -> None:
    c = Case.random(9, 20, 33, 4)
    with torch.autograd.forward_ad.dual_level():
        y = lk.lora_linear(c.x, c.weight, c.bias, c.lora_a, c.lora_b, c.scaling)
    assert torch.equal(y, lk.lora_linear(c.x, c.weight, c.bias, c.lora_a, c.lora_b, c.scaling))


def test_meta_tensors_have_shapes():
    c = Case.random(9, 20, 33, 4)
    meta = [None if t is None else t.to("meta") for t in (c.x, c.weight, c.bias, c.lora_a, c.lora_b)]
    assert lk.lora_linear(*meta).shape == (9, 20)


# --------------------------------------------------------------------------------------------------------------- errors

JAGGED = torch.nested.nested_tensor([torch.zeros(2, 8), torch.zeros(3, 8)], layout=torch.jagged)

BAD = {
    "k_differs": (dict(x=torch.zeros(3, 9)), ValueError, r"disagree on K; got x \[3, 9\], weight \[6, 8\]"),
    "lora_a_transposed": (dict(lora_a=torch.zeros(8, 4)), ValueError, r"lora_a does not fit x.*transpose it"),
    "lora_b_transposed": (dict(lora_b=torch.zeros(4, 6)), ValueError, r"lora_b does not fit.*allowed: \[6, 4\].*transpose it"),
    "rank_0": (dict(lora_a=torch.zeros(0, 8), lora_b=torch.zeros(6, 0)), ValueError, "rank 0"),
    "bias_shape": (dict(bias=torch.zeros(5)), ValueError, r"bias does not fit weight; got bias \[5\]"),
    "weight_3d": (dict(weight=torch.zeros(1, 6, 8)), ValueError, "wrong number of dimensions"),
    "x_integer": (dict(x=torch.zeros(3, 8, dtype=torch.int64)), TypeError, "unsupported dtype; got torch.int64"),
    "weight_dtype": (dict(weight=torch.zeros(6, 8, dtype=bf16)), TypeError, "differ in dtype"),
    "adapter_dtype": (dict(lora_a=torch.zeros(4, 8, dtype=fp16)), TypeError, "lora_a has an unsupported dtype"),
    "mixed_devices": (dict(lora_b=torch.zeros(6, 4, device="meta")), ValueError, "different devices.*lora_b on meta"),
    "scaling_nan": (dict(scaling=float("nan")), ValueError, "scaling is not finite; got nan"),
    "scaling_tensor": (dict(scaling=torch.ones(())), TypeError, "scaling is not a number"),
    "dropout_range": (dict(dropout_p=1.5), ValueError, "no probability; got 1.5"),
    "backend_unknown": (dict(backend="rocm"), ValueError, "unknown backend; got 'rocm'"),
    "seed_dtype": (dict(dropout_p=0.5, seed=torch.zeros(1)), TypeError, "seed is no seed"),
    "seed_type": (dict(dropout_p=0.5, seed="1"), TypeError, "seed is no seed; got str"),
    "seed_fraction": (dict(dropout_p=0.5, seed=1.5), TypeError, "seed is no seed; got float"),
    "seed_too_large": (dict(dropout_p=0.5, seed=2**63), ValueError, "seed is no seed; got 9223372036854775808"),
    "scaling_beyond_floats": (dict(scaling=10**400), ValueError, "scaling is not finite"),
    "no_outputs": (dict(weight=torch.zeros(0, 8), lora_b=torch.zeros(0, 4)), ValueError, r"weight has no elements; got weight \[0, 8\]"),
    "no_inputs": (dict(x=torch.zeros(3, 0), weight=torch.zeros(6, 0), lora_a=torch.zeros(4, 0)), ValueError, "weight has no elements"),
    "x_number": (dict(x=2.0), TypeError, "x is no tensor; got float"),
    "lora_a_list": (dict(lora_a=[[1.0]]), TypeError, "lora_a is no tensor; got list"),
    "weight_none": (dict(weight=None), TypeError, "weight is no tensor; got NoneType"),
    "x_sparse": (dict(x=torch.zeros(3, 8).to_sparse()), TypeError, r"x has an unsupported layout; got torch.sparse_coo.*to_dense"),
    "weight_csr": (dict(weight=torch.eye(6, 8).to_sparse_csr()), TypeError, "weight has an unsupported layout; got torch.sparse_csr"),
    "x_jagged": (dict(x=JAGGED), TypeError, "x has an unsupported layout; got nested torch.jagged"),
    "weight_trainable": (dict(weight=torch.zeros(6, 8, requires_grad=True)), ValueError, "weight requires grad"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    changed, kind, pattern = BAD[name]
    good = dict(x=torch.zeros(3, 8), weight=torch.zeros(6, 8), bias=None, lora_a=torch.zeros(4, 8), lora_b=torch.zeros(6, 4))
    lk.lora_linear(**good)
    with pytest.raises(kind, match=pattern) as caught:
        lk.lora_linear(**(good | changed))
    assert isinstance(caught.value, lk.LoraKernelsError)


def test_bias_of_other_strides_in_a_known_signature() -> None:
    """What was decided for a contiguous bias is not used for one that only differs in its stride."""
    x, weight, lora_a, lora_b = torch.randn(50, 64), torch.randn(48, 64), torch.randn(4, 64), torch.randn(48, 4)
    for bias in (torch.randn(48), torch.randn(96)[::2], torch.randn(1).expand(48)):
        want = torch.nn.functional.linear(x, weight, bias) + (x @ lora_a.t()) @ lora_b.t()
        torch.testing.assert_close(lk.lora_linear(x, weight, bias, lora_a, lora_b), want, rtol=1e-4, atol=1e-3)


# ------------------------------------------------------------------------------------------------------ who else looks on


@pytest.mark.parametrize("known", [False, True], ids=["first_call", "known_signature"])
@pytest.mark.parametrize("trained", [False, True], ids=["no_grad", "grad"])
def test_jit_trace_records_the_op(known, trained) -> None:
    layer = lk.LoraLinear(33, 20, r=4, lora_dropout=0.0)
    torch.nn.init.normal_(layer.lora_B.weight)
    with torch.set_grad_enabled(trained), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated, and warns of the Python values that it sees
        x = torch.randn(9, 33)
        if known:
            layer(x)
        traced = torch.jit.trace(layer, (x,), check_trace=False)
        for x in (torch.randn(9, 33), torch.randn(5, 33)):
            torch.testing.assert_close(traced(x), layer(x))
