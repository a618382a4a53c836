"""Gates of the CUDA kernels that need nvcc and no GPU: compile for sm_90a, resources, warnings, opcodes; the module without a driver."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_kernels.tuning.plan import Problem, cuda_plans

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "csrc" / "cuda"))
import cuda_report  # noqa: E402
import gen_wgmma  # noqa: E402
import native_build_cuda  # noqa: E402

needs_nvcc = pytest.mark.skipif(native_build_cuda.nvcc() is None, reason="no nvcc here")


@pytest.fixture(scope="module")
def kernels() -> list[cuda_report.Kernel]:
    """Every kernel of csrc/cuda as ptxas compiled it for the module, shared by all workers."""
    return cuda_report.compiled()


def test_wgmma_header_is_what_the_generator_writes():
    assert (ROOT / "csrc" / "cuda" / "wgmma.cuh").read_text() == gen_wgmma.text()


def test_no_torch_no_cutlass():
    for path in (ROOT / "csrc" / "cuda").glob("*.*"):
        if path.suffix in (".cu", ".cuh", ".h", ".cpp"):
            included = re.findall(r'#include [<"](.*?)[>"]', path.read_text())
            assert not [i for i in included if re.match(r"torch|ATen|c10|cute|cutlass", i)], path.name


@needs_nvcc
def test_no_spills_no_stack_no_warnings(kernels):
    assert len(kernels) == 50
    for k in kernels:
        assert (k.stack, k.spill_stores, k.spill_loads) == (0, 0, 0), k.name
        assert k.warnings == [], k.name


@needs_nvcc
def test_registers_fit_the_launch(kernels):
    """384 threads of at most 168 registers fill the file of 65536; setmaxnreg then moves 128 x 128 from the producer to the consumers."""
    for k in kernels:
        assert k.registers * 384 <= 65536, k.name
        assert k.sass["USETMAXREG"] == 2, k.name
        assert k.highest_register < 232, f"{k.name}: a consumer uses more registers than setmaxnreg gives it"
        assert 0 < k.highest_producer_register < 40, f"{k.name}: the producer keeps more registers than setmaxnreg leaves it"


@needs_nvcc
def test_plans_name_every_kernel_and_no_other(kernels):
    named = set()
    for op, side in (("fwd", "forward"), ("dx", "dx")):
        for R, dropout in ((16, False), (32, False), (64, False), (256, False), (16, True)):
            for plan in cuda_plans(Problem(op, 8192, 4096, 4096, R, torch.bfloat16, dropout)):
                form = f", column-0 R<={R}" if plan.form == "column0" else ", masked" if dropout and op == "dx" else ""
                named.add(f"linear<bf16, {plan.block_m}x{plan.block_n}, {side}{form}>")
    assert named == {k.name for k in kernels if k.name.startswith("linear<bf16")}


@needs_nvcc
def test_opcodes(kernels):
    for k in kernels:
        assert k.sass["HGMMA"] > 0, k.name
        assert k.sass["UTMALDG"] > 0, k.name
        assert k.sass["LDL"] == k.sass["STL"] == 0, k.name
        assert k.sass["HMMA"] == k.sass["FFMA"] == 0, f"{k.name}: arithmetic beside the tensor cores"
        if k.family == "linear":
            assert k.sass["UTMASTG"] > 0, f"{k.name}: y is not stored by TMA"
            assert k.sass["STSM"] > 0, k.name


@needs_nvcc
def test_no_memory_barrier_in_the_main_loop(kernels):
    """Fences of GPU scope cost hundreds of cycles: only the column-0 publication, the flags and start and end of a CTA may have them."""
    for k in kernels:
        assert k.membar_gpu_between_hgmma == 0, k.name
        allowed = 5 if k.family == "shrink" else 7 if "column-0" in k.name else 4
        assert k.membar_gpu <= allowed, f"{k.name}: a fence that takes in global memory where one of shared memory does"


def has_cuda() -> bool:
    return (
        importlib.util.find_spec("lora_kernels._C") is not None
        and "cuda_kernels"
        in subprocess.run([sys.executable, "-c", "from lora_kernels import _C; print(dir(_C))"], capture_output=True, text=True).stdout
    )


@needs_nvcc
@pytest.mark.skipif(not has_cuda(), reason="the module was built without CUDA")
def test_module_lists_its_kernels_without_a_driver():
    code = "import json; from lora_kernels import _C; print(json.dumps(_C.cuda_kernels()))"
    environment = {"CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin"}
    found = json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment, cwd=ROOT).stdout)
    assert len(found) == 50
    assert max(found.values()) <= 232448
    assert "linear<bf16, 128x256, forward, column-0 R<=16>" in found


@needs_nvcc
@pytest.mark.skipif(not has_cuda(), reason="the module was built without CUDA")
def test_errors_name_kernel_shape_and_cuda_error():
    code = """
from lora_kernels import _C
for call in (lambda: _C.cuda_linear(0, False, False, False, False, 128, 256, 1, 8, 128, 256, 64, 12, 1.0, *[0] * 15),
             lambda: _C.cuda_linear(1, False, False, False, False, 128, 64, 1, 8, 128, 256, 64, 16, 1.0, *[0] * 15),
             lambda: _C.cuda_shrink(0, False, 128, 64, 16, 3, 1.0, 0, *[16] * 8),
             lambda: _C.cuda_linear(0, False, False, False, False, 128, 256, 2, 8, 128, 256, 64, 16, 1.0, *[0] * 15)):
    try:
        call()
    except _C.CudaError as error:
        assert isinstance(error, RuntimeError)
        print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": ""}, cwd=ROOT)
    lines = run.stdout.splitlines()
    assert "M=128 N=256 K=64 R=12: allowed: M >= 1; N, K, R multiples of 8; R to 256" in lines[0]
    assert "fp16" in lines[1]
    assert "no such kernel" in lines[1]
    assert "split=3: allowed: split 1, 2, 4, 8" in lines[2]
    assert lines[3].startswith("linear<bf16, 128x256, forward> M=128 N=256 K=64 R=16 cluster=2: ")
    assert "CUDA error cuda" in lines[3]
