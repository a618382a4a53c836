"""Results files: one JSON per device and suite, written after every case, so that a run cut off keeps what it has."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import get_type_hints

from .._errors import LoraValueError, message
from .files import write_whole
from .shapes import SHORT, Case
from .timing import Ratio

SCHEMA = 1
SUITES = ("linear", "batched", "steps")


class Writer:
    """`folder/<suite>.json`, replaced as a whole each time, so that a reader never sees half a file.

    Where a complete one is, of an earlier run, `<suite>.part.json` until this run is complete: less never takes the place of more.
    """

    def __init__(self, folder: Path, suite: str, provenance: dict, roofs: dict):
        self.final = self.path = folder / f"{suite}.json"
        with contextlib.suppress(LoraValueError):  # none that is complete
            if self.final.is_file() and read(self.final).get("complete"):
                self.path = folder / f"{suite}.part.json"
        self.data = {"schema": SCHEMA, "suite": suite, "complete": False, "provenance": provenance, "roofs": roofs, "records": []}

    def add(self, record: dict) -> None:
        self.data["records"].append(record)
        self._write()

    def close(self, complete: bool = True, **provenance: object) -> None:
        self.data["complete"] = complete
        self.data["provenance"].update(provenance)
        part = self.path
        if complete:
            self.path = self.final
        self._write()
        if self.path != part:
            part.unlink(missing_ok=True)

    def where(self) -> str:
        """Where what was measured lies, in words."""
        return f"{self.path}" if self.path == self.final else f"{self.path}, beside the complete {self.final.name} of an earlier run"

    def _write(self) -> None:
        write_whole(self.path, json.dumps(self.data, indent=1) + "\n")


def read(path: Path) -> dict:
    """One results file, checked to be one."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise LoraValueError(message(f"{path} cannot be read", f"{type(error).__name__}: {error}", fix="run lora-kernels bench again")) from error
    ours = isinstance(data, dict) and data.get("schema") == SCHEMA and data.get("suite") in SUITES
    if not ours or not isinstance(data.get("records"), list) or not isinstance(data.get("provenance"), dict):
        raise LoraValueError(message(f"{path} is no results file of this version", allowed=f"schema {SCHEMA}", fix="run lora-kernels bench again"))
    wrong = [_wrong_record(record, data["suite"], f"records[{i}]") for i, record in enumerate(data["records"])]
    if wrong:  # without results nothing is read of where they are from
        wrong.insert(0, _wrong(data["provenance"], _WHERE, "provenance"))
    if found := next(filter(None, wrong), None):
        raise LoraValueError(message(f"{path} is damaged", found, fix="run lora-kernels bench again"))
    return data


# What is read of a record for tables, plots and figures; `_wrong` says how a type stands for a JSON value.
_WHERE = {"device": {"type": str, "name": str}, "versions": {"torch": str}, "threads": int, "date": str}
_LAYER = {"case": Case, "floor": {"us": float, "bytes": int}, "results": [dict]}
_STEPS = {"case": {"model": str, "tokens": int, "R": int, "dtype": str, "steps": int}, "results": [dict]}
_TIMED = {"us": float, "q20": float, "q80": float, "errors": [float], "over": [Ratio]}
_STEP_TIMED = _TIMED | {"tokens_per_s": float, "last_loss": float, "peak_bytes": int, "saved_bytes": int}


def _wrong_record(record: object, suite: str, at: str) -> str | None:
    whole, timed = (_STEPS, _STEP_TIMED) if suite == "steps" else (_LAYER, _TIMED)
    wrong = _wrong(record, whole, at)
    if wrong:
        return wrong
    if record["case"]["dtype"] not in SHORT:
        return f"{at}.case.dtype {record['case']['dtype']!r}"[:200]
    entries = {name: entry for name, entry in record["results"].items() if "us" in entry}
    return _wrong(entries, [timed], f"{at}.results") or next(filter(None, (_not_times(e, f"{at}.results.{n}") for n, e in entries.items())), None)


def _not_times(entry: dict, at: str) -> str | None:
    """Where times and ratios of times are not what was measured: above 0, the median between the quantiles."""
    times = {"us": (entry["q20"], entry["us"], entry["q80"])}
    times |= {f"over.{name}": (found["q20"], found["median"], found["q80"]) for name, found in entry["over"].items()}
    return next((f"{at}.{name} {found}" for name, found in times.items() if not 0 < found[0] <= found[1] <= found[2]), None)


def _wrong(value: object, wanted: type | dict | list, at: str) -> str | None:
    """Where a value is not as wanted, or None: of a type, of a dataclass's fields and no others, with these keys, or [for all] its keys."""
    fields = get_type_hints(wanted) if is_dataclass(wanted) else wanted
    shown = f"{at} {value!r}"[:200]
    if isinstance(fields, type):
        return None if isinstance(value, (int, float) if fields is float else fields) else shown
    if not isinstance(value, dict) or (fields is not wanted and set(value) - set(fields)):
        return shown
    inner = dict.fromkeys(value, fields[0]) if isinstance(fields, list) else fields
    return next(filter(None, (_wrong(value.get(key), what, f"{at}.{key}") for key, what in inner.items())), None)


def read_folder(folder: Path, suites: Sequence[str] = SUITES) -> dict[str, dict]:
    """Suite -> its file's content, for those that are there."""
    return {suite: read(folder / f"{suite}.json") for suite in suites if (folder / f"{suite}.json").is_file()}


def batch_of(record: dict) -> str:
    """The tokens of a training step, "4 × 128": sequences and their length."""
    sequences = record["case"].get("sequences", 1)
    return f"{sequences} × {record['case']['tokens'] // sequences}"


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
