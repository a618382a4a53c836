"""How long `AdapterPool.load` takes, from the call to the adapter being usable, and how long batches wait for it meanwhile.

    python benchmarks/bench_pool_load.py                  # a 4-layer slice of Llama-3-8B's shapes on the CPU
    python benchmarks/bench_pool_load.py --layers 32 --device cuda --dtype bfloat16

The adapter files lie in the page cache (they are written just before), so the figures are the pool's own: header, reading, casting, the
check for NaN and inf, the copy. The floor is the same file read into memory in one go.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from lora_kernels.serving import AdapterPool

HIDDEN, KV, MLP = 4096, 1024, 14336  # Llama-3-8B
SHAPES = {
    "q_proj": (HIDDEN, HIDDEN),
    "k_proj": (HIDDEN, KV),
    "v_proj": (HIDDEN, KV),
    "o_proj": (HIDDEN, HIDDEN),
    "gate_proj": (HIDDEN, MLP),
    "up_proj": (HIDDEN, MLP),
    "down_proj": (MLP, HIDDEN),
}


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    p.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="of model and pool; files are float32")
    p.add_argument("--device", default="cpu")
    p.add_argument("--rounds", type=int, default=10)
    p.add_argument("--out", type=Path, help="write the figures there as JSON")
    return p.parse_args()


def skeleton(layers: int, dtype: torch.dtype, device: str) -> nn.Module:
    options = {"bias": False, "dtype": dtype, "device": device}
    layers_ = [nn.ModuleDict({name: nn.Linear(K, N, **options) for name, (K, N) in SHAPES.items()}) for _ in range(layers)]
    return nn.ModuleList(layers_).requires_grad_(False)


def write(folder: Path, layers: int, r: int) -> int:
    """A float32 adapter of rank r on every layer; returns its bytes."""
    tensors = {}
    for i in range(layers):
        for name, (K, N) in SHAPES.items():
            tensors[f"base_model.model.{i}.{name}.lora_A.weight"] = torch.randn(r, K)
            tensors[f"base_model.model.{i}.{name}.lora_B.weight"] = torch.randn(N, r)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": r, "lora_alpha": r, "target_modules": list(SHAPES)}))
    return (folder / "adapter_model.safetensors").stat().st_size


def timed(run, rounds: int) -> list[float]:
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def ms(times: list[float], pick=statistics.median) -> float:
    return pick(times) * 1e3 if times else float("nan")


def steps_while(pool: AdapterPool, model: nn.Module, names: list[str], x: torch.Tensor, busy: threading.Thread | None, rounds: int) -> list[float]:
    """Seconds of one pass through the first layer's q_proj in a mixed batch: `rounds` of them, or as long as `busy` runs."""
    times = []
    while len(times) < rounds if busy is None else busy.is_alive():
        start = time.perf_counter()
        with pool.batch(names):
            model[0]["q_proj"](x)
        if x.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times


def main() -> int:
    args = parse()
    dtype = getattr(torch, args.dtype)
    model = skeleton(args.layers, dtype, args.device)
    x = torch.randn(16, HIDDEN, dtype=dtype, device=args.device)
    rows = []
    with tempfile.TemporaryDirectory() as scratch, AdapterPool(model, max_loras=4, max_rank=max(args.ranks)) as pool:
        print(f"{args.layers} layers of Llama-3-8B's shapes, {args.dtype}, {args.device}; float32 files in the page cache; torch {torch.__version__}")
        heads = ("load ms", "best", "best GB/s", "file read ms", "step ms", "while loading", "worst")
        print(f"{'rank':>5} {'MB':>8} " + " ".join(f"{h:>13}" for h in heads))
        for r in args.ranks:
            folder = Path(scratch) / str(r)
            folder.mkdir()
            size = write(folder, args.layers, r)
            loads = timed(lambda folder=folder, r=r: pool.load(f"r{r}", folder), args.rounds)
            floor = timed((folder / "adapter_model.safetensors").read_bytes, args.rounds)
            names = [f"r{r}", None] * 8
            alone = steps_while(pool, model, names, x, None, 50)
            loader = threading.Thread(target=lambda folder=folder: [pool.load("other", folder) for _ in range(args.rounds)])
            loader.start()
            during = steps_while(pool, model, names, x, loader, 0)
            loader.join()
            line = {"rank": r, "bytes": size, "load_s": loads, "file_read_s": floor, "step_alone_s": alone, "step_while_loading_s": during}
            rows.append(line)
            rate = size / min(loads) / 1e9
            figures = (ms(loads), ms(loads, min), rate, ms(floor), ms(alone), ms(during), ms(during, max))
            print(f"{r:5} {size / 1e6:8.1f} " + " ".join(f"{f:13.2f}" for f in figures))
    if args.out:
        args.out.write_text(json.dumps({"arguments": {k: str(v) for k, v in vars(args).items()}, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
