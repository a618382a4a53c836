"""Every Triton kernel of the linear op, forward and backward, against the reference in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from lora_kernels import reference
from lora_kernels.kernels import _launch, lora_linear
from lora_kernels.tuning import store
from lora_kernels.tuning.plan import Plan

TILE = {"column0": (32, 64, 64), "tma": (64, 32, 64), "pointer": (32, 32, 32)}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    form: str
    dtype: str
    M: int
    N: int
    K: int
    R: int
    p: float = 0.0
    adapters: str = "same"  # or "fp32"
    bias: bool = True
    strided: bool = False  # x, dy, weight and adapters as slices of something larger

    def __str__(self) -> str:
        more = "-bias" * self.bias + "-strided" * self.strided + "-fp32_adapters" * (self.adapters == "fp32")
        return f"{self.form}-{self.dtype}-M{self.M}-N{self.N}-K{self.K}-R{self.R}-p{self.p}{more}"


# Pairwise over form, dtype, M (one row, less than a tile, several tiles), ranks 1 to 256 and the switches; sizes that fill no tile.
CASES = [
    Case("column0", "bf16", 1, 72, 136, 16),
    Case("column0", "bf16", 77, 200, 72, 8, bias=False),
    Case("column0", "bf16", 100, 264, 136, 64, adapters="fp32"),
    Case("column0", "fp16", 17, 40, 136, 24),
    Case("column0", "fp16", 77, 200, 264, 64, bias=False),
    Case("column0", "bf16", 45, 136, 72, 4),  # R no multiple of 8: y in one launch, dx in two
    Case("tma", "bf16", 77, 136, 200, 24, p=0.3),
    Case("tma", "bf16", 17, 72, 40, 128, adapters="fp32"),
    Case("tma", "bf16", 130, 40, 136, 256, p=0.05, bias=False),
    Case("tma", "fp16", 1, 200, 72, 4, p=0.3, bias=False),
    Case("tma", "fp16", 77, 136, 136, 1, adapters="fp32"),
    Case("tma", "fp16", 17, 72, 200, 64, p=0.05, adapters="fp32"),
    Case("pointer", "fp32", 17, 50, 37, 1, p=0.3),
    Case("pointer", "fp32", 77, 33, 70, 24, strided=True),
    Case("pointer", "fp32", 1, 40, 64, 128, p=0.05, bias=False),
    Case("pointer", "bf16", 77, 33, 70, 4, strided=True, adapters="fp32"),
    Case("pointer", "bf16", 17, 50, 37, 64, p=0.05, bias=False),
    Case("pointer", "bf16", 40, 64, 96, 256, adapters="fp32"),
    Case("pointer", "fp16", 1, 33, 37, 8),
    Case("pointer", "fp16", 45, 70, 50, 128, p=0.3, strided=True),
]


@pytest.fixture
def force(monkeypatch):
    """force(form): every call gets this kernel form with small tiles."""

    def choose(form: str) -> None:
        BM, BN, BK = TILE[form]
        monkeypatch.setattr(store, "choose", lambda problem, device: Plan("triton", form, BM, BN, BK, 4, 3, 2))
        for cache in (lora_linear._forwards, lora_linear._backwards):
            cache.clear()

    yield choose
    for cache in (lora_linear._forwards, lora_linear._backwards):
        cache.clear()


def operands(case: Case) -> dict:
    dtype = DTYPES[case.dtype]
    adapter = torch.float32 if case.adapters == "fp32" else dtype
    generator = torch.Generator().manual_seed(case.M + case.N)

    def normal(rows: int, columns: int, of: torch.dtype, scale: float = 1.0) -> torch.Tensor:
        if case.strided:
            return (torch.randn(columns + 3, 2 * rows, generator=generator) * scale).to(of)[3:, ::2].t()
        return (torch.randn(rows, columns, generator=generator) * scale).to(of)

    return {
        "x": normal(case.M, case.K, dtype),
        "weight": normal(case.N, case.K, dtype, case.K**-0.5),
        "bias": torch.randn(case.N, generator=generator).to(dtype) if case.bias else None,
        "lora_a": normal(case.R, case.K, adapter, case.K**-0.5),
        "lora_b": normal(case.N, case.R, adapter),
        "dy": normal(case.M, case.N, dtype),
    }


def run(backend, t: dict, case: Case, h=None) -> dict:
    seed = torch.tensor([0x123456789ABCDEF])
    y, h, mask = backend.lora_linear_fwd(t["x"], t["weight"], t["bias"], t["lora_a"], t["lora_b"], 0.5, case.p, seed if case.p else None)
    args = (t["dy"], t["x"], t["weight"], t["lora_a"], t["lora_b"], h, mask, 0.5, case.p, True, True, True)
    return dict(zip(("y", "h", "mask", "dx", "da", "db"), (y, h, mask, *backend.lora_linear_bwd(*args)), strict=False))


def rmse(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case: Case, force, eager_sums) -> None:
    force(case.form)
    t = operands(case)
    exact = run(reference, {k: v if v is None else v.double() for k, v in t.items()}, case)
    with eager_sums:
        eager = run(reference, t, case)
    got = run(lora_linear, t, case)
    assert torch.equal(got["mask"], exact["mask"])
    floor = torch.finfo(DTYPES[case.dtype]).eps / 4
    for name in ("y", "h", "dx", "da", "db"):
        assert got[name].dtype == eager[name].dtype
        assert got[name].shape == eager[name].shape
        error, allowed = rmse(got[name], exact[name]), 2 * rmse(eager[name], exact[name]) + floor
        assert error <= allowed, f"{name}: relative RMSE {error:.2e}, allowed {allowed:.2e}"
    assert all(not flags.any() for flags in _launch.flags.kept.values()), "sync flags are left as they were found: zero"


@pytest.mark.parametrize("form", TILE)
def test_forms_take_the_kernels_they_name(form: str, force) -> None:
    """A silent step down to another form would leave a kernel untested."""
    force(form)
    case = Case(form, "fp16", 17, 40, 40, 8)
    run(lora_linear, operands(case), case)
    (forward,), (backward,) = lora_linear._forwards.values(), lora_linear._backwards.values()
    for half in (forward, backward):
        assert (half.column0 is not None) == (form == "column0")
        assert form == "column0" or half.update.tma == (form == "tma")


@pytest.mark.parametrize("form", ["column0", "tma"])
def test_same_bits_twice(form: str, force) -> None:
    force(form)
    case = Case(form, "bf16", 77, 136, 72, 16, p=0.0 if form == "column0" else 0.3)
    t = operands(case)
    first, second = run(lora_linear, t, case), run(lora_linear, t, case)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_column0_with_one_column_publishes_nothing(force) -> None:
    """N within one tile: nobody would take h, so a published flag would stay set for the next launch."""
    force("column0")
    case = Case("column0", "fp16", 77, 40, 72, 8)
    t = operands(case)
    for _ in range(2):
        assert rmse(run(lora_linear, t, case)["y"], run(reference, t, case)["y"].double()) < 1e-3
    assert all(not flags.any() for flags in _launch.flags.kept.values())


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "h_unwanted"])
@pytest.mark.parametrize("lead", [(33,), (3, 11)], ids=str)
@pytest.mark.parametrize("form", ["column0", "tma", "pointer"])
def test_prepared_calls_of_any_dimensions(form: str, lead: tuple, trained: bool, force) -> None:
    """What the lean path calls gives the op's bits, with x's own leading dimensions, call after call."""
    force(form)
    case = Case(form, "fp16", 33, 72, 40, 8, p=0.0 if form == "column0" else 0.3)
    seed = torch.tensor([0x123456789ABCDEF]) if case.p else None
    prepared = prepared_back = None
    for scale in (1.0, 2.0):
        t = operands(case)
        t["x"] *= scale
        want = run(lora_linear, t, case)
        args = (t["weight"], t["bias"], t["lora_a"], t["lora_b"], 0.5, case.p, seed)
        prepared = prepared or lora_linear.lora_linear_fwd.prepare_nd(lead, t["x"], *args, trained=trained)
        y, h, mask = prepared(t["x"].view(*lead, -1), *args)
        assert y.shape == (*lead, 72)
        assert torch.equal(y.view(33, 72), want["y"])
        if trained:
            assert torch.equal(h, want["h"])
            args = (t["weight"], t["lora_a"], t["lora_b"], h, mask, 0.5, case.p, True, True, True)
            prepared_back = prepared_back or lora_linear.lora_linear_bwd.prepare_nd(lead, t["dy"], t["x"], *args)
            dx, da, db = prepared_back(t["dy"].view(*lead, -1), t["x"].view(*lead, -1), *args)
            assert dx.shape == (*lead, 40)
            assert all(torch.equal(got, want[name]) for got, name in ((dx.view(33, 40), "dx"), (da, "da"), (db, "db")))


@pytest.mark.parametrize("p", [0.0, 0.3], ids=["plain", "dropout"])
def test_no_rows(p: float) -> None:
    case = Case("tma", "fp16", 0, 24, 40, 8, p=p)
    got = run(lora_linear, operands(case), case)
    assert got["y"].shape == (0, 24)
    assert got["dx"].shape == (0, 40)
    assert not got["da"].any()
    assert not got["db"].any()


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)], ids=["dx", "da", "db"])
@pytest.mark.parametrize("form", ["column0", "pointer"])
def test_only_what_is_needed(form: str, needs: tuple, force) -> None:
    force(form)
    case = Case(form, "fp16", 17, 40, 40, 8)
    t = operands(case)
    _, h, mask = lora_linear.lora_linear_fwd(t["x"], t["weight"], None, t["lora_a"], t["lora_b"], 0.5, 0.0, None)
    full = run(reference, t, case)
    grads = lora_linear.lora_linear_bwd(t["dy"], t["x"], t["weight"], t["lora_a"], t["lora_b"], h, mask, 0.5, 0.0, *needs)
    for needed, grad, name in zip(needs, grads, ("dx", "da", "db"), strict=False):
        assert (rmse(grad, full[name].double()) < 2e-3) if needed else grad.numel() == 0


def test_torch_plan_with_dropout_masks_in_the_kernel(monkeypatch) -> None:
    """cuBLAS as the GEMM: mask, h and the masked rank product still come from the kernels."""
    monkeypatch.setattr(store, "choose", lambda problem, device: Plan("torch", "tma", 32, 32, 32, 4, 3, 2))
    case = Case("tma", "fp16", 45, 40, 72, 8, p=0.3)
    t = operands(case)
    lora_linear._forwards.clear(), lora_linear._backwards.clear()
    got, want = run(lora_linear, t, case), run(reference, {k: v.double() for k, v in t.items()}, case)
    lora_linear._forwards.clear(), lora_linear._backwards.clear()
    assert torch.equal(got["mask"], want["mask"])
    for name in ("y", "h", "dx", "da", "db"):
        assert rmse(got[name], want[name]) < 1.5e-3, name


@pytest.mark.parametrize("threshold", [1, 3277, 32767, 32768, 32769, 50000, 65535, 65536])
@pytest.mark.parametrize("K", [37, 264])
def test_every_threshold_of_dropout_keeps_what_the_reference_keeps(force, threshold, K) -> None:
    """Halves of a word are compared together, below and above 0x8000 by other carries."""
    force("pointer")
    case = Case("pointer", "fp32", 40, 8, K, 4, p=threshold / 65536)
    t = operands(case)
    args = (t["x"], t["weight"], None, t["lora_a"], t["lora_b"], 0.5, case.p)
    for seed in (torch.tensor([5]), torch.tensor([-(2**60) - 3])):
        assert torch.equal(lora_linear.lora_linear_fwd(*args, seed)[2], reference.dropout_mask(seed, 40, K, case.p))


def test_everything_dropped(force) -> None:
    force("pointer")
    case = Case("pointer", "fp32", 17, 33, 40, 8, p=1.0)
    t = operands(case)
    got, want = run(lora_linear, t, case), run(reference, t, case)
    assert not got["h"].any()
    assert not got["mask"].any()
    assert not got["da"].any()
    assert rmse(got["y"], want["y"].double()) < 1e-6


def test_strided_bias_and_inference_mode_first() -> None:
    """A bias as a column of a table; a first call in inference mode leaves nothing behind that autograd cannot save."""
    t = operands(case := Case("pointer", "fp32", 5, 33, 40, 4))
    lora_linear._forwards.clear()
    with torch.inference_mode():
        run(lora_linear, t, case)
    got = run(lora_linear, t | {"bias": t["bias"].repeat_interleave(2)[::2]}, case)
    assert torch.equal(got["y"], run(lora_linear, t, case)["y"])
    assert not got["mask"].is_inference()
