"""A table's results as Markdown and HTML, and which row is best."""

from html import escape
from typing import Any

from ddae.report import html

MIN_STANDARD_ERRORS = 2.0  # of a difference; a smaller difference between two rows counts as noise
HEAD = ("row", "here", "untrained weights", "seeds", "paper (ImageNet, fine-tuned)")
BASELINE_NAMES = {"raw_pixels": "raw pixels, nearest neighbours", "chance": "chance"}


def best_row(rows: list[dict[str, Any]]) -> str:
    """Return the row with the highest mean if it differs from every other beyond noise; otherwise why there is none."""
    measured = [row for row in rows if row["mean"] is not None]
    if any(row["deviation"] is None for row in measured) or len(measured) < 2:
        return "unknown; it needs two rows and more than one seed each"
    first = max(measured, key=lambda row: row["mean"])

    def squared_error(row: dict[str, Any]) -> float:
        return row["deviation"] ** 2 / len(row["seeds"])

    for row in measured:
        noise = MIN_STANDARD_ERRORS * (squared_error(first) + squared_error(row)) ** 0.5
        if row is not first and first["mean"] - row["mean"] <= noise:
            return "none; the best rows do not differ beyond noise"
    return first["row"]


def to_markdown(results: dict[str, Any]) -> str:
    """Return the table, its best row, and the runs that were left out."""
    title = f"Table {results['table']}, {results['scale']}: {results['judged']}, mean ± standard deviation over seeds"
    lines = [HEAD, ("---", "--:", "--:", "--:", "--:"), *_lines(results)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    left_out = ", ".join(results["left_out"])
    if left_out:
        left_out = f" Left out because of other settings or other data: {left_out}."
    return f"{title}\n\n{table}\n\nBest: {results['best']}.{left_out}\n"


def to_html(results: dict[str, Any]) -> str:
    """Return the table and its best row as a page."""
    title = f"Table {results['table']}, {results['scale']}: {results['judged']}"
    return html.page(title, f"{html.table(HEAD, _lines(results))}<p>Best: {escape(results['best'])}.</p>")


def _lines(results: dict[str, Any]) -> list[list[str]]:
    """Return the cells of the rows, and of the baselines that all rows share."""
    values = results.get("baselines", {})
    baselines = [[name, f"{values[key]:.2f}", "", "", ""] for key, name in BASELINE_NAMES.items() if key in values]
    return [*map(_cells, results["rows"]), *baselines]


def _cells(row: dict[str, Any]) -> list[str]:
    mean = _with_deviation(row["mean"], row["deviation"])
    untrained = _with_deviation(row.get("untrained"), row.get("untrained_deviation"))
    paper = "" if row["paper"] is None else f"{row['paper']:.1f}"
    return [row["row"], mean, untrained or ("not measured" if mean else ""), str(len(row["seeds"])), paper]


def _with_deviation(mean: float | None, deviation: float | None) -> str:
    if mean is None:
        return ""
    return f"{mean:.2f}" if deviation is None else f"{mean:.2f} ± {deviation:.2f}"
