"""What ptxas made of every CUDA kernel: registers, spills, warnings, opcodes. Needs nvcc and cuobjdump, no GPU.

Usage: python csrc/cuda/cuda_report.py          prints the tables of docs/measured.md
tests/test_cuda_build.py holds the kernels to these figures.
"""

from __future__ import annotations

import collections
import fcntl
import hashlib
import os
import pickle
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import native_build  # noqa: E402
import native_build_cuda  # noqa: E402

OPCODES = ("HGMMA", "UTMALDG", "UTMASTG", "STSM", "HMMA", "FFMA", "LDL", "STL", "USETMAXREG")


@dataclass
class Kernel:
    name: str
    registers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    highest_register: int = 0
    highest_producer_register: int = 0
    membar_gpu: int = 0
    membar_gpu_between_hgmma: int = 0
    warnings: list[str] = field(default_factory=list)
    sass: collections.Counter = field(default_factory=collections.Counter)

    @property
    def family(self) -> str:
        return self.name.split("<")[0]


def readable(mangled: str) -> str:
    """The name that `_C.cuda_kernels()` gives this kernel."""
    element = "bf16" if "nv_bfloat16" in mangled else "fp16"
    numbers = re.findall(r"L[ib](\d+)E", mangled)
    side = "dx" if numbers[0 if "shrink" in mangled else 2] == "1" else "forward"
    if "shrink" in mangled:
        return f"shrink<{element}, {side}, R<={numbers[1]}>"
    block_m, block_n, _, rank, masked = numbers[:5]
    form = f", column-0 R<={rank}" if rank != "0" else ", masked" if masked == "1" else ""
    return f"linear<{element}, {block_m}x{block_n}, {side}{form}>"


def cuobjdump() -> str:
    """The toolkit's, or the one that comes with Triton."""
    if found := shutil.which("cuobjdump") or shutil.which("/usr/local/cuda/bin/cuobjdump"):
        return found
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def read_log(log: str) -> dict[str, Kernel]:
    """ptxas -v: resources and warnings by mangled name."""
    found: dict[str, Kernel] = {}
    current = None
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            current = found.setdefault(match[1], Kernel(readable(match[1])))
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            current.stack, current.spill_stores, current.spill_loads = map(int, match.groups())
        elif match := re.search(r"Used (\d+) registers", line):
            current.registers = int(match[1])
        elif match := re.search(r"\((C7\d+)\).*?'(\w+)'", line):
            found.setdefault(match[2], Kernel(readable(match[2]))).warnings.append(match[1])
    return found


def read_sass(text: str, kernels: dict[str, Kernel]) -> None:
    current, since_hgmma, seen, producer = None, 0, False, False
    for line in text.splitlines():
        if match := re.search(r"Function : (\w+)", line):
            current, since_hgmma, seen = kernels[match[1]], 0, False
            producer = False
        elif match := re.search(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_]*)(\S*)\s*(.*?);", line):
            opcode, suffix, operands = match.groups()
            if opcode in OPCODES:
                current.sass[opcode] += 1
            if opcode == "MEMBAR" and ".GPU" in suffix:
                since_hgmma += 1
                current.membar_gpu += 1
            if opcode in ("BRA", "WARPSYNC", "BAR"):  # the straight line from one wgmma to the next has ended
                seen, since_hgmma = False, 0
            if opcode == "HGMMA":
                current.membar_gpu_between_hgmma += since_hgmma if seen else 0
                seen, since_hgmma = True, 0
            if opcode == "USETMAXREG":
                producer = "DEALLOC" in suffix
            registers = [int(r) for r in re.findall(r"\bR(\d+)\b", operands)]
            current.highest_register = max([current.highest_register, *registers])
            if producer:
                current.highest_producer_register = max([current.highest_producer_register, *registers])


def read_object(path: Path) -> list[Kernel]:
    kernels = read_log(Path(f"{path}.log").read_text())
    if kernels:
        read_sass(subprocess.run([cuobjdump(), "-sass", path], capture_output=True, text=True, check=True).stdout, kernels)
    return list(kernels.values())


def compiled(folder: Path = native_build.FOLDER) -> list[Kernel]:
    """All kernels, from the objects of the module's build, brought up to date; processes that come meanwhile wait for the first."""
    units = native_build_cuda.kernel_units(native_build_cuda.nvcc())
    objects = [folder / f"{unit.source.stem}.o" for unit in units]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        native_build.write_ninja(units, [], folder / "kernels.so", folder)
        run = subprocess.run([native_build.ninja(), "-C", folder, *objects], capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(run.stdout + run.stderr)
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in (Path(__file__), *objects)))
        result = folder / f"report-{digest.hexdigest()[:16]}.pickle"
        if not result.exists():
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                parts = list(pool.map(read_object, objects))
            result.write_bytes(pickle.dumps([vars(k) for part in parts for k in part]))
    return [Kernel(**k) for k in pickle.loads(result.read_bytes())]


def table(kernels: list[Kernel], shared: dict[str, int]) -> str:
    """One row per kernel; element types with the same figures share it."""
    rows: dict[tuple, list[str]] = {}
    for k in sorted(kernels, key=lambda k: k.name):
        figures = (f"{k.highest_producer_register}, {k.highest_register}", k.spill_stores + k.spill_loads, shared.get(k.name, ""))
        element = "bf16" if "<bf16" in k.name else "fp16"
        key = (k.name.replace(element + ", ", ""), *figures, *(k.sass[op] for op in ("HGMMA", "UTMALDG", "UTMASTG")), k.membar_gpu)
        rows.setdefault(key, []).append(element)
    head = ("kernel", "highest register (producer, consumer)", "spills", "shared memory", "HGMMA", "UTMALDG", "UTMASTG", "MEMBAR.GPU", "types")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join(lines + ["| " + " | ".join(map(str, (*key, " ".join(types)))) + " |" for key, types in rows.items()])


# One H200, as measured elsewhere: bf16 cuBLAS at 8192^3 and device-to-device copy. A wgmma m64n256k16 takes 128 cycles, 2048 FMA per cycle and SM.
FLOPS, BYTES, SMS, FMA = 790e12, 4.3e12, 132, 2048


def predicted(M: int, N: int, K: int, R: int) -> dict[str, float]:
    """Time over that of the base GEMM alone, if the main loop runs as fast as cuBLAS: what the rank-R part adds by instruction and byte counts.

    The rank step adds ceil(R / 16) steps to the K loop; the tiles of column 0 add a wgmma m64nRk16 per step, which takes max(R / 2, 16) cycles as it
    reads its A tile again; dA and dB read x and dy once each.
    """
    clock = FLOPS / (2 * FMA * SMS)

    def update(N: int, K: int) -> float:
        base = 2 * M * N * K / FLOPS
        column0 = M / 64 * K / 16 * max(R / 2, 16) / SMS / clock
        return (base * (1 + -(-R // 16) * 16 / K) + column0) / base

    base = 2 * M * N * K / FLOPS
    reductions = 2 * M * (N + K) / BYTES
    forward, dx = update(N, K), update(K, N)
    return {"forward": forward, "dx": dx, "forward + backward": (base * (forward + dx) + reductions) / (2 * base)}


def predictions() -> str:
    rows = ["| M = 8192, N x K | R | forward | dx | forward + backward |", "|---|---|---|---|---|"]
    for N, K in ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192)):
        for R in (16, 64):
            rows.append(f"| {N} x {K} | {R} | " + " | ".join(f"{v:.3f}" for v in predicted(8192, N, K, R).values()) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    try:
        from lora_kernels import _C

        sizes = _C.cuda_kernels()
    except (ImportError, AttributeError):
        sizes = {}
    print(table(compiled(), sizes))
    print("\n" + predictions())
