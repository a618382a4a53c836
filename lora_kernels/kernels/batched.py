"""The Triton implementations of the many-adapter ops: a few launches, prepared once per call signature; and what they refuse."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import _batch_table
from ..reference_batched import h_width
from ._launch import Pointers, guarded, on_device
from .batched_common import MAX_SLICES, arch, unit_rows
from .batched_decode import PARTS, Decode
from .batched_decode import serves as decodes
from .batched_dropout import KeepMask, MaskedShrink
from .batched_prefill import Tiles, plan
from .batched_reduce import SegmentReduce
from .batched_shrink import Shrink
from .batched_tma import TmaTiles
from .batched_tma import serves as tma_serves

_MAX_SIGNATURES = 4096
_prepared: dict[tuple, Callable] = {}


def _rows(t: Tensor) -> Tensor:
    """`t` with unit stride along its rows."""
    return t if unit_rows(t) else t.contiguous()


def _groups(weights: list[Tensor], pools_a: list[Tensor], pools_b: list[Tensor]) -> list[slice]:
    """Runs of at most three slices that share all strides but those between adapters of B: one launch each."""
    alike = [(w.stride(), a.stride(), b.stride()[1:]) for w, a, b in zip(weights, pools_a, pools_b, strict=True)]
    runs: list[slice] = []
    for i in range(len(alike)):
        if runs and alike[i] == alike[i - 1] and i - runs[-1].start < MAX_SLICES:
            runs[-1] = slice(runs[-1].start, i + 1)
        else:
            runs.append(slice(i, i + 1))
    return runs


def _cut(t: Tensor | None, run: slice) -> Tensor | None:
    return None if t is None else t[run]


def _biases(biases: list[Tensor | None]) -> Pointers | None:
    return None if biases[0] is None else Pointers([b.contiguous() for b in biases])


def _tiles(x, y, h, weights, biases, pools_b, ranks, block, batch_invariant=False, masked=False, shrink=()) -> TmaTiles | Tiles:
    """The form of base + update that serves the call; `shrink`, A, scalings and packing, for a form that can compute h itself."""
    if tma_serves(x, y, weights, pools_b, arch(x.device), batch_invariant):
        return TmaTiles(x, y, h, weights, biases, pools_b, ranks, block, masked, *shrink)
    return Tiles(plan(x.dtype, x.shape[1], arch(x.device), True, batch_invariant), x, y, h, weights, biases, pools_b, ranks, block, masked)


class Forward:
    """lora_batched_fwd for one call signature."""

    def __init__(self, x, weights, biases, pools_a, pools_b, ids, ranks, scalings, dropout_p, seed, table, block, rank_packed, batch_invariant):
        (M, K), S, L = x.shape, len(weights), pools_a[0].shape[0]
        widths = [w.shape[0] for w in weights]
        self.y_shape, self.h_shape = (M, sum(widths)), (S, M, h_width(pools_b[0].shape[2]))
        self.mask_shape = None if dropout_p is None else (M, -(-K // 32))
        with torch.inference_mode(False):  # kept: made by a first call in inference mode, autograd would not save it later
            self.no_mask = x.new_empty(0, dtype=torch.int32)
        self.keep = None if dropout_p is None else KeepMask(M, K, L)
        y, h = x.new_empty(self.y_shape), x.new_empty(self.h_shape)
        runs = [slice(0, S)] if rank_packed else _groups(weights, pools_a, pools_b)
        self.one = len(runs) == 1
        self.runs = []
        for run in runs:
            columns = slice(sum(widths[: run.start]), sum(widths[: run.stop]))
            w, a, b, yg, hg, bias = weights[run], pools_a[run], pools_b[run], y[:, columns], h[run], _biases(biases[run])
            r, s = _cut(ranks, run), _cut(scalings, run)
            decode = shrink = tiles = None
            if self.keep is None and decodes(M, block, batch_invariant, w, a, b):
                decode = Decode(x, yg, hg, w, bias, a, b, r, s, block, rank_packed)
            else:
                tiles = _tiles(x, yg, hg, w, bias, b, r, block, batch_invariant, shrink=() if self.keep else (a, s, rank_packed))
                if not tiles.own_h:
                    shrink = MaskedShrink(x, a, hg, r, s, block, rank_packed) if self.keep else Shrink(x, a, hg, r, s, block, rank_packed, 1)
            self.runs.append((run, columns, decode, shrink, tiles))

    def __call__(self, stream, x, weights, biases, pools_a, pools_b, ids, ranks, scalings, dropout_p, seed, table):
        y, h, mask, dropped = x.new_empty(*self.y_shape), x.new_empty(*self.h_shape), self.no_mask, ()
        if self.keep is not None:
            mask = x.new_empty(*self.mask_shape, dtype=torch.int32)
            self.keep(stream, mask, seed, ids, dropout_p)
            dropped = (mask, dropout_p)
        yg, hg, w, a, b, bs, r, s = y, h, weights, pools_a, pools_b, biases, ranks, scalings
        for run, columns, decode, shrink, tiles in self.runs:
            if not self.one:  # views cost microseconds
                yg, hg, w, a, b, bs = y[:, columns], h[run], weights[run], pools_a[run], pools_b[run], biases[run]
                r, s = _cut(ranks, run), _cut(scalings, run)
            if decode is not None:
                decode(stream, x, yg, hg, w, _biases(bs), a, b, r, s, table)
            else:
                if shrink is not None:
                    shrink(stream, x, a, hg, r, s, table, *dropped)
                tiles(stream, x, yg, hg, w, _biases(bs), b, r, ids, table, pools_a=a, scalings=s)
        return y, h, mask


class Backward:
    """lora_batched_bwd for one call signature. dx is the forward kernel with (W, A, B) -> (W^T, B^T, A^T)."""

    def __init__(self, dy, x, weights, pools_a, pools_b, h, mask, ids, ranks, scalings, dropout_p, table, block, need_dx, need_da, need_db):
        self.widths, self.needs, masked = [w.shape[0] for w in weights], (need_dx, need_da, need_db), dropout_p is not None
        L, R, dx = *pools_a[0].shape[:2], x.new_empty(x.shape)
        self.no_dx = x.new_empty(0)
        self.slices = []
        for i, dyi in enumerate(dy.split(self.widths, 1)):
            run = slice(i, i + 1)
            r, s, b_t, a_t = _cut(ranks, run), _cut(scalings, run), pools_b[i].transpose(1, 2), pools_a[i].transpose(1, 2)
            tiles = _tiles(dyi, dx, h[run], [weights[i].t()], None, [a_t], r, block, masked=masked, shrink=([b_t], s)) if need_dx else None
            own = tiles is not None and tiles.own_h
            shrink = Shrink(dyi, [b_t], h[run], r, s, block, False, 1) if (need_dx or need_da) and not own else None
            da = SegmentReduce(x, h, R, L, r, block, False, masked) if need_da else None
            db = SegmentReduce(dyi, h, R, L, r, block, True) if need_db else None
            self.slices.append((run, shrink, tiles, da, db))

    def __call__(self, stream, dy, x, weights, pools_a, pools_b, h, mask, ids, ranks, scalings, dropout_p, table):
        need_dx, need_da, need_db = self.needs
        dropped = (mask, dropout_p) if dropout_p is not None else ()
        dx = x.new_empty(x.shape) if need_dx else self.no_dx
        das = [p.new_zeros(p.shape) for p in pools_a] if need_da else []
        dbs = [p.new_zeros(p.shape) for p in pools_b] if need_db else []
        g = torch.empty_like(h)
        for i, (dyi, (run, shrink, tiles, da, db)) in enumerate(zip(dy.split(self.widths, 1), self.slices, strict=True)):
            r, s, b_t, a_t = _cut(ranks, run), _cut(scalings, run), [pools_b[i].transpose(1, 2)], [pools_a[i].transpose(1, 2)]
            if shrink is not None:
                shrink(stream, dyi, b_t, g[run], r, s, table)
            if tiles is not None:
                part = torch.empty_like(dx) if i else dx
                tiles(stream, dyi, part, g[run], [weights[i].t()], None, a_t, r, ids, table, *dropped, pools_a=b_t, scalings=s)
                if i:
                    dx += part
            if da is not None:
                da(stream, g[i], x, das[i], r, table, *dropped)
            if db is not None:
                db(stream, h[i], dyi, dbs[i], r, table)
        return dx, das, dbs


class ShrinkOp:
    """lora_shrink for one call signature. Up to 256 rows the work is split along K, summed in a fixed order."""

    def __init__(self, x, pools_a, ids, ranks, scalings, table, block, rank_packed, batch_invariant):
        S = len(pools_a)
        self.h_shape = (S, x.shape[0], pools_a[0].shape[1] // (S if rank_packed else 1))
        parts = PARTS if block == _batch_table.SMALL_BLOCK and not batch_invariant else 1
        h = x.new_empty(self.h_shape, dtype=torch.float32)
        runs = [slice(0, S)] if rank_packed else _groups(pools_a, pools_a, pools_a)
        self.runs = [(r, Shrink(x, pools_a[r], h[r], _cut(ranks, r), _cut(scalings, r), block, rank_packed, parts)) for r in runs]

    def __call__(self, stream, x, pools_a, ids, ranks, scalings, table):
        h = x.new_zeros(self.h_shape, dtype=torch.float32)
        for run, shrink in self.runs:
            shrink(stream, x, pools_a[run], h[run], _cut(ranks, run), _cut(scalings, run), table)
        return h


class ExpandOp:
    """lora_expand for one call signature."""

    def __init__(self, y, h, pools_b, ids, ranks, table, block, batch_invariant):
        widths, self.runs, form = [b.shape[1] for b in pools_b], [], plan(y.dtype, 0, arch(y.device), False, batch_invariant)
        for run in _groups(pools_b, pools_b, pools_b):
            columns = slice(sum(widths[: run.start]), sum(widths[: run.stop]))
            yg = y[:, columns]
            self.runs.append((run, columns, Tiles(form, yg, yg, h[run], [], None, pools_b[run], _cut(ranks, run), block)))

    def __call__(self, stream, y, h, pools_b, ids, ranks, table):
        for run, columns, tiles in self.runs:
            yg = y[:, columns]
            tiles(stream, yg, yg, h[run], [], None, pools_b[run], _cut(ranks, run), ids, table)


# ------------------------------------------------------------------------------------------------------- call signatures


def _offsets(args: tuple) -> list[int]:
    """Bytes by which each tensor among the arguments and lists of arguments misses a multiple of 16."""
    flat = [t for arg in args for t in (arg if isinstance(arg, list) else (arg,))]
    return [t.data_ptr() % 16 for t in flat if isinstance(t, Tensor)]


def _key(*facts: object) -> tuple:
    """All that a prepared call depends on: shapes, strides, dtypes, device, alignment, constants. The first is a tensor."""
    key, together = [facts[0].device], 0
    for fact in facts:
        for t in fact if isinstance(fact, list) else (fact,):
            if isinstance(t, Tensor):
                key += (t.shape, t.stride(), t.dtype)
                together |= t.data_ptr()
            else:
                key.append(t)
    return (*key, *_offsets(facts)) if together & 15 else tuple(key)


def _prepare(op: type, key: tuple, *args: object) -> Callable:
    """The call for these arguments and all others of this key."""
    found = _prepared.get(key)
    if found is None:
        if len(_prepared) >= _MAX_SIGNATURES:
            _prepared.clear()
        found = _prepared[key] = op(*args)
    return found


def lora_batched_fwd(x, weights, biases, pools_a, pools_b, ids, ranks, scalings, dropout_p, seed, table, block, rank_packed, batch_invariant):
    """See `reference_batched.lora_batched_fwd`."""
    x = _rows(x)
    args, more = (x, weights, biases, pools_a, pools_b, ids, ranks, scalings, dropout_p, seed, table), (block, rank_packed, batch_invariant)
    if x.shape[0] == 0:
        words = 0 if dropout_p is None else (0, -(-x.shape[1] // 32))
        y, h = x.new_empty(0, sum(w.shape[0] for w in weights)), x.new_empty(len(weights), 0, h_width(pools_b[0].shape[2]))
        return y, h, x.new_empty(words, dtype=torch.int32)
    key = _key(x, weights, biases, pools_a, pools_b, ids, ranks, scalings, *more, dropout_p is None, Forward)
    return on_device(x, _prepare(Forward, key, *args, *more), *args)


def _prepare_serving(shape, x, weights, biases, pools_a, pools_b, ids, *rest):
    """`lora_batched_fwd` for every call of this signature, given as the caller of `lora_batched_linear` gave it; see ops/_serving_path.py."""
    S, widths, more, args = len(weights), [w.shape[0] for w in weights], rest[-3:], (x, weights, biases, pools_a, pools_b, ids, *rest)
    prepared = None if any(_offsets(args[:6])) or not unit_rows(x) else guarded(x.device, Forward(*args))

    def call(x, weight, bias, pools_a, pools_b, ids, ranks, scalings, table):
        one = isinstance(weight, Tensor)
        if S == 1:
            weights, biases = [weight if one else weight[0]], [bias if one or bias is None else bias[0]]
        else:
            weights = list(weight.split(widths) if one else weight)
            biases = [None] * S if bias is None else list(bias.split(widths) if one else bias)
        vectors = [None if t is None else t.expand(S, -1) for t in (ranks, scalings)]
        given = (x if len(shape) == 1 else x.view(-1, x.shape[-1]), weights, biases, pools_a, pools_b, ids, *vectors, None, None, table)
        y = (lora_batched_fwd(*given, *more) if prepared is None else prepared(*given))[0]
        return y if len(shape) == 1 else y.view(*shape, y.shape[1])

    return call


lora_batched_fwd.prepare_serving = _prepare_serving


def lora_batched_bwd(dy, x, weights, pools_a, pools_b, h, mask, ids, ranks, scalings, dropout_p, table, block, need_dx, need_da, need_db):
    """See `reference_batched.lora_batched_bwd`."""
    dy, x, h = _rows(dy), _rows(x), h.contiguous()
    args, more = (dy, x, weights, pools_a, pools_b, h, mask, ids, ranks, scalings, dropout_p, table), (block, need_dx, need_da, need_db)
    if x.shape[0] == 0:
        zeros = [[p.new_zeros(p.shape) for p in pools] if need else [] for pools, need in ((pools_a, need_da), (pools_b, need_db))]
        return x.new_empty(x.shape if need_dx else 0), *zeros
    key = _key(dy, x, weights, pools_a, pools_b, h, mask, ids, ranks, scalings, *more, dropout_p is None, Backward)
    return on_device(x, _prepare(Backward, key, *args, *more), *args)


def lora_shrink(x, pools_a, ids, ranks, scalings, table, block, rank_packed, batch_invariant):
    """See `reference_batched.lora_shrink`."""
    x = _rows(x)
    args, more = (x, pools_a, ids, ranks, scalings, table), (block, rank_packed, batch_invariant)
    key = _key(x, pools_a, ranks, scalings, *more, ShrinkOp)
    return on_device(x, _prepare(ShrinkOp, key, *args, *more), *args)


def lora_expand(y, h, pools_b, ids, ranks, table, block, batch_invariant):
    """See `reference_batched.lora_expand`. h is cast here: cast in the kernel it would be a register operand of wgmma."""
    args, more = (y, h.to(y.dtype), pools_b, ids, ranks, table), (block, batch_invariant)
    if y.shape[0]:
        key = _key(y, args[1], pools_b, ranks, *more, ExpandOp)
        on_device(y, _prepare(ExpandOp, key, *args, *more), *args)


# ------------------------------------------------------------------------------------------------------- what they refuse


def _refuses_dtype(x: Tensor) -> str | None:
    return None if x.dtype in (torch.bfloat16, torch.float16, torch.float32) else f"the Triton kernels take no {x.dtype}"


def _refuses_fwd(x, weights, biases, pools_a, pools_b, ids, ranks, scalings, dropout_p, seed, table, block, rank_packed, batch_invariant):
    if len({b is None for b in biases}) > 1:
        return "either all slices have a bias or none"
    if rank_packed and len(_groups(weights, pools_a, pools_b)) > 1:
        return f"rank-packed slices need equal strides and at most {MAX_SLICES} slices"
    return _refuses_dtype(x)


def _refuses_bwd(dy, x, *_):
    return _refuses_dtype(x)


def _refuses_shrink(x, pools_a, ids, ranks, scalings, table, block, rank_packed, batch_invariant):
    if rank_packed and len(pools_a) > MAX_SLICES:
        return f"rank-packed slices: at most {MAX_SLICES}"
    return _refuses_dtype(x)


def _refuses_expand(y, *_):
    return _refuses_dtype(y) if unit_rows(y) else "y needs unit stride along its rows"


OPS = {
    "lora_batched_fwd": (lora_batched_fwd, _refuses_fwd),
    "lora_batched_bwd": (lora_batched_bwd, _refuses_bwd),
    "lora_shrink": (lora_shrink, _refuses_shrink),
    "lora_expand": (lora_expand, _refuses_expand),
}
