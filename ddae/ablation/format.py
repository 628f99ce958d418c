"""A table's results as Markdown, HTML and a figure, and which row is best."""

from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure

from ddae.pages import render
from ddae.report.figures import COLOURS, style_axis

MIN_STANDARD_ERRORS = 2.0  # of a difference; a smaller difference between two rows counts as noise
HEAD = ("row", "here", "untrained weights", "k-NN", "k-NN, untrained", "seeds", "paper (ImageNet, fine-tuned)")
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
    title = (
        f"Table {results['table']}, {results['scale']}: {results['judged']}, and k-NN of the last block's mean patch; "
        "mean ± standard deviation over seeds"
    )
    lines = [HEAD, ("---", *["--:"] * (len(HEAD) - 1)), *_lines(results)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    left_out = ", ".join(results["left_out"])
    if left_out:
        left_out = f" Left out because of other settings or other data: {left_out}."
    return f"{title}\n\n{table}\n\nBest: {results['best']}.{left_out}\n"


def to_html(results: dict[str, Any]) -> str:
    """Return the table and its best row as a page."""
    title = f"Table {results['table']}, {results['scale']}: {results['judged']}"
    figures = {f"{name}.png": name.replace("_", " ") for name in CURVES if has_curves(results, name)}
    return render("table", title=title, head=HEAD, rows=_lines(results), best=results["best"], figures=figures)


def _lines(results: dict[str, Any]) -> list[list[str]]:
    """Return the cells of the rows, and of the baselines that all rows share."""
    values = results.get("baselines", {})
    empty = [""] * (len(HEAD) - 2)
    baselines = [[name, f"{values[key]:.2f}", *empty] for key, name in BASELINE_NAMES.items() if key in values]
    return [*map(_cells, results["rows"]), *baselines]


def _cells(row: dict[str, Any]) -> list[str]:
    accuracy = _with_deviation(row["mean"], row["deviation"])
    others = [
        _with_deviation(row.get(name), row.get(f"{name}_deviation"))
        for name in ("untrained", "knn_mean", "untrained_knn_mean")
    ]
    missing = "not measured" if accuracy else ""
    paper = "" if row["paper"] is None else f"{row['paper']:.1f}"
    return [row["row"], accuracy, *(each or missing for each in others), str(len(row["seeds"])), paper]


def has_curves(results: dict[str, Any], name: str) -> bool:
    """Return whether a run of the table has curves of this name, one of CURVES."""
    return bool(_rows_with(results, name))


def draw_knn_curves(results: dict[str, Any]) -> Figure:
    """Draw the k-NN accuracy against the images seen, a line per row: mean and standard deviation over seeds."""
    figure = Figure(figsize=(8.0, 4.2), layout="constrained")
    axis = figure.subplots()
    for number, row in _rows_with(results, "knn_curves"):
        by_images: dict[int, list[float]] = {}
        for curve in row["knn_curves"].values():
            for images, accuracy in curve:
                by_images.setdefault(images, []).append(accuracy)
        points = sorted(by_images.items())
        deviations = [stdev(values) if len(values) > 1 else 0.0 for _, values in points]
        means = [mean(values) for _, values in points]
        axis.errorbar(
            [images for images, _ in points], means, deviations, label=row["row"], capsize=2.5, **_line(number)
        )
    axis.set_title(f"k-NN top-1 in %, last block: table {results['table']}, {results['scale']}", fontsize=10)
    levels = {name.partition(",")[0]: results["baselines"][key] for key, name in BASELINE_NAMES.items()}
    style_axis(axis, "images seen", levels=levels)
    axis.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def draw_beta_curves(results: dict[str, Any]) -> Figure:
    """Draw the learnt betas of the first and the last tap, a panel each, a line per row and seed."""
    figure = Figure(figsize=(11.0, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for number, row in _rows_with(results, "beta_curves"):
        for seed, curve in enumerate(curve for curve in row["beta_curves"].values() if curve):
            steps, *betas = zip(*curve, strict=True)
            for axis, values, label in zip(axes, betas, ("", "" if seed else row["row"]), strict=True):
                axis.plot(steps, values, label=label, **_line(number))
    for axis, tap in zip(axes, ("first", "last"), strict=True):
        axis.set_title(f"beta of the {tap} tap: table {results['table']}, {results['scale']}", fontsize=10)
        style_axis(axis, "step")
    axes[-1].legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


CURVES = {"knn_curves": draw_knn_curves, "beta_curves": draw_beta_curves}  # of a row's results; the figures' names


def _rows_with(results: dict[str, Any], name: str) -> list[tuple[int, dict[str, Any]]]:
    """Return the rows that have curves of this name, each with its number in the table, which decides its line."""
    return [(number, row) for number, row in enumerate(results["rows"]) if any(row.get(name, {}).values())]


def _line(number: int) -> dict[str, Any]:
    """Return the style of the line of a row with this number."""
    style = "-" if number < len(COLOURS) else "--"
    return {"color": COLOURS[number % len(COLOURS)], "linewidth": 1.4, "linestyle": style}


def _with_deviation(mean: float | None, deviation: float | None) -> str:
    if mean is None:
        return ""
    return f"{mean:.2f}" if deviation is None else f"{mean:.2f} ± {deviation:.2f}"
