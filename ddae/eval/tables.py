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
    spread = "" if row["deviation"] is None else f" ± {row['deviation']:.2f}"
    measured = "" if row["mean"] is None else f"{row['mean']:.2f}{spread}"
    return [row["row"], measured, str(len(row["seeds"])), "" if row["paper"] is None else f"{row['paper']:.1f}"]


def _baseline_cells(results: dict[str, Any]) -> list[list[str]]:
    """A line for each baseline, below the rows."""
    names = {"untrained": "untrained weights", "raw_pixels": "raw pixels, nearest neighbours", "chance": "chance"}
    lines = []
    for name, words in names.items():
        if values := results.get("baselines", {}).get(name):
            spread = f" ± {values['deviation']:.2f}" if values["deviation"] >= 0.005 else ""
            lines.append([words, f"{values['mean']:.2f}{spread}", str(values["runs"]), ""])
        else:
            lines.append([words, "not measured", "", ""])
    return lines


HEAD = ("row", "here", "seeds", "paper (ImageNet, fine-tuned)")


def markdown(results: dict[str, Any]) -> str:
    """The table, and what may be said of it."""
    lines = [HEAD, ("---", "--:", "--:", "--:"), *map(_cells, results["rows"]), *_baseline_cells(results)]
    title = f"Table {results['table']}, {results['scale']}: {results['judged']}, mean ± standard deviation over seeds"
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    more = (
        f" Left out, of other steps or on other data: {', '.join(results['left_out'])}." if results["left_out"] else ""
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
