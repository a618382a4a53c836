"""One archive of a `make gpu` run, laid out as this repository is: `tar xzf ARCHIVE` in a checkout puts everything where it belongs.

benchmarks/results/<gpu>/               what the benchmarks wrote, summary.json, logs/<step>.log
lora_kernels/tuning/configs/<gpu>.json  the measured plans, where there are any
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from pathlib import Path

LOG_BYTES = 400_000  # the end of each log: a run has some twenty, so that even incompressible ones stay under the limit
MOST_BYTES = 16 << 20


def folder_name(gpu: str) -> str:
    """As `lora_kernels.bench.provenance` and `lora_kernels.tuning.store` name a GPU."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def members(work: Path, gpu: str) -> dict[str, bytes]:
    """Name in the archive -> content."""
    results = f"benchmarks/results/{folder_name(gpu)}"
    found = {f"{results}/logs/{log.name}": log.read_bytes()[-LOG_BYTES:] for log in sorted(work.glob("*.log"))}
    for path in sorted([work / "summary.json", *(work / "results").glob("*")]):
        if path.is_file() and path.suffix != ".part":
            found[f"{results}/{path.name}"] = path.read_bytes()
    for path in (work / "plans").glob("*.json"):
        found[f"lora_kernels/tuning/configs/{path.name}"] = path.read_bytes()
    return found


def pack(work: Path, target: Path, gpu: str) -> int:
    """Write the archive anew, as a whole, and return its size; pictures are left out where it would grow past MOST_BYTES."""
    found = members(work, gpu)
    for keep in (lambda name: True, lambda name: not name.endswith(".png")):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            for name, content in found.items():
                if keep(name):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
        if buffer.tell() <= MOST_BYTES:
            break
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".part")
    part.write_bytes(buffer.getvalue())
    os.replace(part, target)
    return buffer.tell()
