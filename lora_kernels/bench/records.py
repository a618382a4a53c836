"""Results files: one JSON per device and suite, written after every case, so that a run cut off keeps what it has."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from .._errors import LoraValueError, message
from .files import write_whole
from .shapes import Case
from .timing import Ratio

SCHEMA = 1
SUITES = ("linear", "batched", "steps")


class Writer:
    """`folder/<suite>.json`, replaced as a whole each time, so that a reader never sees half a file."""

    def __init__(self, folder: Path, suite: str, provenance: dict, roofs: dict):
        self.path = folder / f"{suite}.json"
        self.data = {"schema": SCHEMA, "suite": suite, "complete": False, "provenance": provenance, "roofs": roofs, "records": []}

    def add(self, record: dict) -> None:
        self.data["records"].append(record)
        self._write()

    def close(self, complete: bool = True, **provenance: object) -> None:
        self.data["complete"] = complete
        self.data["provenance"].update(provenance)
        self._write()

    def _write(self) -> None:
        write_whole(self.path, json.dumps(self.data, indent=1) + "\n")


def read(path: Path) -> dict:
    """One results file, checked to be one."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise LoraValueError(message(f"{path} cannot be read", f"{type(error).__name__}: {error}", fix="run lora-kernels bench again")) from error
    ours = isinstance(data, dict) and data.get("schema") == SCHEMA and data.get("suite") in SUITES
    if not ours or not isinstance(data.get("records"), list) or not isinstance(data.get("provenance"), dict):
        raise LoraValueError(message(f"{path} is no results file of this version", allowed=f"schema {SCHEMA}", fix="run lora-kernels bench again"))
    return data


def read_folder(folder: Path, suites: Sequence[str] = SUITES) -> dict[str, dict]:
    """Suite -> its file's content, for those that are there."""
    return {suite: read(folder / f"{suite}.json") for suite in suites if (folder / f"{suite}.json").is_file()}


def case_of(record: dict) -> Case:
    return Case(**record["case"])


def main_dtype(data: dict) -> str:
    """The dtype of most cases of a results file."""
    dtypes = [record["case"]["dtype"] for record in data["records"]]
    return max(dict.fromkeys(dtypes), key=dtypes.count, default="bfloat16")


def like_peft(results: dict) -> dict:
    """Our entry with fp32 adapters, as PEFT makes them: "ours" where all is fp32."""
    entry = results.get("ours_fp32", {})
    return results.get("ours", {}) if "absent" in entry else entry


def ratio(entry: dict, reference: str) -> Ratio | None:
    """One contestant's time over the reference's, None where either was not timed."""
    found = entry.get("over", {}).get(reference)
    return Ratio(**found) if found else None


def inverse(entry: Ratio | None) -> Ratio | None:
    """A time ratio as a speed-up."""
    return entry and Ratio(1 / entry.median, 1 / entry.q80, 1 / entry.q20)
