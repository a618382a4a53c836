"""lora_kernels: LoRA layers whose low-rank update costs almost nothing beside the frozen layer."""

from . import testing
from ._errors import BackendError, LoraKernelsError, LoraTypeError, LoraValueError
from ._version import __version__
from .integrations.peft import PatchReport, patch, register, unpatch
from .nn import LoraLinear
from .ops.batch_meta import BatchMeta
from .ops.lora_batched import lora_batched_linear
from .ops.lora_expand import lora_expand
from .ops.lora_linear import lora_linear
from .ops.lora_shrink import lora_shrink
from .serving import AdapterPool

__all__ = [
    "AdapterPool",
    "BackendError",
    "BatchMeta",
    "LoraKernelsError",
    "LoraLinear",
    "LoraTypeError",
    "LoraValueError",
    "PatchReport",
    "__version__",
    "lora_batched_linear",
    "lora_expand",
    "lora_linear",
    "lora_shrink",
    "patch",
    "register",
    "testing",
    "unpatch",
]
