"""DTensor: how `lora_linear` splits over ranks (tensor, sequence and data parallel layouts of its arguments).

FSDP2 needs nothing from here: inside a wrapped decoder layer parameters are plain tensors. Where an adapter is an FSDP unit of its
own, or PEFT's layer was parallelised, a patched layer sees a hook or a DTensor and leaves the call to PEFT.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..ops import lora_linear as _  # noqa: F401  (defines the ops)


@functools.cache
def register_sharding_rules() -> None:
    """Let `lora_linear` take DTensors, forward and backward. Call it once, before the first such call; more calls do nothing.

    Layouts (any other is redistributed to one of these by DTensor):

        replicate         everything whole
        column parallel   weight, bias, lora_b split over N      -> y split over N
        row parallel      x, weight, lora_a split over K         -> y a partial sum
        token parallel    x split over M                         -> y split over M

    With dropout only the first two apply (the mask counts rows and columns from the first local one); every rank uses the seed that
    rank 0 of the mesh draws or is given.

    Equivalent to: the same call on the full tensors. Source: DTensor's `register_sharding`.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    whole, rows, columns, part = Replicate(), Shard(0), Shard(1), Partial()

    def given(spec: object, placement: Any) -> Any:
        return None if spec is None else placement

    @register_sharding(torch.ops.lora_kernels.lora_linear_fwd.default)
    def _forward(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed, backend, strict):
        def layout(outputs, x, weight, bias_, lora_a, lora_b):  # outputs: y, h, mask
            return list(outputs), [x, weight, given(bias, bias_), lora_a, lora_b, None, None, given(seed, whole), None, None]

        layouts = [
            layout((whole, whole, whole), whole, whole, whole, whole, whole),
            layout((columns, whole, whole), whole, rows, rows, whole, rows),
        ]
        if dropout_p == 0:
            layouts.append(layout((part, part, whole), columns, columns, part, columns, whole))
            layouts.append(layout((rows, rows, whole), rows, whole, whole, whole, whole))
        return layouts

    @register_sharding(torch.ops.lora_kernels.lora_linear_bwd.default)
    def _backward(dy, x, weight, lora_a, lora_b, h, mask, scaling, dropout_p, need_dx, need_da, need_db, backend, strict):
        def layout(outputs, dy, x, weight, lora_a, lora_b, h):  # outputs: dx, dA, dB; an empty tensor where not needed
            outputs = [p if need else whole for p, need in zip(outputs, (need_dx, need_da, need_db), strict=True)]
            return outputs, [dy, x, weight, lora_a, lora_b, h, whole, *[None] * 7]

        layouts = [
            layout((whole, whole, whole), whole, whole, whole, whole, whole, whole),
            layout((part, part, rows), columns, whole, rows, whole, rows, whole),
        ]
        if dropout_p == 0:
            layouts.append(layout((columns, columns, part), whole, columns, columns, columns, whole, part))
            layouts.append(layout((rows, part, part), rows, rows, whole, whole, whole, rows))
        return layouts
