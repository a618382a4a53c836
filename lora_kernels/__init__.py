"""lora_kernels: LoRA layers whose low-rank update costs almost nothing beside the frozen layer."""

from . import testing
from ._errors import BackendError, LoraKernelsError, LoraTypeError, LoraValueError
from ._version import __version__
from .integrations.peft import PatchReport, patch, register, unpatch
from .nn import LoraLinear
from .ops.lora_linear import lora_linear

__all__ = [
    "BackendError",
    "LoraKernelsError",
    "LoraLinear",
    "LoraTypeError",
    "LoraValueError",
    "PatchReport",
    "__version__",
    "lora_linear",
    "patch",
    "register",
    "testing",
    "unpatch",
]
