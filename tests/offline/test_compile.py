"""Every launch that the heuristic can choose compiles for its architecture: no spills, shared memory in limits, the right opcodes.

The op itself is called on meta tensors, so what is compiled is what would be launched, by the ptxas that Triton uses on a GPU machine.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from lora_kernels.tuning import offline


@pytest.mark.parametrize("layer", [layer for arch in offline.ARCHS for layer in offline.gate(arch)], ids=str)
def test_compiles_within_the_chip(layer: offline.Layer) -> None:
    for report in offline.reports(layer):
        what = f"{report.kernel} {report.config}"
        assert report.spills == 0, f"{what}: {report.spills} bytes spilled"
        assert report.shared <= offline.SHARED_LIMIT[report.arch], f"{what}: {report.shared} bytes of shared memory"
        assert not report.warnings, f"{what}: ptxas {report.warnings}"
        assert report.register_a == 0, f"{what}: {report.register_a} wgmma with A in registers"
        if report.kernel in ("update_tma_kernel", "column0_kernel"):
            product = "HGMMA" if report.arch == 90 else "UTCHMMA"
            missing = [name for name in (product, "UTMALDG", "UTMASTG") if not report.opcodes.get(name)]
            assert not missing, f"{what}: no {missing}"
