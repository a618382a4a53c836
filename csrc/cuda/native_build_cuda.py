"""The CUDA part of `lora_kernels._C`: finds nvcc and says what is compiled. Called by csrc/native_build.py.

LORA_KERNELS_CUDA=0 leaves the CUDA kernels out, 1 fails without nvcc, auto (the default) builds them where nvcc is found.
LORA_KERNELS_ARCHS: comma-separated; the kernels exist for 90a (H100, H200). NVCC names the compiler.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
ARCHS = ("90a",)
OLDEST = (12, 5)  # cudaGetDriverEntryPointByVersion; the PTX would do with 8.3
FLAGS = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v"]


def wanted() -> str:
    value = os.environ.get("LORA_KERNELS_CUDA", "").strip().lower() or "auto"
    if value not in ("0", "1", "auto"):
        raise _bad(f"LORA_KERNELS_CUDA is no choice; got {value!r}; allowed: 0, 1, auto; fix: unset it or name one of these")
    return value


def archs() -> list[str]:
    named = [a.strip() for a in os.environ.get("LORA_KERNELS_ARCHS", "").split(",") if a.strip()] or list(ARCHS)
    unknown = sorted(set(named) - set(ARCHS))
    if unknown:
        fix = "unset it, other GPUs use the Triton kernels"
        raise _bad(f"LORA_KERNELS_ARCHS names what no kernel is for; got {', '.join(unknown)}; allowed: {', '.join(ARCHS)}; fix: {fix}")
    return named


def nvcc() -> str | None:
    """$NVCC, $CUDA_HOME/bin/nvcc, the path, or /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [os.environ.get("NVCC"), home and f"{home}/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for c in candidates if c and (found := shutil.which(c))), None)


def version(compiler: str) -> tuple[int, int]:
    text = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    major, minor = re.search(r"release (\d+)\.(\d+)", text).groups()
    return int(major), int(minor)


def toolkit(compiler: str) -> Path:
    """The folder that holds bin/, include/ and lib64/; nvcc on the path may be a wrapper script, so nvcc itself is asked."""
    run = subprocess.run([compiler, "--dryrun", "-x", "cu", "-E", os.devnull], capture_output=True, text=True)
    return Path(re.search(r"^#\$ TOP=(.*)$", run.stderr, re.M).group(1)).resolve()


def command(compiler: str) -> list[str]:
    return [compiler, *FLAGS, *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs())]


def sources() -> list[Path]:
    """Kernels, slowest to compile first; then host code."""
    kernels = ["forward_update.cu", "dx_update.cu", "shrink.cu", "forward_column0.cu", "dx_column0.cu", "linear_call.cu"]
    return [HERE / name for name in (*kernels, "host.cpp")]


def kernel_units(compiler: str) -> list:
    """What ptxas says of them is read by cuda_report.py; another nvcc makes them anew."""
    from native_build import Unit

    flags = [*command(compiler), "-DCOMPILED_BY={}.{}".format(*version(compiler))]
    return [Unit(source, flags, keep_log=True) for source in sources() if source.suffix == ".cu"]


def link_flags(compiler: str) -> list[str]:
    """The CUDA runtime is linked in, so the module needs no libcudart and loads where there is no driver."""
    top = toolkit(compiler)
    folders = [top / f for f in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib") if (top / f).is_dir()]
    return [*(f"-L{f}" for f in folders), "-lcudart_static", "-ldl", "-lrt", "-lpthread"]


def part(build_dir: Path):
    """What native_build adds for CUDA, or None where it is not wanted or nvcc is missing."""
    import pybind11
    from native_build import Part, Unit

    mode, _ = wanted(), archs()
    compiler = None if mode == "0" else nvcc()
    if compiler is None or version(compiler) < OLDEST:
        if mode == "1":
            got = "no nvcc found" if compiler is None else "nvcc {}.{}".format(*version(compiler))
            oldest = "{}.{}".format(*OLDEST)
            raise _bad(f"LORA_KERNELS_CUDA=1 needs nvcc; got {got}; allowed: {oldest} or newer; fix: set NVCC or CUDA_HOME, or LORA_KERNELS_CUDA=0")
        return None
    flags = command(compiler)
    includes = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    host = [Unit(source, flags) for source in sources() if source.suffix != ".cu"] + [Unit(HERE / "bindings_cuda.cpp", [*flags, *includes])]
    return Part(kernel_units(compiler) + host, defines=["-DLORA_KERNELS_CUDA"], link=link_flags(compiler))


def _bad(why: str) -> Exception:
    from native_build import BadSetting

    return BadSetting(why)
