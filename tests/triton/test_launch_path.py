"""The lean launch hands the driver exactly what Triton's own launch hands it, and remembers what it may: seen on a driver that runs nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PRELUDE = """
import sys, tempfile, pathlib
sys.path.insert(0, {folder!r})
import fake_cuda, torch
cuda = fake_cuda.install(pathlib.Path(tempfile.mkdtemp()))
from lora_kernels.kernels import _launch, lora_linear
from lora_kernels.ops import _registry
import lora_kernels as lk
_registry._SERVES["triton"] = ("cpu",)  # the fake driver takes CPU tensors
empty = lambda *shape, dtype=torch.bfloat16: torch.zeros(shape, dtype=dtype)
"""


def in_own_process(code: str) -> None:
    prelude = PRELUDE.format(folder=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", prelude + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_lean_launch_equals_tritons_own() -> None:
    """Grid, function, stream and every kernel parameter, for a descriptor kernel and for a pointer kernel."""
    in_own_process("""
for step, described, pointers, floats, parameters in (
    # column0: 4 maps with 2 sizes and 2 strides each, 4 pointers, scale, M, N, K, R, two strides
    ("column0", "x w a y", "bias h b sync", (0.5,), 4 * 5 + 4 + 1 + 6),
    ("shrink", "", "x a h none none", (0.5,), 3 + 1 + 3),
):
    M, N, K, R = 192, 160, 80, 16
    t = dict(x=empty(M, K), w=empty(N, K), a=empty(R, K), y=empty(M, N), bias=empty(N), h=empty(M, R), b=empty(N, R), none=None)
    t["sync"] = _launch.workspace(t["x"].device, 0, 9)
    plan = lora_linear.Plan("triton", "column0", 128, 128, 64, 8, 3)
    made = lora_linear.Column0(plan, t["x"], t["w"].t(), t["bias"], t["b"].t()) if step == "column0" else lora_linear.Shrink(t["x"], t["a"])
    args = ([t[n] for n in described.split()], [t[n] for n in pointers.split()], floats)
    cuda.keep(0)
    made.launch._first(*args)
    cuda.keep(parameters)
    made.launch._first(*args)
    own, before = cuda.last(parameters), cuda.launches
    assert made.launch.raw is not None, "this Triton's launcher was not recognised: calls fall back to its own path"
    made.launch(0, *args)
    assert cuda.launches == before + 1
    assert cuda.last(parameters) == own, (step, own, cuda.last(parameters))
    cuda.keep(0)
""")


def test_an_unknown_triton_launches_by_itself() -> None:
    """What its C function takes is not known, so Triton's own path is taken, with one logged reason, and launches the same."""
    in_own_process("""
import logging, triton
lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger("lora_kernels").addHandler(handler)
x, a, h, scale = empty(192, 80), empty(16, 80), empty(192, 16), (0.5,)
def launched(version, calls):
    triton.__version__ = version
    launch = lora_linear.Shrink(x, a).launch
    for _ in range(calls):
        cuda.keep(0)
        launch(0, [], [x, a, h, None, None], scale)
        cuda.keep(7)
    launch(0, [], [x, a, h, None, None], scale)
    return launch.raw, cuda.last(7), [line for line in lines if "launch" in line]
lean, seen, told = launched(triton.__version__, 2)
own, same, why = launched("4.0.0", 2)
assert lean and own is None and same == seen and not told, (lean, own, same, seen, told)
assert len(why) == 1 and "4.0.0" in why[0], why
""")


def test_lean_launches_of_many_adapters_equal_tritons_own() -> None:
    """Every kernel of the batched op, tuples of pointers and numbers among its parameters: decode, prefill by TMA and gathered, dropout, table."""
    in_own_process("""
from lora_kernels import _batch_table
from lora_kernels.kernels import batched, batched_table
lean, seen = _launch.Launcher.__call__, []

def both(self, stream, described, pointers, floats=()):
    flat = [item for arg in (*pointers, *floats, *self.ints) for item in (arg if isinstance(arg, tuple) else (arg,))]
    n = 5 * sum(d is not None for d in described) + sum(item is not None and not (isinstance(item, int) and item == 1) for item in flat)
    cuda.keep(0)
    self._first(described, pointers, floats)
    cuda.keep(n)
    self._first(described, pointers, floats)
    own, before = cuda.last(n), cuda.launches
    assert self.raw is not None, self.fn.__name__
    lean(self, stream, described, pointers, floats)
    assert cuda.launches == before + 1 and cuda.last(n) == own, (self.fn.__name__, own, cuda.last(n))
    seen.append(self.fn.__name__)

_launch.Launcher.__call__ = both
two = (64, 32)
for M, Ns, L, p in ((17, (96,), 2, None), (17, two, 2, None), (600, (96,), 2, None), (600, two, 2, None), (600, two, 70, torch.ones(70))):
    K, R, S = 64, 16, len(Ns)
    x, ids = empty(M, K), torch.zeros(M, dtype=torch.int32)
    ws, pools_a, pools_b = [empty(N, K) for N in Ns], [empty(L, R, K) for _ in Ns], [empty(L, N, R) for N in Ns]
    block = _batch_table.default_block(M, False)
    table = batched_table.build(ids, L, block, ids.new_empty(_batch_table.layout(M, L, block).size))
    tail = (ids, None, torch.ones(S, L), p)
    seed = torch.zeros(1, dtype=torch.int64)
    y, h, mask = batched.lora_batched_fwd(x, ws, [None] * S, pools_a, pools_b, *tail, seed, table, block, False, False)
    batched.lora_batched_bwd(y, x, ws, pools_a, pools_b, h, mask, *tail, table, block, True, True, True)
kernels = "decode shrink segmented_tma batched_linear keep masked_shrink segment_reduce sum_chunks table count sort"
assert set(seen) == {name + "_kernel" for name in kernels.split()}, set(seen)
""")


def test_saved_tensors_that_lie_elsewhere_get_launches_of_their_own() -> None:
    """Kernels are compiled for addresses that are multiples of 16, or are not: also those of h and of the mask."""
    in_own_process("""
from lora_kernels import _batch_table
from lora_kernels.kernels import batched, batched_table
M, N, K, R, L = 17, 64, 64, 16, 2
x, dy, ws, pools_a, pools_b = empty(M, K), empty(M, N), [empty(N, K)], [empty(L, R, K)], [empty(L, N, R)]
ids, p, block = torch.zeros(M, dtype=torch.int32), torch.ones(L), _batch_table.default_block(M, False)
table = batched_table.build(ids, L, block, ids.new_empty(_batch_table.layout(M, L, block).size))
h, mask = empty(1, M, R), torch.zeros(M, K // 32, dtype=torch.int32)
def moved(t):
    place = t.new_zeros(t.numel() + 1)
    return place[1:].view(t.shape)
def prepared(h, mask):
    batched.lora_batched_bwd(dy, x, ws, pools_a, pools_b, h, mask, ids, None, None, p, table, block, True, True, True)
    return len(batched._prepared)
assert [prepared(h, mask), prepared(h, mask), prepared(moved(h), mask), prepared(h, moved(mask))] == [1, 1, 2, 3]
""")


def test_descriptors_are_encoded_once_per_address_and_follow_it() -> None:
    in_own_process("""
x, w, a, b = empty(192, 80), empty(160, 80), empty(16, 80), empty(160, 16)
plan = lora_linear.Plan("triton", "column0", 128, 128, 64, 8, 3)
lora_linear.store.choose = lambda problem, device: plan
keep = []  # outputs stay alive, so that each call has a new y
run = lambda x: keep.append(lora_linear.lora_linear_fwd(x, w, None, a, b, 0.5, 0.0, None))
run(x), run(x)
before = cuda.encoded
run(x)
assert cuda.encoded == before + 1, "only the new y"
run(x.clone())
assert cuda.encoded == before + 3, "a new x and a new y"
cuda.keep(1)
other = x.clone()
run(other)
assert cuda.last(1)[5] == other.data_ptr() % 2**32
""")


def test_a_thread_without_a_context_gets_one_before_its_first_descriptor() -> None:
    """As autograd's threads begin; with new addresses for a launcher that is known, and with a kernel that is known for a new launcher."""
    in_own_process("""
import threading
plan = lora_linear.Plan("triton", "column0", 128, 128, 64, 8, 3)
lora_linear.store.choose = lambda problem, device: plan
def run(M):
    x, w, a, b = empty(M, 80), empty(160, 80), empty(16, 80), empty(160, 16)
    lora_linear.lora_linear_fwd(x, w, None, a, b, 0.5, 0.0, None)
    done.append(M)
done = []
run(192)
for M in (192, 320):
    thread = threading.Thread(target=run, args=(M,))
    thread.start(), thread.join()
assert done == [192, 192, 320], done
""")


def test_public_function_launches_what_the_op_launches() -> None:
    """The path without the dispatcher and the op itself, forward and backward, count the same launches."""
    in_own_process("""
x, w, a, b = empty(192, 80), empty(160, 80), empty(16, 80), empty(160, 16)
a.requires_grad_(), b.requires_grad_(), x.requires_grad_()
counts = []
for dropout_p in (0.0, 0.0, 0.25, 0.25):
    start = cuda.launches
    y = lk.lora_linear(x, w, None, a, b, 0.5, dropout_p, backend="triton", strict=True)
    forward = cuda.launches - start
    y.backward(torch.zeros_like(y))
    counts.append((forward, cuda.launches - start - forward))
# no dropout: column0 | column0, two reductions of two launches each. Dropout at this size: cuBLAS for the GEMM, shrink for the mask.
assert counts[0] == counts[1] == (1, 5) and counts[2] == counts[3] == (1, 6), counts
with torch.no_grad():
    start = cuda.launches
    for _ in range(3):
        lk.lora_linear(x, w, None, a, b, 0.5, backend="triton", strict=True)
    assert cuda.launches == start + 3
""")


def test_leading_dimensions_are_kept_and_cost_no_copy() -> None:
    """y, dx and the saved x lie as x does; the same launches; without leading dimensions too."""
    in_own_process("""
w, a, b = empty(160, 80), empty(16, 80).requires_grad_(), empty(160, 16).requires_grad_()
for dropout_p in (0.0, 0.25):
    for lead in ((192,), (2, 96), (3, 2, 32), ()):
        x = empty(*lead, 80).requires_grad_()
        for _ in range(2):
            start = cuda.launches
            y = lk.lora_linear(x, w, None, a, b, 0.5, dropout_p, backend="triton", strict=True)
            assert y.shape == (*lead, 160) and y.grad_fn.saved_tensors[0] is x and cuda.launches == start + 1
            x.grad = None
            y.backward(torch.zeros_like(y))
            assert x.grad.shape == x.shape and a.grad.shape == a.shape and b.grad.shape == b.shape
            with torch.no_grad():
                assert lk.lora_linear(x, w, None, a, b, 0.5, dropout_p, backend="triton", strict=True).shape == y.shape
    x = empty(80, 2, 96).permute(1, 2, 0)  # not contiguous: read as rows
    assert lk.lora_linear(x, w, None, a, b, 0.5, backend="triton", strict=True).shape == (2, 96, 160)
""")


def test_h_is_shared_only_where_nobody_wants_it() -> None:
    """Without gradients calls of one signature write h to the same memory, up to 32 KiB and one launch; a training call's h is its own."""
    in_own_process("""
seen, launch = [], lora_linear.Column0.__call__
def watched(self, stream, x, w, bias, a, b, y, h, scale):
    seen.append((y, h))  # alive
    launch(self, stream, x, w, bias, a, b, y, h, scale)
lora_linear.Column0.__call__ = watched
w, a, b = empty(160, 80), empty(16, 80), empty(160, 16)
def call(M, n=3):
    seen.clear()
    for _ in range(n):
        lk.lora_linear(empty(M, 80), w, None, a, b, 0.5, backend="triton", strict=True)
    assert len({y.data_ptr() for y, _ in seen}) == n
    return len({h.data_ptr() for _, h in seen})
with torch.no_grad():
    assert call(1024) == 1 and call(1032) == 3
    assert call(64) == 1
a.requires_grad_()
assert call(64) == 3
""")


def test_serving_calls_launch_once_and_nothing_more() -> None:
    """`lora_batched_linear` with shared metadata: q/k/v in one launch; a decode step needs no other."""
    in_own_process("""
from lora_kernels.kernels import batched_table
from lora_kernels import _batch_table
from lora_kernels.ops.batch_meta import BatchMeta
meta = BatchMeta(torch.arange(64, dtype=torch.int32) % 8, 8)
meta.table = batched_table.build(meta.ids, 8, meta.block, meta.ids.new_empty(_batch_table.layout(64, 8, meta.block).size))
x, w, pools_a, pools_b = empty(64, 80), empty(96, 80), [empty(8, 16, 80)] * 3, [empty(8, 32, 16)] * 3
with torch.no_grad():
    for _ in range(3):
        start = cuda.launches
        lk.lora_batched_linear(x, w, None, pools_a, pools_b, meta, backend="triton", strict=True)
        assert cuda.launches == start + 1
""")


def test_workspace_is_one_per_stream_and_grows() -> None:
    in_own_process("""
cpu = torch.device("cpu")
one, two = _launch.workspace(cpu, 1, 10), _launch.workspace(cpu, 2, 10)
assert one.data_ptr() != two.data_ptr() and _launch.workspace(cpu, 1, 10) is one
assert not one.any() and _launch.workspace(cpu, 1, 5000).numel() >= 5000
""")


def test_what_is_remembered_holds_on_to_no_operand() -> None:
    """Launchers, descriptors and prepared calls of training and serving."""
    in_own_process("""
import gc, weakref
w, a, b = empty(160, 80), empty(16, 80).requires_grad_(), empty(160, 16).requires_grad_()
refs = []
for M in (64, 72, 192):
    for p in (0.0, 0.25):
        x = empty(M, 80).requires_grad_()
        y = lk.lora_linear(x, w, None, a, b, 0.5, p, backend="triton", strict=True)
        dy = torch.zeros_like(y)
        y.backward(dy)
        refs += map(weakref.ref, (x, y, dy))
        del x, y, dy
    with torch.no_grad():
        x = empty(M, 80)
        y = lk.lora_linear(x, w, None, a, b, 0.5, backend="triton", strict=True)
        refs += map(weakref.ref, (x, y))
        del x, y
w.grad = a.grad = b.grad = None
gc.collect()
left = [r().shape for r in refs if r() is not None]
assert not left, left
""")
