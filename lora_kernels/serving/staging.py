"""`Staging`: adapter tensors from a file or from memory into slab slots; over pinned memory and a stream of its own where the slabs are on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .._errors import LoraValueError, message
from .held_tensors import HeldTensors
from .tensor_file import TensorFile


class _Buffers:
    """Host memory for one tensor on its way: as it lies in the file, and cast. Reused when `sent` has happened."""

    def __init__(self, pinned: bool) -> None:
        self.pinned = pinned
        self.raw = self.cast = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.sent: torch.cuda.Event | None = None

    def grown(self, which: str, size: int) -> Tensor:
        if getattr(self, which).numel() < size:
            setattr(self, which, torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=self.pinned))
        return getattr(self, which)


class Staging:
    """One load's way to one device, a context: what is copied inside has arrived when it ends. On a GPU all of it runs on a stream of its
    own, from two sets of pinned buffers, so that a tensor is read while the one before it is still being sent.

    `wait_for`: events after which the slot may be written.
    """

    def __init__(self, device: torch.device, wait_for: list[torch.cuda.Event]) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        for event in wait_for if self._stream else ():
            self._stream.wait_event(event)
        self._ring = [_Buffers(pinned=self._stream is not None) for _ in range(2 if self._stream else 1)]
        self._turn = 0
        self._context = torch.cuda.stream(self._stream)  # does nothing for None

    def __enter__(self) -> Staging:
        self._context.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._context.__exit__(*error)
        if self._stream is not None:
            self._stream.synchronize()

    def copy(self, file: TensorFile | HeldTensors, name: str, target: Tensor, scale: float = 1.0) -> int:
        """Write scale * the tensor `name` into `target`, cast to its dtype. Returns the bytes read.

        Raises LoraValueError: the file ends too early; a value that is not finite there or in target's dtype.
        """
        buffers = self._ring[self._turn]
        self._turn = (self._turn + 1) % len(self._ring)
        if buffers.sent is not None:
            buffers.sent.synchronize()
        entry = file.entries[name]
        size = entry.end - entry.start
        tensor = file.read(name, buffers.grown("raw", size))
        if scale != 1.0:
            tensor = tensor.to(torch.float32).mul_(scale)
        if self._stream is not None and tensor.dtype != target.dtype:
            held = buffers.grown("cast", tensor.numel() * target.element_size())
            tensor = held[: tensor.numel() * target.element_size()].view(target.dtype).view(entry.shape).copy_(tensor)
        elif tensor.dtype != target.dtype:
            tensor = tensor.to(target.dtype)
        if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):  # one pass; NaN goes through
            fix = None if tensor.dtype == entry.dtype else "if it is finite there, give AdapterPool(dtype=torch.float32)"
            raise LoraValueError(message(f"{name} holds values that are not finite", f"NaN or inf in {target.dtype}", fix=fix))
        target.copy_(tensor, non_blocking=True)
        buffers.sent = self._stream.record_event() if self._stream is not None else None
        return size
