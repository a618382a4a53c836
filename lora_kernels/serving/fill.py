"""Fills a slot of every slab with an adapter."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .checkpoint import Checkpoint, Pair
from .layers import Shard, Target
from .staging import Staging


@torch.no_grad()
def fill(checkpoint: Checkpoint, slot: int, shards: Sequence[Shard], wait_for: list[torch.cuda.Event]) -> int:
    """Write `slot`, which nobody reads yet; returns the bytes read. Layers that the adapter leaves out get rank 0.

    wait_for: events after which the slot may be written. Raises as `Staging.copy`.
    """
    size = 0
    for shard in shards:
        with Staging(shard.device, wait_for) as staging:
            pairs = [checkpoint.pairs.get(t.name) for t in shard.targets]
            for pair, target in zip(pairs, shard.targets, strict=True):
                size += _copy(staging, checkpoint, pair, target, slot)
            scalings = [p.scaling / _folded(p, t) if p else 0.0 for p, t in zip(pairs, shard.targets, strict=True)]
            shard.ranks[:, slot].copy_(torch.tensor([p.rank if p else 0 for p in pairs], dtype=torch.int32, device="cpu"))
            shard.scalings[:, slot].copy_(torch.tensor(scalings, dtype=torch.float32, device="cpu"))
    return size


def _folded(pair: Pair, target: Target) -> float:
    """The part of the scaling that goes into B: in float16 all of one above 1, as s h may overflow where h does not."""
    return pair.scaling if target.layer.weight.dtype == torch.float16 and abs(pair.scaling) > 1 else 1.0


def _copy(staging: Staging, checkpoint: Checkpoint, pair: Pair | None, target: Target, slot: int) -> int:
    """One layer's part of an adapter into its slot; returns the bytes read. Slab entries past the rank are never read."""
    group, i, size = target.group, target.place, 0
    if pair is not None:
        size += staging.copy(checkpoint.file, pair.a, group.slabs_a[i][slot, : pair.rank])
        size += staging.copy(checkpoint.file, pair.b, group.slabs_b[i][slot, :, : pair.rank], scale=_folded(pair, target))
        if pair.bias is not None:
            return size + staging.copy(checkpoint.file, pair.bias, group.biases[i][slot], scale=pair.scaling)
    if group.biases is not None:
        group.biases[i][slot] = -0.0
    return size
