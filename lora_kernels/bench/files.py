"""Files that hold hours of measuring: a folder that can be written to, known before, and no file that is half written."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from .._errors import LoraValueError, message


def check_writable(folder: Path, what: str, fix: str) -> None:
    """Make the folder where it is missing, and write a file in it. Raises LoraValueError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(b"x")
    except OSError as error:
        raise LoraValueError(message(f"{what}: {folder} cannot be written to", error.strerror, "a folder of yours", fix)) from None


def check_replaceable(path: Path, fix: str) -> None:
    """Raises LoraValueError where `write_whole` would find anything but a file to replace."""
    if path.exists() and not path.is_file():
        raise LoraValueError(message(f"{path} cannot be written", "a folder" if path.is_dir() else "no regular file", "a file, or nothing yet", fix))


@contextlib.contextmanager
def hold(folder: Path, fix: str) -> Iterator[None]:
    """A lock on the folder for the block. Raises LoraValueError where another process has it. None where the system or the disk has no locks."""
    if fcntl is None:
        yield
        return
    held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LoraValueError(message(f"{folder} is in use", "another process that writes there", "one at a time", fix)) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(held)


def write_whole(path: Path, text: str) -> None:
    """Replace the file as a whole: readers never see half of it, and where it cannot be written the old one stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    try:
        part.write_text(text)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
