"""torch.export of inference: `LoraLinear` and patched PEFT models keep the op and the numbers, for any batch size, also out of a file."""

from __future__ import annotations

import io

import pytest
import torch
from peft_models import adapted, one_thread  # noqa: F401 (one_thread is a fixture)
from torch.export import Dim, export, load, save

import lora_kernels as lk


def layer() -> torch.nn.Module:
    found = lk.LoraLinear(12, 20, r=4).eval()
    torch.nn.init.normal_(found.lora_B.weight)
    return found


MODELS = {"LoraLinear": (layer, 1, lambda sizes: (sizes,)), "patched PEFT model": (lambda: adapted("mlp", True), 2, lambda sizes: ((sizes,),))}


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("kind", MODELS)
def test_exported_program_keeps_the_op_and_the_numbers(kind, strict):
    make, ops, shapes = MODELS[kind]
    model, x = make(), torch.randn(9, 12)
    with torch.no_grad():
        program = export(model, (torch.randn(4, 12),), dynamic_shapes=shapes({0: Dim("rows")}), strict=strict)
        file = io.BytesIO()
        save(program, file)
        file.seek(0)
        for p in (program, load(file)):
            assert sum("lora_linear_fwd" in str(node.target) for node in p.graph.nodes) == ops
            torch.testing.assert_close(p.module()(x), model(x))
