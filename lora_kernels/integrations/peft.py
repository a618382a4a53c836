"""`patch`, `unpatch`, `register`: PEFT models on the fused op, and back."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import MethodType, ModuleType
from typing import TYPE_CHECKING

from torch import nn

from .. import _checks, _device
from .._errors import BackendError, LoraTypeError, LoraValueError, message, warn_once

if TYPE_CHECKING:
    from peft import LoraConfig


@dataclass
class PatchReport:
    """What `patch` did: names of the layers that are fused now, and of those left to PEFT with the reason."""

    patched: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.patched)} of {len(self.patched) + len(self.skipped)} LoRA layers fused"]
        for reason in dict.fromkeys(self.skipped.values()):
            names = [name for name, why in self.skipped.items() if why == reason]
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            lines.append(f"  {len(names)} left to PEFT, {reason}: {shown}")
        return "\n".join(lines)


def _layer_module() -> ModuleType:
    """`.peft_layer`, which needs peft: imported at the first use, so that the package works without it."""
    if not _device.has_module("peft"):
        raise LoraValueError(message("peft is not installed", fix="pip install 'lora_kernels[peft]'"))
    from . import peft_layer

    return peft_layer


def patch(model: nn.Module, strict: bool = False, backend: str = "auto") -> PatchReport:
    """Run the LoRA layers of a PEFT model through the fused op, in place; call it again at any time.

    Equivalent to: the model as it was. Layers keep their parameters, keys, config and methods. Where the base layer is 16-bit, the
    low-rank branch computes in its dtype with float32 sums (PEFT casts x to the adapter's float32); dropout draws its mask from
    torch's generator in its own way, so a seed gives other, equally distributed masks than in PEFT.

    Args:
        model: anything that holds `peft.tuners.lora` layers: a PeftModel, or a model with injected or loaded adapters.
        strict: raise where a layer cannot be fused, now or in a later forward, instead of leaving it to PEFT.
        backend: of the op: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        PatchReport with `.patched` (names of layers fused in their present state) and `.skipped` (name -> reason). A layer that is
        skipped for its state (DoRA, merged, disabled, several active adapters) is fused once that state is over.

    Raises:
        LoraValueError: peft is not installed; unknown backend.
        BackendError: strict, and some layer cannot be fused; nothing is patched then.

    Fallback: PEFT's own forward, one log line per reason.
    """
    _check_module("patch", model)
    _checks.check_options("patch", backend, strict=strict)
    strict = strict or _device.env_strict()
    swap, report = [], PatchReport()
    for name, layer, reason in _lora_layers(model):
        if reason is None:
            swap.append(layer)
            whole = _kind(type(layer)) is not type(layer)  # FSDP2 shows its shards here and gathers them before forward
            found = None if whole else _layer_module().plain_operands(layer)
            reason = found if isinstance(found, str) else None
        if reason is None:
            report.patched.append(name)
        else:
            report.skipped[name] = reason
    if strict and report.skipped:
        raise BackendError(message("patch: LoRA layers that cannot be fused", str(report), fix="drop strict / LORA_KERNELS_STRICT"))
    for layer in swap:
        _swap(layer, backend, strict)
    if not report.patched and not report.skipped:
        warn_once("patch: the model has no PEFT LoRA layer; call it after get_peft_model or from_pretrained")
    elif report.skipped:
        warn_once(f"patch: {report}".replace("\n ", ";"))
    return report


def _check_module(what: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise LoraTypeError(message(f"{what}: model is no module", type(model).__name__, "a torch.nn.Module with PEFT LoRA layers"))


def unpatch(model: nn.Module) -> int:
    """Give every patched layer its PEFT class back, in place. Returns how many there were."""
    _check_module("unpatch", model)
    fused = _layer_module().FusedLinear
    layers = [module for module in model.modules() if _kind(type(module)) is fused]
    for layer in layers:
        layer.__dict__.pop("_lora_kernels", None)
        layer.__dict__.pop(_layer_module()._SEEN, None)
        _set_kind(layer, fused.__base__)
    return len(layers)


def register(config: LoraConfig, strict: bool = False, backend: str = "auto") -> LoraConfig:
    """Let PEFT create fused layers from this config, instead of patching the model afterwards.

    Equivalent to: `model = get_peft_model(base, config); patch(model, strict, backend)`

    PEFT does not save the registration with the adapter: after `PeftModel.from_pretrained(dir)` use `patch`, or pass
    `config=register(LoraConfig.from_pretrained(dir))`. Layers that are no plain `nn.Linear` are made by PEFT as ever.

    Returns:
        The same config. Raises: as `patch`.
    """
    _layer_module()
    if not hasattr(config, "_register_custom_module"):
        raise LoraTypeError(message("register: config is no LoRA config", type(config).__name__, "a peft.LoraConfig"))
    _checks.check_backend("register", backend)
    config._register_custom_module({nn.Linear: functools.partial(_create, strict=strict or _device.env_strict(), backend=backend)})
    return config


def _create(target: nn.Module, adapter_name: str, *, strict: bool, backend: str, **kwargs) -> nn.Module | None:
    """PEFT's default layer for `target`, fused; None sends PEFT on to its own dispatch (quantised and other subclasses of nn.Linear)."""
    from peft.tuners.lora.layer import Linear, dispatch_default

    if type(target) is not nn.Linear or type(target.weight) is not nn.Parameter:
        return None
    layer = dispatch_default(target, adapter_name, **kwargs)
    if type(layer) is Linear:
        _swap(layer, backend, strict)
    return layer


def _swap(layer: nn.Module, backend: str, strict: bool) -> None:
    _set_kind(layer, _layer_module().FusedLinear)
    layer.__dict__.pop("_lora_kernels", None)
    if (backend, strict) != ("auto", False):
        layer._lora_kernels = (backend, strict)


def _kind(cls: type) -> type:
    """The class below FSDP2's, which derives one from its own mix-in and the class of each module that it shards."""
    bases = cls.__bases__
    return bases[1] if len(bases) == 2 and bases[0].__name__ == "FSDPModule" else cls


def _set_kind(layer: nn.Module, kind: type) -> None:
    """Change the layer's class, and the forwards that accelerate's hooks have kept on the instance."""
    old = type(layer)
    layer.__class__ = kind if _kind(old) is old else _sharded(old, kind)
    for name in ("forward", "_old_forward"):
        kept = layer.__dict__.get(name)
        if getattr(kept, "__func__", None) is old.forward and kept.__self__ is layer:
            layer.__dict__[name] = MethodType(kind.forward, layer)


@functools.cache
def _sharded(cls: type, kind: type) -> type:
    """FSDP2's class `cls` with `kind` in place of the module's."""
    return type(cls)(f"FSDP{kind.__name__}", (cls.__bases__[0], kind), {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")})


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str | None]]:
    """Every PEFT LoRA layer with its name and the reason why it can never be fused, or None."""
    kinds = _layer_module()
    from peft.tuners.lora.layer import Linear, LoraLayer

    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if _kind(type(module)) in (Linear, kinds.FusedLinear):
            yield name, module, kinds.never_plain(module)
        else:
            yield name, module, f"a {type(module).__module__.removeprefix('peft.tuners.')}.{type(module).__name__}"
