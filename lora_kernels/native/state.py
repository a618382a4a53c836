"""Whether objects still have the attributes they had: a verdict on their state is then as good as new."""

from __future__ import annotations

from collections.abc import Iterable

try:
    from .._C import unchanged
except ImportError:

    def unchanged(entries: tuple, self: object) -> bool:
        """Without the native module comparing takes longer than most verdicts: everything may have changed."""
        return False


def snapshot(self: object, others: Iterable[object], typed: Iterable[object] = (), ignored: str = "") -> tuple:
    """Entries for `unchanged(entries, self)`: true while self and the others have their types and attributes, and the dicts and lists among
    these their keys and items, all by identity, and `typed` their types. Self's attribute `ignored`, which must be there, may change.

    The entries hold on to what they were made of, but not to self.
    """
    entries = [_entry(None, self, ignored)]
    for owner in (self, *others):
        if owner is not self:
            entries.append(_entry(owner, owner, ""))
        entries += [(v, type(v), _contents(v)) for v in vars(owner).values() if isinstance(v, (dict, list))]
    return (*entries, *((t, type(t), None) for t in typed))


def _entry(owner: object, source: object, ignored: str) -> tuple:
    return owner, type(source), _contents({k: ... if k == ignored else v for k, v in vars(source).items()})


def _contents(container: dict | list) -> tuple:
    return tuple(container) if isinstance(container, list) else tuple(part for item in container.items() for part in item)
