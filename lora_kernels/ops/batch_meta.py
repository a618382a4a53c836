"""`BatchMeta`: which row of a batch uses which adapter, prepared once per forward and shared by all layers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .. import _batch_table, _checks, _checks_batched, _device
from .._errors import LoraTypeError, LoraValueError, message
from ..native.signature import all_finite, has_values, value_range


def check_ids(op: str, ids: Tensor, L: int) -> None:
    """Raise when an id is outside -1 ... L - 1. On a GPU only with LORA_KERNELS_CHECK_IDS=1, for it waits for the device."""
    if torch.compiler.is_compiling() or ids.numel() == 0 or not has_values(ids):
        return
    if ids.device.type != "cpu" and not _device.env_flag("LORA_KERNELS_CHECK_IDS"):
        return
    low, high = value_range(ids)
    if low < -1 or high >= L:
        raise LoraValueError(
            message(f"{op}: token_lora_mapping names an adapter outside the pool", f"ids from {low} to {high}", f"-1 (none) to {L - 1}")
        )


def check_ranks(op: str, ranks: Tensor | None, R: int) -> None:
    """Raise when a true rank is outside 0 ... R; read on a CPU only, where that costs no wait."""
    if ranks is None or ranks.device.type != "cpu" or torch.compiler.is_compiling() or ranks.numel() == 0 or not has_values(ranks):
        return
    low, high = value_range(ranks)
    if low < 0 or high > R:
        raise LoraValueError(message(f"{op}: a true rank outside the pool", f"ranks from {low} to {high}", f"0 to {R}"))


def check_scalings(op: str, scalings: Tensor | None) -> None:
    """Raise when a scaling is not finite in float32; read on a CPU only, where that costs no wait."""
    if scalings is None or scalings.device.type != "cpu" or torch.compiler.is_compiling() or not has_values(scalings):
        return
    if not all_finite(scalings):
        raise LoraValueError(message(f"{op}: scalings are not finite", scalings.flatten().tolist()[:5], "finite numbers"))


def as_ids(op: str, ids: Tensor) -> Tensor:
    """`[M]` contiguous int32."""
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        fix = "ids.to(torch.int32)" if isinstance(ids, Tensor) else "torch.tensor(ids, dtype=torch.int32)"
        raise LoraTypeError(message(f"{op}: token_lora_mapping has no usable type", got, "an int32 tensor, one id per row", fix))
    _checks_batched.check_plain(op, token_lora_mapping=ids)
    return _checks_batched.narrowed(ids.reshape(-1), torch.int32).contiguous()


def _build(ids: Tensor, L: int, block: int, out: Tensor) -> Tensor:
    """The table in one or two launches where triton is there, else in PyTorch."""
    if ids.device.type == "cuda" and _device.has_module("triton"):
        from ..kernels import batched_table

        return batched_table.build(ids, L, block, out)
    return _batch_table.build(ids, L, block, out)


def writable(t: Tensor) -> AbstractContextManager:
    """A context in which t can be written: what was made in inference mode only in inference mode."""
    return torch.inference_mode() if t.is_inference() else nullcontext()


class BatchMeta:
    """The adapter of every row, with the sort order, segments and token blocks that GPU kernels need.

    Args:
        token_lora_mapping: int32 `[M]`, adapter of each row, -1 = none. Not kept: `meta.ids` is a copy at an address of its own, which only
            `update_` changes.
        num_adapters: L, the number of slots of the pools it will be used with.
        batch_invariant: whether results must not depend on M either; None reads LORA_KERNELS_BATCH_INVARIANT.

    On a GPU everything is computed there, without waiting for it, into tensors whose addresses and sizes depend on (M, L) alone: build it
    once per forward, or once per batch size and `update_` it before replaying a CUDA graph that was captured with it.
    Ids outside -1 ... L - 1 raise on a CPU; on a GPU they count as none, and raise when LORA_KERNELS_CHECK_IDS=1.
    """

    def __init__(self, token_lora_mapping: Tensor, num_adapters: int, batch_invariant: bool | None = None):
        ids = as_ids("BatchMeta", token_lora_mapping)
        if not isinstance(num_adapters, (int, torch.SymInt)) or num_adapters < 0:
            raise LoraValueError(message("BatchMeta: num_adapters is no count", repr(num_adapters)[:80], "an int of at least 0"))
        _checks.check_flags("BatchMeta", batch_invariant=batch_invariant)
        check_ids("BatchMeta", ids, num_adapters)
        self.num_adapters = num_adapters
        self.batch_invariant = _device.env_flag("LORA_KERNELS_BATCH_INVARIANT") if batch_invariant is None else batch_invariant
        self.block = _batch_table.default_block(ids.shape[0], self.batch_invariant)
        self._ids = ids.clone()
        self.table = None
        if ids.device.type != "cpu":  # CPU kernels sort the ids themselves
            size = _batch_table.layout(ids.shape[0], num_adapters, self.block).size
            self.table = _build(self._ids, num_adapters, self.block, ids.new_empty(size))

    @property
    def ids(self) -> Tensor:
        """Read-only: calls of a known signature do not look at its dtype and shape again. They read `_ids`, which costs no call."""
        return self._ids

    @property
    def num_tokens(self) -> int:
        return self._ids.shape[0]

    def update_(self, token_lora_mapping: Tensor) -> BatchMeta:
        """Another mapping for the same number of rows, in place; safe inside and outside CUDA graph capture."""
        ids = as_ids("BatchMeta.update_", token_lora_mapping)
        if ids.is_meta and not self._ids.is_meta:
            raise LoraValueError(message("BatchMeta.update_: token_lora_mapping has no values", "a tensor on meta", self._ids.device))
        if ids.shape != self._ids.shape:
            got, allowed = f"{ids.shape[0]} ids", f"{self.num_tokens}, as at the start"
            raise LoraValueError(
                message("BatchMeta.update_: another number of rows", got, allowed, "build one BatchMeta per batch size, pad with -1")
            )
        check_ids("BatchMeta.update_", ids, self.num_adapters)
        with writable(self._ids):
            self._ids.copy_(ids)
            if self.table is not None:
                _build(self._ids, self.num_adapters, self.block, self.table)
        return self
