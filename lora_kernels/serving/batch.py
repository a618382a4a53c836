"""`Batch`: which adapter every row of the next forward passes uses, for the thread that entered it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._errors import LoraKernelsError, LoraTypeError, LoraValueError, message
from ..native.signature import has_values
from ..ops.batch_meta import BatchMeta, as_ids, check_ids, writable
from .slots import Adapter

if TYPE_CHECKING:
    from .layers import Group, Target
    from .pool import AdapterPool


class Current(threading.local):
    """The batch that is running in this thread. Every thread has its own, so threads serve different batches on one model."""

    def __init__(self) -> None:  # once per thread; torch 2.11's compiler would take a default on the class for the value
        self.batch: Batch | None = None


class Batch:
    """A context made by `AdapterPool.batch` or `AdapterPool.batch_tokens`; inside it the model adds each row's adapter.

    The adapters it names are held: evicting or replacing one meanwhile changes nothing inside. No gradients are recorded inside.
    For CUDA graphs: enter, warm up, capture, and before each replay call `update_`, which changes rows and adapters in place.
    """

    def __init__(self, pool: AdapterPool, rows: Sequence[str | None] | Tensor, per_token: bool) -> None:
        self._pool, self._rows, self._per_token = pool, rows, per_token
        self._adapters: list[Adapter | None] = []
        self._ids: Tensor | None = None
        self._metas: dict[tuple[torch.device, torch.Size], BatchMeta] = {}
        self._touched: set[int] = set()
        self._outer: tuple[Batch | None, bool] | None = None  # while it runs: the batch around it, and whether gradients were recorded there
        self.with_bias = False
        self.shared: tuple[Group, Tensor, int, int, list[Tensor]] | None = None

    def __enter__(self) -> Batch:
        if self._outer is not None:
            raise LoraKernelsError(message("this batch is running already", fix="make one batch per with statement"))
        self._adapters, self._ids = self._resolve(self._rows)
        try:
            self._pool._entered()
        except BaseException:
            self._pool._release(self._adapters)
            raise
        self.with_bias = any(a is not None and a.bias for a in self._adapters)
        self._touched = {i for a in self._adapters if a is not None for i in a.modules}
        self._outer = (self._pool._current.batch, torch.is_grad_enabled())
        self._pool._current.batch = self
        torch.set_grad_enabled(False)
        return self

    def __exit__(self, *_: object) -> None:
        inner = self._leave()
        if inner is None:
            self._pool._current.batch, recorded = self._outer
            torch.set_grad_enabled(recorded)
        else:  # not the innermost, as when coroutines of one thread interleave: the one inside stays, and goes on to what was around this
            inner._outer = self._outer
        self._outer, self.shared, self._metas = None, None, {}
        self._pool._left(self._adapters)

    def _leave(self) -> Batch | None:
        """The batch of this thread that runs directly inside this one, or None."""
        batch, inner = self._pool._current.batch, None
        while batch is not self:
            if batch is None or batch._outer is None:
                reason = "does not run" if self._outer is None else "was entered in another thread"
                raise LoraKernelsError(message(f"a batch cannot be left here: it {reason}", fix="leave it once, in the thread that entered it"))
            batch, inner = batch._outer[0], batch
        return inner

    def update_(self, rows: Sequence[str | None] | Tensor) -> Batch:
        """Other adapters for as many rows, written into the same memory, so that a captured CUDA graph uses them at its next replay."""
        if self._outer is None:
            raise LoraKernelsError(message("Batch.update_ outside the batch", fix="call it inside the with statement"))
        adapters, ids = self._resolve(rows)
        try:
            check_ids("Batch.update_", ids, self._pool._num_slots)
        except LoraKernelsError:
            self._pool._release(adapters)
            raise
        reason = None
        if ids.shape != self._ids.shape:
            reason = message("Batch.update_: another number of rows", ids.shape[0], self._ids.shape[0], "make one batch per batch size")
        elif not self.with_bias and any(a is not None and a.bias for a in adapters):
            reason = message("Batch.update_: an adapter with lora_bias in a batch that began without", fix="begin with one, or make a new batch")
        if reason is not None:
            self._pool._release(adapters)
            raise LoraValueError(reason)
        held, self._adapters = self._adapters, adapters
        self._touched, self.shared = {i for a in adapters if a is not None for i in a.modules}, None
        try:
            with writable(self._ids):
                self._ids.copy_(ids)
            for (device, _), meta in self._metas.items():
                meta.update_(self._expand(meta.num_tokens).to(device))
        finally:
            self._pool._release(held)
        return self

    def _resolve(self, rows: Sequence[str | None] | Tensor) -> tuple[list[Adapter | None], Tensor]:
        """The adapters, held, and the slot of every row (-1 = none) as int32."""
        if isinstance(rows, Tensor):
            if rows.dtype not in (torch.int32, torch.int64) or rows.dim() != 1:
                raise LoraTypeError(message("slots are no ids", f"{rows.dtype} {list(rows.shape)}", "int32 [M], as from AdapterPool.slot, or names"))
            if not self._per_token and not rows.numel():
                raise LoraValueError(message("a batch needs one slot or -1 per row", "no rows"))
            adapters = list(self._pool._slots.acquire_all())
            try:
                self._check_loaded(rows, adapters)
            except LoraKernelsError:
                self._pool._release(adapters)
                raise
            return adapters, as_ids("a batch", rows).clone()
        if isinstance(rows, str) or not isinstance(rows, Sequence):
            raise LoraTypeError(message("a batch needs one name or None per row", repr(rows)[:80], '["sql", None, "legal"]'))
        if not rows:
            raise LoraValueError(message("a batch needs one name or None per row", "no rows"))
        adapters = self._pool._slots.acquire(rows)
        return adapters, torch.tensor([-1 if a is None else a.slot for a in adapters], dtype=torch.int32, device="cpu")

    @staticmethod
    def _check_loaded(rows: Tensor, adapters: Sequence[Adapter]) -> None:
        """Slots in host memory are those of loaded adapters; an evicted one's may hold anything by now. On a GPU, looking would mean waiting."""
        if rows.is_cpu and has_values(rows):
            empty = set(rows.unique().tolist()) - {a.slot for a in adapters} - {-1}
            if empty:
                loaded = ", ".join(f"{a.slot} ({a.name})" for a in adapters[-5:]) or "none"
                raise LoraValueError(
                    message("a batch names slots of no loaded adapter", sorted(empty)[:5], f"-1, {loaded}", "ask AdapterPool.slot again")
                )

    # ---- for the layers

    def touches(self, target: Target) -> bool:
        """Whether any adapter of the batch adapts this layer. On a GPU, and when traced, always: graphs must serve every mix."""
        return torch.compiler.is_compiling() or target.layer.weight.is_cuda or target.index in self._touched

    def meta(self, x: Tensor) -> BatchMeta:
        """The adapter of every row of x flattened to `[M, K]`; built once per shape and device."""
        if torch.compiler.is_compiling():  # built in the graph, where equal ones become one
            return self._build(x)
        key = (x.device, x.shape[:-1])
        if (found := self._metas.get(key)) is None:
            found = self._metas[key] = self._build(x)
        return found

    def _build(self, x: Tensor) -> BatchMeta:
        M = x.numel() // x.shape[-1]
        self._check(x, M)
        return BatchMeta(self._expand(M).to(x.device), self._pool._num_slots, self._pool._batch_invariant)

    def _check(self, x: Tensor, M: int) -> None:
        n = self._ids.shape[0]
        lead = x.shape[0] if x.dim() > 2 else M
        if self._per_token:
            if n != M:
                raise LoraValueError(message("the batch does not fit this forward", f"{n} ids", f"{M} tokens, x {list(x.shape)}"))
        elif lead % n:
            fix = "one name per sequence; for packed or ragged tokens use batch_tokens"
            raise LoraValueError(message("the batch does not fit this forward", f"{n} names", f"{lead} sequences or a divisor of it", fix))

    def _expand(self, M: int) -> Tensor:
        """Ids per row: a sequence's rows (its tokens, and its beams, which generate() lays side by side) follow each other."""
        n = self._ids.shape[0]
        return self._ids if n == M else self._ids.view(n, 1).expand(n, M // n).reshape(M)
