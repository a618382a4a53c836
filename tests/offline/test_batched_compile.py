"""The many-adapter kernels compile for their architectures without a GPU: no spills, shared memory in limits, the right opcodes.

The launchers run on meta tensors, so what is compiled is what they would launch, by the ptxas that Triton uses on a GPU machine.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from lora_kernels.tuning import offline

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32


Call = offline.ManyAdapters


# "to allow use of registers in GMMA": orders register writes, serialises no loop (docs/measured.md). C7519 in ptxas 12.8, C7520 in 12.9.
HARMLESS = "warpgroup.arrive is injected"
LLAMA = [Call("forward", M, R=R) for M, R in ((1, 16), (16, 64), (256, 64))] + [
    Call("forward", 64, (4096, 1024, 1024), R=16),
    Call("forward", 8192, R=16),
    Call("forward", 8192, R=64),
    Call("forward", 8192, (14336, 14336), R=32),
    Call("forward", 8192, R=64, L=1000),
    Call("forward", 8192, R=64, bare=True),
    Call("forward", 8192, R=64, pool_dtype=fp32, bare=True),
    Call("forward", 8192, (4096, 1024, 1024), R=32),
    Call("forward", 8192, (4096, 1024, 1024), R=64),
]
QKV = (4096, 1024, 1024)
RANKS = [  # pools whose rows are no multiple of 16 ranks: B by 8, 4 or 2 ranks at a time, or one by one
    Call("forward", 64, R=8),
    Call("forward", 8192, R=8),
    Call("forward", 8192, QKV, R=8),
    Call("forward", 8192, R=8, pool_dtype=fp32),
    Call("backward", 4096, R=8, dropout=True),
    Call("forward", 8192, R=24),
    Call("forward", 8192, R=100, bare=True),
    Call("forward", 8192, QKV, R=5),
]
MORE_RANKS = [  # the same in other combinations: a minute more
    Call("forward", 8192, R=8, L=1000),
    Call("forward", 8192, R=4),
    Call("forward", 8192, QKV, R=100),
    Call("forward", 8192, QKV, R=50),
    Call("forward", 8192, R=1),
    Call("forward", 8192, R=33),
]
OTHERS = [
    Call("table", 256, L=64),
    Call("table", 1 << 16, L=2047),
    Call("forward", 17, (33,), K=37, R=5),
    Call("forward", 17, pool_dtype=fp32),
    Call("forward", 512, (1000, 1000), R=64),  # TMA, narrow tiles
    Call("forward", 8192, R=64, dtype=fp16, pool_dtype=fp32),
    Call("forward", 8192, (4096, 1024, 1024), R=64, pool_dtype=fp32),
    Call("forward", 8192, R=256, invariant=True),
    Call("forward", 64, R=16, dtype=fp32),
    Call("forward", 64, R=64, dtype=fp32),
    Call("forward", 1024, (200, 200, 200), R=64, dtype=fp32),
    Call("shrink_expand", 64, R=64),
    Call("shrink_expand", 4096, R=64, dtype=fp16),
    Call("backward", 4096, R=64),
    Call("backward", 4096, R=64, dropout=True),
    Call("backward", 4096, R=64, L=100, dropout=True),
    Call("backward", 300, (200, 72), K=264, R=24, dropout=True, pool_dtype=fp32),
]


@pytest.mark.parametrize("call", LLAMA + RANKS + OTHERS + [pytest.param(c, marks=pytest.mark.slow) for c in MORE_RANKS], ids=str)
def test_compiles_within_the_chip(call: Call) -> None:
    for arch in offline.ARCHS:
        for report in offline.reports(replace(call, arch=arch)):
            what = f"{report.kernel} {report.config} {report.registers} registers on sm_{arch}"
            assert report.spills <= offline.SPILL_LIMIT, f"{what}: {report.spills} bytes spilled"
            assert report.shared <= offline.SHARED_LIMIT[arch], f"{what}: {report.shared} bytes of shared memory"
            assert all(HARMLESS in warning for warning in report.warnings), f"{what}: ptxas {report.warnings}"
            assert report.register_a == 0, f"{what}: {report.register_a} wgmma with A in registers"
            if report.kernel == "segmented_tma_kernel":
                product = "HGMMA" if arch == 90 else "UTCHMMA"
                assert all(report.opcodes.get(name) for name in (product, "UTMALDG", "UTMASTG")), f"{what}: {report.opcodes}"


def test_slices_share_one_read_of_x() -> None:
    """The shrink of q/k/v in prefill has the programs of one slice: each reads its rows once."""

    def programs(Ns) -> int:
        call = Call("forward", 8192, Ns, arch=80)
        return next(launcher.grid[0] for launcher, _ in offline.record(call.arch, call.call) if launcher.fn.__name__ == "shrink_kernel")

    assert programs((4096, 1024, 1024)) == programs((4096,)) == 8192 // 64 + 8


def kernels(**changes) -> set[str]:
    """What an sm_90 launches for 8192 rows of 4096 x 4096 with 8 adapters, changed so."""
    call = replace(Call("forward", 8192, arch=90), **changes)
    return {launcher.fn.__name__ for launcher, _ in offline.record(call.arch, call.call)}


def test_prefill_takes_the_form_that_static_facts_name() -> None:
    """TMA on Hopper and up for up to 16 adapters, and for as many more as the rows bear; else gathered rows: never by the mix, not known here."""
    for tma in ({}, dict(Ns=(4096, 1000, 1000)), dict(L=449), dict(M=300, L=16), dict(M=2048, L=113)):
        assert "segmented_tma_kernel" in kernels(**tma), tma
    gathered = [dict(arch=80), dict(dtype=fp32), dict(K=4095), dict(Ns=(4096, 1001, 1001)), dict(invariant=True)]
    for changes in [*gathered, dict(L=450), dict(M=2047, L=17), dict(M=2048, L=114)]:
        assert kernels(**changes) == {"shrink_kernel", "batched_linear_kernel"}, changes


def test_h_has_no_launch_where_programs_are_spare() -> None:
    """1024 tiles leave 32 of 132 programs a tile less; 1056 leave none; 65 adapters may make more blocks than 32 programs get through."""
    alone = {"segmented_tma_kernel"}
    for spare in ({}, dict(R=64), dict(L=64), dict(Ns=(14336, 14336)), dict(Ns=(4096, 1024, 1024), R=32), dict(M=4096)):
        assert kernels(**spare) == alone, spare
    for none in (dict(M=8448), dict(L=65), dict(pool_dtype=fp32), dict(Ns=(4096, 1024, 1024), R=64)):
        assert kernels(**none) == alone | {"shrink_kernel"}, none
    assert kernels(dropout=True) == alone | {"keep_kernel", "masked_shrink_kernel"}


@pytest.mark.parametrize("Ns", [(4096,), (14336,), (4096, 1024, 1024)], ids=lambda Ns: "+".join(map(str, Ns)))
@pytest.mark.parametrize("M", [16, 64, 128])
def test_decode_is_one_wave_that_keeps_memory_busy(M, Ns):
    """H200: all programs resident at once, and at least 32 KiB of W on its way per SM (4.3 TB/s at 0.8 us take 26), 64 KiB up to 64 rows."""
    ((launcher, args),) = offline.record(90, Call("forward", M, Ns, bare=True, arch=90).call)
    constants, options, programs = launcher.constants, launcher.warps_stages, launcher.grid[0] * launcher.grid[1]
    assert programs <= 132 * offline.resident(offline.compile_launch(launcher, args, 90), options["num_warps"])
    on_the_way = (options["num_stages"] - 1) * constants["BN"] * constants["BK"] * 2 * programs / 132
    assert on_the_way >= (32 if M > 64 else 64) * 1024
