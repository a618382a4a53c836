"""Compiles `lora_kernels._C` with ninja: C++ for the CPU always, CUDA where csrc/cuda brings its part and nvcc is found. Needs no torch.

`python csrc/native_build.py` builds it in place, whatever setuptools is there; an editable install keeps its objects in the same FOLDER. CXX,
CXXFLAGS and LDFLAGS are honoured. The CUDA part joins through `csrc/cuda/native_build_cuda.py`: a function `part(build_dir) -> Part | None`.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

CSRC = Path(__file__).resolve().parent
FOLDER = CSRC.parent / "build" / f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
_BF16 = [*_AVX512, "-mavx512bf16"]
ISA_FLAGS = {"portable": [], "avx2": _AVX2, "avx512": _AVX512, "avx512_bf16": _BF16, "amx_bf16": [*_BF16, "-mamx-tile", "-mamx-bf16"]}
_X86 = ("x86_64", "amd64")


class CannotBuild(Exception):
    """Why the native module is not built; an install goes on without it."""


class BadSetting(Exception):
    """A build variable has no such value, or asks for what is not here: an install stops, or a typo would cost the module unseen."""


@dataclass
class Unit:
    """One object file: a source, the compiler's command line before `-c source -o object`."""

    source: Path
    command: list[str]
    keep_log: bool = False  # what the compiler said, in source.o.log


@dataclass
class Part:
    """What one engine adds to the module."""

    units: list[Unit] = field(default_factory=list)
    defines: list[str] = field(default_factory=list)  # for bindings.cpp
    link: list[str] = field(default_factory=list)


def compiler() -> list[str]:
    """$CXX, or the first C++ compiler on the path."""
    if os.environ.get("CXX"):
        return os.environ["CXX"].split()
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return [name]
    raise CannotBuild("no C++ compiler found; fix: install g++ or clang, or set CXX, and reinstall")


def cxx_command(*flags: str) -> list[str]:
    return [*compiler(), *CXX_FLAGS, *flags, *os.environ.get("CXXFLAGS", "").split()]


def cpu_part() -> Part:
    """csrc/cpu: one file per instruction set with its own flags, and drivers that any CPU runs."""
    skip = [] if platform.machine().lower() in _X86 else [isa for isa in ISA_FLAGS if isa != "portable"]
    units = []
    for source in sorted((CSRC / "cpu").glob("*.cpp")):
        isa = source.stem.removeprefix("isa_") if source.stem.startswith("isa_") else None
        if isa not in skip:
            # gcc 12 takes the undefined operand inside its own AVX-512 intrinsics for ours; its rewriting of addresses in loops (ivopts) costs the
            # panel kernel 2.5 % on Zen 5
            own = ["-Wno-unused-function"] if "clang" in compiler()[0] else ["-Wno-maybe-uninitialized", "-fno-ivopts"]
            flags = [] if isa is None else [*ISA_FLAGS[isa], *own]
            units.append(Unit(source, cxx_command(*flags)))
    return Part(units, link=["-ldl"] if sys.platform.startswith("linux") else [])


def cuda_part(build_dir: Path) -> Part | None:
    """csrc/cuda's own say; None without it or without nvcc."""
    hook = CSRC / "cuda" / "native_build_cuda.py"
    if not hook.exists():
        return None
    spec = importlib.util.spec_from_file_location("native_build_cuda", hook)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.part(build_dir)


def bindings(defines: list[str]) -> list[Unit]:
    import pybind11

    includes = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}", f"-I{CSRC}"]
    return [Unit(source, cxx_command(*includes, *defines, "-O2")) for source in sorted(CSRC.glob("bindings*.cpp"))]


def ninja() -> str:
    found = shutil.which("ninja")
    if found:
        return found
    try:
        import ninja as package
    except ImportError:
        raise CannotBuild("ninja is not installed; fix: pip install ninja") from None
    return str(Path(package.BIN_DIR) / "ninja")


def _escape(text: str) -> str:
    return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def write_ninja(units: list[Unit], link: list[str], target: Path, build_dir: Path) -> None:
    lines = ["ninja_required_version = 1.5", "rule compile", "  command = $cmd -MMD -MF $out.d -c $in -o $out $log"]
    lines += ["  deps = gcc", "  depfile = $out.d"]
    lines += ["rule link", "  command = $cmd $in -o $out.part $libs && mv -f $out.part $out"]  # whole: a process may have it loaded
    objects = []
    for unit in units:
        objects.append(_escape(str(build_dir / f"{unit.source.stem}.o")))
        lines += [f"build {objects[-1]}: compile {_escape(str(unit.source))}", f"  cmd = {' '.join(unit.command)}"]
        if unit.keep_log:
            log = shlex.quote(str(build_dir / f"{unit.source.stem}.o.log")).replace("$", "$$")
            lines += [f"  log = > {log} 2>&1 || (cat {log}; exit 1)"]
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    lines += [f"build {_escape(str(target))}: link {' '.join(objects)}"]
    lines += [f"  cmd = {' '.join([*compiler(), '-shared', *undefined])}", f"  libs = {' '.join([*link, *os.environ.get('LDFLAGS', '').split()])}"]
    (build_dir / "build.ninja").write_text("\n".join(lines) + "\n")


def build(target: Path, build_dir: Path) -> None:
    """Compile and link the module to `target`."""
    try:
        import pybind11  # noqa: F401
    except ImportError:
        raise CannotBuild("pybind11 is not installed; fix: pip install pybind11, or pip install without --no-build-isolation") from None
    build_dir.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    cuda = cuda_part(build_dir)  # first: it checks the variables, which a missing compiler must not hide
    parts = [cpu_part(), *([cuda] if cuda else [])]
    units = [unit for part in parts for unit in part.units] + bindings([d for part in parts for d in part.defines])
    write_ninja(units, [flag for part in parts for flag in part.link], target, build_dir)
    run = subprocess.run([ninja(), "-C", str(build_dir)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(run.stdout)
    if run.returncode:
        raise CannotBuild("the compiler failed, see above; fix: a compiler with C++17 (g++ 11, clang 13 or newer)")


def main() -> None:
    """Into the source tree, without setuptools."""
    target = CSRC.parent / "lora_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    build(target, FOLDER)


if __name__ == "__main__":
    try:
        main()
    except (BadSetting, CannotBuild) as why:
        sys.exit(f"native_build: {why}")
