"""Builds the package; see pyproject.toml.

The native module `lora_kernels._C` is optional: without a compiler the wheel installs and PyTorch serves. A build variable that cannot be
followed (LORA_KERNELS_CUDA, LORA_KERNELS_ARCHS) ends the build.
"""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))  # PEP 517 front ends do not put the project on the path


class BuildNative(build_ext):
    def build_extension(self, ext):
        import native_build  # csrc/native_build.py: what is compiled, and how

        folder = native_build.FOLDER if self.editable_mode else Path(self.build_temp).resolve()
        try:
            native_build.build(Path(self.get_ext_fullpath(ext.name)).resolve(), folder)
        except native_build.CannotBuild as why:
            print(f"lora_kernels: the native module is not built: {why}", file=sys.stderr)
        except native_build.BadSetting as why:
            sys.exit(f"lora_kernels: {why}")


setup(ext_modules=[Extension("lora_kernels._C", sources=[], optional=True)], cmdclass={"build_ext": BuildNative})
