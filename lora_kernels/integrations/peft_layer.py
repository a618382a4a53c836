"""PEFT's LoRA linear layer with the plain case run by one fused op, and the list of what is not plain."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from .. import _device
from .._checks import DTYPES, LARGEST
from .._errors import BackendError, message, warn_once
from ..native.signature import unobserved_signature
from ..native.state import snapshot, unchanged
from ..nn import forward_replaced, hooked
from ..ops._call import any_autocast, autocasts
from ..ops.lora_linear import lora_linear

DISABLED = "adapters disabled"
MERGED = "adapter merged into the base weight"
INACTIVE = "no active adapter on this layer"
NOTHING_TO_FUSE = (DISABLED, MERGED, INACTIVE)  # the base layer runs alone: asked for by the user, so neither logged nor refused

_PLAIN_TENSORS = (Tensor, nn.Parameter)
_SEEN = "_lora_kernels_seen"  # the attribute that holds a layer's `Seen`
_MAX_INPUTS = 1024


class FusedLinear(Linear):
    """`peft.tuners.lora.layer.Linear` whose plain case is one call of `lora_linear`; every other case is PEFT's own forward.

    It adds no state and no submodule and computes nothing but `forward` itself (and keeps its name in repr), so keys, saving, merging, adapter
    switching, copying and pickling are PEFT's. What is plain is decided anew wherever anything of the layer or its parts has changed since
    the last call, so adapters may come, go, merge and change at any time.
    """

    _lora_kernels = ("auto", False)  # (backend, strict); an instance attribute where `patch` was given others

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        reason = "extra arguments to forward" if args or kwargs else None
        seen = None if reason or torch.compiler.is_compiling() else self.__dict__.get(_SEEN)
        if seen is not None and seen.holds(self, x):
            found = seen.operands
        elif reason is None:
            found = plain_operands(self)
            reason = found if isinstance(found, str) else input_refused(self, x, found)
            if reason is None and not torch.compiler.is_compiling():
                _keep_verdict(self, x, found)
        if reason is not None:
            _left_to_peft(reason, self._lora_kernels[1])
            return super().forward(x, *args, **kwargs)
        weight, bias, lora_a, lora_b, lora_bias, scaling, dropout_p = found
        backend, strict = self._lora_kernels
        if lora_bias is not None:
            bias = _joint_bias(bias, lora_bias, scaling, x)
        return lora_linear(x, weight, bias, lora_a, lora_b, scaling, dropout_p, True, None, backend, strict)

    def _get_name(self) -> str:
        return Linear.__name__

    # What takes a layer's tensors away: the verdict holds on to them.

    def _apply(self, *args, **kwargs):
        self.__dict__.pop(_SEEN, None)
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs):
        self.__dict__.pop(_SEEN, None)
        return super()._load_from_state_dict(*args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        self.__dict__.pop(_SEEN, None)
        return super().delete_adapter(adapter_name)


class Seen:
    """A layer's operands, what the verdict "plain" stands on, and the inputs that were found to fit: kept by the layer itself.

    A copy of the layer, or one out of a pickle, looks for itself.
    """

    __slots__ = ("inputs", "operands", "state")

    def __init__(self, operands: Operands):
        self.operands = operands
        self.state: tuple | None = None  # taken at the second look, as a state that changes with every call is not worth it
        self.inputs: set = set()

    def __reduce__(self):
        return _unseen, ()

    def holds(self, layer: Linear, x: Tensor) -> bool:
        """Whether the verdict on the layer and on this input is still good: all that `plain_operands` and `input_refused` look at."""
        if self.state is None or not unchanged(self.state, layer) or _has_any_global_hook() or torch.jit.is_tracing():
            return False
        if _weight_trained(self.operands.weight, self.operands.dropout_p):
            return False
        return _input_key(x, self.operands) in self.inputs


def _unseen() -> None:
    return None


def _input_key(x: Tensor, found: Operands) -> Hashable | None:
    """All that `input_refused` looks at but the layer's own attributes and global hooks; None where it must look each time."""
    key = unobserved_signature(x, found.weight, found.lora_a, found.lora_b, found.bias)
    if key is None or not any_autocast():
        return key
    device = x.device.type
    return key, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _keep_verdict(layer: Linear, x: Tensor, found: Operands) -> None:
    """Remember that the layer in its present state and this input are plain."""
    seen, adapters = layer.__dict__.get(_SEEN), layer.active_adapters
    if seen is None or any(now is not then for now, then in zip(found, seen.operands, strict=True)):
        layer.__dict__[_SEEN] = Seen(found)
        return
    if len(adapters) != 1:  # which of them are on this layer may change unseen
        return
    if seen.state is None or not unchanged(seen.state, layer):
        modules = layer._modules
        containers = [modules["lora_A"], modules["lora_B"], modules["lora_dropout"]]
        parts = [modules["base_layer"], *(c._modules[adapters[0]] for c in containers)]
        seen.state = snapshot(layer, (*containers, *parts), [t for t in found[:5] if t is not None], ignored=_SEEN)
        seen.inputs = set()
    key = _input_key(x, found)
    if key is not None and len(seen.inputs) < _MAX_INPUTS:
        seen.inputs.add(key)


class Operands(NamedTuple):
    """What the fused op reads of a layer in its present state."""

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    lora_bias: Tensor | None
    scaling: float
    dropout_p: float


def plain_operands(layer: Linear) -> str | Operands:
    """The operands when the layer's present state is plain, else the reason why not.

    Runs whenever something has changed since the last call, so it reads `_modules` and `_parameters` directly instead of through
    `nn.Module.__getattr__`.
    """
    if layer.disable_adapters:
        return DISABLED
    if layer.merged:
        return MERGED
    modules = layer._modules
    all_a = modules["lora_A"]._modules
    names = [name for name in layer.active_adapters if name in all_a]
    if len(names) != 1:
        return f"{len(names)} active adapters" if names else INACTIVE
    name = names[0]
    if name in layer.lora_variant:
        return f"LoRA variant {type(layer.lora_variant[name]).__name__}"
    if layer.ephemeral_gpu_offload:
        return "ephemeral GPU offload"
    base, a, b, dropout = modules["base_layer"], all_a[name], modules["lora_B"]._modules[name], modules["lora_dropout"]._modules[name]
    reason = _module_refused("base_layer", base) or _module_refused("lora_A", a) or _module_refused("lora_B", b)
    if reason is not None:
        return reason
    if type(dropout) is nn.Dropout and not dropout.inplace:
        dropout_p = dropout.p if dropout.training else 0.0
    elif type(dropout) is nn.Identity:
        dropout_p = 0.0
    else:
        return f"lora_dropout is a {type(dropout).__name__}" + (", in place" if type(dropout) is nn.Dropout else "")
    if hooked(dropout):
        return "hooks on lora_dropout"
    scaling = layer.scaling[name]
    if isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
        return f"scaling is a {type(scaling).__name__}"
    if not abs(scaling) <= LARGEST:
        return "scaling is not finite in float32"
    (weight, bias), (lora_a, bias_a), (lora_b, lora_bias) = _tensors(base), _tensors(a), _tensors(b)
    if bias_a is not None:
        return "lora_A has a bias"
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()  # such stand-ins for tensors have no storage
    for role, tensor in (("base_layer", weight), ("lora_A", lora_a), ("lora_B", lora_b)):
        if len(tensor.shape) != 2 or 0 in tensor.shape:  # freed or flattened by ZeRO-3 or FSDP1 until the module that owns it is called
            return f"{role}'s weight is not gathered, its shape is {list(tensor.shape)}"
        if not traced and tensor.untyped_storage().nbytes() == 0:
            return f"{role}'s weight is not gathered, its storage is empty"
    if _weight_trained(weight, dropout_p):
        return "base weight requires grad"
    return Operands(weight, bias, lora_a, lora_b, lora_bias, scaling, dropout_p)


def _weight_trained(weight: Tensor, dropout_p: float) -> bool:
    """Whether W needs a gradient; with dropout also where none is wanted now, as a checkpoint's two forwards must draw the same mask."""
    return weight.requires_grad and (dropout_p > 0 or torch.is_grad_enabled())


def _tensors(linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
    parameters = linear._parameters
    if "weight" in parameters and "bias" in parameters:
        return parameters["weight"], parameters["bias"]
    return linear.weight, linear.bias  # FSDP1 puts plain tensors in the parameters' place


def never_plain(layer: Linear) -> str | None:
    """Why swapping this layer's class would be of no use, or None."""
    if layer.fan_in_fan_out or type(layer.base_layer) is not nn.Linear:
        return f"base_layer is a {type(layer.base_layer).__name__}, not nn.Linear"
    if forward_replaced(layer):  # by X-LoRA, accelerate's hooks or another patch; it would never reach the class's forward
        return "its forward was replaced on the instance"
    return None


def _module_refused(role: str, module: nn.Module) -> str | None:
    if type(module) is not nn.Linear:  # a subclass may be quantised, parametrized or compute something else
        return f"{role} is a {type(module).__name__}, not nn.Linear"
    if hooked(module):
        return f"hooks on {role}"
    for tensor in module._parameters.values():
        if tensor is not None and not _plain(tensor):
            return f"{role} holds a {type(tensor).__name__}"
    return None


def _plain(t: object) -> bool:
    """Whether `t` is a tensor without behaviour of its own, or stands for one while torch.export traces without dynamo (strict=False)."""
    return type(t) in _PLAIN_TENSORS or (type(t) is FakeTensor and torch.compiler.is_compiling())


def input_refused(layer: Linear, x: Tensor, found: Operands) -> str | None:
    """Why this call's x or its surroundings need PEFT's own forward, or None."""
    weight, bias, lora_a, lora_b = found[:4]
    if not _plain(x) or x.layout is not torch.strided or x.is_nested:
        return f"x is a {type(x).__name__}, {x.layout if isinstance(x, Tensor) else 'no tensor'}"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    if not torch.compiler.is_compiling() and (_has_any_global_hook() or torch.jit.is_tracing()):
        return "global module hooks or torch.jit.trace"
    if x.dim() < 1 or x.shape[-1] != weight.shape[-1]:
        return "x does not fit the layer"
    device = x.device
    if not device == weight.device == lora_a.device == lora_b.device:
        return "x, base layer and adapter on different devices"
    given, adapter = x.dtype, lora_a.dtype
    autocast = autocasts(device.type) and given is not torch.float64
    dtype = torch.get_autocast_dtype(device.type) if autocast else given
    if not autocast and (weight.dtype is not dtype or (bias is not None and bias.dtype is not dtype)):
        return f"x {given} on a base layer of {weight.dtype}"
    if given not in DTYPES or lora_b.dtype is not adapter or adapter not in (dtype, torch.float32):
        return f"x {given}{' under autocast' if autocast else ''} with lora_A {adapter}, lora_B {lora_b.dtype}"
    if adapter is not dtype and not (layer.cast_input_dtype_enabled or autocast):
        return "input dtype casting disabled"
    return None


def _joint_bias(bias: Tensor | None, lora_bias: Tensor, scaling: float, x: Tensor) -> Tensor:
    """`bias + scaling * lora_bias`, so that LoRA's own bias costs N additions and no pass over y."""
    joint = scaling * lora_bias if bias is None else torch.add(bias, lora_bias, alpha=scaling)
    return joint if autocasts(x.device.type) else joint.to(x.dtype)


def _left_to_peft(reason: str, strict: bool) -> None:
    if reason in NOTHING_TO_FUSE:
        return
    if strict or _device.env_strict():
        raise BackendError(message("a patched LoRA layer would run PEFT's own forward", reason, fix="drop strict / LORA_KERNELS_STRICT"))
    if not torch.compiler.is_compiling():
        warn_once(f"a patched LoRA layer runs PEFT's own forward: {reason}")
