"""Damaged and hostile adapter files: each is refused with a reason or served as it stands, and the pool stays what it was."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import re
import struct

import pytest
import torch
from adapters import PREFIX, by_hand, one_thread, random_tensors, tiny_llama, write_adapter
from safetensors.torch import load_file, save_file

from lora_kernels import LoraKernelsError
from lora_kernels.serving import AdapterPool
from lora_kernels.serving.tensor_file import TensorFile

__all__ = ["one_thread"]
IDS = torch.randint(2, 128, (2, 5), generator=torch.Generator().manual_seed(0))
Q0 = f"{PREFIX}model.layers.0.self_attn.q_proj"


class Bench:
    """A pool with two adapters whose answers are known, and one folder to damage."""

    def __init__(self, root):
        self.base = tiny_llama()
        self.pool = AdapterPool(self.base, max_loras=3, max_rank=8)
        for name in "ab":
            self.pool.load(name, write_adapter(root / name, random_tensors(self.base, ("q_proj", "v_proj"), 4, ord(name))))
        self.folder = write_adapter(root / "victim", random_tensors(self.base, ("q_proj",), 4, 3))
        self.config = (self.folder / "adapter_config.json").read_bytes()
        self.path = self.folder / "adapter_model.safetensors"
        self.good = self.path.read_bytes()
        self.length = struct.unpack("<Q", self.good[:8])[0]
        self.header = json.loads(self.good[8 : 8 + self.length])
        self.answer = self.logits("a", "b")
        self.stats = self.pool.stats()

    def logits(self, *names):
        with self.pool.batch(names):
            return self.base(IDS).logits

    def rewrite(self, header: dict | bytes, data: bytes | None = None) -> None:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        self.path.write_bytes(struct.pack("<Q", len(text)) + text + (self.good[8 + self.length :] if data is None else data))

    def attempt(self, scaling: float | None = 2.0) -> str | None:
        """Load the victim: the reason of its refusal, or None when it was served as the safetensors library reads it."""
        try:
            self.pool.load("victim", self.folder)
        except LoraKernelsError as error:
            reason = str(error)
            assert reason.startswith("adapter 'victim' was not loaded: ")
            assert 40 < len(reason) < 700, reason
            assert "victim" not in self.pool
        else:
            reason = None
            if scaling is not None:
                got, expected = self.logits("victim", "victim"), by_hand(self.folder, scaling, IDS)
                assert torch.isfinite(got).all() == torch.isfinite(expected).all()
                torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-4 * max(1.0, float(expected.abs().max())), equal_nan=True)
            self.pool.evict("victim")
        assert torch.equal(self.logits("a", "b"), self.answer), "the loaded adapters changed"
        now = self.pool.stats()
        assert all(now[key] == self.stats[key] for key in ("loaded", "pinned", "in_use", "free_slots", "slab_bytes"))
        return reason


@pytest.fixture(scope="module")
def module_bench(tmp_path_factory):
    bench = Bench(tmp_path_factory.mktemp("fuzz"))
    yield bench
    bench.pool.close()


@pytest.fixture
def bench(module_bench):
    yield module_bench
    (module_bench.folder / "adapter_config.json").write_bytes(module_bench.config)
    if module_bench.path.is_symlink() or not module_bench.path.is_file():
        module_bench.path.unlink(missing_ok=True)
    module_bench.path.write_bytes(module_bench.good)


def test_the_undamaged_file_is_served(bench):
    assert bench.attempt() is None


def test_every_truncation_is_refused(bench):
    sizes = {*range(40), *range(40, len(bench.good), 61), bench.length + 7, bench.length + 8, bench.length + 9, len(bench.good) - 1}
    for size in sorted(sizes):
        bench.path.write_bytes(bench.good[:size])
        assert bench.attempt() is not None, f"{size} of {len(bench.good)} bytes were served"
    bench.path.write_bytes(bench.good + b"\0")
    assert "bytes to spare" in bench.attempt()


def test_a_file_that_ends_while_it_is_read(bench):
    with TensorFile(bench.path) as file:
        last = max(file.entries, key=lambda name: file.entries[name].end)
        bench.path.write_bytes(bench.good[:-100])
        with pytest.raises(LoraKernelsError, match="the file ended while"):
            file.read(last, torch.empty(4096, dtype=torch.uint8))


@pytest.mark.parametrize("read", ["read", "readinto"], ids=["header", "data"])
def test_a_disk_that_fails(bench, monkeypatch, read):
    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    failing = type("Failing", (io.FileIO,), {read: fails})
    open_file = os.fdopen
    monkeypatch.setattr(
        os, "fdopen", lambda fd, *a, **k: failing(fd) if os.path.samestat(os.fstat(fd), os.stat(bench.path)) else open_file(fd, *a, **k)
    )
    assert "adapter_model.safetensors cannot be read; got Input/output error; allowed: a readable file; fix: " in bench.attempt()


@pytest.mark.parametrize("where", ["header", "data", "config"])
def test_bit_flips(bench, where):
    rng = random.Random(where)
    refused = served = 0
    for _ in range({"header": 500, "data": 150, "config": 300}[where]):
        text = bytearray(bench.config if where == "config" else bench.good)
        at = rng.randrange(8 + bench.length, len(text)) if where == "data" else rng.randrange(min(len(text), 8 + bench.length))
        text[at] ^= 1 << rng.randrange(8)
        (bench.folder / "adapter_config.json" if where == "config" else bench.path).write_bytes(text)
        # What a flip in the config makes of rank and alpha is the next test's matter; here it must only do no harm.
        reason = bench.attempt(None if where == "config" else 2.0)
        refused, served = refused + (reason is not None), served + (reason is None)
    print(f"{where}: {refused} refused, {served} served")
    assert served > 0
    assert refused > 0 or where == "data"  # a flipped value is a value, unless it became NaN or inf


@pytest.mark.parametrize("alpha", [3, 8.5, -2, 0, 1e-3])
def test_the_alpha_that_stands_there_is_used(bench, alpha):
    (bench.folder / "adapter_config.json").write_text(json.dumps(json.loads(bench.config) | {"lora_alpha": alpha}))
    assert bench.attempt(alpha / 4) is None


def _with(header, key, **changes):
    return {k: v | changes if k == key else v for k, v in header.items()}


def _renamed(header, old, new):
    return {k.replace(old, new): v for k, v in header.items()}


A0, B0 = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"
HEADERS = {
    "lora_A-missing": (lambda h: _renamed(h, A0, f"{Q0}.lora_C.weight"), "cannot be served"),
    "one-half": (lambda h: _renamed(h, A0, f"{PREFIX}model.layers.1.self_attn.v_proj.lora_A.weight"), "lacks lora_B.weight|lacks lora_A.weight"),
    "a-and-b-swapped": (lambda h: _renamed(_renamed(_renamed(h, A0, "x"), B0, A0), "x", B0), "wrong shape; got .64, 4.; allowed: .4, 64."),
    "layer-99": (lambda h: _renamed(h, "layers.0.", "layers.99."), "modules that the pool does not serve"),
    "one-layer-only": (lambda h: {k: v for k, v in h.items() if "layers.0." in k or k == "__metadata__"}, "leave a gap|to spare"),
    "dora": (lambda h: _renamed(h, A0, f"{Q0}.lora_magnitude_vector"), "DoRA"),
    "embedding": (lambda h: _renamed(h, A0, f"{PREFIX}model.embed_tokens.lora_embedding_A"), "LoRA on an embedding"),
    "base-weight": (lambda h: _renamed(h, A0, f"{PREFIX}lm_head.base_layer.weight"), "a base weight"),
    "path-in-name": (lambda h: _renamed(h, Q0, f"{PREFIX}../../../../etc/passwd"), "does not serve"),
    "null-in-name": (lambda h: _renamed(h, Q0, f"{PREFIX}a\0b"), "does not serve"),
    "huge-shape": (lambda h: _with(h, A0, shape=[2**62, 64]), "shape and byte range disagree"),
    "huge-offsets": (lambda h: _with(h, A0, shape=[2**40, 64], data_offsets=[0, 2**48]), "gap|overlap|short"),
    "beyond-int64": (lambda h: _with(h, A0, shape=[2**70]), "malformed shape"),
    "negative": (lambda h: _with(h, A0, shape=[-4, -64]), "malformed shape"),
    "float-size": (lambda h: _with(h, A0, shape=[4.0, 64]), "malformed shape"),
    "bool-size": (lambda h: _with(h, A0, shape=[True, 256]), "malformed shape"),
    "nine-dims": (lambda h: _with(h, A0, shape=[1] * 7 + [4, 64]), "malformed shape"),
    "1-d": (lambda h: _with(h, A0, shape=[256]), "wrong shape"),
    "transposed": (lambda h: _with(h, A0, shape=[64, 4]), "wrong shape"),
    "reversed-offsets": (lambda h: _with(h, A0, data_offsets=h[A0]["data_offsets"][::-1]), "shape and byte range disagree"),
    "overlap": (lambda h: _with(h, B0, data_offsets=h[A0]["data_offsets"]), "overlap"),
    "gap": (lambda h: _with(h, A0, dtype="F16", data_offsets=[h[A0]["data_offsets"][0], sum(h[A0]["data_offsets"]) // 2]), "leave a gap"),
    "int8": (lambda h: _with(h, A0, dtype="I8", shape=[16, 64]), "unsupported dtype; got 'I8'"),
    "dtype-list": (lambda h: _with(h, A0, dtype=["F32"]), "unsupported dtype"),
    "half-of-it": (lambda h: _with(h, A0, dtype="F16", shape=[8, 64]), "wrong shape"),
    "no-offsets": (lambda h: {k: {"dtype": "F32", "shape": [4, 64]} if k == A0 else v for k, v in h.items()}, "malformed"),
    "entry-null": (lambda h: {**h, A0: None}, "malformed"),
    "empty": (lambda h: {}, "to spare|no tensors"),
}


@pytest.mark.parametrize("change, reason", HEADERS.values(), ids=HEADERS.keys())
def test_lying_headers(bench, change, reason):
    bench.rewrite(change(bench.header))
    found = bench.attempt()
    assert found is not None
    assert re.search(reason, found), found


@pytest.mark.parametrize(
    "header, reason",
    [
        (b"", "no valid JSON"),
        (b"[1]", "no JSON object"),
        (b"[" * 200_000, "no valid JSON"),
        (b'{"a": 1, "a": 2}', "stands there twice"),
        (b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 4]}}', "no valid JSON|malformed"),
    ],
    ids=["empty", "list", "deep", "twice", "digits"],
)
def test_headers_that_are_none(bench, header, reason):
    bench.rewrite(header)
    assert re.search(reason, bench.attempt())


@pytest.mark.parametrize("declared", [2**63, 2**64 - 1, 10**9, 0, 1])
def test_lying_header_length(bench, declared):
    bench.path.write_bytes(struct.pack("<Q", declared) + bench.good[8:])
    assert bench.attempt() is not None


def test_sparse_file_with_a_huge_tensor_costs_no_memory(bench):
    (bench.folder / "adapter_config.json").write_text(json.dumps(json.loads(bench.config) | {"target_modules": "all-linear"}))
    small = {"dtype": "F32", "shape": [64, 4], "data_offsets": [2**38, 2**38 + 1024]}
    header = {A0: {"dtype": "F32", "shape": [2**32, 16], "data_offsets": [0, 2**38]}, B0: small}
    bench.rewrite(header, b"")
    with bench.path.open("r+b") as file:
        file.truncate(8 + len(json.dumps(header)) + 2**38 + 1024)
    assert "wrong shape; got [4294967296, 16]" in bench.attempt()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", [A0, B0])
def test_values_that_are_not_finite(bench, key, value):
    tensors = load_file(bench.path)
    tensors[key][-1, -1] = value
    save_file(tensors, bench.path)
    assert "not finite" in bench.attempt()


def test_values_beyond_the_pools_dtype(tmp_path):
    base = tiny_llama(torch.float16)
    tensors = random_tensors(base, ("q_proj",), 4, 1)
    tensors[A0][0, 0] = 1e5
    write_adapter(tmp_path, tensors)
    with AdapterPool(base, 1, 4) as pool, pytest.raises(LoraKernelsError, match=r"not finite.*dtype=torch.float32"):
        pool.load("x", tmp_path)
    with AdapterPool(base, 1, 4, dtype=torch.float32) as pool:
        pool.load("x", tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_float_dtypes_are_served(bench, dtype):
    save_file({k: v.to(dtype) for k, v in load_file(bench.path).items()}, bench.path)
    assert bench.attempt() is None


CONFIGS = {
    "rank-lie": ({"r": 8}, "wrong shape; got .4, 64.; allowed: .8, 64. by the model and the config's rank 8"),
    "rank-pattern-lie": ({"rank_pattern": {"q_proj": 2}}, "wrong shape"),
    "bias-lie": ({"lora_bias": True}, "disagree on lora_bias"),
    "more-targets": ({"target_modules": ["q_proj", "k_proj"]}, "names are missing; got model.layers.0.self_attn.k_proj and 1 more"),
}


@pytest.mark.parametrize("changes, reason", CONFIGS.values(), ids=CONFIGS.keys())
def test_config_and_file_that_disagree(bench, changes, reason):
    (bench.folder / "adapter_config.json").write_text(json.dumps(json.loads(bench.config) | changes))
    found = bench.attempt()
    assert re.search(reason, found), found


def test_rank_above_the_pools(bench, tmp_path):
    write_adapter(tmp_path, random_tensors(bench.base, ("q_proj",), 9, 1), r=9)
    with pytest.raises(LoraKernelsError, match=r"rank above the pool's; got 9; allowed: at most max_rank 8; fix: AdapterPool\(max_rank=9\)"):
        bench.pool.load("x", tmp_path)


def test_links_and_special_files(bench, tmp_path):
    bench.path.rename(tmp_path / "elsewhere.safetensors")
    bench.path.symlink_to(tmp_path / "elsewhere.safetensors")  # a hub cache looks like this
    assert bench.attempt() is None
    bench.path.unlink()
    bench.path.symlink_to("/dev/zero")
    assert "no regular file" in bench.attempt()
    bench.path.unlink()
    os.mkfifo(bench.path)
    assert "no regular file" in bench.attempt()
    bench.path.unlink()
    bench.path.mkdir()
    try:
        assert "regular file" in bench.attempt()
    finally:
        bench.path.rmdir()
    assert "cannot be opened; got No such file" in bench.attempt()
