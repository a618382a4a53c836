"""The demo's layer table and its plot."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from models import with_adapter
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import lora_kernels as lk
from lora_kernels.testing import ratio, saved_bytes, timer

NAMES = ("lora_kernels", "PyTorch", "PEFT")


def _shapes(model: nn.Module) -> dict[tuple[int, int], nn.Module]:
    """One of the model's LoRA layers for each (N, K), the largest weights first."""
    from peft.tuners.lora.layer import Linear

    found = {(m.out_features, m.in_features): m for m in model.modules() if isinstance(m, Linear)}
    return dict(sorted(found.items(), key=lambda item: -item[0][0] * item[0][1]))


def _forwards(layer: nn.Module, x: Tensor, p: float) -> dict[str, Callable[[], Tensor]]:
    """The layer's training forward three ways, over the same weights."""
    linear, a, b, s = layer.base_layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]

    def pytorch() -> Tensor:
        low = F.linear(F.linear(F.dropout(x, p), a.to(x.dtype)), b.to(x.dtype))
        return F.linear(x, linear.weight, linear.bias) + s * low

    return {
        "lora_kernels": lambda: lk.lora_linear(x, linear.weight, linear.bias, a, b, s, dropout_p=p),
        "PyTorch": pytorch,
        "PEFT": lambda: layer(x),
    }


def benchmark(base: nn.Module, args: argparse.Namespace, console: Console, shapes: int = 2, rounds: int = 15) -> list[dict]:
    """Forward, forward + backward and saved bytes for the model's largest LoRA layers, M = one step's tokens."""
    M = args.batch * args.seq
    table = Table(
        title=f"One layer, M {M}, R {args.r}: median ms, and its ratio to PEFT's",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for column in ("N x K", "drop", "", "forward", "x PEFT", "fwd+bwd", "x PEFT", "saved MiB"):
        table.add_column(column, justify="left" if column in ("", "N x K") else "right", no_wrap=True)
    rows: list[dict] = []
    for p in sorted({0.0, args.dropout}):
        model = with_adapter(base, r=args.r, alpha=args.alpha, dropout=p, targets=args.targets, seed=args.seed).train()
        for (N, K), layer in list(_shapes(model).items())[:shapes]:
            rows += _measure(layer, M, N, K, p, rounds, table)
        base = model.unload()
    console.print(table)
    return rows


def _measure(layer: nn.Module, M: int, N: int, K: int, p: float, rounds: int, table: Table) -> list[dict]:
    weight = layer.base_layer.weight
    x = torch.randn(M, K, dtype=weight.dtype, device=weight.device, requires_grad=True)
    dy = torch.randn(M, N, dtype=weight.dtype, device=weight.device)
    forwards = _forwards(layer, x, p)
    leaves = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]

    def both(forward: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(), leaves, dy)

    measure = timer(weight.device)
    fwd, full = measure(forwards, rounds), measure({name: both(f) for name, f in forwards.items()}, rounds)
    rows = []
    for name in NAMES:
        kept = saved_bytes(forwards[name], layer.parameters())
        row = {"M": M, "N": N, "K": K, "dropout": p, "name": name, "saved_bytes": kept}
        row |= {"forward_ms": 1e3 * statistics.median(fwd[name]), "forward_ratio": ratio(fwd[name], fwd["PEFT"])}
        row |= {"both_ms": 1e3 * statistics.median(full[name]), "both_ratio": ratio(full[name], full["PEFT"])}
        rows.append(row)
        cells = [
            f"{row['forward_ms']:.2f}",
            f"{row['forward_ratio']:.2f}",
            f"{row['both_ms']:.2f}",
            f"{row['both_ratio']:.2f}",
            f"{kept / 2**20:.2f}",
        ]
        table.add_row(f"{N}x{K}", f"{p:g}", name, *cells, end_section=name == NAMES[-1])
    return rows


def plot(results: dict, path: Path) -> None:
    """Loss of the training run, loss patched against unpatched, and the layer ratios."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    train, compare, rows = results["train"], results["compare"], results["layers"]
    plt.rc("axes", titlesize="medium")
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 4.8), constrained_layout=True)

    left.plot(range(1, len(train["loss"]) + 1), train["loss"], ".-")
    figures = f"held-out perplexity {train['perplexity_before']:.2f} → {train['perplexity_after']:.2f}, {train['tokens_per_s']:.0f} tokens/s"
    left.set(title=f"Fine-tuning with PEFT + lora_kernels\n{figures}", xlabel="step", ylabel="training loss (nats per token)")

    for name, style in (("unpatched", "-"), ("patched", "o--")):
        middle.plot(range(1, len(compare["loss"][name]) + 1), compare["loss"][name], style, label=f"{name} PEFT")
    figures = f"differ by {compare['worst']:.1e} at most ({compare['limit']:.1e} allowed), step time × {compare['step_ratio']:.2f}"
    middle.set(title=f"Same steps, no dropout\n{figures}", xlabel="step", ylabel="training loss (nats per token)")
    middle.legend()
    for axes in (left, middle):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    groups = [(row["N"], row["K"], row["dropout"]) for row in rows if row["name"] == NAMES[0]]
    for i, name in enumerate(NAMES):
        heights = [row["both_ratio"] for row in rows if row["name"] == name]
        right.bar([g + 0.27 * (i - 1) for g in range(len(groups))], heights, width=0.25, label=name)
    right.axhline(1.0, color="0.4", linewidth=0.8)
    right.set_xticks(range(len(groups)), [f"{n} × {k}\ndropout {p:g}" for n, k, p in groups])
    right.set(title=f"One layer (N × K), M {rows[0]['M']}\nforward + backward", ylabel="time relative to PEFT (lower is faster)")
    right.set_ylim(0, 1.25 * max(row["both_ratio"] for row in rows))
    right.legend(ncols=3, loc="upper center", frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
