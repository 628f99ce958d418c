"""Output of the benchmarks: a table, rows of a CSV file, and bars of rates relative to a baseline."""

import csv
import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ddae.report.figures import COLOURS, style_axis

READ_ONLY = "read only"  # a loader that does not decode; its bar would dwarf those of the decoders


def report_rates(rates: dict[str, list[float]], baseline: str, title: str, out: str) -> None:
    """Print a table of images/s by round; if `out` is not empty, append its rows to OUT.csv and draw OUT.png.

    A ratio is the median over rounds of a rate divided by the baseline's rate in the same round.
    """
    print(f"\n{title}: median of {len(rates[baseline])} interleaved rounds")
    rows, ratios = [], {}
    for name, by_round in rates.items():
        low, median, high = min(by_round), statistics.median(by_round), max(by_round)
        ratio = statistics.median(rate / base for rate, base in zip(by_round, rates[baseline], strict=True))
        print(f"{name:16s} {median:8.0f} images/s ({low:.0f} to {high:.0f})   {ratio:.2f} x {baseline}")
        row = {"about": title, "way": name, "rounds": len(by_round), "lowest": f"{low:.0f}", "median": f"{median:.0f}"}
        rows.append(row | {"highest": f"{high:.0f}", "ratio": f"{ratio:.2f}", "over": baseline})
        if name != READ_ONLY:
            ratios[name] = ratio
    if out:
        append_csv(rows, Path(out).with_suffix(".csv"))
        draw_bars({"": ratios}, baseline, title, Path(out).with_suffix(".png"))


def report_cpu_times(times: dict[str, list[dict[str, float]]], baseline: str, title: str, out: str) -> None:
    """Print a table of CPU times in ms, medians over rounds; if `out` is not empty, append its rows to OUT_cpu.csv.

    times: by loader; one {kind of thread: ms} a round. A ratio is the median over rounds of training and loading
    threads together, divided by the baseline's in the same round.
    """
    print(f"\n{title}: CPU time of the training process for 64 images in ms, median of {len(times[baseline])} rounds")
    in_python = {name: [each["training"] + each["loading"] for each in rounds] for name, rounds in times.items()}
    rows = []
    for name, rounds in times.items():
        medians = {kind: statistics.median(each[kind] for each in rounds) for kind in rounds[0]}
        ratios = [ms / base for ms, base in zip(in_python[name], in_python[baseline], strict=True)]
        text = "   ".join(f"{kind} {ms:6.2f}" for kind, ms in medians.items())
        ratio, span = statistics.median(ratios), f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{name:18s} {text}   training + loading: {ratio:.2f} x {baseline} ({span})")
        row = {"about": title, "way": name, "rounds": len(rounds)} | {f"{k}_ms": f"{v:.2f}" for k, v in medians.items()}
        rows.append(row | {"ratio": f"{ratio:.2f}", "over": baseline})
    if out:
        append_csv(rows, Path(f"{out}_cpu.csv"))


def append_csv(rows: list[dict[str, Any]], path: Path) -> None:
    """Append rows to a CSV file; a new file gets a header."""
    is_new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def draw_bars(panels: dict[str, dict[str, float]], baseline: str, title: str, path: Path) -> None:
    """Draw images/s relative to the baseline as bars. panels: {heading: {name: ratio}}."""
    size = (2.8 + 3.6 * len(panels), 1.3 + 0.4 * max(map(len, panels.values())))
    figure = Figure(figsize=size)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)
    for axis, (heading, ratios) in zip(axes[0], panels.items(), strict=True):
        bars = axis.barh(list(ratios), list(ratios.values()), color=COLOURS[0], height=0.6)
        axis.bar_label(bars, fmt=" {:.2f} x", fontsize=8)
        axis.axvline(1, color="#444444", linewidth=0.8)
        axis.set_title(heading, fontsize=9)
        axis.margins(x=0.2)
        style_axis(axis, f"images/s relative to {baseline}")
    axes[0, 0].invert_yaxis()  # of all panels: the first bar on top
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
