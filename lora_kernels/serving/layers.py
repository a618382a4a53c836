"""The model's linear layers on the batched path: found, given slabs, swapped in by class, swapped out again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .._errors import LoraKernelsError, LoraTypeError, LoraValueError, message
from ..native.signature import has_values
from ..ops.lora_batched import lora_batched_linear
from ..ops.lora_expand import lora_expand
from ..ops.lora_shrink import lora_shrink
from .batch import TASKS

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from .batch import Batch, Current

# Layers of one parent that get the same input: one shrink (or one whole call) serves all of them.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(eq=False)
class Group:
    """Target layers that share their input (often just one), with their slabs; L slots, R = max_rank.

    slabs_a[i] `[L, R, K]`, slabs_b[i] `[L, N_i, R]`, ranks int32 `[S, L]`, scalings float32 `[S, L]`: allocated once, never moved.
    biases[i] `[L + 1, N_i]`, scaling applied, or None until an adapter with lora_bias comes.
    """

    layers: list[nn.Linear]
    slabs_a: list[Tensor]
    slabs_b: list[Tensor]
    ranks: Tensor
    scalings: Tensor
    biases: list[Tensor] | None = None

    def __post_init__(self) -> None:
        self._tables: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def tables(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """ranks and scalings of `count` layers, the same objects every time: what was looked at need not be looked at again."""
        if torch.compiler.is_compiling():
            return self.ranks[first : first + count], self.scalings[first : first + count]
        if (found := self._tables.get((first, count))) is None:
            found = self._tables[first, count] = (self.ranks[first : first + count], self.scalings[first : first + count])
        return found


@dataclass(eq=False)
class Target:
    """One layer's place: its name in the model, its number among all targets, its group and the place in it."""

    name: str
    index: int
    group: Group
    place: int
    current: Current
    exact_base: bool
    layer: nn.Linear = field(repr=False)
    scattered: str | None = None  # why its rows are not the batch's sequences in order

    def __reduce__(self):
        raise LoraKernelsError(message("a model with an AdapterPool can be neither copied nor pickled", fix="close() the pool first"))


@dataclass(eq=False)
class Shard:
    """The target layers of one device, with their ranks int32 `[layers, L]` and scalings float32 `[layers, L]`."""

    device: torch.device
    ranks: Tensor
    scalings: Tensor
    targets: list[Target] = field(default_factory=list)

    @classmethod
    def allocate(cls, device: torch.device, layers: int, L: int) -> Shard:
        ranks = torch.zeros(layers, L, dtype=torch.int32, device=device)
        return cls(device, ranks, torch.zeros(layers, L, dtype=torch.float32, device=device))


class PooledLinear(nn.Linear):
    """`nn.Linear` that adds each row's adapter inside a batch. It overrides nothing but `forward` and adds no parameter or buffer."""

    _lora_target: Target

    def forward(self, input: Tensor) -> Tensor:
        try:
            target = self._lora_target
        except AttributeError:  # the pool was closed after this call had begun
            return F.linear(input, self.weight, self.bias)
        batch = target.current.batch
        if batch is TASKS:
            batch = target.current.of_task()
        if batch is None or (target.scattered is not None and not batch.adapts(target)):
            return F.linear(input, self.weight, self.bias)
        if target.exact_base:
            return _add_update(batch, target, input, F.linear(input, self.weight, self.bias))
        y = _shared(batch, target, input, _whole)
        return _add_bias(batch, target, input, y) if batch.with_bias else y


def _add_update(batch: Batch, target: Target, x: Tensor, y: Tensor) -> Tensor:
    """y += s (x A^T) B^T in place: rows without an adapter keep the base layer's bits."""
    meta = batch.meta(x)
    if not batch.touches(target):
        return y
    group, i = target.group, target.place
    h = _shared(batch, target, x, _shrink)
    lora_expand(y, h, group.slabs_b[i], meta, group.ranks[i])
    return _add_bias(batch, target, x, y) if batch.with_bias else y


def _shrink(batch: Batch, x: Tensor, group: Group, places: list[int]) -> list[Tensor]:
    if x.dtype != group.slabs_a[0].dtype and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    rows = slice(places[0], places[-1] + 1)
    return list(lora_shrink(x, group.slabs_a[rows], batch.meta(x), *group.tables(places[0], len(places))))


def _whole(batch: Batch, x: Tensor, group: Group, places: list[int]) -> list[Tensor]:
    layers, rows = [group.layers[i] for i in places], slice(places[0], places[-1] + 1)
    weights, biases = [m.weight for m in layers], [m.bias for m in layers]
    slabs_a, slabs_b = group.slabs_a[rows], group.slabs_b[rows]
    return list(lora_batched_linear(x, weights, biases, slabs_a, slabs_b, batch.meta(x), *group.tables(places[0], len(places))))


def _shared(batch: Batch, target: Target, x: Tensor, compute) -> Tensor:
    """`compute` for the target; for all its siblings at once when the first of them is called, if x stays what it is until the last."""
    group, i = target.group, target.place
    if len(group.layers) == 1 or torch.compiler.is_compiling() or x.is_inference():  # inference tensors have no version counter
        return compute(batch, x, group, [i])[0]
    if (found := batch.shared) is not None and found[0] is group and found[1] is x and found[2] == x._version and i > found[3]:
        results = found[4]
        batch.shared = None if i == len(group.layers) - 1 else (*found[:3], i, results)
        return results[i]
    if i > 0:
        return compute(batch, x, group, [i])[0]
    results = compute(batch, x, group, list(range(len(group.layers))))
    batch.shared = (group, x, x._version, 0, results)
    return results[0]


def _add_bias(batch: Batch, target: Target, x: Tensor, y: Tensor) -> Tensor:
    """Add each row's lora_bias. Id -1 picks the last row of the table, which, as all empty rows, holds -0.0: y + -0.0 is y, bit for bit."""
    rows = target.group.biases[target.place][batch.meta(x).ids]
    return y.add_(rows.view(y.shape))


# ------------------------------------------------------------------------------------------------------------- swapping


def find(model: nn.Module, target_modules: Sequence[str] | str | None) -> dict[str, nn.Linear]:
    """Plain linear layers by name: those whose name is, or ends in, one of `target_modules`; all but the output embedding when None."""
    if not isinstance(model, nn.Module):
        raise LoraTypeError(message("AdapterPool: model is no module", type(model).__name__, "a torch.nn.Module with linear layers"))
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps: the same layers under their own names
    left_out = _left_out(model)
    linears = {name: m for name, m in model.named_modules() if type(m) is nn.Linear and "forward" not in m.__dict__ and name not in left_out}
    if any(name.endswith(".base_layer") for name in linears):
        got, fix = f"{type(model).__name__} with PEFT's LoRA layers", "AdapterPool(peft_model.unload(), ...), then load the adapters' folders"
        raise LoraValueError(message("AdapterPool: the model has adapters already", got, "the base model", fix))
    if target_modules is None or target_modules == "all-linear":
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        found = {name: m for name, m in linears.items() if m is not head}
    else:
        wanted = [target_modules] if isinstance(target_modules, str) else target_modules
        if not isinstance(wanted, Sequence | Set) or not all(isinstance(t, str) for t in wanted):
            raise LoraTypeError(message("AdapterPool: target_modules are no names", repr(target_modules)[:80], "a list of str, or None"))
        matches = {t: [n for n in linears if n == t or n.endswith("." + t)] for t in wanted}
        if missing := [t for t, names in matches.items() if not names]:
            kinds = ", ".join(sorted({n.rsplit(".", 1)[-1] for n in linears})) or "no plain torch.nn.Linear at all"
            allowed = "; ".join([kinds, *dict.fromkeys(why for n, why in left_out.items() if any(n == t or n.endswith("." + t) for t in missing))])
            raise LoraValueError(message("AdapterPool: the model has no linear layer of this name", ", ".join(map(repr, missing)), allowed))
        chosen = {n for names in matches.values() for n in names}
        found = {n: m for n, m in linears.items() if n in chosen}
    if not found:
        allowed, fix = "; ".join(["plain torch.nn.Linear layers", *dict.fromkeys(left_out.values())]), None
        if any(type(m) is PooledLinear for m in model.modules()):
            fix = "close() the pool that the model has"
        elif subclasses := sorted({type(m).__name__ for m in model.modules() if isinstance(m, nn.Linear) and type(m) is not nn.Linear}):
            allowed += f"; none of a subclass, whose own forward would not run: {', '.join(subclasses)}"
        elif not left_out:
            fix = "name layers of type torch.nn.Linear in target_modules"
        raise LoraValueError(message("AdapterPool: no linear layers to serve", type(model).__name__, allowed, fix))
    return found


# Parts of a model that get images, videos or sounds, and what brings their results to the text.
TOWERS = {
    "vision_tower", "vision_model", "visual", "vision_encoder", "image_encoder", "image_tower", "video_tower", "audio_tower", "audio_model",
    "multi_modal_projector", "mm_projector", "vision_projection", "language_projection", "connector", "aligner", "qformer", "embed_vision",
    "embed_audio", "embed_tokens_extend", "resampler_model", "image_to_text_projection", "vision_adapter", "vision_embed_tokens",
    "vision_backbone", "video_model", "acoustic_tokenizer_encoder", "semantic_tokenizer_encoder", "semantic_connector", "word_timestamp_encoder",
}  # fmt: skip
# The same where a part of TEXT lies beside them.
BESIDE_TEXT = ("encoder", "projector", "merger", "resampler", "visual_projection", "vpm", "apm", "mlp1")
TEXT = ("language_model", "text_model", "llm")
# Modules of transformers whose layers get time before the sequences. Where there are as many of both, their inputs do not tell.
TIME_FIRST = {
    "modeling_xlnet.XLNetLayer", "modeling_fsmt.EncoderLayer", "modeling_fsmt.DecoderLayer", "modeling_longformer.LongformerSelfAttention",
    "modeling_led.LEDEncoderSelfAttention",
}  # fmt: skip
# Those whose `generate` lays copies of the batch behind it, for classifier-free guidance, and not beside each sequence, as beams lie.
TILED = {"modeling_dia.DiaForConditionalGeneration", "modeling_janus.JanusForConditionalGeneration"}


def scattered(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Those of the layers whose rows are not the batch's sequences in order, as far as their place tells, with the reason."""
    turned = {f"{name}." if name else "": why for name, m in model.named_modules() if (why := _time_first(m))}
    parents = [name for name, m in model.named_modules() if any(hasattr(m, text) for text in TEXT)]
    towers = {f"{name}.{part}".lstrip(".") for name in parents for part in BESIDE_TEXT}
    parts = {name: set(name.split(".")) for name in names}
    # A model of one tower has its inputs for sequences; one that embeds tokens elsewhere is more.
    embeds = [name for name, m in model.named_modules() if isinstance(m, nn.Embedding)]
    beside = any(not p & TOWERS for p in (*parts.values(), *(set(name.split(".")) for name in embeds)))
    found = {}
    for name, of in parts.items():
        if "experts" in of and "router" not in of:
            found[name] = "a routed expert, which takes tokens of any sequence"
        elif beside and (of & TOWERS or any(f"{name}.".startswith(f"{tower}.") for tower in towers)):
            found[name] = "in the tower of another modality, of which a sequence may bring several inputs or none"
        elif why := next((why for prefix, why in turned.items() if name.startswith(prefix)), None):
            found[name] = why
    return found


def _time_first(m: nn.Module) -> str | None:
    """Why the layers below this module get time before the sequences, or None."""
    if isinstance(m, nn.TransformerDecoderLayer) and not m.self_attn.batch_first:
        return "in a decoder layer made with batch_first=False"
    return "in a layer that gets time before the sequences" if _kind(m) in TIME_FIRST else None


def tiled(model: nn.Module) -> bool:
    """Whether the model's `generate` may lay copies of the batch behind it."""
    return any(_kind(m) in TILED for m in model.modules())


def _kind(m: nn.Module) -> str:
    return f"{type(m).__module__.rpartition('.')[2]}.{type(m).__name__}"


def _left_out(model: nn.Module) -> dict[str, str]:
    """Layers that are not served though adapters may name them, by all their names, and why."""
    names: dict[nn.Module, list[str]] = {}  # one for a layer of a block that is registered twice: PEFT, too, adapts it in both places
    for prefix, parent in model.named_modules():
        for part, m in parent._modules.items():
            names.setdefault(m, []).append(f"{prefix}.{part}" if prefix else part)
    found = {}
    for m, known in names.items():
        if isinstance(m, nn.TransformerEncoderLayer):
            why = "none of nn.TransformerEncoderLayer, which may compute without calling its linear layers"
            found |= {f"{name}.{part}": why for name in known for part in ("linear1", "linear2")}
        elif type(m).__name__ == "Conv1D":
            found |= dict.fromkeys(known, "none of transformers' Conv1D (GPT-2), which is no torch.nn.Linear and is not served")
        elif isinstance(m, nn.Linear) and len(known) > 1:
            found |= dict.fromkeys(known, "none that is registered twice, of which PEFT adapts the first place alone")
    return found


def check_weights(model: nn.Module, found: dict[str, nn.Linear], exact_base: bool) -> None:
    """Raise where a weight has no values, or is of a tensor class whose products the ops cannot add to, or, without exact_base, not make."""
    gathered = {m for f in model.modules() if hasattr(f, "unshard") for m in f.modules()}  # by FSDP2: plain tensors while the layer runs
    for name, layer in found.items():
        weight = layer.weight
        if not has_values(weight):
            raise LoraValueError(message("AdapterPool: a layer's weight has no values", f"{name} on {weight.device}", "a model that is loaded"))
        if not is_traceable_wrapper_subclass(weight) or layer in gathered:
            continue
        if hasattr(weight, "to_local"):  # a DTensor
            fix = "lora_shrink and lora_expand on each rank's part of the layer"
            raise LoraTypeError(message("AdapterPool: a layer that is split over ranks", f"{name}, a {type(weight).__name__}", "whole layers", fix))
        if not exact_base:
            what, got = "AdapterPool: a weight that the fused op cannot read", f"{name}, a {type(weight).__name__}"
            raise LoraTypeError(message(what, got, "plain torch.Tensor weights", "exact_base=True"))


def group_siblings(found: dict[str, nn.Linear]) -> list[list[str]]:
    """Names in the model's order, siblings that share their input together."""
    groups, placed = [], set()
    for name, layer in found.items():
        if name in placed:
            continue
        names = next((n for n in _families(name) if all(m in found and _alike(found[m], layer) for m in n)), [name])
        placed.update(names)
        groups.append(names)
    return groups


def _families(name: str) -> list[list[str]]:
    prefix, dot, last = name.rpartition(".")
    return [[prefix + dot + sibling for sibling in family] for family in SIBLINGS if last in family]


def _alike(a: nn.Linear, b: nn.Linear) -> bool:
    return (a.in_features, a.weight.device, a.weight.dtype) == (b.in_features, b.weight.device, b.weight.dtype)


def by_device(found: dict[str, nn.Linear]) -> dict[torch.device, list[list[str]]]:
    """The groups of siblings on every device of the model."""
    devices: dict[torch.device, list[list[str]]] = {}
    for names in group_siblings(found):
        devices.setdefault(found[names[0]].weight.device, []).append(names)
    return devices


def allocate(layers: list[nn.Linear], shard: Shard, L: int, R: int, dtype: torch.dtype | None) -> Group:
    """Slabs for these layers; their rows of the shard's tables are the next free ones."""
    K, options = layers[0].in_features, {"device": shard.device, "dtype": dtype or layers[0].weight.dtype}
    rows = slice(len(shard.targets), len(shard.targets) + len(layers))
    try:
        slabs_a = [torch.zeros(L, R, K, **options) for _ in layers]
        slabs_b = [torch.zeros(L, m.out_features, R, **options) for m in layers]
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        got = f"{L} slots of rank {R} for layers of {K} x {layers[0].out_features} on {shard.device}"
        raise LoraKernelsError(
            message("AdapterPool: the adapters' memory cannot be allocated", got, fix="a smaller max_rank or max_loras")
        ) from error
    return Group(layers, slabs_a, slabs_b, shard.ranks[rows], shard.scalings[rows])


def allocate_biases(group: Group, L: int) -> None:
    options = {"device": group.slabs_b[0].device, "dtype": group.layers[0].weight.dtype}
    group.biases = [torch.full((L + 1, m.out_features), -0.0, **options) for m in group.layers]


def swap_in(target: Target) -> None:
    target.layer._lora_target = target
    target.layer.__class__ = PooledLinear


def swap_out(targets: Iterable[Target], hooks: Iterable[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()
    for target in targets:
        target.layer.__class__ = nn.Linear
        del target.layer._lora_target
