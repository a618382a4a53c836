"""torch.export of inference: `LoraLinear` and patched PEFT models keep the op and the numbers, for any batch size, also out of a file."""

from __future__ import annotations

import io

import pytest
import torch
from functorch.compile import make_boxed_func
from peft_models import adapted, one_thread  # noqa: F401 (one_thread is a fixture)
from torch._dynamo.backends.common import aot_autograd
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


@pytest.mark.parametrize("op", ["lora_linear", "lora_batched"])
def test_a_compiled_program_trains_through_the_op(op):
    """An exported one cannot; torch 2.11 says of both that they are exported."""
    x, w, ids = torch.randn(5, 12, requires_grad=True), torch.randn(20, 12), torch.tensor([0, 2, -1, 1, 2], dtype=torch.int32)
    shapes = ((4, 12), (20, 4)) if op == "lora_linear" else ((3, 4, 12), (3, 20, 4))
    a, b = (torch.randn(shape, requires_grad=True) for shape in shapes)
    call = {"lora_linear": lambda: lk.lora_linear(x, w, None, a, b), "lora_batched": lambda: lk.lora_batched_linear(x, w, None, a, b, ids)}[op]
    graphs = []

    def look(graph: torch.fx.GraphModule, _: list):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return make_boxed_func(graph.forward)

    y = torch.compile(call, backend=aot_autograd(fw_compiler=look), fullgraph=True)()
    got, expected = (torch.autograd.grad(out.sum(), (x, a, b)) for out in (y, call()))
    assert any(f"{op}_fwd" in target for graph in graphs for target in graph)
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_exported_program_compiled_ahead_of_time(kind, tmp_path):
    """AOTInductor: the package calls the op, so it is loaded where lora_kernels is imported."""
    make, _, shapes = MODELS[kind]
    model, x = make(), torch.randn(9, 12)
    with torch.no_grad():
        program = export(model, (torch.randn(4, 12),), dynamic_shapes=shapes({0: Dim("rows")}))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "layer.pt2"))
        torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), model(x))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_many_adapters_are_exported_for_serving_alone(strict):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Buffer(torch.randn(20, 12))
            self.a, self.b = torch.nn.Parameter(torch.randn(3, 4, 12)), torch.nn.Parameter(torch.randn(3, 20, 4))

        def forward(self, x, ids):
            return lk.lora_batched_linear(x, self.weight, None, self.a, self.b, ids)

    model, operands = Layer(), (torch.randn(5, 12), torch.tensor([0, 2, -1, 1, 2], dtype=torch.int32))
    with pytest.raises(Exception, match="no gradients in an exported program"):  # strict: wrapped by dynamo
        export(model, operands, strict=strict)
    with torch.no_grad():
        torch.testing.assert_close(export(model, operands, strict=strict).module()(*operands), model(*operands))
