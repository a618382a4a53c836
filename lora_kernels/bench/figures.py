"""Writes the figures of README.md and docs/performance.md from the results files (`make readme-figures`); `--check` only compares.

A figure stands between two comments and is named by device folder, suite and producer:

    <!-- figure amd-epyc-zen-4-avx512-bf16-2-threads linear speedup -->
    ...
    <!-- /figure -->
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from .._errors import message
from . import records
from .plots import LABELS
from .provenance import ROOT
from .report import losses
from .timing import Ratio

PAGES = ("README.md", "docs/performance.md")
_FIGURE = re.compile(r"(<!-- figure (\S+) (\S+) (\S+) -->)(.*?)(<!-- /figure -->)", re.DOTALL)


def _shown(ratio: Ratio | None) -> str:
    return "" if ratio is None else f"{ratio.median:.2f}×" if ratio.resolved else f"unresolved ({ratio.q20:.2f} to {ratio.q80:.2f})"


def _rows(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def _where(data: dict) -> str:
    source = data["provenance"]
    device = source["device"]["name"] + (f", {source['cpu']['isa']}, {source['threads']} threads" if source["device"]["type"] == "cpu" else "")
    cut = "" if data["complete"] else "; cut off before its end"
    return f"\n\n{device}; torch {source['versions']['torch']}; {source['date'][:10]}; commit {(source['commit'] or 'unknown')[:9]}{cut}."


def linear_speedup(data: dict) -> str:
    """Forward + backward: what the adapter costs over the frozen layer, PEFT's way and ours, and the speed-up."""
    rows, dtype = [], records.main_dtype(data)
    for record in data["records"]:
        case, results = records.case_of(record), record["results"]
        ours = records.like_peft(results)
        if not case.backward or case.dtype != dtype or "us" not in ours:
            continue
        title = f"{case.model} {case.projection} {case.K}→{case.N}" + (f", dropout {case.dropout:g}" if case.dropout else "")
        over = [_shown(records.ratio(entry, "base")) for entry in (results.get("peft", {}), ours)]
        gains = [_shown(records.inverse(records.ratio(ours, name))) for name in ("peft", "naive")]
        rows.append([title, str(case.M), str(case.R), *over, *gains])
    head = ["layer", "tokens", "rank", "PEFT over frozen layer", "ours over frozen layer", "speed-up over PEFT", "over naive PyTorch"]
    return _rows(head, rows) + _where(data)


def batched_decode(data: dict) -> str:
    """Decode with many adapters: µs of each contestant beside the roofline."""
    order = ("base", "peft_mixed", "loop", "gather_bmm", "vllm", "sglang", "ours")
    names = [n for n in order if any("us" in r["results"].get(n, {}) for r in data["records"])]
    rows = []
    for record in data["records"]:
        case = records.case_of(record)
        times = [f"{record['results'][n]['us']:.0f}" if "us" in record["results"].get(n, {}) else "" for n in names]
        layer = f"{case.model} {case.projection} {case.K}→{case.N}"
        rows.append([layer, str(case.M), str(case.L), str(case.R), f"{record['floor']['us']:.0f}", *times])
    return _rows(["layer", "tokens", "adapters", "rank", "roofline µs", *(LABELS.get(n, n) + " µs" for n in names)], rows) + _where(data)


def training_steps(data: dict) -> str:
    rows = []
    for record in data["records"]:
        for name, entry in record["results"].items():
            if "us" in entry:
                gain = "" if name == "peft" else _shown(records.inverse(records.ratio(entry, "peft")))
                memory = [f"{entry[key] / 2**20:.1f}" for key in ("peak_bytes", "saved_bytes")]
                label = {"ours_low": "lora_kernels (bf16 adapters)", "ours": "lora_kernels (fp32 adapters)"}.get(name, LABELS.get(name, name))
                rows.append([record["case"]["model"], records.batch_of(record), label, f"{entry['tokens_per_s']:.0f}", gain, *memory])
    return _rows(["model", "tokens a step", "who", "tokens/s", "speed-up over PEFT", "peak MiB", "saved for backward MiB"], rows) + _where(data)


def not_fastest(data: dict) -> str:
    """The cases in which ours is not the fastest, as a list."""
    lines = losses({data["suite"]: data})
    return "\n".join(f"- {line}" for line in lines) if lines else "None among those measured."


PRODUCERS: dict[str, Callable[[dict], str]] = {"speedup": linear_speedup, "decode": batched_decode, "steps": training_steps, "losses": not_fastest}


def filled(page: str, results: Path) -> str:
    """The page with every figure written anew."""

    def produce(match: re.Match) -> str:
        opening, folder, suite, producer, _, closing = match.groups()
        if producer not in PRODUCERS:
            raise SystemExit(f"unknown figure {producer!r}; known: {', '.join(sorted(PRODUCERS))}")
        path = results / folder / f"{suite}.json"
        figure = PRODUCERS[producer](records.read(path)) if path.is_file() else "Not measured yet."
        return f"{opening}\n{figure}\n{closing}"

    return _FIGURE.sub(produce, page)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a page differs from the results files")
    args = parser.parse_args(argv)
    pages, stale = [path for name in PAGES if (path := ROOT / name).is_file()], []
    if not pages:
        print(message(f"no page to fill in {ROOT}", allowed=", ".join(PAGES), fix="run it in a checkout"), file=sys.stderr)
        return 2
    for path in pages:
        page = path.read_text()
        new = filled(page, ROOT / "benchmarks" / "results")
        if new != page:
            stale.append(path.name)
            if not args.check:
                path.write_text(new)
    print(f"{'differ from' if args.check else 'rewritten from'} the results: {', '.join(stale)}" if stale else "figures equal the results")
    return 1 if stale and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
