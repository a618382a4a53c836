"""`HeldTensors`: an adapter's tensors in memory, with the face of a `TensorFile`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .._errors import LoraTypeError, message
from ..ops._call import check_memory
from .tensor_file import DTYPES, Entry


class HeldTensors:
    """Tensors by name on any device, brought to the CPU here, on the caller's stream; those on the CPU are read where they lie.

    Raises LoraTypeError: no mapping of names to plain, dense tensors of float64, float32, float16 or bfloat16. LoraValueError: freed storage.
    """

    name = "the adapter's tensors"

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        if not isinstance(tensors, Mapping):
            fix = "peft.get_peft_model_state_dict(model)" if isinstance(tensors, torch.nn.Module) else None
            raise LoraTypeError(message(f"{self.name} are no mapping", type(tensors).__name__, "a dict: name -> tensor", fix))
        self._tensors: dict[str, Tensor] = {}
        for key, given in tensors.items():
            if not isinstance(key, str) or not isinstance(given, Tensor):
                raise LoraTypeError(message(f"{self.name} are malformed", f"{key!r:.80}: {type(given).__name__}", "name -> tensor"))
            plain = type(given) in (Tensor, nn.Parameter)
            if not plain or given.layout != torch.strided or given.is_nested or given.is_meta:
                got, fix = (f"{given.layout} on {given.device}", None) if plain else (type(given).__name__, "gather it first: DTensor.full_tensor()")
                raise LoraTypeError(message(f"{key} cannot be read", got, "a plain dense tensor", fix))
            if given.dtype not in DTYPES.values():
                raise LoraTypeError(message(f"{key} has an unsupported dtype", given.dtype, ", ".join(map(str, DTYPES.values()))))
            check_memory(key, given)
            self._tensors[key] = given.detach().cpu()
        self.entries = {key: Entry(t.dtype, tuple(t.shape), 0, t.numel() * t.element_size()) for key, t in self._tensors.items()}

    def read(self, name: str, buffer: Tensor) -> Tensor:
        """The tensor `name`, copied into `buffer` (uint8, on the CPU, at least `end - start` bytes, 8-byte aligned)."""
        entry = self.entries[name]
        return buffer[: entry.end].view(entry.dtype).view(entry.shape).copy_(self._tensors[name])

    def close(self) -> None:
        self._tensors = {}
