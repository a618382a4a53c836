"""The emulator finds faults: each line takes one rule away from a CUDA kernel's PTX, and that must end in an error or in wrong numbers.

A kernel that passes in the emulator without one of these instructions would have shown nothing by passing with it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import emulator
import pytest
import torch

from lora_kernels.native import cuda
from lora_kernels.native.cuda import Form

pytestmark = pytest.mark.skipif(not emulator.has_nvcc(), reason="no nvcc")
M, N, K, R = 300, 1280, 136, 24


@dataclass(frozen=True)
class Fault:
    name: str
    kernel: str  # update, column0, shrink, or both: the update behind the shrink that makes its h
    was: str
    now: str
    found: str  # pattern of the outcome

    def __str__(self) -> str:
        return f"{self.kernel}-{self.name}"


FAULTS = [
    Fault(
        "slot_given_back_while_wgmma_reads_it",
        "update",
        "wgmma.wait_group.sync.aligned 1;",
        "wgmma.wait_group.sync.aligned 3;",
        "still read asynchronously",
    ),
    Fault(
        "accumulator_used_too_early",
        "update",
        "wgmma.wait_group.sync.aligned 0;",
        "wgmma.wait_group.sync.aligned 7;",
        "accumulator used before|still read",
    ),
    Fault("tma_stores_what_was_not_fenced", "update", "fence.proxy.async.shared::cta;", "", "without fence.proxy.async"),
    Fault("wgmma_reads_what_was_not_fenced", "shrink", "fence.proxy.async.shared::cta;", "", "without fence.proxy.async"),
    Fault("h_not_fenced_towards_tma", "column0", "fence.proxy.async;", "", "without fence.proxy.async"),
    Fault("panel_rewritten_while_it_is_stored", "update", "cp.async.bulk.wait_group.read 1;", "", "still read asynchronously"),
    Fault("block_ends_while_its_panels_are_read", "update", "cp.async.bulk.wait_group 0;", "", "a thread that exits"),
    Fault("warps_not_synchronised_before_the_store", "update", "bar.sync", "bar.warp.sync -1;//", "without fence.proxy.async"),
    Fault("h_published_before_it_is_visible", "column0", "red.release.gpu", "red.relaxed.gpu", "wrong numbers"),
    Fault("ticket_never_drawn", "column0", "atom.global.add.u32", "ld.volatile.global.u32", ""),
    Fault("cluster_left_too_early", "update", "barrier.cluster.wait.acquire.aligned;", "", "exited|no mbarrier"),
    Fault(
        "half_of_a_cluster_not_released",
        "update",
        "mapa.shared::cluster.u32 remote, ",
        "mov.b32 remote, ",
        "more arrivals|still read|still writing|two asynchronous copies",
    ),
    Fault("h_taken_before_the_shrink_has_ended", "both", "griddepcontrol.wait;", "", "wrong numbers|no mbarrier"),
    Fault("barrier_waits_for_other_bytes", "update", "mbarrier.arrive.expect_tx.shared::cta.b64", "mbarrier.arrive.shared::cta.b64", ""),
]


def launch(kernel: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel gives, and in float64."""
    x, w, a, b = (torch.randn(*shape).bfloat16() for shape in ((M, K), (N, K), (R, K), (N, R)))
    w, a = w * K**-0.5, a * K**-0.5
    exact = x.double() @ a.double().t()
    if kernel == "shrink":
        mask = torch.zeros(M, -(-K // 32), dtype=torch.int32)
        return cuda.shrink(x, a, 1.0, False, mask, torch.tensor([3]), 1e-5), exact
    if kernel == "both":
        y, _, _ = cuda.lora_linear_fwd(x, w, None, a, b, 1.0, 1e-5, torch.tensor([3]))
        return y, x.double() @ w.double().t() + exact @ b.double().t()
    if kernel == "column0":
        how, given = Form(True, 128, 256, 2), None
    else:
        how, given = Form(False, 128, 256, 2), exact.bfloat16()
    y, _ = cuda.linear(x, w, None, a if given is None else None, b, given, 1.0, False, how=how)
    return y, x.double() @ w.double().t() + exact @ b.double().t()


def wrong(kernel: str) -> bool:
    got, exact = launch(kernel)
    return not ((got.double() - exact).norm() <= 0.01 * exact.norm())  # NaN is wrong


@pytest.fixture(autouse=True)
def _as_before():
    """The short limit of steps is not for the tests after these."""
    yield
    emulator.reset(1, multiprocessors=4)


@pytest.mark.parametrize("kernel", ["update", "column0", "shrink", "both"])
def test_right_without_a_fault(kernel):
    assert not wrong(kernel)


def outcome(fault: Fault) -> str:
    """The error that the fault leads to, "wrong numbers", or "" where it goes unnoticed."""
    try:
        with emulator.planted(fault.was, fault.now):
            return "wrong numbers" if wrong(fault.kernel) else ""
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_found(fault: Fault):
    """In one of a few interleavings."""
    for seed in range(40):
        emulator.reset(seed, multiprocessors=4, steps=10**7)
        if got := outcome(fault):
            assert re.search(fault.found, got), got
            return
    raise AssertionError("not found")
