"""The many-adapter kernels compile for their architectures without a GPU: no spills, shared memory in limits, the right opcodes.

The launchers run on meta tensors, so what is compiled is what they would launch.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lora_kernels import _batch_table
from lora_kernels.kernels import _launch, batched, batched_table

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes a program may have; CUDA C++ Programming Guide, compute capabilities
TYPES = {bf16: "*bf16", fp16: "*fp16", fp32: "*fp32", torch.int32: "*i32"}
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
KERNELS = ("decode_kernel", "shrink_kernel", "batched_linear_kernel", "segment_reduce_kernel")


@dataclass(frozen=True)
class Call:
    op: str
    M: int
    Ns: tuple[int, ...] = (4096,)
    K: int = 4096
    R: int = 16
    L: int = 8
    dtype: torch.dtype = bf16
    pool_dtype: torch.dtype | None = None
    invariant: bool = False

    def __str__(self) -> str:
        dtypes = str(self.dtype)[6:] + (f"-{str(self.pool_dtype)[6:]}_pools" if self.pool_dtype else "")
        return f"{self.op}-M{self.M}-N{'+'.join(map(str, self.Ns))}-K{self.K}-R{self.R}-{dtypes}" + "-invariant" * self.invariant

    def run(self) -> None:
        M, K, R, L, S = self.M, self.K, self.R, self.L, len(self.Ns)
        empty = functools.partial(torch.empty, device="meta", dtype=self.dtype)
        pool = functools.partial(torch.empty, device="meta", dtype=self.pool_dtype or self.dtype)
        x, ws, biases = empty(M, K), [empty(N, K) for N in self.Ns], [empty(N) for N in self.Ns]
        pools_a, pools_b = [pool(L, R, K) for _ in self.Ns], [pool(L, N, R) for N in self.Ns]
        block = _batch_table.default_block(M, self.invariant)
        table = torch.empty(_batch_table.layout(M, L, block).size, dtype=torch.int32, device="meta")
        ids, ranks, scalings = table[:M], torch.empty(S, L, dtype=torch.int32, device="meta"), torch.empty(S, L, device="meta")
        if self.op == "forward":
            batched.lora_batched_fwd(x, ws, biases, pools_a, pools_b, ids, ranks, scalings, None, None, table, block, False, self.invariant)
        elif self.op == "backward":
            h, dy = empty(S, M, R), empty(M, sum(self.Ns))
            batched.lora_batched_bwd(dy, x, ws, pools_a, pools_b, h, ids, ids, ranks, scalings, None, table, block, True, True, True)
        else:
            h = batched.lora_shrink(x, pools_a, ids, ranks, scalings, table, block, False, self.invariant)
            batched.lora_expand(empty(M, sum(self.Ns)), h, pools_b, ids, ranks, table, block, self.invariant)


LLAMA = [Call("forward", M, R=R) for M, R in ((1, 16), (16, 64), (64, 16), (256, 64))] + [
    Call("forward", 64, (4096, 1024, 1024), R=16),
    Call("forward", 8192, R=64),
    Call("forward", 8192, (14336, 14336), R=16),
]
OTHERS = [
    Call("forward", 17, (33,), K=37, R=5),
    Call("forward", 17, pool_dtype=fp32),
    Call("forward", 8192, R=256, invariant=True),
    Call("forward", 64, R=16, dtype=fp32),
    Call("forward", 1024, R=64, dtype=fp32),
    Call("shrink_expand", 64, R=64),
    Call("shrink_expand", 4096, R=64, dtype=fp16),
    Call("backward", 4096, R=64),
]


class Recorder:
    """Stands for a kernel and notes its launches."""

    def __init__(self, fn, launches: list):
        self.fn, self.launches = fn, launches

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((self.fn, args, options))


def recorded(call: Call, arch: int, monkeypatch) -> list[tuple]:
    """(kernel, arguments, options) of every launch of `call`."""
    launches: list[tuple] = []
    with monkeypatch.context() as patch:
        patch.setattr(batched, "_sms", lambda device: 132)
        patch.setattr(batched, "_major", lambda device: arch // 10)
        for name in KERNELS:
            patch.setattr(batched, name, Recorder(getattr(batched, name), launches))
        call.run()
    _launch._workspaces.clear()
    return launches


def source(fn, args: tuple, options: dict) -> ASTSource:
    """The kernel with the signature Triton would derive from these arguments, every pointer 16-byte aligned."""
    signature, constants, attributes = {}, {}, {}

    def describe(value, path):
        if isinstance(value, tuple):
            return tuple(describe(v, (*path, j)) for j, v in enumerate(value))
        if isinstance(value, torch.Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            return TYPES[value.dtype]
        if fn.params[path[0]].do_not_specialize:
            return "i32"
        if value == 1:
            constants[path] = 1
            return "constexpr"
        if value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if abs(value) < 2**31 else "i64"

    for i, name in enumerate(fn.arg_names):
        if i < len(args):
            signature[name] = describe(args[i], (i,))
        else:
            signature[name], constants[(i,)] = "constexpr", options[name]
    return ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=attributes)


def compiled(arch: int, fn, args: tuple, options: dict) -> dict:
    """Registers, spills, shared memory, ptxas notes and opcodes of one launch."""
    kernel = triton.compile(
        source(fn, args, options), target=GPUTarget("cuda", arch, 32), options={k: options[k] for k in ("num_warps", "num_stages")}
    )
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "k.ptx", Path(folder) / "k.cubin"
        ptx.write_text(kernel.asm["ptx"])
        ptxas = BIN / ("ptxas-blackwell" if arch >= 100 and (BIN / "ptxas-blackwell").exists() else "ptxas")
        name = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
        log = subprocess.run([ptxas, "-v", f"--gpu-name={name}", ptx, "-o", cubin], capture_output=True, text=True, check=True).stderr
    return {
        "registers": int(re.search(r"Used (\d+) registers", log).group(1)),
        "spills": sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)),
        "shared": kernel.metadata.shared,
        "notes": sorted(set(re.findall(r"\((C75\d\d)\)", log))),
        "register_a": len(re.findall(r"wgmma\.mma_async[^;]*\},\s*\{", kernel.asm["ptx"])),
    }


def gate(call: Call, arch: int, monkeypatch) -> list[tuple[str, dict]]:
    found = {}
    for fn, args, options in recorded(call, arch, monkeypatch):
        key = source(fn, args, options)
        found.setdefault(f"{fn.__name__} {key.signature} {key.constants}", (fn, args, options))
    return [(fn.__name__, compiled(arch, fn, args, options)) for fn, args, options in found.values()]


def check(name: str, arch: int, report: dict) -> None:
    what = f"sm_{arch} {name} {report['registers']} registers"
    assert report["spills"] == 0, f"{what}: {report['spills']} bytes spilled"
    assert report["shared"] <= SHARED_LIMIT[arch], f"{what}: {report['shared']} bytes of shared memory"
    assert not report["notes"], f"{what}: ptxas {report['notes']}"
    assert report["register_a"] == 0, f"{what}: {report['register_a']} wgmma with A in registers"


@pytest.mark.parametrize("call", LLAMA + OTHERS, ids=str)
def test_compiles_within_the_chip(call, monkeypatch):
    for arch in SHARED_LIMIT:
        for name, report in gate(call, arch, monkeypatch):
            check(name, arch, report)


@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_table_compiles(arch, monkeypatch):
    launches: list[tuple] = []
    monkeypatch.setattr(batched_table, "table_kernel", Recorder(batched_table.table_kernel, launches))
    batched_table.build(torch.empty(256, dtype=torch.int32, device="meta"), 64, 16, torch.empty(9, dtype=torch.int32, device="meta"))
    check("table_kernel", arch, compiled(arch, *launches[0]))
