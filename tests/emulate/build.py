"""`make emulate`: a copy of the package in build/emulate whose AVX-512 and AMX kernels run on any CPU, their intrinsics emulated (immintrin.h,
tiles.h).

It shows that their code computes the right thing, on machines that cannot run it; nothing of its speed. Needs SIMDe's headers.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "csrc"))
import native_build  # noqa: E402

EMULATED = [
    "-O1",
    "-Wno-ignored-attributes",
    "-Wno-psabi",
    "-DSIMDE_NO_NATIVE",
    f"-I{HERE}",
]  # -O3 takes gcc 12 several minutes on 1500 lines of emulation in every tile


def main() -> None:
    probe = subprocess.run([*native_build.compiler(), "-x", "c++", "-E", "-"], input="#include <simde/x86/avx512.h>", capture_output=True, text=True)
    if probe.returncode:
        sys.exit("emulate: SIMDe's headers are missing; fix: apt-get install libsimde-dev")
    out = ROOT / "build" / "emulate"
    shutil.rmtree(out / "lora_kernels", ignore_errors=True)
    shutil.copytree(ROOT / "lora_kernels", out / "lora_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    native_build.ISA_FLAGS.update(avx512=EMULATED, avx512_bf16=EMULATED, amx_bf16=EMULATED)
    cpu_part = native_build.cpu_part

    def every_isa() -> native_build.Part:
        part = cpu_part()
        for unit in part.units:
            if unit.source.stem == "isa":
                unit.command += ["-include", str(HERE / "every_isa.h")]
        return part

    native_build.cpu_part, native_build.cuda_part = every_isa, lambda build_dir: None
    native_build.build(out / "lora_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", out / "objects")


if __name__ == "__main__":
    main()
