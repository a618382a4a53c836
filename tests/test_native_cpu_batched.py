"""The many-adapter forward of the native CPU engine against float64: every instruction set and form, mixed ranks, fp32 pools, dropout, same bits."""

from __future__ import annotations

import pytest
import torch

from lora_kernels import reference_batched
from lora_kernels.native import cpu, cpu_batched
from lora_kernels.tuning import cpu as plan

pytestmark = pytest.mark.skipif(cpu.unusable() is not None, reason=f"native module: {cpu.unusable()}")

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
ISAS = cpu.isas() if cpu.unusable() is None else []


@pytest.fixture(params=ISAS)
def isa(request):
    before = cpu.isa()
    cpu.use_isa(request.param)
    yield request.param
    cpu.use_isa(before)


def problem(M, Ns=(37, 70), K=45, R=9, L=5, dtype=fp32, pool_dtype=None, dropout=False, packed=False, seed=0):
    """The arguments of lora_batched_fwd: random ids with runs and gaps, ranks from 0 to R."""
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=g)
    S, pool_dtype = len(Ns), pool_dtype or dtype
    ids = torch.randint(-1, L, (M,), generator=g, dtype=torch.int32)
    ids[M // 2 :] = ids[M // 2 :].sort().values
    ranks = torch.randint(0, R + 1, (1 if packed else S, L), generator=g, dtype=torch.int32)
    ranks[0, 0] = R
    pools_a = (
        [(make(L, R * (S if packed else 1), K) / K**0.5).to(pool_dtype)] * S if packed else [(make(L, R, K) / K**0.5).to(pool_dtype) for _ in Ns]
    )
    return [
        make(M, K).to(dtype),
        [(make(N, K) / K**0.5).to(dtype) for N in Ns],
        [make(N).to(dtype) if i else None for i, N in enumerate(Ns)],
        pools_a,
        [(make(L, N, R) / R**0.5).to(pool_dtype) for N in Ns],
        ids,
        ranks.expand(S, L),
        torch.rand(S, L, generator=g) + 0.5,
        torch.linspace(0, 0.6, L) if dropout else None,
        torch.tensor([99]) if dropout else None,
        None,
        16,
        packed,
        False,
    ]


def to_double(args):
    cast = lambda v: [cast(t) for t in v] if isinstance(v, list) else v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
    x, weights, biases, pools_a, pools_b, *rest = args
    rounded = [p.to(x.dtype) for p in pools_a], [p.to(x.dtype) for p in pools_b]  # operands are in x's dtype
    return [cast(v) for v in (x, weights, biases, *rounded)] + rest


def check(args):
    y, _, mask = cpu_batched.lora_batched_fwd(*args)
    exact, _, exact_mask = reference_batched.lora_batched_fwd(*to_double(args))
    eager = reference_batched.lora_batched_fwd(*args)[0]
    error = lambda t: ((t.double() - exact).norm() / exact.norm()).item() if t.numel() else 0.0
    floor = {fp32: 6e-8, fp16: 5e-4, bf16: 4e-3}[y.dtype]
    assert y.shape == eager.shape
    assert torch.equal(mask, exact_mask)
    assert error(y) <= 2 * error(eager) + floor
    return y


@pytest.mark.parametrize("dtypes", [(fp32, fp32), (bf16, bf16), (bf16, fp32), (fp16, fp32)], ids=lambda d: "-".join(str(t)[6:] for t in d))
@pytest.mark.parametrize("form", ["in_place", "panels"])
def test_matches_float64(isa, form, dtypes):
    with plan.forced(form):
        for M, dropout, packed in [(0, False, False), (1, False, False), (1, True, True), (17, True, False), (70, False, True), (130, True, True)]:
            check(problem(M, dtype=dtypes[0], pool_dtype=dtypes[1], dropout=dropout, packed=packed, seed=M))


def test_some_rows_of_an_adapter_among_many(isa):
    """One workspace serves the products of every adapter: those of fewer rows must not want more of it."""
    args = problem(160, Ns=(64,), K=33, L=1, dtype=bf16)
    args[5] = torch.where(torch.arange(160) < 127, 0, -1).int()
    with plan.forced("panels"):
        check(args)


@pytest.mark.parametrize("shape", [(64, 1024, 600), (16, 1024, 64), (40, 250, 70), (64, 1024, 2048)], ids=lambda s: "M{}-N{}-K{}".format(*s))
def test_adapters_of_rank_0_alone(isa, shape):
    """As the adapters of a pool that leave a layer out: sums must not wait in room that is made for ranks."""
    M, N, K = shape
    args = problem(M, Ns=(N,), K=K, R=8, L=2, dtype=bf16)
    args[6] = torch.zeros(1, 2, dtype=torch.int32)
    with plan.forced("panels"):
        check(args)


def test_a_pool_whose_b_is_one_row_for_all_columns(isa):
    args = problem(40, Ns=(70,), K=33, L=3, dtype=bf16)
    args[4] = [args[4][0][:, :1].expand(-1, 70, -1)]
    for form in ("in_place", "panels"):
        with plan.forced(form):
            check(args)


def test_large_ranks(isa):
    for form in ("in_place", "panels"):
        with plan.forced(form):
            check(problem(40, Ns=(66,), K=33, R=300, L=3, dtype=bf16))


@pytest.mark.parametrize("form", ["in_place", "panels"])
def test_a_rows_bits_do_not_depend_on_neighbours_or_threads(isa, form):
    args = problem(60, dtype=bf16)
    before = torch.get_num_threads()
    with plan.forced(form):
        whole = cpu_batched.lora_batched_fwd(*args)[0]
        for threads in (1, 3):
            torch.set_num_threads(threads)
            try:
                assert torch.equal(cpu_batched.lora_batched_fwd(*args)[0], whole)
            finally:
                torch.set_num_threads(before)
        mixed = list(args)
        mixed[5] = torch.where(torch.arange(60) % 3 == 0, args[5], args[5].roll(7))
        kept = torch.arange(60) % 3 == 0
        assert torch.equal(cpu_batched.lora_batched_fwd(*mixed)[0][kept], whole[kept])


def test_rows_without_an_adapter_are_the_base(isa):
    for form in ("in_place", "panels"):
        with plan.forced(form):
            args = problem(50, dtype=fp32)
            args[5] = torch.full((50,), -1, dtype=torch.int32)
            y = check(args)
            args[4] = [torch.full_like(p, torch.nan) for p in args[4]]
            assert torch.equal(cpu_batched.lora_batched_fwd(*args)[0], y)
