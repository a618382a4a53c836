"""`AdapterPool`: many PEFT adapters on one model, any mix of them in one batch."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import _checks, _device
from .._errors import LoraKernelsError, LoraTypeError, LoraValueError, message
from . import layers
from .batch import Batch, Current, watch
from .checkpoint import Checkpoint, Shape
from .fill import fill
from .layers import Group, Shard, Target
from .peft_config import MAX_RANK
from .slots import Adapter, Slots

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Loaded(NamedTuple):
    """What `AdapterPool.load` did: layers adapted, largest rank, bytes read, seconds from the call to being usable."""

    name: str
    layers: int
    max_rank: int
    bytes_read: int
    seconds: float


class AdapterPool:
    """Puts a model's linear layers on the batched path and keeps up to `max_loras` PEFT adapters in memory allocated once.

        pool = AdapterPool(model, max_loras=64, max_rank=64)
        pool.load("sql", "path/to/peft_adapter_dir")
        pool.load("legal", "path/to/another")
        with pool.batch(["sql", None, "legal"]):          # one adapter, or none, per sequence
            model.generate(**three_prompts)

    Equivalent to: running each row of the batch through `PeftModel.from_pretrained(model, its adapter)`, or the bare model for None.

    Outside a batch the model computes what it did before, bit for bit; so do rows without an adapter (see exact_base). `close` puts the
    model back; the pool is a context manager that closes itself, and a pool that nothing refers to any more is closed.

    Args:
        model: any module with `torch.nn.Linear` layers, already on its device. Do not move or convert it while the pool is open.
        max_loras: adapters held at a time. When one more comes, the least recently used unpinned one that no running batch holds goes, or,
            where batches hold all, the least recently used unpinned one. One slot more is allocated, so that an adapter can be replaced,
            and a load can fail, without giving up another first.
        max_rank: largest rank of any layer of any adapter. Memory: (max_loras + 1) * max_rank * (K + N) elements per layer; ranks below
            max_rank cost no time.
        dtype: of the adapters in memory; the layer's own when None. float32 is allowed on any model.
        target_modules: names, or ends of names, of the layers to serve; every plain `nn.Linear` but the output embedding when None. Those of
            `nn.TransformerEncoderLayer` are not served: it may compute without calling them. Nor is a layer that is registered twice.
        exact_base: True: the base layer is `F.linear`, and the update is added (`lora_shrink`, `lora_expand`), so rows without an adapter
            have the base model's bits. False: one fused op (`lora_batched_linear`), which rounds its base product in its own order; only
            then does LORA_KERNELS_BATCH_INVARIANT=1 hold for whole layers.

    Threads: every method may be called from any thread, also while others run batches, and each thread and asyncio task may run its own. A batch
    sees an adapter as it was when the batch began, wholly, whatever is loaded, replaced or evicted meanwhile.

    Raises: LoraValueError, LoraTypeError for arguments that do not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        max_loras: int,
        max_rank: int,
        dtype: torch.dtype | None = None,
        target_modules: Sequence[str] | str | None = None,
        exact_base: bool = True,
    ) -> None:
        _check_count("max_loras", max_loras, 65535)
        _check_count("max_rank", max_rank, MAX_RANK)
        _checks.check_flags("AdapterPool", exact_base=exact_base)
        found = layers.find(model, target_modules)
        layers.check_weights(model, found, exact_base)
        for name, layer in found.items():
            own = layer.weight.dtype
            if own not in _DTYPES or dtype not in (None, own, torch.float32):
                got, allowed = f"dtype {dtype}, {name} {own}", "layers in bfloat16, float16, float32; dtype None, theirs or float32"
                raise LoraTypeError(message("AdapterPool: a dtype that cannot be served", got, allowed))
        self.max_loras, self.max_rank = max_loras, max_rank
        self._slots, self._num_slots = Slots(max_loras), max_loras + 1
        self._current = Current()
        self._batch_invariant = _device.env_flag("LORA_KERNELS_BATCH_INVARIANT")
        self._lock = threading.Lock()
        self._closed = False
        self._running = self._refused = self._batches = 0
        self._last_use: dict[int, dict[int, torch.cuda.Event]] = {}  # slot -> stream -> event after its last batch there
        self._targets: dict[str, Target] = {}
        self._shards: list[Shard] = []
        inner = getattr(model, "_orig_mod", model)
        scattered, self._tiled = layers.scattered(inner, found), layers.tiled(inner)
        for device, groups in layers.by_device(found).items():
            shard = Shard.allocate(device, sum(map(len, groups)), self._num_slots)
            self._shards.append(shard)
            for names in groups:
                group = layers.allocate([found[n] for n in names], shard, self._num_slots, max_rank, dtype)
                for place, name in enumerate(names):
                    target = Target(name, len(self._targets), group, place, self._current, exact_base, found[name], scattered.get(name))
                    self._targets[name] = target
                    shard.targets.append(target)
        self._scattered = frozenset(t.index for t in self._targets.values() if t.scattered is not None)
        self._shapes = {name: Shape(t.layer.in_features, t.layer.out_features) for name, t in self._targets.items()}
        self._wait_for_fills()
        for target in self._targets.values():
            layers.swap_in(target)
        # Nobody can begin a batch of a pool that was dropped: its model gets its layers back, and the slabs are freed.
        self._restore = weakref.finalize(self, layers.swap_out, list(self._targets.values()), watch(inner, self._current))
        self._restore.atexit = False

    def __reduce__(self):
        raise LoraKernelsError(message("an AdapterPool can be neither copied nor pickled", fix="make another one for another model"))

    # ------------------------------------------------------------------------------------------------------------- adapters

    def load(self, name: str, folder: str | os.PathLike, timeout: float = 10.0) -> Loaded:
        """Load a PEFT adapter folder under `name`, replacing an adapter of that name. All or nothing: an error leaves the pool as it was.

        Served: LoRA on linear layers with rank_pattern, alpha_pattern, use_rslora and lora_bias. Only adapter_config.json and
        adapter_model.safetensors are opened, never a pickle file.

        Args:
            timeout: seconds to wait for a free slot, where running batches and other loads hold all of them; inf: as long as it takes.

        Raises:
            LoraValueError: with the reason: nothing there, a damaged file, values that are not finite, a rank above max_rank, layers that
                the pool does not serve, or a kind of adapter that is more than plain LoRA (DoRA, modules_to_save, PiSSA, ...).
            LoraKernelsError: no slot became free in time; the pool is closed.
        """
        return self._load(name, lambda shapes: Checkpoint.of_folder(folder, shapes, self.max_rank), timeout)

    def load_tensors(self, name: str, tensors: Mapping[str, Tensor], config: object, timeout: float = 10.0) -> Loaded:
        """Load an adapter that is in memory, as of a trainer whose next rollout uses it:

            pool.load_tensors("policy", peft.get_peft_model_state_dict(model), model.peft_config["default"])

        Equivalent to: `load` of the folder that `save_pretrained` would write, without the files. The pool's model is another than the trainer's.

        Args:
            tensors: by PEFT's names, on any device; copied, so that training may go on once this has returned.
            config: a `peft.LoraConfig`, or a dict as adapter_config.json holds.
            timeout: as of `load`.

        Raises: as `load`; LoraTypeError for what is no mapping of plain tensors (shards of FSDP have to be gathered), or no config.
        """
        return self._load(name, lambda shapes: Checkpoint.of_tensors(tensors, config, shapes, self.max_rank), timeout)

    def evict(self, name: str) -> None:
        """Forget an adapter. Batches that run now go on using it. Raises LoraValueError when it is not loaded, or pinned."""
        self._check_open()
        self._slots.evict(name)

    def pin(self, name: str) -> None:
        """Keep an adapter from being evicted, also when the pool is full, until `unpin`. A reload keeps it pinned."""
        self._check_open()
        self._slots.pin(name, True)

    def unpin(self, name: str) -> None:
        """Let the adapter be evicted again."""
        self._check_open()
        self._slots.pin(name, False)

    def slot(self, name: str) -> int:
        """The adapter's id for `batch_tokens` with a tensor. It holds until the adapter is evicted or replaced; `pin` it."""
        self._check_open()
        return self._slots.get(name).slot

    @property
    def names(self) -> tuple[str, ...]:
        """Loaded adapters, least recently used first."""
        return tuple(a.name for a in self._slots.listed())

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __len__(self) -> int:
        return len(self._slots.listed())

    def stats(self) -> dict[str, int]:
        """Counts: loaded, max_loras, pinned, in_use, free_slots, loads, evictions, refused (failed loads), batches; layers, slab_bytes."""
        slabs = [s for g in self._groups() for s in (*g.slabs_a, *g.slabs_b, *(g.biases or ()))]
        own = {"refused": self._refused, "batches": self._batches, "layers": len(self._targets)}
        return self._slots.snapshot() | own | {"slab_bytes": sum(s.numel() * s.element_size() for s in slabs)}

    # -------------------------------------------------------------------------------------------------------------- batches

    def batch(self, names: Sequence[str | None]) -> Batch:
        """A context in which sequence i of the model's input uses adapter names[i], or none.

        It holds for the thread or asyncio task that entered it: a thread that is started inside (as for a streamed `generate`) enters a batch
        of its own. The input's leading dimension is the number of names or, with beams, a multiple of it. Works with `generate` (KV cache,
        padding, beams), `torch.compile` and, through `Batch.update_`, CUDA graphs. Entering raises LoraValueError for names that are not
        loaded, a forward for layers whose rows do not lie as the model's input does (batches of several adapters alone).
        """
        self._check_open()
        return Batch(self, names, per_token=False)

    def batch_tokens(self, adapters: Sequence[str | None] | Tensor) -> Batch:
        """As `batch`, with one adapter per token of the flattened input, for engines that pack sequences.

        A tensor holds slots (`slot`), int32 `[M]`, -1 = none; then every loaded adapter is held while the batch runs.
        """
        self._check_open()
        return Batch(self, adapters, per_token=True)

    # ---------------------------------------------------------------------------------------------------------------- close

    def close(self) -> None:
        """Put the model's layers back as they were and forget all adapters. Raises LoraKernelsError while batches run."""
        with self._lock:
            if self._running:
                raise LoraKernelsError(message("AdapterPool.close while batches run", f"{self._running} running", fix="end them first"))
            if self._closed:
                return
            self._closed = True
        self._restore()
        self._slots.clear()
        self._targets, self._shapes, self._shards = {}, {}, []

    def __enter__(self) -> AdapterPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self)} of {self.max_loras} adapters on {len(self._targets)} layers"
        return f"AdapterPool({state}, max_rank {self.max_rank})"

    # -------------------------------------------------------------------------------------------------------------- details

    def _load(self, name: str, opened: Callable[[dict[str, Shape]], Checkpoint], timeout: float) -> Loaded:
        start = time.perf_counter()
        if not isinstance(name, str) or not name:
            raise LoraValueError(message("an adapter's name is no name", repr(name)[:80], "a string that is not empty"))
        try:
            shapes, shards = self._shapes, self._shards  # before the question: a close from now on takes them from the pool alone
            self._check_open()
            with opened(shapes) as checkpoint, self._slots.writing(timeout) as slot:
                if checkpoint.config.lora_bias:
                    self._allocate_biases()
                size = fill(checkpoint, slot, shards, list(self._last_use.pop(slot, {}).values()))
                modules = frozenset(t.index for shard in shards for t in shard.targets if t.name in checkpoint.pairs)
                adapter = Adapter(name, slot, modules, checkpoint.config.lora_bias, max(p.rank for p in checkpoint.pairs.values()), size)
                with self._lock:  # a close comes before, or forgets the adapter with the others
                    self._check_open()
                    self._slots.publish(adapter)
        except LoraKernelsError as error:
            with self._lock:
                self._refused += 1
            raise type(error)(f"adapter {name!r} was not loaded: {error}") from error.__cause__
        return Loaded(name, len(adapter.modules), adapter.max_rank, adapter.size, time.perf_counter() - start)

    def _check_open(self) -> None:
        if self._closed:
            raise LoraKernelsError(message("this AdapterPool is closed", fix="make a new one"))

    def _allocate_biases(self) -> None:
        with self._lock:
            self._check_open()
            for group in self._groups():
                if group.biases is None:
                    layers.allocate_biases(group, self._num_slots)
            self._wait_for_fills()

    def _wait_for_fills(self) -> None:
        """New memory is filled on the caller's stream; loads write on streams of their own, which know nothing of that."""
        for shard in self._shards:
            if shard.device.type == "cuda":
                torch.cuda.synchronize(shard.device)

    def _groups(self) -> list[Group]:
        return list({id(t.group): t.group for t in self._targets.values()}.values())

    def _entered(self) -> None:
        with self._lock:
            self._check_open()
            self._running += 1
            self._batches += 1

    def _left(self, adapters: Sequence[Adapter | None]) -> None:
        self._release(adapters)
        with self._lock:
            self._running -= 1

    def _release(self, adapters: Sequence[Adapter | None]) -> None:
        """Give back adapters of a batch. Kernels that read their slots may still be queued: whoever writes there waits for them."""
        for shard in self._shards:
            if shard.device.type == "cuda":
                stream = torch.cuda.current_stream(shard.device)
                event = stream.record_event()
                for slot in {a.slot for a in adapters if a is not None}:
                    self._last_use.setdefault(slot, {})[stream.cuda_stream] = event
        self._slots.release(adapters)


def _check_count(what: str, value: object, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise LoraValueError(message(f"AdapterPool: {what} is no count", repr(value)[:80], f"an int from 1 to {most}"))
