"""Compile the launches of an op for an architecture without a GPU, and read off registers, spills, shared memory and opcodes."""

from __future__ import annotations

import collections
import contextlib
import functools
import io
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.cache import get_cache_manager
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import _batch_table
from ..kernels import _launch, batched, batched_table, lora_linear
from . import store

# Shared memory one program may have, bytes (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
# Bytes a kernel may spill. Tiles are chosen for Triton 3.6; what the others spill is in docs/measured.md.
SPILL_LIMIT = 0 if triton.__version__.startswith("3.6.") else 208
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
_NVDISASM = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"


@dataclass(frozen=True)
class Report:
    """What one compiled kernel needs. spills: bytes of spill stores and loads and of stack, where also a TMA descriptor would lie that was copied
    instead of chosen by address; shared: bytes; register_a: wgmma with A in registers; warnings: what ptxas says of wgmma, with its code.
    """

    kernel: str
    arch: int
    config: str
    registers: int
    spills: int
    shared: int
    register_a: int
    warnings: tuple[str, ...]
    cubin: bytes = field(repr=False)

    @functools.cached_property
    def opcodes(self) -> dict[str, int]:
        """How often each stands in the SASS. Read when asked for: disassembling takes longer than ptxas does."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            sass = subprocess.run([_NVDISASM, "-c", "-ndf", file.name], capture_output=True, text=True, check=True).stdout  # -ndf: no jump analysis
        return dict(collections.Counter(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", sass, re.MULTILINE)))


def record(arch: int, call: Callable[[], Any]) -> list[tuple[_launch.Launcher, list]]:
    """The launches that `call` would make on a GPU of this architecture; its tensors lie on the meta device."""
    caches = (lora_linear._forwards, lora_linear._backwards, batched._prepared, batched_table._tables)
    before = store.ARCH
    try:
        store.ARCH = arch
        store.choose.cache_clear()
        with _launch.recording() as launches:
            call()
    finally:
        store.ARCH = before
        store.choose.cache_clear()
        for cache in caches:  # what was prepared while recording holds meta tensors and a foreign architecture
            cache.clear()
    return launches


def _source(launcher: _launch.Launcher, args: list) -> ASTSource:
    """The kernel with the signature Triton would derive from these arguments."""
    fn = launcher.fn
    signature, constants, attributes = {}, {}, {}

    def describe(value: Any, path: tuple[int, ...]) -> str | tuple:
        parameter = fn.params[path[0]]
        if isinstance(value, tuple):
            return tuple([describe(item, (*path, i)) for i, item in enumerate(value)])
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize):
            constants[path] = value
            return "constexpr"
        if isinstance(value, TensorDescriptor):
            return f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>".replace(" ", "")
        if isinstance(value, torch.Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            return "*" + _TYPES[value.dtype]
        if isinstance(value, float):
            return "fp32"
        if value % 16 == 0 and not parameter.do_not_specialize:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if abs(value) < 2**31 else "i64"

    for i, (parameter, value) in enumerate(zip(fn.params, [*args, *[None] * (len(fn.params) - len(args))], strict=False)):
        signature[parameter.name] = describe(launcher.constants[parameter.name] if parameter.is_constexpr else value, (i,))
    return ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=attributes)


def _compile(source: ASTSource, target: GPUTarget, options: dict[str, int]) -> tuple[CompiledKernel, str]:
    """As on the GPU machine, through Triton's cache; and what ptxas said, which is kept there beside the kernel."""
    said = io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(said):
        knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=target, options=options)
        cache = get_cache_manager(compiled.hash)
        if not said.getvalue() and (kept := cache.get_file("ptxas.log")):
            return compiled, Path(kept).read_text()
        if not said.getvalue():  # in the cache by a launch, which keeps no log
            knobs.compilation.always_compile = True
            compiled = triton.compile(source, target=target, options=options)
    cache.put(said.getvalue(), "ptxas.log", binary=False)
    return compiled, said.getvalue()


def compile_launch(launcher: _launch.Launcher, args: list, arch: int) -> Report:
    """Compile one recorded launch with the ptxas that Triton uses on the GPU machine."""
    compiled, log = _compile(_source(launcher, args), GPUTarget("cuda", arch, 32), launcher.warps_stages)
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", log))
    shown = {k: v for k, v in launcher.constants.items() if k not in ("GROUP_M", "HAS_BIAS", "PRECISION", "PREC")}
    config = " ".join(f"{k}={int(v)}" for k, v in (shown | launcher.warps_stages).items())
    return Report(
        kernel=launcher.fn.__name__,
        arch=arch,
        config=config,
        registers=int(re.search(r"Used (\d+) registers", log).group(1)),
        spills=spills,
        shared=compiled.metadata.shared,
        register_a=len(re.findall(r"wgmma\.mma_async[^;]*\},\s*\{", compiled.asm["ptx"])),
        warnings=tuple(
            sorted({f"{code} {text}" for code, text in re.findall(r"\((C75\d\d)\)\s*(.*?)(?: in around line| in the function|$)", log, re.M)})
        ),
        cubin=compiled.asm["cubin"],
    )


def resident(report: Report, warps: int) -> int:
    """Programs of a kernel that one SM of sm_90 has room for (65536 registers, dealt by 8 to a thread; 228 KiB, of which a program costs 1 more)."""
    threads = 32 * warps
    return min(233_472 // (report.shared + 1024), 65_536 // (-(-report.registers // 8) * 8 * threads), 2048 // threads)


@dataclass(frozen=True)
class Layer:
    """One call of the op, forward and backward, as the offline gate and the report compile it."""

    arch: int
    R: int
    p: float = 0.0
    N: int = 4096
    K: int = 4096
    M: int = 8192
    dtype: torch.dtype = torch.bfloat16
    adapters: torch.dtype | None = None
    strided: bool = False

    def __str__(self) -> str:
        more = f"-{self.adapters}_adapters".replace("torch.", "") if self.adapters else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"sm_{self.arch}-{dtype}-M{self.M}-N{self.N}-K{self.K}-R{self.R}-p{self.p}{more}" + "-strided" * self.strided

    def call(self) -> None:
        adapters = self.adapters or self.dtype

        def empty(*shape: int, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            if self.strided:
                return torch.empty_strided(shape, (2 * shape[1], 2), dtype=dtype, device="meta")
            return torch.empty(shape, dtype=dtype, device="meta")

        x, weight = empty(self.M, self.K), empty(self.N, self.K)
        bias = torch.empty(self.N, dtype=self.dtype, device="meta")
        lora_a, lora_b = empty(self.R, self.K, dtype=adapters), empty(self.N, self.R, dtype=adapters)
        seed = torch.empty(1, dtype=torch.int64, device="meta") if self.p else None
        _, h, mask = lora_linear.lora_linear_fwd(x, weight, bias, lora_a, lora_b, 0.5, self.p, seed)
        args = (empty(self.M, self.N), x, weight, lora_a, lora_b, h, mask, 0.5, self.p, True, True, True)
        lora_linear.lora_linear_bwd(*args)


@dataclass(frozen=True)
class ManyAdapters:
    """One call of the many-adapter ops: "forward", "backward" (both), "shrink_expand" or "table"."""

    op: str
    M: int
    Ns: tuple[int, ...] = (4096,)
    K: int = 4096
    R: int = 16
    L: int = 8
    dtype: torch.dtype = torch.bfloat16
    pool_dtype: torch.dtype | None = None
    invariant: bool = False
    dropout: bool = False
    bare: bool = False  # no bias, all ranks full, no scalings
    arch: int = 0

    def __str__(self) -> str:
        dtypes = str(self.dtype)[6:] + (f"-{str(self.pool_dtype)[6:]}_pools" if self.pool_dtype else "")
        options = "-bare" * self.bare + "-invariant" * self.invariant + "-dropout" * self.dropout
        return f"{self.op}-M{self.M}-N{'+'.join(map(str, self.Ns))}-K{self.K}-R{self.R}-L{self.L}-{dtypes}{options}"

    def call(self) -> None:
        M, K, R, L, S = self.M, self.K, self.R, self.L, len(self.Ns)
        empty = functools.partial(torch.empty, device="meta", dtype=self.dtype)
        pool = functools.partial(torch.empty, device="meta", dtype=self.pool_dtype or self.dtype)
        x, ws, biases = empty(M, K), [empty(N, K) for N in self.Ns], [None if self.bare else empty(N) for N in self.Ns]
        pools_a, pools_b = [pool(L, R, K) for _ in self.Ns], [pool(L, N, R) for N in self.Ns]
        block = _batch_table.default_block(M, self.invariant)
        table = torch.empty(_batch_table.layout(M, L, block).size, dtype=torch.int32, device="meta")
        ids, ranks, scalings = table[:M], torch.empty(S, L, dtype=torch.int32, device="meta"), torch.empty(S, L, device="meta")
        p, seed = (scalings[0], torch.empty(1, dtype=torch.int64, device="meta")) if self.dropout else (None, None)
        if self.bare:
            ranks = scalings = None
        if self.op == "table":
            batched_table.build(ids, L, block, table)
        elif self.op == "shrink_expand":
            h = batched.lora_shrink(x, pools_a, ids, ranks, scalings, table, block, False, self.invariant)
            batched.lora_expand(empty(M, sum(self.Ns)), h, pools_b, ids, ranks, table, block, self.invariant)
        else:
            base = (x, ws, biases, pools_a, pools_b, ids, ranks, scalings)
            _, h, mask = batched.lora_batched_fwd(*base, p, seed, table, block, False, self.invariant)
            if self.op == "backward":
                dy = empty(M, sum(self.Ns))
                batched.lora_batched_bwd(dy, x, ws, pools_a, pools_b, h, mask, ids, ranks, scalings, p, table, block, True, True, True)


ARCHS = (80, 90, 100)
_ODD = {"N": 4097, "K": 4095}


def gate(arch: int) -> list[Layer]:
    """Layers that together reach every kernel, form and block size the heuristic can choose on this architecture."""
    common = [Layer(arch, R, p) for R in (16, 32, 64, 128) for p in (0.0, 0.05)]
    return common + [
        Layer(arch, 8, 0.05),  # ranks that a rank block covers with a mask
        Layer(arch, 24, 0.0),
        Layer(arch, 40, 0.05),
        Layer(arch, 40, 0.05, **_ODD, dtype=torch.float32),
        Layer(arch, 100, 0.0),
        Layer(arch, 100, 0.05),
        Layer(arch, 64, 0.0, dtype=torch.float16, adapters=torch.float32),
        Layer(arch, 256, 0.05, dtype=torch.float16, adapters=torch.float32),
        Layer(arch, 20, 0.0, M=48, N=96),  # little M, narrow N: the small TMA tile
        Layer(arch, 20, 0.05, M=48, N=96),  # cuBLAS for the GEMM, kernels for the mask
        Layer(arch, 9, 0.05, **_ODD, adapters=torch.float32),
        Layer(arch, 64, 0.0, **_ODD),
        Layer(arch, 16, 0.0, strided=True),
        Layer(arch, 16, 0.05, dtype=torch.float32),
        Layer(arch, 64, 0.05, **_ODD, dtype=torch.float32),
    ]


@functools.cache
def _cached(key: tuple, arch: int) -> Report:
    launcher, args = _pending[key]
    return compile_launch(launcher, args, arch)


_pending: dict[tuple, tuple] = {}


def reports(layer: Any) -> list[Report]:
    """One report per distinct kernel that `layer.call()` launches on `layer.arch`."""
    found = {}
    for launcher, args in record(layer.arch, layer.call):
        source = _source(launcher, args)
        key = (launcher.fn.__name__, str(source.signature), str(source.constants), str(source.attrs), str(launcher.warps_stages))
        _pending[key] = (launcher, args)
        found[key] = _cached(key, layer.arch)
    return list(found.values())
