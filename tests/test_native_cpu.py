"""The native CPU engine: every instruction set of this machine and every form against float64, odd shapes, strides, threads, special values."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
from oracle import Case, assert_close, eager

import lora_kernels as lk
from lora_kernels import reference
from lora_kernels._errors import BackendError, LoraValueError
from lora_kernels.native import cpu
from lora_kernels.tuning import cpu as plan

pytestmark = pytest.mark.skipif(cpu.unusable() is not None, reason=f"native module: {cpu.unusable()}")

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
ISAS = cpu.isas() if cpu.unusable() is None else []
FORMS = ["in_place", "panels", "torch"]
#        M, N, K, R
SHAPES = [
    (0, 8, 8, 4),
    (1, 1, 1, 1),
    (1, 33, 65, 4),
    (2, 65, 33, 3),
    (17, 31, 47, 8),
    (64, 96, 100, 24),
    (5, 40, 72, 64),
    (130, 50, 70, 128),
    (3, 300, 290, 256),
    (0, 8, 8, 512),
]
DEEP = [(1, 2900, 40, 4), (37, 70, 2500, 16), (20, 600, 300, 8)]
# reductions over K (h by dot products, by panels), N and M
LONG = [(16, 64, 28672, 16), (130, 64, 28672, 16), (64, 28672, 96, 16), (16384, 96, 96, 16)]
DTYPES = [(fp32, fp32), (bf16, bf16), (bf16, fp32), (fp16, fp16), (fp16, fp32)]


def shape_id(shape):
    return "M{}-N{}-K{}-R{}".format(*shape)


def dtype_id(pair):
    names = [str(d).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp") for d in pair]
    return "x_{}-adapter_{}".format(*names)


@pytest.fixture(params=ISAS)
def isa(request):
    before = cpu.isa()
    cpu.use_isa(request.param)
    yield request.param
    cpu.use_isa(before)


@pytest.fixture(params=FORMS)
def form(request):
    with plan.forced(request.param):
        yield request.param


def run(c: Case, **options) -> dict[str, torch.Tensor]:
    x, a, b = (t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (c.x, c.lora_a, c.lora_b))
    return run_on(x, c.weight, c.bias, a, b, c, **options)


def run_on(x, weight, bias, a, b, c: Case, **options) -> dict[str, torch.Tensor]:
    y = lk.lora_linear(x, weight, bias, a, b, c.scaling, c.dropout_p, seed=c.seed, backend="cpu", strict=True, **options)
    dx, da, db = torch.autograd.grad(y, (x, a, b), c.dy)
    return {"y": y.detach(), "dx": dx, "da": da, "db": db}


# ------------------------------------------------------------------------------------------------------------ numerics


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["no_dropout", "dropout"])
def test_matches_float64(isa, form, dtypes, dropout_p):
    for shape in SHAPES if dtypes[1] == dtypes[0] else SHAPES[2:5]:
        c = Case.random(*shape, *dtypes, bias=shape[0] % 2 == 1, dropout_p=dropout_p)
        try:
            assert_close(run(c), c)
        except AssertionError as error:
            raise AssertionError(f"{shape_id(shape)}: {error}") from None


@pytest.mark.parametrize("shape", DEEP, ids=shape_id)
@pytest.mark.parametrize("dtypes", DTYPES[:3], ids=dtype_id)
def test_long_sums(isa, shape, dtypes):
    """More than one packed block along K and N; fp32 sums must not degrade with the length."""
    c = Case.random(*shape, *dtypes)
    assert_close(run(c), c)


@pytest.mark.parametrize("shape", LONG, ids=shape_id)
@pytest.mark.parametrize("form", ["in_place", "panels"], indirect=True)
def test_very_long_sums(isa, form, shape):
    """fp32 sums are sums of sums: uncut, a lane's chain of additions over K 28672 has 2.8 times eager's error on AVX2, 4.4 times in portable."""
    c = Case.random(*shape)
    assert_close(run(c), c)


@pytest.mark.parametrize("M, K, dtype", [(3000, 40, bf16), (1100, 1400, fp32)], ids=str)
def test_many_rows(M, K, dtype):
    """More rows than one chunk of the panel form, with sums that wait for the next block of K and without."""
    c = Case.random(M, 70, K, 5, dtype)
    assert_close(run(c), c)


def test_mask_is_the_references(isa):
    seed = torch.tensor([0x1234_5678_9ABC_DEF])
    for M, K, p in [(1, 1, 0.5), (3, 31, 0.1), (5, 32, 0.5), (7, 33, 0.999), (4, 577, 0.05), (2, 2048, 1.0)]:
        expected = reference.dropout_mask(seed, M, K, p)
        mask = torch.full_like(expected, -1)
        cpu._C.cpu_dropout_mask(seed.item(), reference.drop_threshold(p), K, mask, 2)
        assert torch.equal(mask, expected)
    c = Case.random(9, 20, 77, 4, dropout_p=0.4)
    args = (c.x, c.weight, None, c.lora_a, c.lora_b, 1.0, 0.4, seed)
    assert torch.equal(cpu.lora_linear_fwd(*args)[2], reference.lora_linear_fwd(*args)[2])


# ----------------------------------------------------------------------------------------------------- memory and threads


@pytest.mark.parametrize("dtype", [fp32, bf16, fp16], ids=str)
def test_row_strided_inputs_are_read_in_place(isa, form, dtype):
    c = Case.random(19, 37, 45, 6, dtype)
    between = 0.0 if form == "torch" else torch.nan  # what lies there gets into PyTorch's own product on AMX (2.13, K odd)
    wide = {
        name: torch.full((t.shape[0], t.shape[1] + pad), between, dtype=dtype)
        for (name, t), pad in zip(c._asdict().items(), (3, 5, 0, 1, 7, 9), strict=False)
        if name != "bias" and isinstance(t, torch.Tensor)
    }
    views = {name: buffer[:, 1 : 1 + getattr(c, name).shape[1]] for name, buffer in wide.items()}
    for name, view in views.items():
        view.copy_(getattr(c, name))
    strided = c._replace(**views)
    x, a, b = (t.detach().requires_grad_() for t in (strided.x, strided.lora_a, strided.lora_b))
    got, expected = run_on(x, strided.weight, c.bias, a, b, strided), run(c)
    for name in got:
        assert torch.equal(got[name], expected[name]) or form == "torch", name  # PyTorch's own product may round otherwise
    assert_close(got, c)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["no_dropout", "dropout"])
def test_any_strides_of_x_and_dy(form, dropout_p):
    """A summed y has a dy of one element, a transposed one a dy by columns; x may be a transposed view: no reason for the reference."""
    c = Case.random(16, 24, 40, 4, dropout_p=dropout_p)
    by_columns = lambda t: t.t().contiguous().t()
    for changes in ({"dy": torch.ones(()).expand(16, 24)}, {"dy": c.dy[:1].expand(16, 24)}, {"dy": by_columns(c.dy), "x": by_columns(c.x)}):
        odd = c._replace(**changes)
        expected = run(odd._replace(x=odd.x.contiguous(), dy=odd.dy.contiguous()))
        for _ in range(2):  # the second call's way is remembered
            got = run(odd)
            assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert_close(got, odd)  # by columns; the others' sums are too few for a ratio of errors
    x = c.x.requires_grad_()
    y = lk.lora_linear(x.view(2, 8, 40), c.weight, c.bias, c.lora_a, c.lora_b, backend="cpu", strict=True)
    y.mean().backward()
    torch.testing.assert_close(x.grad, ((c.weight + c.lora_b @ c.lora_a).sum(0) / y.numel()).expand(16, 40))


def test_huge_leading_dimension():
    rows, ld = 3, 2**31 + 8  # 4 GiB and more between rows; only the touched pages exist
    base = torch.empty((rows - 1) * ld + 64, dtype=bf16)
    x = base.as_strided((rows, 64), (ld, 1))
    c = Case.random(rows, 48, 64, 4, bf16)
    x.copy_(c.x)
    for name in ("in_place", "panels"):
        with plan.forced(name):
            got = cpu.lora_linear_fwd(x, c.weight, None, c.lora_a, c.lora_b, 1.0, 0.0, None)[0]
            assert torch.equal(got, cpu.lora_linear_fwd(c.x, c.weight, None, c.lora_a, c.lora_b, 1.0, 0.0, None)[0])


@pytest.mark.parametrize("form", ["in_place", "panels"], indirect=True)
def test_same_bits_on_any_number_of_threads(isa, form):
    before = torch.get_num_threads()
    for M, N, K, dtype, p in [(1, 200, 170, bf16, 0.2), (1, 521, 170, bf16, 0.2), (3, 521, 90, fp32, 0.0), (7, 200, 170, bf16, 0.2)] + [
        (33, 200, 170, bf16, 0.2),
        (200, 200, 170, bf16, 0.2),
        (300, 200, 170, fp32, 0.0),
        (1050, 70, 700, fp32, 0.0),
        (1050, 650, 130, bf16, 0.2),
        (1050, 130, 1300, bf16, 0.0),
    ]:
        c = Case.random(M, N, K, 16, dtype, dropout_p=p)
        results = []
        try:
            for threads in (1, 2, 3, 7, 2):
                torch.set_num_threads(threads)
                results.append(run(c))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            for name in other:
                assert torch.equal(other[name], results[0][name]), (M, name)


@pytest.mark.parametrize("form", ["in_place", "panels"], indirect=True)
def test_a_row_does_not_depend_on_its_neighbours(isa, form):
    for dtype, K in itertools.product((fp32, bf16), (90, 4500)):  # short rows of W are read one after the other, long ones abreast
        c = Case.random(29, 70, K, 9, dtype)
        whole = cpu.lora_linear_fwd(c.x, c.weight, c.bias, c.lora_a, c.lora_b, 0.5, 0.0, None)[0]
        for rows in (slice(0, 1), slice(3, 5), slice(4, 7), slice(11, 29)):
            assert torch.equal(cpu.lora_linear_fwd(c.x[rows], c.weight, c.bias, c.lora_a, c.lora_b, 0.5, 0.0, None)[0], whole[rows])


def _in_worker(_index: int) -> torch.Tensor:
    c = Case.random(40, 64, 64, 8)
    return lk.lora_linear(c.x, c.weight, None, c.lora_a, c.lora_b, backend="cpu", strict=True)


class _Dataset(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    __getitem__ = staticmethod(_in_worker)


def test_forked_dataloader_worker():
    here = _in_worker(0)  # the pool runs in the parent before the fork
    for batch in torch.utils.data.DataLoader(_Dataset(), num_workers=2, multiprocessing_context="fork", timeout=60):
        assert torch.equal(batch[0], here)


FORKED = """
import os, signal, torch, lora_kernels as lk
torch.set_num_threads(2)
x, w, a, b = torch.randn(512, 256), torch.randn(256, 256), torch.randn(16, 256), torch.randn(256, 16)
x @ w.t()
if pid := os.fork():
    raise SystemExit(os.waitpid(pid, 0)[1])
signal.alarm(30)
with lk.native.cpu.plan.forced("panels"):
    lk.lora_linear(x, w, None, a, b, backend="cpu", strict=True)
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_child_of_a_parent_that_used_torchs_pool_and_never_ours():
    code = "import lora_kernels.native.cpu\n" + FORKED
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


def test_it_shares_torchs_thread_pool():
    assert cpu._C.cpu_has_thread_pool()
    maps = "/proc/self/maps"
    if os.path.exists(maps):
        with open(maps) as lines:
            pools = {line.split()[-1] for line in lines if "libgomp" in line or "libiomp" in line}
        assert len([p for p in pools if "torch" in p]) <= 1
        assert not any("lora_kernels" in p for p in pools)


# -------------------------------------------------------------------------------------------------------- special values


@pytest.mark.parametrize("dtype", [fp32, bf16, fp16], ids=str)
def test_nan_and_infinity_reach_exactly_the_outputs_that_depend_on_them(isa, form, dtype):
    """As in eager in float64. Not as in bf16: on AMX PyTorch 2.13's own product lets an infinity in dy's last column into a row beside it."""
    for value in (torch.nan, torch.inf, -torch.inf):
        for field, at in (("x", (4, 44)), ("weight", (36, 44)), ("lora_b", (2, 4)), ("dy", (18, 36))):
            c = Case.random(19, 37, 45, 5, dtype)
            getattr(c, field)[at] = value
            got, expected = run(c), eager(c if form == "torch" else c.to(torch.float64))
            for name in got:
                assert torch.equal(got[name].isfinite(), expected[name].isfinite()), (value, field, name)


def test_denormals(isa, form):
    """Subnormal numbers are numbers like any other, as in eager on a CPU without bf16 arithmetic. Where there is some (avx512_bf16,
    amx_bf16), its instructions take bf16 subnormals for zeros: ours do, and PyTorch's product gives what PyTorch gives there."""
    for dtype, small in ((fp16, 3e-7), (fp32, 1e-39), (bf16, 1e-39)):
        x, w = torch.ones(5, 40, dtype=dtype), torch.full((6, 40), small, dtype=dtype)
        zero = torch.zeros(1, 40, dtype=dtype), torch.zeros(6, 1, dtype=dtype)
        y = cpu.lora_linear_fwd(x, w, None, *zero, 1.0, 0.0, None)[0]
        exact = torch.full((5, 6), 40 * w[0, 0].double().item(), dtype=torch.float64)
        if form == "torch":
            expected = torch.nn.functional.linear(x, w).double()
        else:
            expected = exact * (dtype != bf16 or not isa.endswith("_bf16"))
        torch.testing.assert_close(y.double(), expected, rtol=2e-3, atol=0)


# -------------------------------------------------------------------------------------------------------- which one runs


def test_refusals_say_why_and_the_reference_serves():
    c = Case.random(4, 8, 8, 2)
    turned = c.weight.t().contiguous().t()
    with pytest.raises(BackendError, match="weight's columns are not contiguous"):
        lk.lora_linear(c.x, turned, None, c.lora_a, c.lora_b, backend="cpu", strict=True)
    assert torch.allclose(lk.lora_linear(c.x, turned, None, c.lora_a, c.lora_b), lk.lora_linear(c.x, c.weight, None, c.lora_a, c.lora_b), atol=1e-6)
    d = c.to(torch.float64)
    with pytest.raises(BackendError, match="float64"):
        lk.lora_linear(d.x, d.weight, None, d.lora_a, d.lora_b, backend="cpu", strict=True)


def _child(value: str) -> subprocess.CompletedProcess:
    code = "from lora_kernels.native import cpu; print(cpu.unusable(), cpu.isa())"
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, "LORA_KERNELS_CPU_ISA": value}, capture_output=True, text=True)


def test_isa_override():
    for value, found in ((" Portable\n", "portable"), (" ", ISAS[0])):
        assert _child(value).stdout.split() == ["None", found]
    wrong = _child("port able")
    assert wrong.returncode
    assert "LORA_KERNELS_CPU_ISA" in wrong.stderr
    assert "allowed: " + ", ".join(ISAS) in wrong.stderr
    with pytest.raises(LoraValueError, match="allowed: "):
        cpu.use_isa("sse")
