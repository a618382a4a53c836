"""`AdapterPool` on a GPU: loads on a stream of their own beside running batches, and CUDA graphs that serve every mix."""

from __future__ import annotations

import pytest
import torch
from adapters import random_tensors, tiny_llama, write_adapter

from lora_kernels.serving import AdapterPool

pytestmark = pytest.mark.gpu
IDS = torch.randint(2, 128, (3, 6), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def base():
    return tiny_llama(torch.bfloat16).cuda()


@pytest.fixture
def folders(base, tmp_path):
    return [write_adapter(tmp_path / str(i), random_tensors(base, ("_proj",), 8, i), r=8) for i in range(4)]


@pytest.mark.parametrize("exact_base", [True, False], ids=["exact-base", "one-op"])
def test_gpu_agrees_with_cpu(base, folders, exact_base):
    cpu = tiny_llama(torch.bfloat16).float()
    plain = (base(IDS.cuda()).logits.cpu() - cpu(IDS).logits).norm()
    with AdapterPool(base, 3, 8, exact_base=exact_base) as pool, AdapterPool(cpu, 3, 8) as reference:
        for i, folder in enumerate(folders[:3]):
            pool.load(str(i), folder)
            reference.load(str(i), folder)
        with pool.batch(["0", None, "2"]), reference.batch(["0", None, "2"]):
            error = (base(IDS.cuda()).logits.cpu() - cpu(IDS).logits).norm()
    assert error < 3 * plain


@pytest.mark.parametrize("exact_base", [True, False], ids=["exact-base", "one-op"])
def test_one_graph_serves_every_mix_and_later_loads(base, folders, exact_base):
    layer, x = base.model.layers[0].mlp, torch.randn(3, 1, 64, device="cuda", dtype=torch.bfloat16)
    with AdapterPool(base, 3, 8, exact_base=exact_base) as pool:
        for i, folder in enumerate(folders[:3]):
            pool.load(str(i), folder)
        with pool.batch(["0", "1", "2"]) as batch:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                layer(x)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = layer(x)
            pool.load("3", folders[3])  # evicts none of the running ones' slots
            for names in (["0", None, "2"], [None, None, "1"], ["3", "3", "1"]):
                names = [n if n is None or n in pool else None for n in names]
                batch.update_(names)
                graph.replay()
                with pool.batch(names):
                    assert torch.equal(y, layer(x)), names


def test_slots_are_not_overwritten_under_queued_kernels(base, folders):
    """A batch's kernels are still queued when it ends; loads into its slot must wait for them."""
    with AdapterPool(base, 1, 8) as pool:
        pool.load("a", folders[0])
        with pool.batch(["a"] * 3):
            expected = base(IDS.cuda()).logits
        for turn in range(20):
            torch.cuda._sleep(20_000_000)
            with pool.batch(["a"] * 3):
                got = base(IDS.cuda()).logits
            for i in (1, 2, 0):
                pool.load("a", folders[i])
            assert torch.equal(got, expected), turn
