"""Metadata and weight pools of other servers, taken as they are: vLLM, SGLang, Punica. No weight is copied, nothing waits for the device.

Each function returns what the ops take. Layouts were read in vLLM 0.33.0 (`vllm/lora/ops/triton_ops`), SGLang 0.5.23
(`sglang/srt/lora/utils.py`) and Punica 591b598 (`src/punica/ops`).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks, _checks_batched
from .._errors import LoraTypeError, LoraValueError, message
from ..native.signature import has_values
from ..ops.batch_meta import BatchMeta


class Foreign(NamedTuple):
    """Keyword-ready parts of a call: meta, true ranks int32 `[L]` and scalings float32 `[L]` (None where the form has none)."""

    meta: BatchMeta
    ranks: Tensor | None
    scalings: Tensor | None


def _is_count(n: object, least: int = 0) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and n >= least


def _check_vector(op: str, name: str, t: object, integers: bool = True) -> None:
    _checks_batched.check_plain(op, **{name: t})
    if t.dim() != 1 or not (t.dtype in (torch.int32, torch.int64) if integers else t.is_floating_point()):
        kind = ("integers", "int32 or int64") if integers else ("numbers", "a floating-point type")
        got = f"{t.dtype} {list(t.shape)}"
        raise LoraTypeError(message(f"{op}: {name} is no vector of {kind[0]}", got, f"{kind[1]}, one dimension"))


# ----------------------------------------------------------------------------------------------------------------- vLLM


def from_vllm(meta_args: Sequence[Tensor], num_adapters: int, batch_invariant: bool | None = None) -> Foreign:
    """vLLM's `LoRAKernelMeta.meta_args(token_nums, ...)`: seven tensors, of which the first, token_lora_mapping int32 `[M]` (-1 = none),
    says everything; the others are its sort, which is made again in this package's layout.

    Its slabs `[L, 1, R, K]` and `[L, 1, N, R]` go to the ops as they are. Scaling is folded into B by vLLM, ranks are padded with zeros:
    both come back as None.
    """
    if not isinstance(meta_args, (list, tuple)) or len(meta_args) != 7 or not isinstance(meta_args[0], Tensor):
        got = f"{len(meta_args)} values" if isinstance(meta_args, (list, tuple)) else type(meta_args).__name__
        allowed = "the 7 tensors of LoRAKernelMeta.meta_args, token_lora_mapping first"
        raise LoraValueError(message("from_vllm: not vLLM's metadata", got, allowed))
    return Foreign(BatchMeta(meta_args[0], num_adapters, batch_invariant), None, None)


# --------------------------------------------------------------------------------------------------------------- SGLang


def segment_ids(indptr: Tensor, slots: Tensor, num_tokens: int, permutation: Tensor | None = None) -> Tensor:
    """int32 `[num_tokens]` from contiguous segments: rows indptr[i] ... indptr[i + 1] use slots[i]; rows before the first and past the last
    segment use none, and slots past the last segment (padding) say nothing.

    `permutation` int `[up to num_tokens]`: segment position j stands for row permutation[j]; rows that it does not name use none.

    Raises: LoraTypeError, LoraValueError: no integer vectors, fewer slots than segments, a longer permutation than rows; on a CPU also
        segments that run backwards or past the rows, and rows that the permutation names twice or that are not there.
    """
    segments = _check_segments(indptr, slots, num_tokens, permutation)
    position = torch.arange(num_tokens, device=indptr.device, dtype=indptr.dtype)
    segment = torch.searchsorted(indptr[1:].contiguous(), position, right=True)
    padded = torch.cat([_checks_batched.narrowed(slots[:segments], torch.int32), slots.new_full((1,), -1, dtype=torch.int32)])
    ids = padded[segment].masked_fill_(position < indptr[0], -1)
    if permutation is None:
        return ids
    return torch.full_like(ids, -1).scatter_(0, permutation.to(torch.int64), ids[: permutation.shape[0]])


def _check_segments(indptr: Tensor, slots: Tensor, num_tokens: int, permutation: Tensor | None) -> int:
    """The number of segments. Values are read on a CPU only: on a GPU that would wait."""
    vectors = {"indptr": indptr, "slots": slots} | ({} if permutation is None else {"permutation": permutation})
    for name, t in vectors.items():
        _check_vector("segments", name, t)
    _checks.check_devices("segments", **vectors)
    if not _is_count(num_tokens):
        raise LoraValueError(message("segments: num_tokens is no count", repr(num_tokens)[:80], "an int of at least 0"))
    segments = indptr.shape[0] - 1
    if segments < 0 or slots.shape[0] < segments:
        got = f"indptr {list(indptr.shape)}, slots {list(slots.shape)}"
        raise LoraValueError(message("segments: indptr and slots do not fit", got, "indptr [segments + 1], slots [at least segments]"))
    if permutation is not None and permutation.shape[0] > num_tokens:
        raise LoraValueError(message("segments: the permutation has more rows than there are", permutation.shape[0], f"at most {num_tokens}"))
    if not indptr.is_cpu or not has_values(indptr):
        return segments
    if indptr[0] < 0 or (indptr.diff() < 0).any():
        raise LoraValueError(message("segments: indptr runs backwards", indptr.tolist()[:8], "0 or more, ascending"))
    rows = num_tokens if permutation is None else permutation.shape[0]
    if indptr[-1] > rows:
        raise LoraValueError(message("segments: indptr runs past the rows", f"an end at {int(indptr[-1])}", f"at most {rows}"))
    if permutation is not None and permutation.numel():
        low, high = (int(v) for v in permutation.aminmax())
        if low < 0 or high >= num_tokens or permutation.unique().numel() != permutation.numel():
            allowed = f"each of 0 to {num_tokens - 1} at most once"
            raise LoraValueError(message("segments: the permutation is none", f"rows from {low} to {high}", allowed))
    return segments


_SGLANG = ("permutation", "num_segments", "seg_indptr", "weight_indices", "lora_ranks", "scalings")


def from_sglang(batch_info: Any, num_tokens: int | None = None, batch_invariant: bool | None = None) -> Foreign:
    """SGLang's `LoRABatchInfo`: segments (`seg_indptr`, `weight_indices`), a `permutation` of the rows, `lora_ranks`, `scalings`.

    Requests without an adapter are a slot of rank 0 there, and so here. num_tokens: rows of x; when None, the permutation's length or
    `expected_tokens`. Weights go to the ops as they lie: the stacked A `[L, S r, K]`, whose slices follow each other at the true rank, as
    `pool_a=[A] * S, rank_packed=True`, and B `[L, N, r]` as `pool_b=sglang_slices(B, widths)`.
    """
    if lacking := [name for name in _SGLANG if not hasattr(batch_info, name)]:
        got, allowed = f"{type(batch_info).__name__} without {', '.join(lacking)}", "SGLang's LoRABatchInfo, or an object with its fields"
        raise LoraTypeError(message("from_sglang: not SGLang's metadata", got, allowed))
    op, permutation, count = "from_sglang", batch_info.permutation, batch_info.num_segments
    for name in ("seg_indptr", "weight_indices", "lora_ranks", "scalings") + (() if permutation is None else ("permutation",)):
        _check_vector(op, name, getattr(batch_info, name), name != "scalings")
    indptr, slots, ranks = batch_info.seg_indptr, batch_info.weight_indices, batch_info.lora_ranks
    if not _is_count(count) or count > min(indptr.shape[0] - 1, slots.shape[0]):
        got = f"{count!r:.80}, seg_indptr {list(indptr.shape)}, weight_indices {list(slots.shape)}"
        raise LoraValueError(message(f"{op}: num_segments does not fit", got, "an int, seg_indptr [more], weight_indices [at least as many]"))
    if batch_info.scalings.shape != ranks.shape:
        got = f"lora_ranks {list(ranks.shape)}, scalings {list(batch_info.scalings.shape)}"
        raise LoraValueError(message(f"{op}: lora_ranks and scalings do not fit", got, "one of each per slot"))
    if num_tokens is None:
        num_tokens = getattr(batch_info, "expected_tokens", None) if permutation is None else permutation.shape[0]
    if num_tokens is None:
        got = "neither permutation nor expected_tokens"
        raise LoraValueError(message("from_sglang: the number of rows is not known", got, fix="num_tokens=x.shape[0]"))
    ids = segment_ids(indptr[: count + 1], slots[:count], num_tokens, permutation)
    meta = BatchMeta(ids, ranks.shape[0], batch_invariant)
    return Foreign(meta, _checks_batched.narrowed(ranks, torch.int32), batch_info.scalings.to(torch.float32))


def sglang_slices(pool_b: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """Views of B `[L, sum N_i, r]`, one per output slice."""
    _checks.check_tensors("sglang_slices", pool_b=pool_b)
    if pool_b.dim() != 3:
        raise LoraValueError(message("sglang_slices: wrong number of dimensions", f"pool_b {list(pool_b.shape)}", "[L, sum of widths, r]"))
    if not isinstance(widths, (list, tuple)) or not all(_is_count(n, 1) for n in widths) or sum(widths) != pool_b.shape[1]:
        allowed = f"a list of ints from 1 with the sum {pool_b.shape[1]}"
        raise LoraValueError(message("sglang_slices: widths do not fit pool_b", repr(widths)[:80], allowed))
    return list(pool_b.split(list(widths), 1))


# --------------------------------------------------------------------------------------------------------------- Punica


class _Memory:
    """A range of device memory in the form that `torch.as_tensor` takes without a copy."""

    def __init__(self, address: int, nbytes: int, owner: object):
        self.__cuda_array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3, "strides": None}
        self.owner = owner


def _bytes_at(address: int, nbytes: int, device: torch.device, owner: object) -> Tensor:
    if device.type == "cuda":
        return torch.as_tensor(_Memory(address, nbytes, owner), device=device)
    memory = (ctypes.c_char * nbytes).from_address(address)
    memory.owner = owner
    return torch.frombuffer(memory, dtype=torch.uint8)


class Pointers(NamedTuple):
    """`pool`: a view `[slots, rows, columns]` over the memory the pointers name; `slots` int32 `[segments]`: the slot of each pointer."""

    pool: Tensor
    slots: Tensor


def pool_of_pointers(
    pointers: Tensor, rows: int, columns: int, dtype: torch.dtype, layer: int = 0, owner: object = None, most: int = 65536
) -> Pointers:
    """Punica's weight pointers (int64 `[segments]`, each to `[layers, rows, columns]`) as one pool, without copying a weight.

    The matrices must lie at multiples of one pitch in one allocation, as adapters loaded into one pool do; an adapter's slot is its place
    in that allocation, and places that no pointer names are never read. Reads the pointers, and so waits for the device: call it when
    adapters are loaded, not in every forward. `owner` is kept alive with the pool (the tensor the pointers point into).
    Where Punica keeps the transpose (`[H1, R]` for A in sgmv_cutlass), give rows and columns as stored and use `pool.transpose(1, 2)`.

    Raises:
        LoraValueError: pointers without a common pitch of at least one matrix; a layer past it; matrices outside an owner that is a tensor.
    """
    if not isinstance(pointers, Tensor) or pointers.dtype != torch.int64 or pointers.dim() != 1 or pointers.numel() == 0:
        got = f"{pointers.dtype} {list(pointers.shape)}" if isinstance(pointers, Tensor) else type(pointers).__name__
        raise LoraTypeError(message("pool_of_pointers: these are no pointers", got, "int64 [segments >= 1]"))
    if not isinstance(dtype, torch.dtype) or not all(isinstance(n, int) and not isinstance(n, bool) for n in (rows, columns, layer, most)):
        got = f"rows {rows!r:.40}, columns {columns!r:.40}, dtype {dtype!r:.40}, layer {layer!r:.40}, most {most!r:.40}"
        raise LoraTypeError(message("pool_of_pointers: no shape and dtype", got, "ints and a torch.dtype"))
    addresses = pointers.tolist()
    size = dtype.itemsize
    first, matrix = min(addresses), rows * columns * size
    if first <= 0 or first % size:
        raise LoraValueError(message("pool_of_pointers: a pointer to no matrix", first, f"addresses above 0, multiples of {size}"))
    pitch = math.gcd(*(address - first for address in addresses)) or matrix
    slots = [(address - first) // pitch for address in addresses]
    fits = layer >= 0 and all(1 <= n < 2**31 for n in (rows, columns))
    if not fits or (len(set(addresses)) > 1 and (layer + 1) * matrix > pitch >= matrix):
        got = f"layer {layer} of [{rows}, {columns}] at a pitch of {pitch} bytes"
        allowed = "rows and columns from 1 to 2**31 - 1, a layer inside the pitch"
        raise LoraValueError(message("pool_of_pointers: no such layer", got, allowed))
    if pitch < matrix or pitch % size or max(slots) >= most:
        fix = "allocate the adapters in one [adapters, layers, rows, columns] tensor and use its slice for the layer as the pool"
        got = f"pitch {pitch} bytes for matrices of {matrix}, {max(slots) + 1} places"
        raise LoraValueError(message("pool_of_pointers: the matrices lie at no common pitch", got, f"pitch >= {matrix}, at most {most} places", fix))
    start, nbytes = first + layer * matrix, max(slots) * pitch + matrix
    memory = owner.untyped_storage() if isinstance(owner, Tensor) else None
    low, high = (0, 2**63 - 1) if memory is None else (memory.data_ptr(), memory.data_ptr() + memory.nbytes())
    if first < low or start + nbytes > high:
        got, allowed = f"{nbytes} bytes at {start}", f"addresses from {low} to {high}"
        raise LoraValueError(message("pool_of_pointers: the matrices lie outside their owner's memory", got, allowed))
    raw = _bytes_at(start, nbytes, pointers.device, owner).view(dtype)
    pool = raw.as_strided((max(slots) + 1, rows, columns), (pitch // size, columns, 1))
    return Pointers(pool, torch.tensor(slots, dtype=torch.int32, device=pointers.device))


def from_punica(indptr: Tensor, slots: Tensor, num_tokens: int, num_adapters: int, batch_invariant: bool | None = None) -> Foreign:
    """Punica's SGMV segments: `s` int32 `[segments + 1]` and the slot of each segment (from `pool_of_pointers`).

    Punica folds the scaling into B and takes one rank per call: ranks and scalings come back as None. Its BGMV form needs no function:
    the indices are token_lora_mapping, and `w_T_all[:, layer]` is the pool.
    """
    return Foreign(BatchMeta(segment_ids(indptr, slots, num_tokens), num_adapters, batch_invariant), None, None)
