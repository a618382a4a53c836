"""Which adapters stay, which go, and what a batch that is running sees of it."""

from __future__ import annotations

import gc
import os
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from pathlib import Path

import pytest
import torch
from adapters import one_thread, random_tensors, tiny_llama, write_adapter
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_kernels import LoraKernelsError, LoraValueError
from lora_kernels.serving import AdapterPool
from lora_kernels.serving.slots import Adapter, Slots

__all__ = ["one_thread"]
IDS = torch.randint(2, 128, (2, 5), generator=torch.Generator().manual_seed(0))


def adapter_folder(base, folder: Path, seed: int, r: int = 4) -> Path:
    return write_adapter(folder, random_tensors(base, ("q_proj", "up_proj"), r, seed), r=r, target_modules=["q_proj", "up_proj"])


@pytest.fixture(scope="module")
def base():
    return tiny_llama()


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return [adapter_folder(base, root / str(i), i) for i in range(6)]


@pytest.fixture
def pool(base):
    with AdapterPool(base, max_loras=3, max_rank=4) as pool:
        yield pool


def logits(base, pool, name):
    with pool.batch([name, None]):
        return base(IDS).logits[0]


def test_least_recently_used_goes_first(base, pool, folders):
    for i in range(3):
        pool.load(f"n{i}", folders[i])
    with pool.batch(["n0", "n1"]):
        pass
    pool.load("n3", folders[3])
    assert pool.names == ("n0", "n1", "n3")
    assert "n2" not in pool
    assert len(pool) == 3
    assert pool.stats()["evictions"] == 1


def test_an_adapter_that_no_batch_holds_goes_before_an_older_one_in_use(base, pool, folders):
    for i in range(3):
        pool.load(f"n{i}", folders[i])
    with pool.batch(["n0", None]):
        with pool.batch(["n1", None]), pool.batch(["n2", None]):
            pass
        pool.load("n3", folders[3])
        assert set(pool.names) == {"n0", "n2", "n3"}


def test_pinned_adapters_stay(pool, folders):
    for i in range(3):
        pool.load(f"n{i}", folders[i])
    pool.pin("n0")
    pool.pin("n1")
    pool.load("n3", folders[3])
    assert set(pool.names) == {"n0", "n1", "n3"}
    with pytest.raises(LoraValueError, match=r"'n0' is pinned.*unpin\('n0'\)"):
        pool.evict("n0")
    pool.load("n0", folders[4])
    assert pool.stats()["pinned"] == 2, "a reload forgot the pin"
    pool.pin("n3")
    with pytest.raises(LoraValueError, match="every adapter is pinned"):
        pool.load("n4", folders[4])
    assert set(pool.names) == {"n0", "n1", "n3"}
    pool.unpin("n0")
    pool.evict("n0")
    with pytest.raises(LoraValueError, match="no adapter of this name"):
        pool.evict("n0")


def test_running_batch_keeps_what_is_replaced_or_evicted(base, pool, folders):
    pool.load("a", folders[0])
    pool.load("b", folders[1])
    old = logits(base, pool, "a")
    with pool.batch(["a", "b"]):
        before = base(IDS).logits
        pool.load("a", folders[2])
        pool.evict("b")
        assert torch.equal(base(IDS).logits, before)
        with pytest.raises(LoraValueError, match="'b'"), pool.batch(["b", None]):
            pass
        new = logits(base, pool, "a")
        assert torch.equal(base(IDS).logits, before)
    assert torch.equal(before[0], old)
    assert not torch.equal(new, old)
    assert pool.stats()["free_slots"] == 3


def test_a_single_slot_pool_replaces_its_adapter(base, folders):
    with AdapterPool(base, max_loras=1, max_rank=4) as pool:
        for i in (0, 1, 2):
            pool.load("a", folders[i])
        expected = logits(base, pool, "a")
        pool.load("b", folders[2])
        assert pool.names == ("b",)
        assert torch.equal(logits(base, pool, "b"), expected)


def test_load_waits_for_a_slot_only_so_long(base, pool, folders):
    for i in range(3):
        pool.load(f"n{i}", folders[i])
    with pool.batch(["n0", "n1"]), pool.batch(["n2", None]):
        pool.load("n3", folders[3])  # takes the spare slot; n0 loses its name, not its slot
        with pytest.raises(LoraKernelsError, match=r"no slot became free within 0.01 s"):
            pool.load("n4", folders[4], timeout=0.01)
        assert "n4" not in pool
        assert len(pool) == 3
    pool.load("n4", folders[4], timeout=0.01)


@pytest.mark.parametrize("timeout", [float("nan"), -1, "1", None, True], ids=str)
def test_timeouts_that_are_none(pool, folders, timeout):
    with pytest.raises(LoraValueError, match="adapter 'a' was not loaded: timeout is no time to wait"):
        pool.load("a", folders[0], timeout=timeout)


@pytest.mark.parametrize("timeout", [float("inf"), 1e12, 10**400], ids=["inf", "1e12", "10**400"])
def test_load_waits_as_long_as_it_takes(base, folders, timeout):
    with AdapterPool(base, max_loras=1, max_rank=4) as pool, ThreadPoolExecutor(1) as others:
        pool.load("a", folders[0])
        with pool.batch(["a"]):
            pool.load("b", folders[1])  # the spare slot
            with pool.batch(["b"]):
                loading = others.submit(pool.load, "c", folders[2], timeout)
                with pytest.raises(TimeoutError):
                    loading.result(0.2)
        assert loading.result(60).name == "c"


def test_failed_load_evicts_nothing_and_frees_its_slot(base, pool, folders, tmp_path):
    tensors = random_tensors(base, ("q_proj",), 4, 1)
    tensors[max(tensors)][0, 0] = float("nan")
    write_adapter(tmp_path, tensors)
    for i in range(3):
        pool.load(f"n{i}", folders[i])
    expected = [logits(base, pool, f"n{i}") for i in range(3)]
    for _ in range(5):
        with pytest.raises(LoraValueError, match="adapter 'bad' was not loaded:.*not finite"):
            pool.load("bad", tmp_path)
        with pytest.raises(LoraValueError, match="not finite"):
            pool.load("n1", tmp_path)
    assert set(pool.names) == {"n0", "n1", "n2"}
    assert pool.stats()["free_slots"] == 1
    assert pool.stats()["refused"] == 10
    for i in range(3):
        assert torch.equal(logits(base, pool, f"n{i}"), expected[i])


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_churn_of_200_adapters_keeps_memory_and_results(base, tmp_path):
    folders = [adapter_folder(base, tmp_path / str(i), 100 + i, r=1 + i % 8) for i in range(40)]
    with AdapterPool(base, max_loras=8, max_rank=8) as pool:
        first, addresses, bytes_before = {}, None, 0
        for turn in range(200):
            i = turn % 40
            pool.load(f"n{i}", folders[i])
            got = logits(base, pool, f"n{i}")
            assert torch.equal(first.setdefault(i, got), got), f"adapter {i} answers differently when loaded again"
            if turn % 7 == 0:
                pool.evict(f"n{i}")
            now = [(s.data_ptr(), s.numel()) for g in pool._groups() for s in (*g.slabs_a, *g.slabs_b, g.ranks, g.scalings)]
            assert addresses in (None, now), "slabs moved"
            addresses = now
            if turn == 50:
                gc.collect()
                bytes_before, files_before = resident_bytes(), len(os.listdir("/proc/self/fd"))
        gc.collect()
        assert pool.stats()["loads"] == 200
        assert len(pool) <= 8
        assert len(os.listdir("/proc/self/fd")) == files_before
        assert resident_bytes() - bytes_before < 8e6
        assert len({tuple(row.flatten()[:50].tolist()) for row in first.values()}) == 40


# Random loads (failing ones too), evictions, pins and batches, checked against what must always hold.
ACTIONS = st.lists(st.tuples(st.sampled_from(["load", "fail", "evict", "pin", "unpin", "enter", "leave"]), st.integers(0, 4)), max_size=60)


@settings(max_examples=150, deadline=None)
@given(max_loras=st.integers(1, 3), actions=ACTIONS)
def test_slots_are_never_lost_nor_given_twice(max_loras, actions):
    slots, batches, pinned = Slots(max_loras), [], set()
    for action, number in actions:
        name = f"n{number}"
        before = [a.name for a in slots.listed()]
        try:
            if action == "load":
                with slots.writing(timeout=0) as slot:
                    slots.publish(Adapter(name, slot))
            elif action == "fail":
                with slots.writing(timeout=0):
                    raise LoraValueError("bad file")
            elif action == "enter":
                batches.append(slots.acquire([name, None, name]))
            elif action == "leave" and batches:
                slots.release(batches.pop(number % len(batches)))
            elif action == "evict":
                slots.evict(name)
            elif action in ("pin", "unpin"):
                slots.pin(name, action == "pin")
        except LoraKernelsError:
            assert [a.name for a in slots.listed()] == before, "a refused action changed the pool"
        held = {a.slot for batch in batches for a in batch if a}
        listed = {a.slot for a in slots.listed()}
        assert len(listed) == len(slots.listed()) <= max_loras
        assert sorted([*slots._free, *(held | listed)]) == list(range(max_loras + 1))
        pinned = {a.name for a in slots.listed() if a.pinned}
        if action in ("load", "evict"):
            assert not {n for n in pinned if n not in before}
