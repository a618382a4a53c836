"""The CPU engine against F.linear, naive LoRA, in-place addmm_ and PEFT: one interleaved run, ratios to F.linear alone.

    python benchmarks/bench_cpu_linear.py [--clock wall|thread] [--threads N] [--shapes 576x576,...] [--dtypes ...] [--tokens ...] [--modes fwd,fb]

Weights are rotated through 96 MiB so that they come from memory as in a model. Every competitor's result is checked before it is timed.
`--clock thread` with `--threads 1` measures CPU time of one thread, which other processes disturb little; the product's figures are wall time.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch
import torch.nn.functional as F

import lora_kernels as lk
from lora_kernels.native import cpu

CACHE_BYTES = 96 << 20
SCALING = 2.0


def interleaved(calls, budget_s, base="base", clock=time.perf_counter, rounds=7, most=60):
    """name -> (median microseconds, median over rounds of time / base's time in the same round); calls in random order, call(i) gets a counter."""
    for call in calls.values():
        call(0), call(1)
    times, names, i, start = {name: [] for name in calls}, list(calls), 2, time.perf_counter()
    rng = random.Random(0)
    while len(times[base]) < rounds or (time.perf_counter() - start < budget_s and len(times[base]) < most):
        rng.shuffle(names)
        for name in names:
            begin = clock()
            for j in range(3):
                calls[name](i + j)
            times[name].append((clock() - begin) / 3)
        i += 3
    return {n: (statistics.median(t) * 1e6, statistics.median(a / b for a, b in zip(t, times[base], strict=True))) for n, t in times.items()}


def peft_layer(weight, a, b, adapter_dtype):
    """PEFT's own layer on this weight, or None without PEFT."""
    try:
        from peft import LoraConfig
        from peft.tuners.lora import Linear
    except ImportError:
        return None
    with torch.device("meta"):
        base = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    base.weight = torch.nn.Parameter(weight, requires_grad=False)
    R = a.shape[0]
    layer = Linear(base, "default", LoraConfig(r=R, lora_alpha=SCALING * R, target_modules=["x"]), r=R, lora_alpha=SCALING * R)
    layer.lora_A["default"].weight = torch.nn.Parameter(a.detach().to(adapter_dtype, copy=True))
    layer.lora_B["default"].weight = torch.nn.Parameter(b.detach().to(adapter_dtype, copy=True))
    return layer


def competitors(weights, a, b, dtype):
    """name -> f(x, weight number)."""
    n = len(weights)
    calls = {
        "base": lambda x, i: F.linear(x, weights[i % n]),
        "naive": lambda x, i: F.linear(x, weights[i % n]) + SCALING * F.linear(F.linear(x, a), b),
        "addmm": lambda x, i: torch.addmm(F.linear(x, weights[i % n]), F.linear(x, a), b.t(), alpha=SCALING)
        if torch.is_grad_enabled()
        else F.linear(x, weights[i % n]).addmm_(F.linear(x, a), b.t(), alpha=SCALING),
    }
    for name, adapter_dtype in (("peft", dtype), ("peft32", torch.float32)):
        if name == "peft32" and dtype == torch.float32:
            continue
        layers = [peft_layer(w, a, b, adapter_dtype) for w in weights]
        if layers[0] is not None:
            calls[name] = lambda x, i, layers=layers: layers[i % n](x)
    calls["ours"] = lambda x, i: lk.lora_linear(x, weights[i % n], None, a, b, SCALING, backend="cpu", strict=True)
    return calls


def check(calls, x, weight, a, b):
    exact = F.linear(x.double(), weight.double()) + SCALING * F.linear(F.linear(x.double(), a.double()), b.double())
    error = {name: ((call(x, 0).double() - exact).norm() / exact.norm()).item() for name, call in calls.items() if name != "base"}
    assert error["ours"] <= 2 * error["naive"] + 1e-7, error


def with_backward(call, x, dy, a, b):
    def run(i):
        call(x, i).backward(dy)
        x.grad = a.grad = b.grad = None

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clock", choices=("wall", "thread"), default="wall")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shapes", default="576x576,2048x2048", help="NxK,...")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--tokens", default="1,64,1024")
    parser.add_argument("--modes", default="fwd,fb")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--budget", type=float, default=1.0, help="seconds per line")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.thread_time if options.clock == "thread" else time.perf_counter
    print(f"{cpu.isa()}, {options.threads} threads, torch {torch.__version__}, {options.clock} time, R {options.rank}; ratio to F.linear alone")
    torch.manual_seed(0)
    for dtype in (getattr(torch, name) for name in options.dtypes.split(",")):
        for N, K in ([int(v) for v in s.split("x")] for s in options.shapes.split(",")):
            copies = max(1, -(-CACHE_BYTES // (N * K * dtype.itemsize)))
            weights = [(torch.randn(N, K) * K**-0.5).to(dtype) for _ in range(copies)]
            a = (torch.randn(options.rank, K) * K**-0.5).to(dtype).requires_grad_()
            b = (torch.randn(N, options.rank) * 0.1).to(dtype).requires_grad_()
            calls = competitors(weights, a, b, dtype)
            for mode in options.modes.split(","):
                for M in (int(m) for m in options.tokens.split(",")):
                    x, dy = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
                    with torch.set_grad_enabled(mode == "fb"):
                        if mode == "fb":
                            x.requires_grad_()
                            timed = {name: with_backward(call, x, dy, a, b) for name, call in calls.items()}
                        else:
                            check(calls, x, weights[0], a, b)
                            timed = {name: lambda i, call=call, x=x: call(x, i) for name, call in calls.items()}
                        result = interleaved(timed, options.budget, clock=clock)
                    ratios = "  ".join(f"{name} {ratio:5.2f}" for name, (_, ratio) in result.items() if name != "base")
                    print(f"{mode:3} {str(dtype)[6:]:8} {N}x{K} M {M:5}  base {result['base'][0]:9.1f} us  {ratios}", flush=True)


if __name__ == "__main__":
    main()
