"""PNGs from results files alone: speed-up over PEFT against tokens, overhead over the frozen layer against rank, decode against adapters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from . import records
from .records import case_of
from .shapes import SHORT, Case

# contestant -> name, colour, mark
STYLES = {
    "naive": ("naive PyTorch", "#7f7f7f", "s"),
    "addmm": ("in-place addmm_", "#8c564b", "v"),
    "compile": ("torch.compile", "#9467bd", "^"),
    "peft": ("PEFT (fp32 adapters)", "#d62728", "D"),
    "peft_low": ("PEFT (bf16 adapters)", "#ff7f0e", "p"),
    "ours": ("lora_kernels", "#1f77b4", "o"),
    "ours_fp32": ("lora_kernels (fp32 adapters)", "#17becf", "P"),
    "loop": ("loop over adapters", "#8c564b", "v"),
    "gather_bmm": ("gather + bmm", "#9467bd", "^"),
    "peft_mixed": ("PEFT mixed batch", "#d62728", "D"),
    "base": ("frozen layer alone", "#444444", "x"),
}
LABELS = {name: style[0] for name, style in STYLES.items()}


def _figure():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.4), dpi=150, layout="constrained")
    axes.grid(True, which="major", linewidth=0.4, alpha=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _finish(figure, axes, data: dict, title: str, path: Path) -> Path:
    from matplotlib import pyplot

    where = data["provenance"]
    device = where["device"]["name"] + (f", {where['threads']} threads" if where["device"]["type"] == "cpu" else "")
    commit = (where["commit"] or "no commit")[:9]
    axes.set_title(f"{title}\n", fontsize=10, loc="left")
    note = f"{device}; torch {where['versions']['torch']}; {where['date'][:10]}, {commit}"
    axes.text(0, 1.015, note, transform=axes.transAxes, fontsize=7.5, color="#555555")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path)
    pyplot.close(figure)
    return path


def _ticks(axes, values: list[int]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted(set(values))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())


def _line(axes, points: list[tuple[int, float, float, float]], name: str, label: str | None = None, **style) -> None:
    """x, median and the 20/80 quantiles as a bar."""
    points.sort()
    x, y, low, high = zip(*points, strict=True)
    bars = [[m - a for m, a in zip(y, low, strict=True)], [b - m for m, b in zip(y, high, strict=True)]]
    words, color, mark = STYLES.get(name, (name, None, "o"))
    style = {"color": color, "marker": mark, "markersize": 4.5, "linewidth": 1.5} | style
    axes.errorbar(x, y, yerr=bars, label=label or words, capsize=2.5, elinewidth=0.8, **style)


def _series(data: dict, wanted: Callable[[Case], bool], by: Callable[[Case], tuple]) -> dict[tuple, list[dict]]:
    groups = defaultdict(list)
    for record in data["records"]:
        if wanted(case_of(record)):
            groups[by(case_of(record))].append(record)
    return groups


def _widest(groups: dict[tuple, list[dict]], spread: Callable[[Case], int]) -> list[dict]:
    """The group that covers most values of the x axis."""
    return max(groups.values(), key=lambda rows: len({spread(case_of(r)) for r in rows}), default=[])


def _plain(data: dict) -> Callable[[Case], bool]:
    dtype = records.main_dtype(data)
    return lambda case: case.backward and not case.dropout and case.dtype == dtype


def speedup_over_peft(data: dict, path: Path) -> Path | None:
    """x: tokens; y: PEFT's time over ours; one colour per rank, full lines for ours, dashed for torch.compile."""
    rows = _widest(_series(data, _plain(data), lambda c: (c.model, c.projection)), lambda c: c.M)
    by_rank = defaultdict(list)
    for record in rows:
        by_rank[case_of(record).R].append(record)
    by_rank = {rank: found for rank, found in by_rank.items() if len(found) > 1}
    if not by_rank:
        return None
    figure, axes = _figure()
    palette = dict(zip(sorted(by_rank), ["#1f77b4", "#2ca02c", "#d62728", "#9467bd"], strict=False))
    for name, line, words in (("ours_fp32", "-", "lora_kernels"), ("compile", "--", "torch.compile")):
        for rank, found in sorted(by_rank.items()):
            points = []
            for record in found:
                gain = records.inverse(
                    records.ratio(records.like_peft(record["results"]) if name == "ours_fp32" else record["results"].get(name, {}), "peft")
                )
                if gain:
                    points.append((case_of(record).M, gain.median, gain.q20, gain.q80))
            if points:
                _line(axes, points, name, f"{words}, R {rank}", color=palette[rank], linestyle=line)
    axes.axhline(1, color="#d62728", linewidth=0.9, label="PEFT (fp32 adapters)")
    _ticks(axes, [case_of(r).M for r in rows])
    axes.set_xlabel("tokens M")
    axes.set_ylabel("speed-up over PEFT, times")
    case = case_of(rows[0])
    return _finish(figure, axes, data, f"Forward + backward, {case.model} {case.projection} {case.K}→{case.N}, {SHORT[case.dtype]}", path)


def overhead_over_base(data: dict, path: Path) -> Path | None:
    """x: rank; y: time over that of the frozen layer alone, as a percentage on top."""
    rows = _widest(_series(data, _plain(data), lambda c: (c.model, c.projection, c.M)), lambda c: c.R)
    if len({case_of(r).R for r in rows}) < 2:
        return None
    figure, axes = _figure()
    for name in ("peft", "peft_low", "naive", "compile", "addmm", "ours_fp32", "ours"):
        points = []
        for record in rows:
            over = records.ratio(record["results"].get(name, {}), "base")
            if over:
                points.append((case_of(record).R, *(100 * (v - 1) for v in (over.median, over.q20, over.q80))))
        if points:
            _line(axes, points, name)
    axes.axhline(0, color=STYLES["base"][1], linewidth=0.9, label=LABELS["base"])
    _ticks(axes, [case_of(r).R for r in rows])
    axes.set_xlabel("rank R")
    axes.set_ylabel("extra time over the frozen layer, %")
    case = case_of(rows[0])
    return _finish(figure, axes, data, f"Forward + backward, {case.model} {case.projection} {case.K}→{case.N}, M {case.M}, {SHORT[case.dtype]}", path)


def decode_over_adapters(data: dict, path: Path) -> Path | None:
    """x: adapters in the batch; y: µs, with the roofline (fewest bytes over measured bandwidth) drawn in."""
    rows = _widest(_series(data, lambda c: c.L > 0, lambda c: (c.model, c.projection, c.M)), lambda c: c.L)
    if len(rows) < 2:
        return None
    figure, axes = _figure()
    for name in ("peft_mixed", "loop", "gather_bmm", "vllm", "sglang", "ours", "base"):
        points = [(case_of(r).L, e["us"], e["q20"], e["q80"]) for r in rows if "us" in (e := r["results"].get(name, {}))]
        if points:
            _line(axes, points, name, linestyle=":" if name == "base" else "-")
    roof = sorted((case_of(r).L, r["floor"]["us"]) for r in rows)
    axes.plot(*zip(*roof, strict=True), color="#2ca02c", linestyle="--", linewidth=1.5, label="roofline")
    axes.set_yscale("log")
    _ticks(axes, [case_of(r).L for r in rows])
    axes.set_xlabel("adapters in the batch")
    axes.set_ylabel("time of one layer, µs")
    case = case_of(rows[0])
    return _finish(figure, axes, data, f"Decode, {case.model} {case.projection} {case.K}→{case.N}, M {case.M}, R {case.R}, {SHORT[case.dtype]}", path)


def draw(folder: Path) -> list[Path]:
    """Every plot that the results files in `folder` allow, beside them."""
    files = records.read_folder(folder)
    made = []
    if "linear" in files:
        made.append(speedup_over_peft(files["linear"], folder / "speedup_over_peft.png"))
        made.append(overhead_over_base(files["linear"], folder / "overhead_over_base.png"))
    if "batched" in files:
        made.append(decode_over_adapters(files["batched"], folder / "decode_over_adapters.png"))
    return [path for path in made if path]
