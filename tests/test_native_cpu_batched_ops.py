"""The native CPU engine's many-adapter backward, shrink and expand against float64: every instruction set, mixed ranks, dropout, same bits."""

from __future__ import annotations

import pytest
import torch
from test_native_cpu_batched import bf16, fp16, fp32, isa, problem, to_double  # noqa: F401 (isa is a fixture)

from lora_kernels import reference_batched
from lora_kernels.native import cpu, cpu_batched

pytestmark = pytest.mark.skipif(cpu.unusable() is not None, reason=f"native module: {cpu.unusable()}")

FLOOR = {fp32: 3e-7, fp16: 1e-3, bf16: 8e-3}
DTYPES = pytest.mark.parametrize("dtypes", [(fp32, fp32), (bf16, bf16), (bf16, fp32), (fp16, fp32)], ids=lambda d: "-".join(str(t)[6:] for t in d))


def close(found, eager, exact, dtype):
    assert (found.shape, found.dtype) == (exact.shape, eager.dtype)
    error = lambda t: ((t.double() - exact).norm() / exact.norm()).item() if exact.norm() else t.double().norm().item()
    assert error(found) <= 2 * error(eager) + FLOOR[dtype]


def backward_args(args, dy, h, mask, need=(True, True, True)):
    x, weights, _, pools_a, pools_b, ids, ranks, scalings, dropout_p, *_ = args
    return dy, x, weights, pools_a, pools_b, h, mask, ids, ranks, scalings, dropout_p, None, 16, *need


def training_problem(M, dtype=fp32, pool_dtype=None, dropout=False, **sizes):
    args = problem(M, dtype=dtype, pool_dtype=pool_dtype, dropout=dropout, seed=M, **sizes)
    _, h, mask = reference_batched.lora_batched_fwd(*args)
    dy = torch.randn(M, sum(w.shape[0] for w in args[1]), generator=torch.Generator().manual_seed(M)).to(dtype)
    return args, dy, h, mask


@DTYPES
@pytest.mark.parametrize("M, dropout", [(0, False), (1, True), (17, False), (70, True), (530, True)])
def test_backward_matches_float64(isa, dtypes, M, dropout):  # noqa: F811
    args, dy, h, mask = training_problem(M, *dtypes, dropout=dropout)
    found = cpu_batched.lora_batched_bwd(*backward_args(args, dy, h, mask))
    eager = reference_batched.lora_batched_bwd(*backward_args(args, dy, h, mask))
    exact = reference_batched.lora_batched_bwd(*backward_args(to_double(args), dy.double(), h.double(), mask))
    close(found[0], eager[0], exact[0], dtypes[0])
    for kind in (1, 2):
        for ours, theirs, truth in zip(found[kind], eager[kind], exact[kind], strict=True):
            close(ours, theirs, truth, dtypes[0])
            assert torch.equal(ours == 0, truth == 0)  # adapters without rows, and past the true rank


def test_backward_gives_what_is_asked_for(isa):  # noqa: F811
    args, dy, h, mask = training_problem(40)
    full = cpu_batched.lora_batched_bwd(*backward_args(args, dy, h, mask))
    for need in [(True, False, False), (False, True, False), (False, False, True)]:
        dx, das, dbs = cpu_batched.lora_batched_bwd(*backward_args(args, dy, h, mask, need))
        assert torch.equal(dx, full[0]) if need[0] else dx.numel() == 0
        assert (len(das), len(dbs)) == (2 * need[1], 2 * need[2])
        assert all(torch.equal(a, b) for a, b in zip(das + dbs, full[1] * need[1] + full[2] * need[2], strict=True))


def test_backward_bits_depend_on_neither_threads_nor_neighbours(isa):  # noqa: F811
    args, dy, h, mask = training_problem(60, bf16, dropout=True)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        try:
            dx, das, dbs = cpu_batched.lora_batched_bwd(*backward_args(args, dy, h, mask))
        finally:
            torch.set_num_threads(before)
        results.append([dx, *das, *dbs])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    kept = torch.arange(60) % 3 == 0
    mixed = list(args)
    mixed[5] = torch.where(kept, args[5], args[5].roll(7))
    dx = cpu_batched.lora_batched_bwd(*backward_args(mixed, dy, h, mask))[0]
    assert torch.equal(dx[kept], results[0][0][kept])


@DTYPES
@pytest.mark.parametrize("packed", [False, True], ids=["slices", "rank_packed"])
def test_shrink_matches_float64(isa, dtypes, packed):  # noqa: F811
    for M in (0, 1, 17, 150):
        x, _, _, pools_a, _, ids, ranks, scalings, *_ = problem(M, dtype=dtypes[0], pool_dtype=dtypes[1], packed=packed, seed=M, R=70, K=97)
        rest = ids, ranks, scalings, None, 16, packed, False
        found, eager = cpu_batched.lora_shrink(x, pools_a, *rest), reference_batched.lora_shrink(x, pools_a, *rest)
        exact = reference_batched.lora_shrink(x.double(), [p.to(x.dtype).double() for p in pools_a], *rest)
        close(found, eager, exact, fp32)
        assert torch.equal(found == 0, exact == 0)


@DTYPES
@pytest.mark.parametrize("wide_h", [False, True], ids=["h in y's dtype", "h fp32"])
def test_expand_matches_float64(isa, dtypes, wide_h):  # noqa: F811
    for M in (0, 1, 17, 150):
        _, _, _, _, pools_b, ids, ranks, *_ = problem(M, dtype=dtypes[0], pool_dtype=dtypes[1], seed=M)
        g = torch.Generator().manual_seed(M)
        y, h = torch.randn(M, 110, generator=g).to(dtypes[0])[:, :107], torch.randn(2, M, 9, generator=g).to(fp32 if wide_h else dtypes[0])
        found, eager, exact = y.clone(), y.clone(), y.double()
        cpu_batched.lora_expand(found, h, pools_b, ids, ranks, None, 16, False)
        reference_batched.lora_expand(eager, h, pools_b, ids, ranks, None, 16, False)
        reference_batched.lora_expand(exact, h.to(y.dtype).double(), [p.to(y.dtype).double() for p in pools_b], ids, ranks, None, 16, False)
        close(found, eager, exact, y.dtype)
        assert torch.equal(found[ids < 0], y[ids < 0])


def test_halves_bits_depend_on_neither_threads_nor_neighbours(isa):  # noqa: F811
    args = problem(90, dtype=bf16, R=33, K=97)
    x, _, _, pools_a, pools_b, ids, ranks, scalings, *_ = args
    kept = torch.arange(90) % 3 == 0

    def halves(ids):
        h = cpu_batched.lora_shrink(x, pools_a, ids, ranks, scalings, None, 16, False, False)
        y = torch.ones(90, 107, dtype=bf16)
        cpu_batched.lora_expand(y, h, pools_b, ids, ranks, None, 16, False)
        return h, y

    before, (h, y) = torch.get_num_threads(), halves(ids)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            again = halves(ids)
        finally:
            torch.set_num_threads(before)
        assert torch.equal(again[0], h)
        assert torch.equal(again[1], y)
    mixed = halves(torch.where(kept, ids, ids.roll(7)))
    assert torch.equal(mixed[0][:, kept], h[:, kept])
    assert torch.equal(mixed[1][kept], y[kept])


def test_column_views_and_the_one_row_batch(isa):  # noqa: F811
    """Row-strided x, y and pools are used where they lie; one row gives the bits it has among others."""
    x, _, _, pools_a, _, ids, ranks, scalings, *_ = problem(30, dtype=fp16)
    wide = torch.zeros(30, 60, dtype=fp16)
    wide[:, 3:48] = x
    rest = ranks, scalings, None, 16, False, False
    h = cpu_batched.lora_shrink(x, pools_a, ids, *rest)
    assert torch.equal(cpu_batched.lora_shrink(wide[:, 3:48], pools_a, ids, *rest), h)
    assert torch.equal(cpu_batched.lora_shrink(x[7:8], pools_a, ids[7:8], *rest), h[:, 7:8])
    assert "not contiguous" in cpu_batched.OPS["lora_shrink"][1](x.t().contiguous().t(), pools_a, ids, *rest)
