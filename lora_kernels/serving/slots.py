"""`Slots`: which adapter lies in which slot, who uses it, and which one goes when a new one comes. Bookkeeping only, no tensors.

A slot is free, being written by one loader, or holds an adapter. An adapter that is evicted or replaced while batches use it loses its
name at once and its slot when the last of them ends. There is one slot more than adapters, so that a full pool can take a new version
of an adapter, or a new adapter, before it gives up an old one: nothing is evicted for a load that fails.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from .._errors import LoraKernelsError, LoraValueError, message


@dataclass(eq=False)
class Adapter:
    """A loaded adapter. `modules`: indices of the target layers it adapts; `bias`: whether it has lora_bias."""

    name: str
    slot: int
    modules: frozenset[int] = frozenset()
    bias: bool = False
    max_rank: int = 0
    size: int = 0  # bytes read from its file
    users: int = 0
    pinned: bool = False
    listed: bool = True  # False once evicted or replaced


class Slots:
    """Thread-safe. At most `max_loras` adapters by name, least recently used first: loaded, or acquired by name, longest ago."""

    def __init__(self, max_loras: int) -> None:
        self.max_loras = max_loras
        self._changed = threading.Condition()
        self._free = list(range(max_loras, -1, -1))
        self._by_name: OrderedDict[str, Adapter] = OrderedDict()
        self.loads = self.evictions = 0

    # ---- loading

    @contextmanager
    def writing(self, timeout: float) -> Iterator[int]:
        """A free slot to write into. It is free again when the block ends, unless `publish` was called for it."""
        if not isinstance(timeout, (int, float)) or isinstance(timeout, bool) or not timeout >= 0:  # also NaN
            raise LoraValueError(message("timeout is no time to wait", repr(timeout)[:80], "seconds from 0, float('inf') for as long as it takes"))
        with self._changed:
            if not self._changed.wait_for(lambda: self._free, min(timeout, threading.TIMEOUT_MAX)):
                got = f"{self._in_use()} adapters in running batches, others being loaded"
                fix = "end the batches, or load with a longer timeout"
                raise LoraKernelsError(message(f"no slot became free within {timeout:g} s", got, f"max_loras {self.max_loras}", fix))
            slot = self._free.pop()
        try:
            yield slot
        except BaseException:
            self._release_slot(slot)
            raise

    def publish(self, adapter: Adapter) -> None:
        """From now on the name means this adapter. Replaces one of the same name; else a full pool evicts its `_victim`."""
        with self._changed:
            if (old := self._by_name.get(adapter.name)) is not None:
                adapter.pinned = old.pinned
                self._retire(old)
            elif len(self._by_name) >= self.max_loras:
                self._retire(self._victim())
                self.evictions += 1
            self._by_name[adapter.name] = adapter
            self.loads += 1

    def _victim(self) -> Adapter:
        """The least recently used unpinned adapter that nobody holds; where all are held, the least recently used unpinned one."""
        unpinned = [a for a in self._by_name.values() if not a.pinned]
        if not unpinned:
            raise LoraValueError(message("the pool is full and every adapter is pinned", f"max_loras {self.max_loras}", fix="unpin or evict one"))
        return next((a for a in unpinned if not a.users), unpinned[0])

    # ---- use

    def acquire(self, names: Sequence[str | None]) -> list[Adapter | None]:
        """The adapters of these names, held until `release`; all of them or, with an error, none."""
        with self._changed:
            found = [None if name is None else self._get(name) for name in names]
            for adapter in dict.fromkeys(a for a in found if a is not None):
                adapter.users += 1
                self._by_name.move_to_end(adapter.name)
            return found

    def acquire_all(self) -> list[Adapter]:
        """Every loaded adapter, held until `release`."""
        with self._changed:
            for adapter in self._by_name.values():
                adapter.users += 1
            return list(self._by_name.values())

    def release(self, adapters: Sequence[Adapter | None]) -> None:
        with self._changed:
            for adapter in dict.fromkeys(a for a in adapters if a is not None):
                adapter.users -= 1
                if not adapter.users and not adapter.listed:
                    self._release_slot(adapter.slot)

    def evict(self, name: str) -> None:
        with self._changed:
            adapter = self._get(name)
            if adapter.pinned:
                raise LoraValueError(message(f"adapter {name!r} is pinned", allowed="unpinned adapters", fix=f"unpin({name!r}) first"))
            self._retire(adapter)
            self.evictions += 1

    def clear(self) -> None:
        """Forget every adapter."""
        with self._changed:
            for adapter in list(self._by_name.values()):
                self._retire(adapter)

    def pin(self, name: str, pinned: bool) -> None:
        with self._changed:
            self._get(name).pinned = pinned

    def get(self, name: str) -> Adapter:
        with self._changed:
            return self._get(name)

    def listed(self) -> list[Adapter]:
        """Loaded adapters, least recently used first."""
        with self._changed:
            return list(self._by_name.values())

    def snapshot(self) -> dict[str, int]:
        with self._changed:
            adapters = self._by_name.values()
            return {
                "loaded": len(adapters),
                "max_loras": self.max_loras,
                "pinned": sum(a.pinned for a in adapters),
                "in_use": self._in_use(),
                "free_slots": len(self._free),
                "loads": self.loads,
                "evictions": self.evictions,
            }

    # ---- under the lock

    def _in_use(self) -> int:
        return sum(a.users > 0 for a in self._by_name.values())

    def _get(self, name: str) -> Adapter:
        if not isinstance(name, str) or name not in self._by_name:
            known = ", ".join(list(self._by_name)[-5:]) or "none"
            fix = "load it, or use None for the base model"
            raise LoraValueError(message("no adapter of this name is loaded", repr(name), f"{len(self._by_name)} loaded: {known}", fix))
        return self._by_name[name]

    def _retire(self, adapter: Adapter) -> None:
        del self._by_name[adapter.name]
        adapter.listed = False
        if not adapter.users:
            self._release_slot(adapter.slot)

    def _release_slot(self, slot: int) -> None:
        with self._changed:  # reentrant
            self._free.append(slot)
            self._changed.notify()
