"""The flags of kernels that leave them zero: shared by the launches of a stream, never by one that a graph captured."""

from __future__ import annotations

import pytest
import torch

from lora_kernels import _flags

CPU = torch.device("cpu")


@pytest.fixture
def capture(monkeypatch):
    """A function that says whether a capture is under way from now on."""
    return lambda on: monkeypatch.setattr(_flags, "_capturing", lambda device: on)


def addresses(*tensors: torch.Tensor) -> set[int]:
    """Of all their words."""
    return {t.data_ptr() + 4 * i for t in tensors for i in range(t.numel())}


def test_a_stream_has_one_buffer_that_grows():
    flags = _flags.Flags()
    first = flags.on(CPU, 0, 10)
    assert flags.on(CPU, 0, _flags.FEWEST) is first
    assert flags.on(CPU, 1, 10) is not first
    larger = flags.on(CPU, 0, 5000)
    assert larger.numel() >= 5000
    assert not larger.any()
    assert flags.on(CPU, 0, 10) is larger


def test_every_captured_launch_has_flags_of_its_own(capture):
    """Neither shared with eager calls or another launch, nor freed when those need more, nor given out again; whole lines, zero."""
    flags = _flags.Flags()
    eager = flags.on(CPU, 0, 10)
    capture(True)
    captured = [flags.on(CPU, 0, ints) for ints in (10, 33, 1)]
    capture(False)
    larger = flags.on(CPU, 0, 5000)
    capture(True)
    captured.append(flags.on(CPU, 0, 64))
    assert len(addresses(eager, larger, *captured)) == eager.numel() + larger.numel() + sum(t.numel() for t in captured)
    for t, ints in zip(captured, (10, 33, 1, 64), strict=True):
        assert t.numel() >= ints
        assert (t.data_ptr() - captured[0].data_ptr()) % 128 == 0
        assert not t.any()


def test_captured_launches_take_from_the_slab_while_it_lasts(capture, monkeypatch):
    """Then they bring zeros of their own, which is a node of the graph, until an eager call has filled it again."""
    monkeypatch.setattr(_flags, "SLAB", 256)
    made, zeros = [], torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: made.append(a) or zeros(*a, **k))
    flags = _flags.Flags()
    flags.on(CPU, 0, 10)
    for _ in range(3):
        capture(True)
        made.clear()
        taken = [flags.on(CPU, 0, 60) for _ in range(4)]
        assert not made
        assert len(addresses(*taken)) == 4 * 64
        assert flags.on(CPU, 0, 60).numel() == 60
        assert len(made) == 1
        capture(False)
        flags.on(CPU, 0, 10)
    made.clear()
    flags.on(CPU, 0, 10)
    assert not made, "a full slab is not filled again"


def test_the_first_capture_of_a_device_without_eager_calls(capture):
    capture(True)
    taken = [_flags.Flags().on(CPU, 0, 10) for _ in range(2)]
    assert len(addresses(*taken)) == 20
    assert not torch.cat(taken).any()


def test_nothing_is_used_again_after_an_aborted_launch(capture):
    flags = _flags.Flags()
    flags.on(CPU, 0, 10).fill_(7)
    capture(True)
    flags.on(CPU, 0, 10).fill_(7)
    capture(False)
    flags.forget()
    assert not flags.on(CPU, 0, 10).any()
    capture(True)
    assert not flags.on(CPU, 0, 10).any()
