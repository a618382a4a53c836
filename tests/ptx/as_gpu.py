"""The emulator as the GPU of the whole library, for CPU tensors: behind Triton's kernels and behind csrc/cuda. For a process of its own."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from types import SimpleNamespace

import emulator
import torch

from lora_kernels import _batch_table, _device
from lora_kernels.kernels import _launch, batched_table
from lora_kernels.native import cuda
from lora_kernels.ops import _registry, _serving_path, batch_meta, lora_batched

MULTIPROCESSORS = 4

emulator.reset(1, MULTIPROCESSORS)  # before a kernel asks for their number: it asks once
emulator.as_triton_driver()
_launch.PROGRAMS = MULTIPROCESSORS
_registry._SERVES.update(triton=("cpu",), cuda=("cpu",))
_device.sm_count = lambda *_: MULTIPROCESSORS
torch.cuda.current_stream = lambda *_: SimpleNamespace(cuda_stream=0)
torch.cuda.device = lambda *_: contextlib.nullcontext()
torch.cuda.get_device_capability = lambda *_: (9, 0)
torch.cuda.synchronize = emulator.synchronize
torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN: what a kernel does not write is found


# ---- metadata of a batch: a table, as on a GPU, where CPU kernels sort the ids themselves ----

_meta_init, _unlikely = batch_meta.BatchMeta.__init__, _serving_path._unlikely


def _with_table(self: batch_meta.BatchMeta, *args: object) -> None:
    _meta_init(self, *args)
    size = _batch_table.layout(self.num_tokens, self.num_adapters, self.block).size
    self.table = batched_table.build(self.ids, self.num_adapters, self.block, self.ids.new_empty(size))


batch_meta.BatchMeta.__init__ = _with_table
batch_meta._build = batched_table.build
lora_batched._PlainIds = batch_meta.BatchMeta
_serving_path._unlikely = lambda mapping, first: not isinstance(mapping, batch_meta.BatchMeta) or _unlikely(mapping, first)

# ---- csrc/cuda ----

cuda._module = emulator.cuda_module
cuda.unusable = lambda: None if emulator.has_nvcc() else "no nvcc"
_depth = 0


def _finished(run: Callable) -> Callable:
    """CPU tensors do not wait for a stream: the outermost call does. Within it a launch may overlap the one before."""

    @functools.wraps(run)
    def call(*args: object, **options: object) -> object:
        global _depth
        _depth += 1
        try:
            return run(*args, **options)
        finally:
            _depth -= 1
            if not _depth:
                emulator.synchronize()

    return call


for _name in ("lora_linear_fwd", "lora_linear_bwd", "shrink", "linear"):
    setattr(cuda, _name, _finished(getattr(cuda, _name)))
cuda.OPS.update({name: (getattr(cuda, name), refuses) for name, (_, refuses) in cuda.OPS.items()})
