"""`BatchMeta` (see `ops/batch_meta.py`) and the mapping of whole sequences to rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .._errors import LoraTypeError, LoraValueError, message
from ..ops.batch_meta import BatchMeta

__all__ = ["BatchMeta", "ids_of_sequences"]


def ids_of_sequences(slots: Sequence[int | None], lengths: Sequence[int] | int, device: torch.device | str | None = None) -> torch.Tensor:
    """int32 `[sum of lengths]`: the slot of each sequence (None = no adapter) repeated over its rows. One copy to the device, not awaited."""
    lengths = [lengths] * len(slots) if isinstance(lengths, int) else list(lengths)
    if len(lengths) != len(slots) or any(not isinstance(n, int) or n < 0 for n in lengths):
        allowed = f"{len(slots)}, one per sequence, ints of at least 0"
        raise LoraValueError(message("ids_of_sequences: lengths do not fit", lengths, allowed))
    if wrong := [s for s in slots if s is not None and not isinstance(s, int)]:
        raise LoraTypeError(message("ids_of_sequences: a slot is no id", repr(wrong[0])[:80], "ints, as from AdapterPool.slot, or None"))
    values = torch.tensor([-1 if s is None else s for s in slots], dtype=torch.int32, device="cpu")
    ids = values.repeat_interleave(torch.tensor(lengths, dtype=torch.int64, device="cpu"))
    return ids if device is None else ids.to(device, non_blocking=True)
