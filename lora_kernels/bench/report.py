"""The table: one block per case, one line per contestant; who is absent or refused, once each, below."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from rich.console import Console
from rich.table import Table

from .. import _console
from . import records
from .problem import floor_flops
from .shapes import Case
from .timing import Ratio

_table = partial(_console.table, figures=True)


def _us(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _ratio(found: Ratio | None) -> str:
    return "" if found is None else str(found)


def _bytes(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:.2f}"


def rate(case: Case, entry: dict, floor: dict) -> str:
    """TFLOP/s of the algebra, or GB/s of the fewest bytes where the case is a matter of bandwidth (M <= 64)."""
    seconds = entry["us"] / 1e6
    if case.M <= 64:
        return f"{floor['bytes'] / seconds / 1e9:.1f} GB/s"
    return f"{floor_flops(case) / seconds / 1e12:.3g} TFLOP/s"


def linear_table(record: dict) -> Table:
    """The block of one linear or batched case."""
    case, floor, results = records.case_of(record), record["floor"], record["results"]
    naive = "loop" if case.L else "naive"
    peft = "peft_mixed" if case.L else "peft"
    title = f"{case}: floor {_us(floor['us'])} µs"
    table = _table(
        title, "contestant", "µs", "20 %", "80 %", "rate", "% of roofline", "× base", f"× {naive}", f"× {peft}", "peak MiB", "saved MiB", "error"
    )
    for name, entry in results.items():
        if "us" not in entry:
            continue
        ratios = [_ratio(records.ratio(entry, reference)) if name != reference else "1" for reference in ("base", naive, peft)]
        shown = "" if name == "base" else rate(case, entry, floor)
        roof = "" if name == "base" else f"{100 * floor['us'] / entry['us']:.0f}"
        times = [_us(entry[key]) for key in ("us", "q20", "q80")]
        worst = max(entry["errors"].values())
        table.add_row(name, *times, shown, roof, *ratios, _bytes(entry.get("peak_bytes")), _bytes(entry.get("saved_bytes")), f"{worst:.1e}")
    return table


def steps_table(record: dict) -> Table:
    title = "{model}, {batch} tokens a step, R {R}, {dtype}, {steps} training steps".format(batch=records.batch_of(record), **record["case"])
    table = _table(title, "contestant", "ms a step", "20 %", "80 %", "tokens/s", "× peft", "peak MiB", "saved MiB", "gradient error", "last loss")
    for name, entry in record["results"].items():
        if "us" in entry:
            ratio = "1" if name == "peft" else _ratio(records.ratio(entry, "peft"))
            times = [f"{entry[key] / 1e3:.1f}" for key in ("us", "q20", "q80")]
            memory = [_bytes(entry["peak_bytes"]), _bytes(entry["saved_bytes"])]
            error = f"{max(entry['errors'].values()):.1e}"
            table.add_row(name, *times, f"{entry['tokens_per_s']:.0f}", ratio, *memory, error, f"{entry['last_loss']:.4f}")
    return table


def summary(suite: str, data: dict) -> Table:
    """One line per case: the frozen layer's µs, and everyone's time over it."""
    names = [name for name in dict.fromkeys(n for r in data["records"] for n, e in r["results"].items() if "us" in e) if name != "base"]
    table = _table(f"{suite}, over the frozen layer alone", "case", "base µs", *names)
    for record in data["records"]:
        results = record["results"]
        if "us" in results.get("base", {}):
            ratios = [records.ratio(results.get(name, {}), "base") for name in names]
            shown = ["" if r is None else f"{r.median:.2f}" if r.resolved else f"({r.median:.2f})" for r in ratios]
            table.add_row(str(records.case_of(record)), _us(results["base"]["us"]), *shown)
    return table


def not_timed(files: dict[str, dict]) -> list[str]:
    """One line per contestant and reason: refused ones first, then absent ones, with the suites they miss."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for suite, data in files.items():
        for record in data["records"]:
            for name, entry in record["results"].items():
                for kind in ("refused", "absent"):
                    if kind in entry:
                        where = found.setdefault((kind, name, entry[kind]), [])
                        if suite not in where:
                            where.append(suite)
    ordered = sorted(found.items(), key=lambda item: item[0][0] != "refused")
    return [f"{kind}: {name} ({', '.join(where)}): {why}" for (kind, name, why), where in ordered]


def losses(files: dict[str, dict]) -> list[str]:
    """The cases in which ours is not the fastest that computes the layer, with the ratio where it is resolved."""
    lines = []
    for data in files.values():
        for record in data["records"]:
            timed = {name: entry for name, entry in record["results"].items() if "us" in entry and name != "base"}
            ours = [name for name in timed if name.startswith("ours")]
            others = [name for name in timed if not name.startswith("ours")]
            if not ours or not others:
                continue
            best, rival = (min(names, key=lambda n: timed[n]["us"]) for names in (ours, others))
            if timed[rival]["us"] < timed[best]["us"]:
                title = str(records.case_of(record)) if data["suite"] != "steps" else record["case"]["model"]
                lines.append(f"{title}: {rival} {_us(timed[rival]['us'])} µs, {best} {_us(timed[best]['us'])} µs")
    return lines


def disturbed(files: dict[str, dict], spread: float = 1.5) -> tuple[int, int]:
    """In how many cases the frozen layer's own time (or PEFT's step) varied by more than `spread` between its 20 and 80 % quantiles; of how many."""
    entries = [r["results"].get("base") or r["results"].get("peft", {}) for data in files.values() for r in data["records"]]
    timed = [entry for entry in entries if "us" in entry]
    return sum(entry["q80"] > spread * entry["q20"] for entry in timed), len(timed)


def print_record(out: Console, suite: str, record: dict) -> None:
    out.print(steps_table(record) if suite == "steps" else linear_table(record))


def print_end(out: Console, files: dict[str, dict], suites: Sequence[str] = ()) -> None:
    """What closes a run: who was not timed in any file there; a summary of the `suites` just measured; where ours is not the fastest."""
    for suite in suites:
        if suite in files and suite != "steps":
            out.print(summary(suite, files[suite]))
    for line in not_timed(files):
        out.print(line)
    slower = losses(files)
    out.print(f"Not the fastest in {len(slower)} cases:" if slower else "Ours is the fastest wherever it was timed.")
    for line in slower:
        out.print("  " + line)
    restless, cases = disturbed(files)
    if restless:
        out.print(
            f"This machine was busy: in {restless} of {cases} cases one and the same call varied by more than half; measure again when it is idle."
        )
    out.print("In brackets: a ratio whose spread (20 to 80 % of the rounds) is wider than its effect.")
