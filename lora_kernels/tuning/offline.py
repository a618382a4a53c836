"""Compile the launches of an op for an architecture without a GPU, and read off registers, spills, shared memory and opcodes."""

from __future__ import annotations

import collections
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from ..kernels import _launch
from . import store

# Shared memory one program may have, bytes (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Report:
    """What one compiled kernel needs. spills: bytes of spill stores and loads; shared: bytes; register_a: wgmma with A in registers."""

    kernel: str
    arch: int
    config: str
    registers: int
    spills: int
    shared: int
    register_a: int
    opcodes: dict[str, int]
    warnings: tuple[str, ...]


def record(arch: int, call: Callable[[], Any]) -> list[tuple[_launch.Launcher, list]]:
    """The launches that `call` would make on a GPU of this architecture; its tensors lie on the meta device."""
    before = store.ARCH
    store.ARCH = arch
    store.choose.cache_clear()
    try:
        with _launch.recording() as launches:
            call()
    finally:
        store.ARCH = before
        store.choose.cache_clear()
    return launches


def _source(launcher: _launch.Launcher, args: list) -> ASTSource:
    """The kernel with the signature Triton would derive from these arguments."""
    fn = launcher.fn
    signature, constants, attributes = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(fn.params, [*args, *[None] * (len(fn.params) - len(args))])):
        name = parameter.name
        if parameter.is_constexpr:
            value = launcher.constants[name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>".replace(" ", "")
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(i,)] = "*" + _TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=attributes)


def compile_launch(launcher: _launch.Launcher, args: list, arch: int) -> Report:
    """Compile one recorded launch with the ptxas that Triton uses on the GPU machine."""
    compiled = triton.compile(_source(launcher, args), target=GPUTarget("cuda", arch, 32), options=launcher.warps_stages)
    name = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "k.ptx", Path(folder) / "k.cubin"
        ptx.write_text(compiled.asm["ptx"])
        ptxas = _BIN / ("ptxas-blackwell" if arch >= 100 and (_BIN / "ptxas-blackwell").exists() else "ptxas")
        log = subprocess.run([ptxas, "-v", f"--gpu-name={name}", ptx, "-o", cubin], capture_output=True, text=True, check=True).stderr
        sass = subprocess.run([_BIN / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
    opcodes = collections.Counter(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", sass, re.MULTILINE))
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))
    shown = {k: v for k, v in launcher.constants.items() if k not in ("GROUP_M", "HAS_BIAS", "PRECISION")}
    config = " ".join(f"{k}={int(v)}" for k, v in (shown | launcher.warps_stages).items())
    return Report(
        kernel=launcher.fn.__name__,
        arch=arch,
        config=config,
        registers=int(re.search(r"Used (\d+) registers", log).group(1)),
        spills=spills,
        shared=compiled.metadata.shared,
        register_a=len(re.findall(r"wgmma\.mma_async[^;]*\},\s*\{", compiled.asm["ptx"])),
        opcodes=dict(opcodes),
        warnings=tuple(sorted(set(re.findall(r"\((C75\d\d)\)", log)))),
    )
