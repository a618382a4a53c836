"""`Batch`: which adapter every row of the next forward passes uses, for the thread or the asyncio task that entered it."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .._errors import LoraKernelsError, LoraTypeError, LoraValueError, message
from ..native.signature import has_values
from ..ops.batch_meta import BatchMeta, as_ids, check_ids, writable
from .slots import Adapter

MOST_METAS = 64  # shapes of layers' rows that a batch remembers on a CPU; on a GPU all, as captured graphs use them
INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")  # of Hugging Face's models; else the first tensor counts

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from .layers import Group, Target
    from .pool import AdapterPool


# By this thread or task, the innermost last. Weak: a task keeps what it started with, and a batch its pool.
ENTERED: ContextVar[tuple[weakref.ref[Batch], ...]] = ContextVar("lora_kernels_batches", default=())
TASKS = object()  # stands for the batch of a thread whose tasks have one each


class Current(threading.local):
    """The batch of a pool that is running in this thread. Every thread has its own, so threads serve different batches on one model.

    So do asyncio's tasks. `ENTERED` alone would tell, but torch.compile cannot look into it.
    """

    def __init__(self) -> None:  # once per thread; torch 2.11's compiler would take a default on the class for the value
        self.batch: Batch | object | None = None
        self.running: list[Batch] = []

    def now(self) -> Batch | None:
        return self.of_task() if self.batch is TASKS else self.batch

    def of_task(self) -> Batch | None:
        """The batch, where `batch` is TASKS."""
        if torch.compiler.is_compiling():
            fix = "enter the batch and run the model in a worker thread"
            raise LoraKernelsError(message("a compiled model cannot tell the batches of asyncio tasks apart", fix=fix))
        mine = self._entered()
        return mine[-1] if mine else None

    def enter(self, batch: Batch) -> None:
        ENTERED.set((*ENTERED.get(), weakref.ref(batch)))
        self.running.append(batch)
        self._settle()

    def leave(self, batch: Batch) -> None:
        i = self.running.index(batch)
        if i + 1 < len(self.running):  # as when coroutines interleave: the one after it goes on to what was around this
            self.running[i + 1].recorded = batch.recorded
        else:
            torch.set_grad_enabled(batch.recorded)
        self.running.pop(i)
        ENTERED.set(tuple(found for found in ENTERED.get() if found() is not batch))
        self._settle()

    def _entered(self) -> list[Batch]:
        return [b for found in ENTERED.get() if (b := found()) in self.running]  # a task's context keeps what its parent has left since

    def _settle(self) -> None:
        one_context = not _in_task() and self._entered() == self.running
        self.batch = None if not self.running else self.running[-1] if one_context else TASKS


def _in_task() -> bool:
    try:
        return asyncio.current_task() is not None
    except RuntimeError:  # no event loop in this thread
        return False


class Batch:
    """A context made by `AdapterPool.batch` or `AdapterPool.batch_tokens`; inside it the model adds each row's adapter.

    The adapters it names are held: evicting or replacing one meanwhile changes nothing inside. No gradients are recorded inside.
    For CUDA graphs: enter, warm up, capture, and before each replay call `update_`, which changes rows and adapters in place.
    """

    def __init__(self, pool: AdapterPool, rows: Sequence[str | None] | Tensor, per_token: bool) -> None:
        self._pool, self._rows, self._per_token = pool, rows, per_token
        self.current = pool._current
        self._adapters: list[Adapter | None] = []
        self._ids: Tensor | None = None
        self._metas: dict[tuple[torch.device, torch.Size, int | None, bool], BatchMeta] = {}
        self._touched: set[int] = set()
        self.recorded: bool | None = None  # while it runs: whether gradients were recorded around it
        self.mixed = False  # whether its rows have different adapters
        self.with_bias = False
        self._running: nn.Module | None = None  # the whole model, or its encoder called for itself, during a forward
        self._depth = 0  # of its calls of itself
        self._lead = 0  # the leading dimension of its input, 0 where no tensor has rows
        self._sequences: int | None = None  # the same, where the names divide it
        self._tokens: set[int] = set()  # rows that its layers may have where sequences and tokens are one dimension
        self._ordered = True  # whether several adapters would do, as far as layers have run
        self.shared: tuple[Group, Tensor, int, int, list[Tensor]] | None = None

    def __enter__(self) -> Batch:
        if self.recorded is not None:
            raise LoraKernelsError(message("this batch is running already", fix="make one batch per with statement"))
        self._adapters, self._ids = self._resolve(self._rows)
        try:
            self._pool._entered()
        except BaseException:
            self._pool._release(self._adapters)
            raise
        self.mixed = _mixed(self._rows)
        self.with_bias = any(a is not None and a.bias for a in self._adapters)
        self._touched = {i for a in self._adapters if a is not None for i in a.modules}
        self.recorded = torch.is_grad_enabled()
        self.current.enter(self)
        torch.set_grad_enabled(False)
        return self

    def __exit__(self, *_: object) -> None:
        if self not in self.current.running:
            reason = "does not run" if self.recorded is None else "was entered in another thread"
            raise LoraKernelsError(message(f"a batch cannot be left here: it {reason}", fix="leave it once, in the thread that entered it"))
        self.current.leave(self)
        self.recorded, self.shared, self._metas = None, None, {}
        self._ordered, self._depth = True, 0
        self._end()
        self._pool._left(self._adapters)

    def update_(self, rows: Sequence[str | None] | Tensor) -> Batch:
        """Other adapters for as many rows, written into the same memory, so that a captured CUDA graph uses them at its next replay."""
        if self.recorded is None:
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
        elif any(a is not None and a.modules & self._pool._scattered - self._touched for a in adapters):
            reason = message("Batch.update_: an adapter of layers that keep no order of rows, in a batch that began without", fix="make a new batch")
        elif _mixed(rows) and not self._ordered:
            what = "Batch.update_: several adapters, in a batch of one of which layers got other rows than its sequences"
            reason = message(what, fix="make a new batch, or a pool whose target_modules leave such layers out")
        elif not self.with_bias and any(a is not None and a.bias for a in adapters):
            reason = message("Batch.update_: an adapter with lora_bias in a batch that began without", fix="begin with one, or make a new batch")
        if reason is not None:
            self._pool._release(adapters)
            raise LoraValueError(reason)
        held, self._adapters = self._adapters, adapters
        self._touched, self.shared = {i for a in adapters if a is not None for i in a.modules}, None
        self.mixed = self.mixed or _mixed(rows)
        try:
            with writable(self._ids):
                self._ids.copy_(ids)
            for (device, *_), meta in self._metas.items():
                meta.update_(self._expand(meta.num_tokens).to(device))
        finally:
            self._pool._release(held)
        return self

    def _resolve(self, rows: Sequence[str | None] | Tensor) -> tuple[list[Adapter | None], Tensor]:
        """The adapters, held, and the slot of every row (-1 = none) as int32."""
        if isinstance(rows, Tensor):
            if rows.dtype not in (torch.int32, torch.int64) or rows.dim() != 1 or rows.is_meta:
                raise LoraTypeError(
                    message("slots are no ids", f"{rows.dtype} {list(rows.shape)} on {rows.device}", "int32 [M], as from AdapterPool.slot, or names")
                )
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

    # ---- for the model and its layers

    def begin_forward(self, module: nn.Module, inputs: Sequence[Tensor]) -> None:
        """The model's own input says how many sequences there are, beams included; a layer's may have its dimensions turned."""
        self._depth += module is self._running
        if self._running is not None:
            return
        self._running = module
        self._lead = lead = next((t.shape[0] for t in inputs if t.dim() > 1), 0)
        self._sequences = lead if lead and lead % self._ids.shape[0] == 0 else None
        self._tokens = {lead, *(lead * t.shape[1] for t in inputs if t.dim() > 1 and t.shape[0] == lead)}

    def end_forward(self, module: nn.Module) -> None:
        if module is self._running and self._depth:
            self._depth -= 1
        elif module is self._running:
            self._end()

    def _end(self) -> None:
        self._running, self._lead, self._sequences, self._tokens = None, 0, None, set()

    def _fits(self) -> bool:
        """Whether the model that runs has an input of as many sequences or tokens as this batch is for."""
        if self._per_token:
            return self._running is not None and self._ids.shape[0] in self._tokens
        return self._sequences is not None

    def adapts(self, target: Target) -> bool:
        """Whether a layer whose rows are not the batch's sequences in order is to add an adapter. Raises where rows have different ones."""
        if target.index not in self._touched:
            return False
        if self.mixed:
            got, fix = f"{target.name}: {target.scattered}", "a batch of one adapter, or a pool whose target_modules leave such layers out"
            raise LoraValueError(message("rows of several adapters go through a layer that does not keep them in order", got, fix=fix))
        self._ordered = False
        return True

    def touches(self, target: Target) -> bool:
        """Whether any adapter of the batch adapts this layer. On a GPU, and when traced, always: graphs must serve every mix."""
        return torch.compiler.is_compiling() or target.layer.weight.is_cuda or target.index in self._touched

    def meta(self, x: Tensor) -> BatchMeta:
        """The adapter of every row of x flattened to `[M, K]`; built once per shape and device."""
        if torch.compiler.is_compiling():  # built in the graph, where equal ones become one
            return self._build(x)
        key = (x.device, x.shape[:-1], self._sequences, self.mixed)
        if (found := self._metas.get(key)) is None:
            if x.is_cpu and len(on_cpu := [k for k in self._metas if k[0] == x.device]) >= MOST_METAS:
                del self._metas[on_cpu[0]]
            found = self._metas[key] = self._build(x)
        elif x.dim() == 2 and found.num_tokens not in self._tokens:  # rows that fitted an earlier forward may be others now
            self._check(x, found.num_tokens, again=True)
        if x.dim() > 2 and self._sequences is not None:
            self._tokens.add(found.num_tokens)
        return found

    def _build(self, x: Tensor) -> BatchMeta:
        M = x.shape[:-1].numel()
        self._check(x, M)
        return BatchMeta(self._expand(M).to(x.device), self._pool._num_slots, self._pool._batch_invariant)

    def _check(self, x: Tensor, M: int, again: bool = False) -> None:
        """Raise where x's rows are not this batch's in order. Where all have the same adapter that only keeps it from a mix, in `update_`.

        again: rows of this shape have passed, in this forward or an earlier one.
        """
        n, lead, traced = self._ids.shape[0], x.shape[0] if x.dim() > 2 else M, torch.compiler.is_compiling()
        if not traced and M == 0:
            return
        divides = fits = not self._per_token and lead % n == 0
        got, allowed = f"{n} names", f"{lead} sequences or a divisor of it"
        fix = "one name per sequence, batch_tokens for packed or ragged tokens, or target_modules that leave the layer out of the pool"
        if self._per_token:
            fits, got, allowed, fix = n == M, f"{n} ids", f"{M} tokens, x {list(x.shape)}", None
        elif self._pool._tiled and (self.mixed or not traced):
            fits, allowed = lead == n, f"{lead} names"
            fix = "a name for every row: this model's generate may lay copies of the batch behind it, as for guidance, which takes names * 2"
        elif fits and self._sequences is not None and not traced:
            fits = lead == self._sequences if x.dim() > 2 else M in self._tokens
            allowed = f"{self._sequences} sequences, as the model's input has, one after the other; x {list(x.shape)}"
        elif fits and x.dim() == 2 and self._lead and not traced:  # the model's input has other sequences
            fits, allowed = n == M, f"{self._lead} sequences or a divisor of it, as the model's input has; x {list(x.shape)}"
        if fits:
            return
        if self.mixed or traced or not (again or divides or self._fits()):
            raise LoraValueError(message("the batch does not fit this forward", got, allowed, fix))
        self._ordered = False  # whichever rows these are, all have the same adapter

    def _expand(self, M: int) -> Tensor:
        """Ids per row: a sequence's rows (its tokens, and its beams, which generate() lays side by side) follow each other.

        Where the names do not divide the rows, all have the same adapter.
        """
        n = self._ids.shape[0]
        if n == M:
            return self._ids
        return self._ids.view(n, 1).expand(n, M // n).reshape(M) if M % n == 0 else self._ids[:1].repeat(M)


def _mixed(rows: Sequence[str | None] | Tensor) -> bool:
    """Whether rows may have different adapters. Slots in a tensor may lie on a GPU, where looking would mean waiting."""
    return len(rows) > 1 and (isinstance(rows, Tensor) or len(set(rows)) > 1)


class _Watch:
    """Tells the batch that runs when a forward of the whole model, or of the encoder that `generate` calls for itself, begins and ends.

    Not in a compiled one, which has only the sizes to go by.
    """

    def __init__(self, current: Current) -> None:
        self.current = current

    def begin(self, module: nn.Module, args: tuple, kwargs: Mapping) -> None:
        if not torch.compiler.is_compiling() and (batch := self.current.now()) is not None:
            named = [kwargs[name] for name in INPUTS if isinstance(kwargs.get(name), Tensor)]
            batch.begin_forward(module, named or [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)])

    def end(self, module: nn.Module, *_: object) -> None:
        if not torch.compiler.is_compiling() and (batch := self.current.now()) is not None:
            batch.end_forward(module)

    def __reduce__(self):
        raise LoraKernelsError(message("a model with an AdapterPool can be neither copied nor pickled", fix="close() the pool first"))


def watch(model: nn.Module, current: Current) -> list[RemovableHandle]:
    """Hooks by which the model tells its batches of its forwards."""
    hooks, of = [], _Watch(current)
    for module in _callable(model):
        hooks += [module.register_forward_pre_hook(of.begin, with_kwargs=True), module.register_forward_hook(of.end, always_call=True)]
    return hooks


def _callable(model: nn.Module) -> list[nn.Module]:
    """The model, what of a model of transformers lies below its head, and the encoder of an encoder-decoder."""
    found = [model, getattr(model, "base_model", None)]
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and hasattr(model, "get_encoder"):
        found.append(model.get_encoder())
    return list(dict.fromkeys(m for m in found if isinstance(m, nn.Module)))
