"""Triton's C launch function without the Python around it. What it takes is private to Triton and differs by version."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from .._errors import warn_once

FLAT, PACKED = "flat", "packed"  # the kernel's arguments one by one, or in one tuple beside a description of it
LAYOUTS = {(3, 6): FLAT, (3, 7): PACKED, (3, 8): PACKED, (3, 9): PACKED}


def layout() -> str | None:
    """None for a Triton whose launch function is not known here: calls take Triton's own way then, which is right but slow."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version not in LAYOUTS:
        versions = ", ".join(f"{major}.{minor}" for major, minor in LAYOUTS)
        warn_once(
            f"triton {triton.__version__} is not among the versions whose launch function is known here, {versions}: "
            "each launch takes Triton's own path, 30 us and more longer (docs/measured.md, Host cost)"
        )
    return LAYOUTS.get(version)


class RawLaunch:
    """One compiled kernel: `launch(*arguments(grid, stream, args))`, args as the kernel declares them, constexprs included, descriptors encoded."""

    __slots__ = ("_head", "_packed", "encode", "launch")

    def __init__(self, launch: Callable, encode: Callable[[TensorDescriptor, int], list], head: tuple, packed: bool):
        self.launch, self.encode, self._head, self._packed = launch, encode, head, packed

    def arguments(self, grid: tuple[int, int, int], stream: int, args: tuple) -> tuple:
        return (*grid, stream, *self._head, args) if self._packed else (*grid, stream, *self._head, *args)


def raw_launch(compiled: Any) -> RawLaunch | None:
    """None where Triton's own path must be taken: an unknown version, a kernel that wants scratch memory, instrumentation."""
    launcher, known = compiled.run, layout()
    if known is None or launcher.global_scratch_size or launcher.profile_scratch_size or getattr(launcher, "gsan_enabled", False):
        return None
    launch, metas = launcher.launch, ()
    if getattr(launch, "__closure__", None) is not None:  # a function of Python around it encodes the descriptors
        inside = inspect.getclosurevars(launch).nonlocals
        launch, metas = inside.get("launcher"), inside.get("tensordesc_meta")
        if launch is None or not metas or None in metas:
            return None
    options = (launcher.launch_cooperative_grid, launcher.launch_pdl)
    scratch, hooks = (None, None), (None, None, None)
    if known == FLAT:
        head = (compiled.function, *options, *scratch, compiled.packed_metadata, *hooks)
    else:
        head = (compiled.function, *options, compiled.packed_metadata, *hooks, *scratch, launcher.arg_annotations, launcher.kernel_signature)
    return RawLaunch(launch, _encoder(metas), head, known == PACKED)


def _encoder(metas: Sequence) -> Callable[[TensorDescriptor, int], list]:
    """The kernel arguments of the descriptor at a position: encoded map, shape, strides."""
    from triton.backends.nvidia.driver import make_tensordesc_arg as make

    unused = (None,) * (len(inspect.signature(make).parameters) - 2)  # Triton 3.8 hands it the launch's other arguments
    return lambda descriptor, position: make(descriptor, metas[position], *unused)
