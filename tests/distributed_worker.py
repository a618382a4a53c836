"""What two gloo ranks check; `test_distributed.py` starts them and reads one JSON line from rank 0.

Run as: python distributed_worker.py RANK WORLD_SIZE RENDEZVOUS_FILE [all | inductor]
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from peft.tuners.lora.layer import Linear
from peft_models import adapted, loss
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import lora_kernels as lk
from lora_kernels.integrations import peft_layer
from lora_kernels.integrations.distributed import register_sharding_rules

WHOLE, ROWS, COLUMNS = Replicate(), Shard(0), Shard(1)
LAYOUTS = {  # x, weight, bias, lora_a, lora_b
    "replicate": (WHOLE, WHOLE, WHOLE, WHOLE, WHOLE),
    "column": (WHOLE, ROWS, ROWS, WHOLE, ROWS),
    "row": (COLUMNS, COLUMNS, WHOLE, COLUMNS, WHOLE),
    "token": (ROWS, WHOLE, WHOLE, WHOLE, WHOLE),
    "odd one": (ROWS, COLUMNS, ROWS, ROWS, COLUMNS),
}


def gap(got: torch.Tensor, expected: torch.Tensor) -> float:
    return (got - expected).abs().max().item()


def fsdp(units: str, backend: str = "aot_eager") -> dict:
    """Loss and gradients of a patched model under FSDP2, as distances from the unsharded, unpatched model; and who ran the layers.

    `backend` compiles "compiled decoder layers".
    """
    plain, model = adapted("llama", False, lora_bias=True), adapted("llama", False, lora_bias=True)
    expected = loss(plain, "llama")
    expected.backward()
    grads = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    lk.patch(model)
    if units == "compiled decoder layers":
        for layer in model.base_model.model.model.layers:
            layer.compile(backend=backend, fullgraph=True)
    if units == "adapters":
        for layer in (m for m in model.modules() if isinstance(m, Linear)):
            fully_shard(layer.lora_A["default"]), fully_shard(layer.lora_B["default"])
    if units == "LoRA layers":
        for layer in [m for m in model.modules() if isinstance(m, Linear)]:
            fully_shard(layer)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    if units == "compiled decoder layers":  # traced calls are not counted
        return fsdp_gaps(model, expected, grads)
    calls = {"fused": 0, "peft": 0}
    op, tell = peft_layer.lora_linear, peft_layer._left_to_peft
    peft_layer.lora_linear = lambda *a: (calls.update(fused=calls["fused"] + 1), op(*a))[1]
    peft_layer._left_to_peft = lambda *a: (calls.update(peft=calls["peft"] + 1), tell(*a))[1]
    try:
        found = fsdp_gaps(model, expected, grads)
    finally:
        peft_layer.lora_linear, peft_layer._left_to_peft = op, tell
    return calls | found


def fsdp_gaps(model: torch.nn.Module, expected: torch.Tensor, grads: dict[str, torch.Tensor]) -> dict:
    for _ in range(2):
        model.zero_grad()
        value = loss(model, "llama")
        value.backward()
    gaps = {n: gap(p.grad.full_tensor(), grads[n]) for n, p in model.named_parameters() if p.grad is not None}
    return {"same_names": sorted(gaps) == sorted(grads), "gap": max(gap(value.detach(), expected.detach()), *gaps.values())}


def sharded_op(layout: str, bias: bool, dropout_p: float) -> dict:
    """The op on DTensors against the op on the full tensors: output and gradients."""
    mesh, g = init_device_mesh("cpu", (dist.get_world_size(),)), torch.Generator().manual_seed(0)
    full = [torch.randn(*shape, generator=g) for shape in ((6, 10), (8, 10), (8,), (4, 10), (8, 4))]
    dy, seed = torch.randn(6, 8, generator=g), torch.tensor([77])
    results = []
    for split in (False, True):
        place = (lambda t, p: distribute_tensor(t, mesh, [p])) if split else (lambda t, p: t.clone())
        x, w, b, la, lb = (place(t, p).detach() for t, p in zip(full, LAYOUTS[layout], strict=True))
        wanted = [t.requires_grad_() for t in (x, la, lb)]
        given_seed = place(seed, WHOLE) if dropout_p else None
        y = lk.lora_linear(x, w, b if bias else None, la, lb, 0.7, dropout_p, seed=given_seed)
        y.backward(place(dy, WHOLE))
        results.append([t.detach().full_tensor() if split else t.detach() for t in (y, *(t.grad for t in wanted))])
        placement = str(y.placements[0]) if split else ""
    return {"gap": max(gap(*pair) for pair in zip(*results, strict=True)), "y": placement}


def drawn_seed(column: bool, rank: int) -> float:
    """A layer with dropout whose ranks' generators differ, on DTensors, against the plain layer with rank 0's generator."""
    mesh, g = init_device_mesh("cpu", (dist.get_world_size(),)), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    layer = lk.LoraLinear(10, 8, r=4, lora_dropout=0.4)
    torch.nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(6, 10, generator=g)
    torch.manual_seed(100)
    expected = layer(x)
    for part in (layer.base_layer, layer.lora_B, layer.lora_A):
        for name, p in list(part.named_parameters()):
            split = distribute_tensor(p.detach(), mesh, [ROWS if column and part is not layer.lora_A else WHOLE])
            part.register_parameter(name, torch.nn.Parameter(split, requires_grad=p.requires_grad))
    torch.manual_seed(100 + rank)
    return gap(layer(distribute_tensor(x, mesh, [WHOLE])).full_tensor(), expected)


def everything(rank: int, world_size: int) -> dict:
    found = {f"fsdp {units}": fsdp(units) for units in ("decoder layers", "LoRA layers", "adapters", "compiled decoder layers")}
    register_sharding_rules()
    register_sharding_rules()
    for layout in LAYOUTS:
        for bias in (True, False):
            for dropout_p in (0.0, 0.4):
                found[f"op {layout} bias={bias} dropout={dropout_p}"] = sharded_op(layout, bias, dropout_p)
    for column in (False, True):
        gaps = [None] * world_size
        dist.all_gather_object(gaps, drawn_seed(column, rank))
        found[f"drawn seed column={column}"] = max(gaps)
    return found


def main(rank: int, world_size: int, rendezvous: str, wanted: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    found = everything(rank, world_size) if wanted == "all" else fsdp("compiled decoder layers", wanted)
    if rank == 0:
        print(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4] if len(sys.argv) > 4 else "all")
