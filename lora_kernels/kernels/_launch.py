"""Launching: one compiled kernel per `Launcher`, device guard, sync workspace, and a recorder that lets configs be compiled without a GPU.

Triton's own launch binds, specialises and hashes every argument of every call and encodes each TMA descriptor anew. A `Launcher`
belongs to one call signature (shapes, strides, dtypes, alignment), so it goes through Triton once and afterwards hands raw pointers,
remembered descriptors and a constant tail straight to the compiled kernel's C launcher; all of them together, where a call's addresses are known.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import _device
from .._flags import Flags
from ..native.signature import addresses
from ._raw_launch import raw_launch

_MAX_REMEMBERED = 1024  # calls, and descriptors per argument; addresses come back, as the caching allocator reuses its blocks
_runtime = knobs.runtime
PROGRAMS = 132  # of a device that is not there: H200 when recording
_recorded: list | None = None


class Pointers(tuple):
    """Tensors that go to a kernel as one argument, a tuple of pointers."""

    __slots__ = ()

    def data_ptr(self) -> tuple[int, ...]:
        return tuple([t.data_ptr() for t in self])


class Launcher:
    """One kernel with its constexprs and options, for calls that differ only in addresses and float arguments.

    The kernel's parameters stand in the order: descriptors, pointers, floats, ints, constexprs. A descriptor (with its block) or a pointer
    may be None, a pointer also `Pointers`, an int a tuple of ints.
    """

    __slots__ = ("blocks", "constants", "fn", "grid", "ints", "kernel", "known", "maps", "raw", "tail", "warps_stages")

    def __init__(
        self,
        fn,
        grid: Sequence[int],
        blocks: Sequence[Sequence[int] | None],
        ints: Sequence[int | tuple[int, ...]],
        warps: int,
        stages: int,
        **constants: Any,
    ):
        self.fn = fn
        self.grid = (*grid, 1, 1)[:3]
        self.blocks = [block and list(block) for block in blocks]
        self.ints = tuple(ints)
        self.constants = constants
        self.warps_stages = {"num_warps": warps, "num_stages": stages}
        self.maps: list[dict[int, list]] = [{} for _ in blocks]
        self.known: dict[Hashable, tuple] = {}
        self.raw = None

    def __call__(
        self, stream: int, described: Sequence[Tensor | None], pointers: Sequence[Tensor | Pointers | None], floats: Sequence[float] = ()
    ) -> None:
        """A described tensor of more than two dimensions is contiguous and stands for its rows."""
        hook = _runtime.launch_enter_hook
        if self.raw is None or getattr(hook, "calls", hook):  # a profiler's hook wants Triton's own launch
            self._first(described, pointers, floats)
            return
        key = addresses(stream, floats, described, pointers)
        self.raw(*(self.known.get(key) or self._arguments(key, stream, described, pointers, floats)))

    def _arguments(self, key: Hashable, stream: int, described: Sequence[Tensor | None], pointers: Sequence, floats: Sequence[float]) -> tuple:
        """What the C launcher takes, remembered for calls of the same addresses."""
        args: list = []
        for maps, tensor, block in zip(self.maps, described, self.blocks, strict=False):
            if tensor is None:
                args.append(None)
                continue
            address = tensor.data_ptr()
            args += maps.get(address) or self._describe(maps, address, tensor, block)
        args += [p if p is None else p.data_ptr() for p in pointers]
        if len(self.known) >= _MAX_REMEMBERED:
            self.known.clear()
        self.known[key] = found = self.kernel.arguments(self.grid, stream, (*args, *floats, *self.tail))
        return found

    def _first(self, described: Sequence[Tensor | None], pointers: Sequence[Tensor | Pointers | None], floats: Sequence[float]) -> None:
        pointers = [tuple(p) if isinstance(p, Pointers) else p for p in pointers]
        maps = [t if t is None else _descriptor(t, block) for t, block in zip(described, self.blocks, strict=True)]
        args = [*maps, *pointers, *floats, *self.ints]
        if _recorded is not None:
            _recorded.append((self, args))
            return
        if isinstance(self.fn, InterpretedFunction):
            self.fn[self.grid](*args, **self.constants)
            return
        if any(self.blocks):
            _bind_context()
        compiled = self.fn.run(*args, grid=self.grid, warmup=False, **self.constants, **self.warps_stages)
        self.tail = (*self.ints, *(self.constants[name] for name in self.fn.arg_names if name in self.constants))
        self.kernel = raw_launch(compiled)
        if self.kernel:
            self.raw = self.kernel.launch  # last: another thread takes it as the sign that the rest is there

    def _describe(self, maps: dict[int, list], address: int, tensor: Tensor, block: list[int]) -> list:
        """The kernel arguments of one descriptor (encoded map, shape, strides), remembered by address."""
        if len(maps) >= _MAX_REMEMBERED:
            maps.clear()
        present = [m for m, of in zip(self.maps, self.blocks, strict=True) if of]  # Triton counts the descriptors that are there
        position = next(i for i, m in enumerate(present) if m is maps)
        _bind_context()
        maps[address] = self.kernel.encode(_descriptor(tensor, block), position)
        return maps[address]


def _descriptor(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(tensor if tensor.dim() == 2 else tensor.view(-1, tensor.shape[-1]), block)


@functools.cache
def _libcuda() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")  # Triton's driver has loaded it


def _bind_context() -> None:
    """Give this thread the device's context, if it has none.

    A thread of autograd's has none before its first launch, and Triton's launch, which would see to it, comes after the descriptors.
    """
    context = ctypes.c_void_p()
    _libcuda().cuCtxGetCurrent(ctypes.byref(context))
    if not context:
        _libcuda().cuDevicePrimaryCtxRetain(ctypes.byref(context), driver.active.get_current_device())
        _libcuda().cuCtxSetCurrent(context)


def on_device(tensor: Tensor, run: Callable, *args: Any) -> Any:
    """`run(stream, *args)` with the tensor's device current."""
    if not tensor.is_cuda:
        return run(0, *args)  # interpreter, or recording
    index = tensor.device.index
    if index == torch._C._cuda_getDevice():
        return run(torch._C._cuda_getCurrentRawStream(index), *args)
    with torch.cuda.device(index):
        return run(torch._C._cuda_getCurrentRawStream(index), *args)


def guarded(device: torch.device, run: Callable) -> Callable:
    """`run(stream, ...)` as a function of the rest, for tensors on this device: `on_device` for calls whose device is known beforehand."""
    if device.type != "cuda":
        return functools.partial(run, 0)
    index, current, stream = device.index, torch._C._cuda_getDevice, torch._C._cuda_getCurrentRawStream

    def call(*args: Any) -> Any:
        if current() == index:
            return run(stream(index), *args)
        with torch.cuda.device(index):
            return run(stream(index), *args)

    return call


def precision(dtype: torch.dtype) -> str:
    """tl.dot's precision: for fp32 inputs as torch's TF32 setting says."""
    return "tf32" if dtype != torch.float32 or tf32_allowed() else "ieee"


def tf32_allowed() -> bool:
    """torch's setting. `allow_tf32` raises in torch 2.11 once anything has used `fp32_precision`, as transformers does; that one reads both."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def regular(*tensors: Tensor) -> bool:
    """Whether these 2-D tensors are 16-bit with contiguous rows, base and row pitch multiples of 16 bytes (what TMA can describe)."""
    return all(
        t.element_size() == 2 and t.stride(1) == 1 and t.stride(0) % 8 == 0 and t.stride(0) >= t.shape[1] and t.data_ptr() % 16 == 0 for t in tensors
    )


def programs(device: torch.device) -> int:
    """Programs of a persistent grid: one per SM."""
    return _device.sm_count(device.index or 0) if device.type == "cuda" else PROGRAMS


def maker(x: Tensor, *shape: int) -> Callable[[], Tensor]:
    """A function that makes contiguous tensors of this shape, in x's dtype and on its device, which must be the current one.

    Where torch has it, the allocation that inductor's code uses, past the dispatcher: 0.6 us where new_empty takes 1.2 (Zen 3,
    benchmarks/bench_host_overhead.py). Nothing listens to the dispatcher inside an implementation.
    """
    make = getattr(torch._C._dynamo.guards, f"_empty_strided_{x.device.type}", None)
    if make is None:
        return functools.partial(torch.empty, shape, dtype=x.dtype, device=x.device)
    return functools.partial(make, shape, torch.empty(shape, device="meta").stride(), x.dtype)


class PerStream:
    """`make(stream)`, remembered by stream; made anew for each launch that a CUDA graph captures, as the graph may be replayed on any stream."""

    __slots__ = ("capturing", "found", "make")

    def __init__(self, device: torch.device, make: Callable[[int], Tensor]):
        self.capturing = torch._C._cuda_isCurrentStreamCapturing if device.type == "cuda" else bool
        self.found: dict[int, Tensor] = {}
        self.make = make

    def on(self, stream: int) -> Tensor:
        if self.capturing():
            return self.make(stream)
        found = self.found.get(stream)
        if found is None:
            found = self.found[stream] = self.make(stream)
        return found


flags = Flags()
workspace = flags.on  # (device, stream, ints) -> zeroed int32 flags for a kernel that leaves them zero


@contextlib.contextmanager
def recording() -> Iterator[list]:
    """Collect launches as (launcher, arguments) instead of running them; tensors may be on the meta device."""
    global _recorded
    _recorded = []
    try:
        yield _recorded
    finally:
        _recorded = None
