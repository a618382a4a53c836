"""`LoraLinear`: a frozen linear layer with one adapter, as a module."""

from __future__ import annotations

import math
import numbers

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _checks
from ._errors import LoraKernelsError, LoraTypeError, LoraValueError, message
from .ops.lora_linear import lora_linear


class _ZeroLinear(nn.Linear):
    """B's layer: zero also where all modules are reset, as after `to_empty` of a model that was made on device "meta"."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def _get_name(self) -> str:
        return nn.Linear.__name__


class _BaseWeight(Tensor):
    """The base weight to be looked at alone: nn.TransformerEncoderLayer and others compute with `weight`, which would leave the adapter out."""

    _READS = ("__get__", "size", "dim", "numel", "stride", "element_size", "is_floating_point", "is_complex", "__repr__")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ in cls._READS:
            with torch._C.DisableTorchFunctionSubclass():
                found = func(*args, **(kwargs or {}))
            if not isinstance(found, Tensor):  # .T and others
                return found
        what, fix = "LoraLinear.weight is not all of the layer, so nothing is computed with it", "call the layer, or read base_layer.weight"
        raise LoraKernelsError(message(what, func.__name__, "its shape, dtype and device", fix))


def forward_replaced(module: nn.Module) -> bool:
    """Whether the instance has a forward that is not its class's (which accelerate leaves there, bound, when its hooks go)."""
    own = module.__dict__.get("forward")
    return own is not None and (getattr(own, "__func__", None) is not type(module).forward or own.__self__ is not module)


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward: the fused op reads its weights and would skip that."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own) or forward_replaced(module)


class LoraLinear(nn.Module):
    """Frozen linear layer plus a trainable low-rank update, computed by one op.

    Equivalent to:
        base_layer(x) + scaling * lora_B(lora_A(F.dropout(x, lora_dropout, self.training)))

    State: `base_layer.weight [N, K]`, `base_layer.bias [N]`, `lora_A.weight [R, K]`, `lora_B.weight [N, R]`: the keys of a PEFT
    adapter file below the module's name, so adapters go both ways by adding or removing PEFT's prefix `base_model.model.`.
    The forward reads these weights itself: hooks on `base_layer`, `lora_A` and `lora_B` do not run.

    Args:
        in_features, out_features: K and N.
        r: rank, at least 1.
        lora_alpha: scaling is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora.
        lora_dropout: in [0, 1), on the low-rank branch's input, in training mode; 0 unless given, in `from_linear` 0.05.
        bias: whether the base layer has a (frozen) bias.
        dtype: of the base layer. The adapter is float32 where that is a 16-bit type, as in PEFT.
        backend: of the op: "auto", "cuda", "triton", "cpu" or "reference".

    Raises:
        LoraValueError, LoraTypeError: rank below 1, alpha that is not finite, dropout outside [0, 1), unknown backend.

    Source: LoRA, arXiv:2106.09685; rank-stabilised scaling, arXiv:2312.03732.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 16,
        lora_alpha: float = 32,
        lora_dropout: float = 0.0,
        bias: bool = True,
        use_rslora: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _check_options(r, lora_alpha, lora_dropout, backend, bias=bias, use_rslora=use_rslora)
        _check_sizes(in_features, out_features)
        _check_dtype("LoraLinear", dtype or torch.get_default_dtype())
        _check_device(device)
        self._build(nn.Linear(in_features, out_features, bias, device, dtype), r, lora_alpha, lora_dropout, use_rslora, backend)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, r: int = 16, lora_alpha: float = 32, lora_dropout: float = 0.05, use_rslora: bool = False, backend: str = "auto"
    ) -> LoraLinear:
        """Put an adapter on `linear`, which becomes `base_layer`: its weights are shared, not copied, and frozen from now on.

        The new layer gives the same output as `linear` until it is trained. Raises: as the class; LoraTypeError when `linear` is
        not exactly an `nn.Linear` (a subclass may be quantised or compute something else) or has hooks or a weight that is computed.
        """
        if type(linear) is not nn.Linear:
            raise LoraTypeError(message("LoraLinear.from_linear: no plain linear layer", type(linear).__name__, "torch.nn.Linear"))
        if hooked(linear) or not {"weight", "bias"} <= linear._parameters.keys():  # spectral_norm, weight_norm, prune: all of these
            fix = "remove the hooks (with remove_weight_norm, prune.remove, ... where these made them), or put them on the LoraLinear"
            raise LoraTypeError(message("LoraLinear.from_linear: hooks, or a weight that is computed", linear, "F.linear(x, weight, bias)", fix))
        _check_options(r, lora_alpha, lora_dropout, backend, use_rslora=use_rslora)
        _check_dtype("LoraLinear.from_linear", linear.weight.dtype)
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._build(linear, r, lora_alpha, lora_dropout, use_rslora, backend)
        return self.train(linear.training)

    def _build(self, linear: nn.Linear, r: int, lora_alpha: float, lora_dropout: float, use_rslora: bool, backend: str) -> None:
        r = int(r)
        self.r, self.lora_alpha, self.lora_dropout, self.use_rslora, self.backend = r, lora_alpha, lora_dropout, use_rslora, backend
        self.scaling = lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r
        self.base_layer = linear.requires_grad_(False)
        weight = linear.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.lora_A = nn.Linear(linear.in_features, r, bias=False, device=weight.device, dtype=dtype)
        self.lora_B = _ZeroLinear(r, linear.out_features, bias=False, device=weight.device, dtype=dtype)
        self._unmerged_weight: Tensor | None = None
        self._merged_bits: tuple[torch.dtype, int] | None = None

    def reset_parameters(self) -> None:
        """A uniform as `nn.Linear`'s default, B zero: the update starts at zero."""
        self.lora_A.reset_parameters()
        self.lora_B.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., K]` -> `[..., N]`; dtypes and errors as `lora_kernels.lora_linear`."""
        parts = self._modules  # past nn.Module.__getattr__ three times
        base = parts["base_layer"]
        if self._unmerged_weight is not None:
            return F.linear(x, base.weight, base.bias)
        a, b = parts["lora_A"].weight, parts["lora_B"].weight
        return lora_linear(x, base.weight, base.bias, a, b, self.scaling, self.lora_dropout, self.training, backend=self.backend)

    # What code around a linear layer looks at (T5's feed-forward: wo.weight.dtype).

    @property
    def in_features(self) -> int:
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        return self.base_layer.out_features

    @property
    def weight(self) -> Tensor:
        """The base weight's shape, dtype and device; to compute with it raises LoraKernelsError. A DTensor is not shown."""
        weight = self.base_layer.weight
        if type(weight) not in (Tensor, nn.Parameter):
            raise AttributeError("weight")
        return weight.detach().as_subclass(_BaseWeight)

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    @property
    def merged(self) -> bool:
        """Whether the base weight holds the update now."""
        return self._unmerged_weight is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Write W + scaling * B A into the base weight (summed in float32, rounded once to W's dtype); the adapter rests.

        Memory: a copy of W is kept until `unmerge`, which therefore restores it bit for bit. Does nothing when merged already.
        As in PEFT, whoever shares the base weight sees the merged one, and so does `state_dict`; `load_state_dict` wants `unmerge` first.

        Raises: LoraValueError when the merged weight is not finite in W's dtype, or has no memory (device "meta"), or W is computed (by a
        parametrization) rather than stored; nothing is changed then.
        """
        if self.merged:
            return
        weight, a, b = self.base_layer.weight, self.lora_A.weight, self.lora_B.weight
        if weight.is_meta or a.is_meta or b.is_meta:
            raise LoraValueError(message("LoraLinear.merge: the weights have no memory", "device meta", fix="load them first"))
        if self.base_layer._parameters.get("weight") is not weight:
            fix = "parametrize.remove_parametrizations(layer.base_layer, 'weight'), or gather it (FSDP1)"
            raise LoraValueError(message("LoraLinear.merge: the base weight is computed, not stored", type(self.base_layer).__name__, fix=fix))
        merged = torch.addmm(weight.to(a.dtype), b.to(a.dtype), a, alpha=self.scaling).to(weight.dtype)
        if not merged.isfinite().all():
            raise LoraValueError(message("LoraLinear.merge: the merged weight is not finite", fix="look for NaN or inf in the adapter"))
        self._unmerged_weight = weight.detach().clone()
        weight.copy_(merged)
        self._merged_bits = _bits(weight)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weight back as it was before `merge`, bit for bit. Raises LoraKernelsError when not merged, or when the base weight is
        another by now: written, replaced, or merged into by another layer that shares it."""
        if not self.merged:
            raise LoraKernelsError(message("LoraLinear.unmerge: the adapter is not merged", fix="call merge() first"))
        if not self._as_merged():
            fix = "unmerge layers that share a weight in the reverse order of merging"
            raise LoraKernelsError(message("LoraLinear.unmerge: the base weight is not the one that merge wrote", fix=fix))
        self.base_layer.weight.copy_(self._unmerged_weight)
        self._unmerged_weight = None

    def _as_merged(self) -> bool:
        """Whether the base weight is the one that `merge` wrote, or what a conversion of the base layer alone made of it."""
        found = _bits(self.base_layer.weight)
        return found == self._merged_bits or found[0] != self._merged_bits[0]

    def _apply(self, fn, recurse=True):
        """A merged weight that is converted remains the one that `merge` wrote, whatever its bits are then."""
        ours = self.merged and self._as_merged()
        super()._apply(fn, recurse)
        if ours:
            self._merged_bits = _bits(self.base_layer.weight)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """Refuses weights while merged: `unmerge` would put the base weight from before back over the loaded one."""
        if self.merged and any(f"{prefix}{name}.weight" in state_dict for name in ("base_layer", "lora_A", "lora_B")):
            raise LoraKernelsError(
                message("LoraLinear: weights cannot be loaded while the adapter is merged", prefix.rstrip(".") or None, fix="call unmerge() first")
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        state = ", merged" if self.merged else ""
        return f"{shape}, r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}, use_rslora={self.use_rslora}{state}"


def _bits(weight: Tensor) -> tuple[torch.dtype, int]:
    """dtype and a checksum of the bits, the same on every device; 0 where there are none."""
    as_int = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return weight.dtype, 0 if weight.is_meta else int(weight.detach().view(as_int).sum(dtype=torch.int64))


def _counts(n: object) -> bool:
    """Whether `n` is an integer, also numpy's, of at least 1."""
    return isinstance(n, numbers.Integral) and not isinstance(n, bool) and n >= 1


def _check_device(device: object) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError) as why:
        raise LoraValueError(message("LoraLinear: no such device", f"{device!r}: {str(why).splitlines()[0]}")) from None


def _check_sizes(in_features: int, out_features: int) -> None:
    for name, size in (("in_features", in_features), ("out_features", out_features)):
        if not _counts(size):
            raise LoraValueError(message(f"LoraLinear: {name} is no size", repr(size), "an int >= 1"))


def _check_dtype(what: str, dtype: torch.dtype) -> None:
    if dtype not in _checks.DTYPES:
        raise LoraTypeError(message(f"{what}: a dtype that cannot be computed with", dtype, ", ".join(map(str, _checks.DTYPES)), "linear.to(dtype)"))


def _check_options(r: int, lora_alpha: float, lora_dropout: float, backend: str, **flags: bool) -> None:
    if not _counts(r):
        raise LoraValueError(message("LoraLinear: r is no rank", repr(r), "an int >= 1", "use nn.Linear for no adapter"))
    if not isinstance(lora_alpha, (int, float)) or isinstance(lora_alpha, bool) or not abs(lora_alpha) <= _checks.LARGEST:
        raise LoraValueError(message("LoraLinear: lora_alpha is not finite", repr(lora_alpha), f"up to {_checks.LARGEST:.6g}, as float32"))
    if not isinstance(lora_dropout, (int, float)) or isinstance(lora_dropout, bool) or not 0 <= lora_dropout < 1:
        raise LoraValueError(message("LoraLinear: lora_dropout is no dropout probability", lora_dropout, "a number in [0, 1)"))
    _checks.check_options("LoraLinear", backend, **flags)
