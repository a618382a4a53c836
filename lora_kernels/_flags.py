"""Zeroed int32 flags for kernels that leave them zero: one buffer per stream, and a piece of its own for every launch that a CUDA graph captures."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

FEWEST = 1024  # of a stream's buffer
SLAB = 1 << 20  # 4 MiB: captured launches take 64 to some thousand flags each
_LINE = 32  # flags of two launches share no line of 128 bytes


def _kept_zeros(device: torch.device, ints: int) -> torch.Tensor:
    """Zeroed words that outlive the call, zero for whatever stream uses them next.

    Made by a thread of its own: the warm-up of torch.compile's CUDA graphs sends all allocations of the current thread to a pool, reclaims it
    afterwards, and raises for what is still held there.
    """
    if device.type != "cuda":
        return torch.zeros(ints, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device)

    def make() -> torch.Tensor:
        with torch.cuda.stream(stream):
            made = torch.zeros(ints, dtype=torch.int32, device=device)
            stream.synchronize()
            return made

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch._C._cuda_isCurrentStreamCapturing()


class Flags:
    """The flags of one engine's kernels. Two launches of one stream never run at once, so they share; an outgrown buffer goes back to the allocator.

    A graph may be replayed on any stream, beside any other, long after its capture: a captured launch shares with nobody, and what it was given is
    never given again. It comes out of a slab that eager calls keep filled, so that the graph has no node for it; once the slab is used up, a
    memset node zeroes what it gets.
    """

    def __init__(self) -> None:
        self.kept: dict[tuple[torch.device, int], torch.Tensor] = {}
        self._slabs: dict[torch.device, torch.Tensor] = {}  # what is left of each device's
        self._low: torch.device | None = None
        self._lock = threading.Lock()

    def on(self, device: torch.device, stream: int, ints: int) -> torch.Tensor:
        """At least `ints` flags for a launch on this stream of this device, which is the current one."""
        if _capturing(device):
            return self._captured(device, ints)
        found = self.kept.get((device, stream))
        if found is None or found.shape[0] < ints:
            found = self.kept[device, stream] = _kept_zeros(device, max(ints, FEWEST))
            if device not in self._slabs:
                self._low = device
        if self._low is not None and self._low == device:
            slab = _kept_zeros(device, SLAB)
            with self._lock:
                self._slabs[device], self._low = slab, None
        return found

    def _captured(self, device: torch.device, ints: int) -> torch.Tensor:
        with self._lock:
            slab = self._slabs.get(device)
            size = -(-ints // _LINE) * _LINE
            if slab is None or slab.shape[0] - size < SLAB // 2:
                self._low = device
            if slab is None or slab.shape[0] < size:
                return torch.zeros(ints, dtype=torch.int32, device=device)
            self._slabs[device] = slab[size:]
            return slab[:size]

    def forget(self) -> None:
        """Use nothing again of what an aborted launch may have left in them."""
        with self._lock:
            self.kept.clear()
            self._slabs.clear()
