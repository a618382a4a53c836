"""One batch per thread and per task of asyncio."""

from __future__ import annotations

import asyncio

import pytest
import torch
from adapters import one_thread, pooled, tiny_llama

__all__ = ["one_thread"]
IDS = torch.tensor([[3, 5, 7, 9]])


@pytest.fixture
def llama(tmp_path):
    model = tiny_llama()
    with pooled(model, tmp_path, ["q_proj", "down_proj"]) as pool:
        yield model, pool


def alone(model, pool, name):
    with pool.batch([name]):
        return model(IDS).logits


def test_every_task_of_an_event_loop_has_its_own_batch(llama):
    model, pool = llama
    expected = {name: alone(model, pool, name) for name in ("a", "b", None)}

    async def serve(name):
        with pool.batch([name]):
            await asyncio.sleep(0.01)
            assert not torch.is_grad_enabled()
            return model(IDS).logits

    async def without():
        await asyncio.sleep(0.005)
        return model(IDS).logits

    async def main():
        return await asyncio.gather(serve("a"), serve("b"), without(), serve("a"))

    for name, got in zip(("a", "b", None, "a"), asyncio.run(main()), strict=True):
        assert torch.equal(got, expected[name]), name
    assert torch.is_grad_enabled()
    assert torch.equal(alone(model, pool, "b"), expected["b"]), "threads are as before"


def test_batches_inside_one_another_in_a_task(llama):
    model, pool = llama
    expected = {name: alone(model, pool, name) for name in ("a", "b")}

    async def main():
        with pool.batch(["a"]):
            with pool.batch(["b"]):
                await asyncio.sleep(0)
                inner = model(IDS).logits
            return inner, model(IDS).logits

    inner, outer = asyncio.run(main())
    assert torch.equal(inner, expected["b"])
    assert torch.equal(outer, expected["a"])


def test_a_task_keeps_the_batch_of_the_one_that_started_it(llama):
    model, pool = llama
    expected = {name: alone(model, pool, name) for name in ("a", None)}

    async def main():
        async def later(seconds):
            await asyncio.sleep(seconds)
            return model(IDS).logits

        with pool.batch(["a"]):
            late = asyncio.create_task(later(0.05))
            early = await asyncio.create_task(later(0))
        return early, await late

    early, late = asyncio.run(main())
    assert torch.equal(early, expected["a"])
    assert torch.equal(late, expected[None]), "the batch has ended"
    assert torch.is_grad_enabled()


def test_a_compiled_model_refuses_the_batches_of_tasks(llama):
    model, pool = llama
    compiled = torch.compile(model.model.layers[0].self_attn.q_proj, backend="eager", fullgraph=True)

    async def main():
        with pool.batch(["a"]), pytest.raises(Exception, match="worker thread"):
            compiled(torch.randn(1, 4, model.config.hidden_size))

    asyncio.run(main())
