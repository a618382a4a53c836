"""Builds the PTX emulator and puts it where a GPU would be: behind Triton as its driver, behind csrc/cuda as its runtime.

`library()` is libcuda.so.1; `cuda_module()` the CUDA part of `_C` compiled to PTX and linked against it. Both are kept in build/ptx and built again
when a source has changed.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUT = ROOT / "build" / "ptx"
sys.path.insert(0, str(ROOT / "csrc"))
sys.path.insert(0, str(ROOT / "csrc" / "cuda"))
FLAGS = ["-std=c++20", "-O3", "-march=native", "-ffp-contract=off", "-fPIC", "-fwrapv", "-fno-strict-aliasing", "-Wall", "-Wextra"]


def _ninja(name: str, units: list, target: Path, link: list[str]) -> Path:
    import native_build

    folder = OUT / name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:  # several test processes may come at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        native_build.write_ninja(units, link, target, folder)
        run = subprocess.run([native_build.ninja(), "-C", str(folder)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return target


def has_nvcc() -> bool:
    import native_build_cuda

    return native_build_cuda.nvcc() is not None


@functools.cache
def library() -> ctypes.CDLL:
    import native_build
    import native_build_cuda
    import triton

    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"  # cuda.h
    skip = {"module", "runtime"}
    if has_nvcc():
        include = native_build_cuda.toolkit(native_build_cuda.nvcc()) / "include"
        skip.remove("runtime")
    sources = [source for source in sorted(HERE.glob("*.cpp")) if source.stem not in skip]
    units = [native_build.Unit(source, [*native_build.compiler(), *FLAGS, f"-I{include}"]) for source in sources]
    target = _ninja("emulator", units, OUT / "libcuda.so.1", ["-Wl,-soname,libcuda.so.1"])
    loaded = ctypes.CDLL(str(target), mode=ctypes.RTLD_GLOBAL)
    loaded.emulator_error.restype = ctypes.c_char_p
    loaded.emulator_instructions.restype = ctypes.c_uint64
    return loaded


@functools.cache
def cuda_module() -> ModuleType:
    """`bind_cuda` of csrc/cuda on the emulator."""
    import native_build
    import native_build_cuda
    import pybind11

    library()
    includes = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    compiler = [
        native_build_cuda.nvcc(),
        "-std=c++17",
        "-O3",
        "-lineinfo",
        "-no-compress",
        "-Xcompiler",
        "-fPIC,-fvisibility=hidden",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]
    sources = [*native_build_cuda.sources(), ROOT / "csrc" / "cuda" / "bindings_cuda.cpp"]
    units = [native_build.Unit(source, [*compiler, *includes]) for source in sources]
    units.append(native_build.Unit(HERE / "module.cpp", [*native_build.compiler(), *FLAGS, "-fvisibility=hidden", *includes]))
    target = OUT / f"_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    _ninja("cuda", units, target, [f"-L{OUT}", "-l:libcuda.so.1", f"-Wl,-rpath,{OUT}"])
    spec = importlib.util.spec_from_file_location("_emulated", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def reset(seed: int, multiprocessors: int, steps: int = 10**10) -> None:
    """Another interleaving. steps: instructions of one launch before it counts as endless."""
    library().emulator_reset(ctypes.c_uint64(seed), multiprocessors, ctypes.c_uint64(steps))


def synchronize() -> None:
    if library().emulator_synchronize():
        raise RuntimeError(library().emulator_error().decode())


def as_triton_driver() -> None:
    """Makes the emulator this process's only GPU for Triton; kernels take CPU tensors. What ptxas would compile is executed as PTX instead."""
    sys.path.insert(0, str(HERE.parent / "triton"))
    from fake_cuda import FakeDriver
    from triton import knobs, runtime

    def keep_ptx(backend: object = None, stages: dict | None = None, *_: object) -> tuple[str, str] | None:
        if stages is None:
            return "emulator", "emulator"  # a part of Triton's cache key, and its hash
        stages["cubin"] = lambda ptx, metadata: ptx.encode() + b"\0"

    library()
    os.environ["TRITON_CACHE_DIR"] = str(OUT / "triton")
    knobs.nvidia.libcuda_path = str(OUT)
    knobs.runtime.add_stages_inspection_hook = keep_ptx
    runtime.driver.set_active(FakeDriver())


@contextlib.contextmanager
def planted(was: str, now: str) -> Iterator[None]:
    """Kernels run with this text of their PTX replaced."""
    library().emulator_plant(was.encode(), now.encode())
    try:
        yield
        assert library().emulator_replaced(), f"no kernel holds {was!r}"
    finally:
        library().emulator_plant(b"", b"")
