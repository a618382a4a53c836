"""Reading a .safetensors file that nobody vouches for.

The header is checked against the file's own size before any tensor is read, and tensors are read, not mapped: a file that is cut short
while it is being read gives an error here, where a mapped one would kill the process (SIGBUS).
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .._errors import LoraValueError, message

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_HEADER = 100_000_000  # bytes; the format's own limit
MAX_DIMS = 8


class Entry(NamedTuple):
    """One tensor of a file: its bytes are start ... end - 1 after the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def open_regular(path: Path):
    """The file opened for reading bytes; refuses what is no regular file (opening a FIFO would wait for a writer)."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        raise LoraValueError(message(f"{path.name} cannot be opened", getattr(error, "strerror", None) or error, "a readable file")) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise LoraValueError(message(f"{path.name} is no regular file", allowed="a regular file"))
    return os.fdopen(descriptor, "rb", buffering=0)


@contextmanager
def reading(name: str) -> Iterator[None]:
    """An OSError while `name` is read (a bad disk, a share that is gone, a file of /proc) becomes LoraValueError."""
    try:
        yield
    except OSError as error:
        raise LoraValueError(message(f"{name} cannot be read", error.strerror or error, "a readable file", "fetch the file again")) from None


def unique_keys(pairs: list[tuple[str, object]]) -> dict:
    """For json.loads: an object that names a key twice is refused, for readers disagree about which one counts."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!r} stands there twice")
    return found


def parse_json(text: bytes, what: str) -> dict:
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise LoraValueError(message(f"{what} is no valid JSON", str(error)[:200])) from None
    if not isinstance(found, dict):
        raise LoraValueError(message(f"{what} is no JSON object", type(found).__name__))
    return found


class TensorFile:
    """An open .safetensors file with a header that holds; `entries` by tensor name.

    Raises LoraValueError: no such file, header or sizes that do not fit the file, unknown dtypes, overlapping or unaccounted bytes.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._file = open_regular(path)
        try:
            self.entries = self._header(os.fstat(self._file.fileno()).st_size)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, name: str, buffer: Tensor) -> Tensor:
        """The tensor `name`, as a view of `buffer` (uint8, on the CPU, at least `end - start` bytes, 8-byte aligned)."""
        entry = self.entries[name]
        size = entry.end - entry.start
        target = memoryview((ctypes.c_char * size).from_address(buffer.data_ptr())).cast("B")
        done = 0
        with reading(self.name):
            self._file.seek(self._data + entry.start)
            while done < size and (got := self._file.readinto(target[done:])):
                done += got
        if done < size:
            raise self._bad(f"the file ended while {name} was read", f"{done} bytes", f"{size} bytes")
        return buffer[:size].view(entry.dtype).view(entry.shape)

    def _header(self, file_size: int) -> dict[str, Entry]:
        if file_size < 8:
            raise self._bad("too short for a header", f"{file_size} bytes", "at least 8")
        length = int.from_bytes(self._exactly(8), "little")
        if length > min(file_size - 8, MAX_HEADER):
            raise self._bad("the declared header size does not fit", f"{length} bytes", f"at most {min(file_size - 8, MAX_HEADER)}")
        header = parse_json(self._exactly(length), f"the header of {self.name}")
        header.pop("__metadata__", None)
        self._data = 8 + length
        entries = {name: self._entry(name, value) for name, value in header.items()}
        at = 0
        for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
            if entry.start != at:
                raise self._bad(f"the bytes of {name} overlap others or leave a gap", f"offset {entry.start}", f"{at}")
            at = entry.end
        if at != file_size - self._data:
            got = f"{file_size - self._data} bytes of data"
            raise self._bad("the file is cut short or has bytes to spare", got, f"{at}, as declared in its header", "fetch the file again")
        return entries

    def _entry(self, name: str, value: object) -> Entry:
        if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
            raise self._bad(f"the header entry of {name!r} is malformed", allowed="dtype, shape and data_offsets")
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise self._bad(f"{name} has an unsupported dtype", repr(dtype)[:40], ", ".join(DTYPES))
        if not _sizes(shape) or len(shape) > MAX_DIMS:
            raise self._bad(f"{name} has a malformed shape", repr(shape)[:80], "a short list of sizes")
        if not _sizes(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].itemsize:
            needed = f"{math.prod(shape) * DTYPES[dtype].itemsize} bytes for {dtype} {shape}"
            raise self._bad(f"{name}: shape and byte range disagree", repr(offsets)[:80], needed[:120])
        return Entry(DTYPES[dtype], tuple(shape), *offsets)

    def _exactly(self, size: int) -> bytes:
        parts = []
        with reading(self.name):
            while size and (part := self._file.read(size)):
                parts.append(part)
                size -= len(part)
        if size:
            raise self._bad("the file ended inside its header")
        return b"".join(parts)

    def _bad(self, what: str, got: object = None, allowed: object = None, fix: str | None = None) -> LoraValueError:
        return LoraValueError(message(f"{self.name}: {what}", got, allowed, fix))


def _sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)
