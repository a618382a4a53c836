"""Every launch that the heuristic can choose compiles for its architecture: no spills, shared memory in limits, the right opcodes.

The op itself is called on meta tensors, so what is compiled is what would be launched, by the ptxas that Triton uses on a GPU machine.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import torch
from triton import knobs

from lora_kernels.tuning import offline


@pytest.mark.parametrize("layer", [layer for arch in offline.ARCHS for layer in offline.gate(arch)], ids=str)
def test_compiles_within_the_chip(layer: offline.Layer) -> None:
    for report in offline.reports(layer):
        what = f"{report.kernel} {report.config}"
        assert report.spills <= offline.SPILL_LIMIT, f"{what}: {report.spills} bytes spilled"
        assert report.shared <= offline.SHARED_LIMIT[report.arch], f"{what}: {report.shared} bytes of shared memory"
        assert not report.warnings, f"{what}: ptxas {report.warnings}"
        assert report.register_a == 0, f"{what}: {report.register_a} wgmma with A in registers"
        if report.kernel in ("update_tma_kernel", "column0_kernel"):
            product = "HGMMA" if report.arch == 90 else "UTCHMMA"
            missing = [name for name in (product, "UTMALDG", "UTMASTG") if not report.opcodes.get(name)]
            assert not missing, f"{what}: no {missing}"


SIZES = [{}, {"N": 4097}, {"K": 4095}, {"N": 4097, "K": 4095}, {"strided": True}]


@pytest.mark.slow
@pytest.mark.parametrize("R", [1, 9, 16, 24, 32, 33, 40, 64, 100, 128, 200, 256])
@pytest.mark.parametrize("arch", offline.ARCHS)
def test_no_rank_spills(arch: int, R: int) -> None:
    """At every alignment; without dropout fp32 and few rows are cuBLAS's."""
    layers = [offline.Layer(arch, R, p, dtype=dtype, **sizes) for dtype in (torch.bfloat16, torch.float16) for p in (0.0, 0.05) for sizes in SIZES]
    layers += [offline.Layer(arch, R, 0.05, dtype=torch.float32, **sizes) for sizes in SIZES]
    layers += [offline.Layer(arch, R, 0.05, M=48, N=96, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    for layer in layers:
        for report in offline.reports(layer):
            assert report.spills <= offline.SPILL_LIMIT, f"{layer} {report.kernel} {report.config}: {report.spills} bytes spilled"


def test_reports_do_not_depend_on_tritons_cache(tmp_path) -> None:
    """Compiled here, kept with what ptxas said, or put there by a launch that kept no log."""
    launcher, args = offline.record(80, offline.Layer(80, 16).call)[-1]
    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path)
        compiled = offline.compile_launch(launcher, args, 80)
        assert compiled.registers > 0
        assert offline.compile_launch(launcher, args, 80) == compiled
        (log,) = tmp_path.rglob("ptxas.log")
        log.unlink()
        assert offline.compile_launch(launcher, args, 80) == compiled
