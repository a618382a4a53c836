"""Other LoRA engines, as contestants where they can be imported. All need a GPU, and none has run here yet (docs/measured.md).

Unsloth rewrites PEFT and transformers when it is imported, which would change the PEFT contestants: it runs only with LORA_KERNELS_BENCH_UNSLOTH=1.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

from .. import _device
from .problem import SCALING, Operands
from .shapes import Case


def _needs(module: str, switch: str | None = None, dropout: bool | None = None):
    """dropout: None takes any case, True only those with, False only those without dropout."""

    def missing(case: Case, device: torch.device) -> str | None:
        if not _device.has_module(module):
            return f"{module} is not installed"
        if device.type != "cuda":
            return f"{module} needs a GPU"
        if switch is not None and not _device.env_flag(switch):
            return f"importing it changes PEFT; set {switch}=1"
        if dropout is not None and dropout != (case.dropout > 0):
            return f"{module} runs only {'with' if dropout else 'without'} dropout"
        return None

    return missing


def _unsloth(ops: Operands, case: Case):
    from unsloth.kernels.fast_lora import LoRA_W

    from .contestants import Bound, _leaf

    a, b = _leaf(ops.lora_a, case), _leaf(ops.lora_b, case)
    return Bound(lambda: LoRA_W.apply(ops.x[None], ops.weight, None, a, b, SCALING)[0], (ops.x, a, b))


def _lorafusion(ops: Operands, case: Case):
    from lorafusion.ops.lora_v1 import fused_linear_lora

    from .contestants import Bound, _leaf

    a, b = _leaf(ops.lora_a, case), _leaf(ops.lora_b, case)
    return Bound(lambda: fused_linear_lora(ops.x[None], ops.weight, a, b, SCALING, dropout_p=case.dropout)[0], (ops.x, a, b))


def linear() -> list:
    from .contestants import Contestant

    return [
        Contestant("unsloth", "Unsloth's LoRA_W", _unsloth, _needs("unsloth", "LORA_KERNELS_BENCH_UNSLOTH", dropout=False)),
        # Its backward takes the dropout mask's shape unconditionally, so it fails without dropout.
        Contestant("lorafusion", "LoRAFusion's fused_linear_lora", _lorafusion, _needs("lorafusion", dropout=True)),
    ]


# ------------------------------------------------------------------------------------------------------- many adapters


def _vllm(ops: Operands, case: Case):
    """Base GEMM, shrink into zeroed fp32, expand added in place; alpha / r folded into B, as vLLM's loader does."""
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

    from .contestants import Bound

    meta = LoRAKernelMeta.make(case.L, case.M, device=ops.x.device)
    meta.prepare_tensors(ops.ids)
    args = meta.meta_args(case.M, False)
    pool_b = ops.lora_b * SCALING
    h = torch.empty(1, case.M, case.R, dtype=torch.float32, device=ops.x.device)

    def forward():
        y = torch.nn.functional.linear(ops.x, ops.weight)
        h.zero_()
        lora_shrink(ops.x, [ops.lora_a], h, *args, 1.0)
        lora_expand(h, [pool_b], y, *args, offset_start=0, add_inputs=True)
        return y

    return Bound(forward, (ops.x,))


def _sglang(ops: Operands, case: Case):
    """SGLang's "triton" backend at decode: one segment per row."""
    from sglang.srt.lora.triton_ops import sgemm_lora_a_fwd, sgemm_lora_b_fwd

    from .contestants import Bound

    ints = {"dtype": torch.int32, "device": ops.x.device}
    ones = torch.ones(case.M, **ints)
    batch = SimpleNamespace(
        use_cuda_graph=False,
        bs=case.M,
        num_segments=case.M,
        seg_lens=ones,
        seg_indptr=torch.arange(case.M + 1, **ints),
        max_len=1,
        weight_indices=ops.ids,
        lora_ranks=torch.full((case.L,), case.R, **ints),
        scalings=torch.full((case.L,), SCALING, device=ops.x.device),
        permutation=None,
    )

    def forward():
        y = torch.nn.functional.linear(ops.x, ops.weight)
        h = sgemm_lora_a_fwd(ops.x, ops.lora_a, batch)
        return sgemm_lora_b_fwd(h, ops.lora_b, batch, y)

    return Bound(forward, (ops.x,))


def batched() -> list:
    from .contestants import Contestant

    return [
        Contestant("vllm", "vLLM's base GEMM + lora_shrink + lora_expand", _vllm, _needs("vllm")),
        Contestant("sglang", "SGLang's base GEMM + sgemm_lora_a + sgemm_lora_b", _sglang, _needs("sglang")),
    ]
