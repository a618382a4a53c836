"""csrc/native_build.py: without a C++ compiler an install goes on without the module, with a wrong build variable it stops; both say why."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lora_kernels import _env

ROOT = Path(__file__).resolve().parent.parent


def load(monkeypatch, path: str):
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def native_build(monkeypatch):
    module = load(monkeypatch, "csrc/native_build.py")
    monkeypatch.setattr(module, "cuda_part", lambda build_dir: None)
    return module


def test_no_compiler_on_the_path(native_build, monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(native_build.CannotBuild, match="no C\\+\\+ compiler found; fix: install"):
        native_build.build(tmp_path / "lib" / "_C.so", tmp_path / "build")
    assert not (tmp_path / "lib" / "_C.so").exists()


def test_a_compiler_that_is_not_there(native_build, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    pytest.importorskip("ninja")
    with pytest.raises(native_build.CannotBuild, match="the compiler failed, see above"):
        native_build.build(tmp_path / "lib" / "_C.so", tmp_path / "build")
    assert not (tmp_path / "lib" / "_C.so").exists()


def test_what_a_compiler_said_is_kept_and_shown_if_it_failed(native_build, tmp_path):
    pytest.importorskip("ninja")
    source = tmp_path / "one.cpp"
    source.touch()

    def run(code: int) -> str:
        compiler = tmp_path / f"compiler{code}"
        compiler.write_text(f"#!/bin/sh\necho 168 registers\ntouch {tmp_path}/one.o {tmp_path}/one.o.d\nexit {code}\n")
        compiler.chmod(0o755)
        native_build.write_ninja([native_build.Unit(source, [str(compiler)], keep_log=True)], [], tmp_path / "_C.so", tmp_path)
        done = subprocess.run([native_build.ninja(), "-C", tmp_path, tmp_path / "one.o"], capture_output=True, text=True)
        assert bool(done.returncode) == bool(code)
        return done.stdout

    assert "FAILED" in run(1)
    assert "\n168 registers" in run(1)
    assert "\n168 registers" not in run(0)
    assert (tmp_path / "one.o.log").read_text() == "168 registers\n"


def test_cxx_may_carry_arguments(native_build, monkeypatch):
    monkeypatch.setenv("CXX", "ccache clang++")
    assert native_build.compiler() == ["ccache", "clang++"]


def test_a_module_in_use_is_replaced_not_written_over(native_build, monkeypatch, tmp_path):
    pytest.importorskip("ninja")
    linker, target = tmp_path / "linker", tmp_path / "_C.so"
    monkeypatch.setenv("CXX", str(linker))
    target.write_text("old")
    with target.open() as in_use:
        for code, left in ((1, "old"), (0, "new")):
            linker.write_text(f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\nprintf new > "$2"\nexit {code}\n')
            linker.chmod(0o755)
            native_build.write_ninja([], [], target, tmp_path)
            done = subprocess.run([native_build.ninja(), "-C", tmp_path], capture_output=True, text=True)
            assert (bool(done.returncode), target.read_text()) == (bool(code), left), done.stdout
        assert in_use.read() == "old"


def setup_py(tmp_path, **variables: str) -> subprocess.CompletedProcess:
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "tmp")]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "CXX": "/nonexistent/c++", **variables}, capture_output=True, text=True)


@pytest.mark.parametrize("name, value, allowed", [("CUDA", "yes", "0, 1, auto"), ("ARCHS", "90", "90a")], ids=["cuda", "archs"])
def test_setup_stops_at_a_variable_that_it_cannot_follow(tmp_path, name, value, allowed):
    """Also where the module could not be built anyway."""
    done = setup_py(tmp_path, **{f"LORA_KERNELS_{name}": value})
    assert done.returncode == 1
    assert f"lora_kernels: LORA_KERNELS_{name} " in done.stderr
    assert f"{value!r}; allowed: {allowed}; fix: ".replace("'90'", "90") in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("version, got", [(None, "no nvcc found"), ((12, 4), "nvcc 12.4")], ids=["none", "old"])
def test_cuda_that_is_asked_for_and_cannot_be_built_stops_the_build(native_build, monkeypatch, tmp_path, version, got):
    cuda = load(monkeypatch, "csrc/cuda/native_build_cuda.py")
    monkeypatch.setattr(cuda, "nvcc", lambda: version and "nvcc")
    monkeypatch.setattr(cuda, "version", lambda compiler: version)
    monkeypatch.setattr(native_build, "cuda_part", cuda.part)
    monkeypatch.setenv("LORA_KERNELS_CUDA", "1")
    with pytest.raises(native_build.BadSetting, match=f"got {got}; allowed: {_env.NVCC} or newer; fix: "):
        native_build.build(tmp_path / "_C.so", tmp_path / "build")
    monkeypatch.setenv("LORA_KERNELS_CUDA", "auto")
    assert cuda.part(tmp_path) is None


def test_setup_goes_on_without_the_module(tmp_path):
    done = setup_py(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the native module is not built" in done.stderr
    assert not list(tmp_path.rglob("_C*.so"))


def test_the_package_works_without_the_module():
    """In a fresh interpreter to which lora_kernels._C cannot be imported."""
    code = """
import sys
sys.modules["lora_kernels._C"] = None
import torch
import lora_kernels as lk
from lora_kernels.ops import _registry
x, ids = torch.ones(3, 8), torch.tensor([0, -1, 1], dtype=torch.int32)
lk.lora_linear(x, torch.ones(5, 8), None, torch.ones(2, 8), torch.ones(5, 2))
lk.lora_batched_linear(x, torch.ones(5, 8), None, torch.ones(2, 4, 8), torch.ones(2, 5, 4), ids)
print(_registry.provider("cpu"))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the native module is not built" in done.stdout
    assert "fix:" in done.stdout


def test_a_source_distribution_holds_the_sources_and_builds(tmp_path):
    here, there = ROOT, tmp_path / "tree"
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "csrc", "lora_kernels/_version.py", "lora_kernels/tuning"):
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (here / name).is_dir() else shutil.copy
        copy(here / name, there / name)
    build = "import setuptools.build_meta as backend; print(backend.build_{}('{}'))"
    subprocess.run([sys.executable, "-c", build.format("sdist", tmp_path)], cwd=there, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "unpacked", filter="data")
    (root,) = (tmp_path / "unpacked").iterdir()
    sources = {path.relative_to(there) for path in (there / "csrc").rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert sources
    assert not [path for path in sources if not (root / path).is_file()]
    without = os.environ | {"CC": "/nonexistent", "CXX": "/nonexistent"}
    subprocess.run([sys.executable, "-c", build.format("wheel", tmp_path)], cwd=root, env=without, check=True, capture_output=True)
    assert list(tmp_path.glob("*.whl"))
