"""Shared settings: no hub access, deterministic seeds, one thread per worker, GPU tests skipped where there is no GPU."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Generator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # several workers of several threads each would fight for the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# What a user has set for the package is not what the tests are about; these are for the tests themselves.
for _name in [name for name in os.environ if name.startswith("LORA_KERNELS_")]:
    if _name.removeprefix("LORA_KERNELS_") not in ("EMULATE", "ORACLES", "FAILURES", "TEST_SECONDS"):
        del os.environ[_name]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or os.environ.get("LORA_KERNELS_EMULATE") == "1":
        return
    skip = pytest.mark.skip(reason="no CUDA GPU here")
    for item in items:
        if item.get_closest_marker("gpu"):  # not in item.keywords, which hold the name of the folder too
            item.add_marker(skip)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Every failure goes into the file LORA_KERNELS_FAILURES, where that is set, as it happens: a run that is ended may not reach its summary."""
    path = os.environ.get("LORA_KERNELS_FAILURES")
    if path and report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        with open(path, "a") as log:
            log.write(f"==== {report.nodeid} ({report.when})\n{report.longreprtext}\n\n")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A worker that is at one test for more than LORA_KERNELS_TEST_SECONDS is ended, wherever it hangs, and makes way for a new one."""
    seconds = os.environ.get("LORA_KERNELS_TEST_SECONDS")
    if not seconds or "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    with open(os.environ.get("LORA_KERNELS_FAILURES", os.devnull), "a") as log:
        faulthandler.dump_traceback_later(float(seconds), exit=True, file=log)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish() -> None:
    """After a fault on the GPU nothing works in this process any more: the worker, its report sent, makes way for a new one.

    Workers share the GPU's memory: none keeps more than 2 GiB of free blocks from one test to the next.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
        if torch.cuda.memory_reserved() > 2 << 30:
            torch.cuda.empty_cache()
    except RuntimeError:
        os._exit(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
