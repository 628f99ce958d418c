"""What may be said of a table's rows, in Markdown and as a page."""

import html
from typing import Any

NOISE = 2.0  # standard errors of a difference, within which two rows are not told apart


def best(found: list[dict[str, Any]]) -> str:
    """The row with the highest mean, where NOISE standard errors of the difference tell it from all others; else why
    none is named."""
    measured = [row for row in found if row["mean"] is not None]
    if any(row["deviation"] is None for row in measured) or len(measured) < 2:
        return "not said: more than one seed is wanted"
    first = max(measured, key=lambda row: row["mean"])

    def error(row: dict[str, Any]) -> float:
        return row["deviation"] ** 2 / len(row["seeds"])

    for row in measured:
        if row is not first and first["mean"] - row["mean"] <= NOISE * (error(first) + error(row)) ** 0.5:
            return "none: the best rows do not differ beyond noise"
    return first["row"]


def _cells(row: dict[str, Any]) -> list[str]:
    measured = _with_spread(row["mean"], row["deviation"])
    untrained = _with_spread(row.get("untrained"), row.get("untrained_deviation")) or (
        "not measured" if measured else ""
    )
    return [
        row["row"],
        measured,
        untrained,
        str(len(row["seeds"])),
        "" if row["paper"] is None else f"{row['paper']:.1f}",
    ]


def _with_spread(mean: float | None, deviation: float | None) -> str:
    spread = "" if deviation is None else f" ± {deviation:.2f}"
    return "" if mean is None else f"{mean:.2f}{spread}"


def _baseline_cells(results: dict[str, Any]) -> list[list[str]]:
    """A line for each baseline that all rows share, below the rows."""
    names = {"raw_pixels": "raw pixels, nearest neighbours", "chance": "chance"}
    known = results.get("baselines", {})
    return [[words, f"{known[name]:.2f}", "", "", ""] for name, words in names.items() if name in known]


HEAD = ("row", "here", "untrained weights", "seeds", "paper (ImageNet, fine-tuned)")


def markdown(results: dict[str, Any]) -> str:
    """The table, and what may be said of it."""
    lines = [HEAD, ("---", "--:", "--:", "--:", "--:"), *map(_cells, results["rows"]), *_baseline_cells(results)]
    title = f"Table {results['table']}, {results['scale']}: {results['judged']}, mean ± standard deviation over seeds"
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    more = (
        f" Left out, of other steps, on other data or without baselines: {', '.join(results['left_out'])}."
        if results["left_out"]
        else ""
    )
    return f"{title}\n\n{table}\n\nBest: {results['best']}.{more}\n"


def page(results: dict[str, Any]) -> str:
    """The same as a page."""
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>"
        for line in (HEAD, *map(_cells, results["rows"]), *_baseline_cells(results))
    )
    title = html.escape(f"Table {results['table']}, {results['scale']}: {results['judged']}")
    style = "body{font:15px system-ui,sans-serif;margin:2em}td{padding:3px 14px 3px 0;border-bottom:1px solid #ddd}"
    head = f'<meta charset="utf-8"><title>{title}</title><style>{style}</style>'
    return (
        f'<!doctype html><html lang="en"><head>{head}</head>'
        f"<body><h1>{title}</h1><table>{body}</table><p>Best: {html.escape(results['best'])}.</p></body></html>\n"
    )
