"""lora_kernels: LoRA layers whose low-rank update costs almost nothing beside the frozen layer."""

from ._errors import BackendError, LoraKernelsError, LoraTypeError, LoraValueError
from ._version import __version__
from .ops.lora_linear import lora_linear

__all__ = [
    "BackendError",
    "LoraKernelsError",
    "LoraTypeError",
    "LoraValueError",
    "__version__",
    "lora_linear",
]
