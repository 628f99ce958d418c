"""What a run leaves to look at: the pictures under figures/, and report.html, one page that needs nothing beside it."""

import base64
import html
import json
import os
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from ddae.config.base import flatten
from ddae.config.pretrain import PretrainConfig
from ddae.data.preview import Preview
from ddae.distributed.comm import device, is_main
from ddae.export.model_card import write_card
from ddae.method.betas import Betas
from ddae.method.model import PretrainModel
from ddae.report import figures
from ddae.training.tracker import read_metrics

NUM_IMAGES = 8
CAPTIONS = {
    "reconstructions": "{images} images (left), the patches that the encoder sees (rows take turns between the run's "
    "own masks and random ones), what the decoder rebuilds from each tapped block, the distance of each masked patch "
    "to the nearest visible one, and each block's weights.",
    "losses": "Error of masked patches by tapped block (squared; of codes cross-entropy): plain means, not weighted.",
    "betas": "The learnable exponents: below 0 a block works on patches near visible ones, above 0 on far ones.",
    "weights": "How much a masked patch counts at each distance, with the betas at the end.",
    "probes": "k-NN accuracy on the split val in the course of training, untrained weights at step 0, beside raw "
    "pixels (dashes and dots) and chance (dots); two numbers that need no label.",
    "curves": "Loss and learning rate by step, and what was measured in between.",
    "blocks": "Accuracy by block and pooling, beside untrained weights, raw pixels and chance.",
    "confusion": "Where the classes of the validation images went.",
    "examples": "Validation images with the predicted class and its probability; red where it is wrong.",
    "neighbours": "Validation images (left) and the training images whose features are nearest; red where the class "
    "is another.",
    "overlays": "Validation images, the class of every pixel, and the predicted one.",
    "classes": "How well each class is found: pixels that are of it and predicted, over those that are either.",
    "codes": "Patches of validation images that the most frequent codes stand for, framed, in their surroundings.",
    "distance": "The distance of each masked patch to the nearest visible one, of three kinds of masks.",
    "attention": "Where the cls token looks, on the same images.",
    "locality": "How far the heads of each block reach: the mean distance from a patch to what it attends to.",
    "rates": "Learning rate, images per second, and seconds of a step spent waiting for data.",
}
STYLE = """body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:1180px;margin:2em auto;padding:0 1em}
h1{margin-bottom:0}h2{margin-top:2em}img{max-width:100%}table{border-collapse:collapse;font-size:13px}
td,th{padding:2px 10px 2px 0;text-align:left;border-bottom:1px solid #eee}.sub{color:#777;margin-top:0}
details{margin:1em 0}figure{margin:1em 0}figcaption{color:#555;font-size:13px}"""


def write_report(config: PretrainConfig, method: PretrainModel, betas: Betas, preview: Preview) -> list[Path]:
    """Draw everything; all ranks call it (the model may be sharded), rank 0 writes. The files written."""
    folder = Path(config.folder)
    drawn: dict[str, Figure] = {}
    by_name = dict(zip(betas.names, betas.used().detach().cpu().tolist(), strict=True))
    if config.pixel.enabled:
        images = preview.images.to(device())
        if len(images):
            values = figures.betas_of_pixels(config, by_name)
            drawn["reconstructions"] = figures.reconstructions(method, config, images, values)
    if not is_main():
        return []
    everything = read_metrics(folder / "metrics.jsonl")
    rows = [row for row in everything if "loss/total" in row]
    groups = {"loss": ["loss/total"]}
    for branch in method.branches:
        groups[f"{branch} error"] = figures.metric_names(rows, f"error/{branch}/")
    drawn["losses"] = figures.curves(rows, groups, "")
    if by_name:
        drawn["betas"] = figures.curves(rows, {"betas": figures.metric_names(rows, "beta/")}, "")
        farthest = float(max(config.grid) - 1) / 2
        drawn["weights"] = figures.weight_by_distance(by_name, farthest, config.dynamic.distance_norm)
    if probed := figures.metric_names([row for row in everything if any(n.startswith("features/") for n in row)], ""):
        groups = {
            f"{of}": [n for n in probed if n.startswith(of)]
            for of in ("knn/", "features/effective_rank/", "features/std/")
        }
        words = {"knn/": "k-NN accuracy in %", "features/effective_rank/": "effective rank", "features/std/": "spread"}
        drawn["probes"] = figures.curves(everything, {words[of]: names for of, names in groups.items() if names}, "")
    groups = {name: [name] for name in ("lr", "throughput/images_per_s", "time/data_wait")}
    drawn["rates"] = figures.curves(rows, groups, "")
    files = [save(figure, folder / "figures" / f"{name}.png") for name, figure in drawn.items()]
    page = folder / "report.html"
    unfinished = page.with_suffix(".part")
    unfinished.write_text(_page(config, rows, files, preview.held_out))
    unfinished.replace(page)
    encoder = [folder / "encoder" / name for name in ("encoder.safetensors", "config.json", "README.md")]
    return [*files, *encoder, page]


def summary(config: PretrainConfig) -> str:
    """Where to look at a run."""
    page = Path(config.folder) / "report.html"
    lines = [f"pictures and curves:  {page}"] if config.train.report else []
    if config.tracker.kind == "mlflow":
        mlflow = os.path.relpath(Path(sys.executable).with_name("mlflow"))
        lines.append(f"metrics in MLflow:    {mlflow} ui")
    return "\n".join([*lines, f"encoder:              {Path(config.folder) / 'encoder'}"])


def save(figure: Figure, path: Path) -> Path:
    """Write a picture, and forget the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _page(config: PretrainConfig, rows: list[dict[str, float]], files: list[Path], held_out: bool) -> str:
    first, last = rows[0], rows[-1]
    compared = [n for n in last if n.startswith(("loss/", "error/", "beta/"))]
    numbers = [(n, f"{first[n]:.4f}", f"{last[n]:.4f}") for n in compared]
    settings = [(key, json.dumps(value)) for key, value in flatten(config.to_dict()).items()]
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(config.preset)}</title>
<style>{STYLE}</style></head><body>
<h1>{html.escape(config.preset)}</h1>
<p class="sub">{int(last["step"])} steps of {config.data.batch_size} images, {last["epoch"]:.1f} epochs</p>
{_pictures(files, "ValidationSet-out" if held_out else "Training")}
<h2>From the first step to the last</h2>{_table(("metric", "first", "last"), numbers)}
<details><summary>All settings</summary>{_table(("field", "value"), settings)}</details>
{_evaluations(Path(config.folder))}
</body></html>
"""


def page_of(evaluation: Path) -> Path:
    """Where an evaluation is shown: on the page of the run whose folder it lies in, or on one of its own."""
    of_run = evaluation.parent / "report.html"
    return of_run if of_run.exists() else evaluation / "report.html"


def add_evaluation(folder: Path, drawn: dict[str, Figure]) -> list[Path]:
    """Show an evaluation's results.json and these pictures; the files written."""
    files = [save(figure, folder / "figures" / f"{name}.png") for name, figure in drawn.items()]
    page = page_of(folder)
    if page.parent == folder:
        title = html.escape(str(folder))
        head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        text = f"{head}<style>{STYLE}</style></head><body><h1>{title}</h1>{_evaluation(folder)}</body></html>\n"
    else:
        text = page.read_text()
        start, end = text.index(EVALUATIONS[0]), text.index(EVALUATIONS[1]) + len(EVALUATIONS[1])
        text = text[:start] + _evaluations(folder.parent) + text[end:]
    unfinished = page.with_suffix(".part")
    unfinished.write_text(text)
    unfinished.replace(page)
    update_card(folder.parent)
    return [*files, page]


def update_card(run: Path) -> None:
    """Bring the README.md of a run's export up to date."""
    if (run / "encoder" / "config.json").exists():
        settings = json.loads((run / "encoder" / "config.json").read_text())
        write_card(run / "encoder", "ddae", settings["model"], settings["normalisation"], run)


EVALUATIONS = ("<!-- evaluations -->", "<!-- end of evaluations -->")


def _evaluations(run: Path) -> str:
    """All evaluations that lie in a run's folder."""
    found = sorted(file.parent for file in run.glob("*/results.json"))
    return (
        EVALUATIONS[0]
        + "".join(f"<h2>{html.escape(each.name)}</h2>{_evaluation(each)}" for each in found)
        + EVALUATIONS[1]
    )


def _evaluation(folder: Path) -> str:
    results = flatten(json.loads((folder / "results.json").read_text()))
    known = {key: value for key, value in results.items() if value is not None}
    rows = [(key, f"{value:.4g}" if isinstance(value, float) else str(value)) for key, value in known.items()]
    pictures = sorted(
        (folder / "figures").glob("*.png"), key=lambda file: (list(CAPTIONS).index(_kind(file)), file.stem)
    )
    verdict = f"<p><b>{html.escape(results['verdict'])}</b></p>" if "verdict" in results else ""
    return verdict + _pictures(pictures, "") + _table(("result", "value"), rows)


def _kind(file: Path) -> str:
    """What a picture shows, which its name begins with."""
    return file.stem.split("_")[0]


def _pictures(files: list[Path], images: str) -> str:
    """The pictures with their captions; images: what kind of images they show."""
    shown = ""
    for file in files:
        picture = base64.b64encode(file.read_bytes()).decode()
        caption = html.escape(CAPTIONS[_kind(file)].format(images=images))
        shown += f'<figure><img alt="{file.stem}" src="data:image/png;base64,{picture}">'
        shown += f"<figcaption>{caption}</figcaption></figure>\n"
    return shown


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    def line(cells: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(head, "th") + "".join(line(row, "td") for row in rows) + "</table>"
