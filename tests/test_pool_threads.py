"""Eight threads load, replace and evict while others serve: a batch sees one version of every adapter, whole."""

from __future__ import annotations

import random
import threading
import time

import pytest
import torch
from adapters import one_thread, random_tensors, tiny_llama, write_adapter

from lora_kernels import LoraKernelsError
from lora_kernels.serving import AdapterPool, layers
from lora_kernels.serving import pool as pool_module

__all__ = ["one_thread"]
NAMES, VERSIONS, ROWS, LOADERS, SERVERS = 6, 3, 4, 8, 2
IDS = torch.randint(2, 128, (1, 5), generator=torch.Generator().manual_seed(0)).expand(ROWS, -1)
MODULES = ["q_proj", "v_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("lora_bias", [False, True])
def test_a_close_while_an_adapter_is_loaded(tmp_path, monkeypatch, lora_bias):
    base = tiny_llama()
    tensors = random_tensors(base, ("q_proj",), 4, 1)
    if lora_bias:
        tensors |= {name.replace("lora_A.weight", "lora_B.bias"): torch.ones(64) for name in tensors if "lora_A" in name}
    write_adapter(tmp_path, tensors, lora_bias=lora_bias)
    pool = AdapterPool(base, max_loras=2, max_rank=4)
    open_folder = pool_module.Checkpoint.of_folder
    monkeypatch.setattr(pool_module.Checkpoint, "of_folder", lambda *args: pool.close() or open_folder(*args))
    with pytest.raises(LoraKernelsError, match="adapter 'a' was not loaded: this AdapterPool is closed"):
        pool.load("a", tmp_path)
    assert (pool.names, pool.stats()["free_slots"]) == ((), 3)


def test_a_close_while_a_layer_is_called():
    """Python has chosen the pool's forward by then, and finds the layer put back."""
    layer, x = torch.nn.Sequential(torch.nn.Linear(8, 8)), torch.randn(3, 8)
    AdapterPool(layer, max_loras=2, max_rank=4).close()
    assert torch.equal(layers.PooledLinear.forward(layer[0], x), layer(x))


@pytest.mark.parametrize("seconds", [4, pytest.param(60, marks=pytest.mark.slow)], ids=["4s", "60s"])
def test_no_wrong_row_while_eight_threads_load(tmp_path, seconds):
    base = tiny_llama()
    folders = {
        (n, v): write_adapter(
            tmp_path / f"{n}-{v}", random_tensors(base, tuple(MODULES), r, 10 * n + v), r=r, lora_alpha=8 + v, target_modules=MODULES
        )
        for n in range(NAMES)
        for v in range(VERSIONS)
        for r in [2 + 3 * ((n + v) % 4)]
    }
    broken = tmp_path / "broken"
    tensors = random_tensors(base, tuple(MODULES), 4, 1)
    tensors[max(tensors)][-1, -1] = float("inf")  # found only after every other tensor was written
    write_adapter(broken, tensors, target_modules=MODULES)

    stop, wrong = time.monotonic() + seconds, []
    counts = {"loads": 0, "evictions": 0, "refused": 0, "batches": 0, "rows": 0, "absent": 0}
    counting = threading.Lock()

    def count(**more: int) -> None:
        with counting:
            for key, value in more.items():
                counts[key] += value

    with AdapterPool(base, max_loras=4, max_rank=11) as pool:
        plain = base(IDS).logits[0]
        expected: dict[int, list[torch.Tensor]] = {n: [] for n in range(NAMES)}
        for (n, _), folder in folders.items():
            pool.load("probe", folder)
            with pool.batch(["probe", *[None] * (ROWS - 1)]):
                expected[n].append(base(IDS).logits[0])
        pool.evict("probe")

        def load(seed: int) -> None:
            rng = random.Random(seed)
            while time.monotonic() < stop and not wrong:
                n = rng.randrange(NAMES)
                try:
                    if (what := rng.random()) < 0.8:
                        pool.load(f"n{n}", folders[n, rng.randrange(VERSIONS)], timeout=60)
                        count(loads=1)
                    elif what < 0.9:
                        pool.evict(f"n{n}")
                        count(evictions=1)
                    else:
                        pool.load(f"n{n}", broken, timeout=60)
                        wrong.append("a broken adapter was loaded")
                except LoraKernelsError as error:
                    if "not finite" not in str(error) and "no adapter of this name" not in str(error):
                        wrong.append(str(error))
                    count(refused=1)
                except BaseException as error:
                    wrong.append(repr(error))

        def serve(seed: int) -> None:
            rng = random.Random(1000 + seed)
            while time.monotonic() < stop and not wrong:
                chosen = [rng.choice([None, *(int(name[1:]) for name in pool.names)]) for _ in range(ROWS)]
                try:
                    with pool.batch([None if n is None else f"n{n}" for n in chosen]):
                        outputs = [base(IDS).logits for _ in range(2)]
                except LoraKernelsError as error:
                    if "no adapter of this name" not in str(error):
                        wrong.append(str(error))
                    count(absent=1)
                    continue
                except BaseException as error:
                    wrong.append(repr(error))
                    return
                if not torch.equal(*outputs):
                    wrong.append(f"batch {chosen} changed while it ran")
                for n, row in zip(chosen, outputs[0], strict=True):
                    if not any(torch.equal(row, version) for version in ([plain] if n is None else expected[n])):
                        wrong.append(f"a row of adapter {n} is none of its versions")
                count(batches=1, rows=ROWS)

        threads = [threading.Thread(target=load, args=(i,)) for i in range(LOADERS)]
        threads += [threading.Thread(target=serve, args=(i,)) for i in range(SERVERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(seconds + 120)
        stats = pool.stats()
    print(counts, stats)
    assert not wrong, wrong[:5]
    assert min(counts["loads"], counts["refused"], counts["rows"]) > 5, f"the test did nothing: {counts}"
    assert stats["in_use"] == 0
    assert stats["free_slots"] + stats["loaded"] == 5
