"""The report of a run: figures/ and report.html, one page with all figures embedded."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from ddae.atomic import write_text
from ddae.config.base import flatten
from ddae.config.pretrain import PretrainConfig
from ddae.data.preview import Preview
from ddae.distributed.comm import device, is_main
from ddae.export.model_card import is_outdated, write_card
from ddae.method.betas import Betas
from ddae.method.model import PretrainModel
from ddae.pages import Picture, picture, render
from ddae.report import figures
from ddae.training.tracker import read_metrics

logger = logging.getLogger(__name__)
NUM_IMAGES = 8  # in the figure of reconstructions
CAPTIONS = {  # by the first word of a figure's file name, in the order of the page
    "reconstructions": "{images} images; visible patches (rows alternate between the run's own masks and random "
    "masks); the reconstruction from each tapped block; the distance of each masked patch to the nearest visible "
    "patch; the weights of the masked patches in each block's loss.",
    "losses": "Total loss, and the unweighted mean error of masked patches by tapped block (squared error; "
    "cross-entropy for codes).",
    "betas": "Learnable exponents β during training. β < 0 gives larger weights to masked patches near visible "
    "patches, β > 0 to distant ones.",
    "weights": "Weight of a masked patch in the loss by its distance to the nearest visible patch, with the betas at "
    "the end of training.",
    "probes": "k-NN accuracy on the validation split during training (step 0: untrained weights), with the accuracy "
    "of raw pixels (dash-dotted) and chance (dotted); effective rank and standard deviation of the features.",
    "collapse": "Features of teacher (solid) and student (dashed) by tapped block: effective rank over patches and "
    "over images, standard deviation over images (0: collapsed); the shares of the targets that the position of a "
    "patch alone and the mean of the image alone explain, and the share above which a warning is given.",
    "curves": "Training and validation metrics by step.",
    "blocks": "Accuracy by block and pooling, with untrained weights, raw pixels and chance as horizontal lines.",
    "confusion": "Confusion matrix on the validation images, each row divided by its sum.",
    "examples": "Validation images with the predicted class and its probability; wrong predictions are red.",
    "neighbours": "Validation images (left) and the training images with the most similar features; images of another "
    "class are red.",
    "similar": "Photos (left) and the photos nearest to each by the features of the trained encoder, of untrained "
    "weights, and by raw pixels.",
    "overlays": "Validation images, true classes and predicted classes of their pixels.",
    "classes": "Intersection over union of each class on the validation images.",
    "codes": "Validation patches (framed, with their neighbours) of the most frequent codes, one row per code.",
    "distance": "Distance of each masked patch to the nearest visible patch, by masking strategy and ratio.",
    "attention": "Attention of the cls token to the patches; all encoders are shown on the same images.",
    "locality": "Attention distance of each head by block: the mean distance between a patch and those it attends to.",
    "rates": "Learning rate, images per second, and seconds per step spent waiting for data.",
}
RATES = {  # panels of a figure, and the metric in each
    "learning rate": "lr",
    "images per second": "throughput/images_per_s",
    "seconds a step waits for data": "time/data_wait",
}
START, END = "<!-- evaluations -->", "<!-- end of evaluations -->"  # enclose what add_evaluation() replaces


def write_report(config: PretrainConfig, model: PretrainModel, betas: Betas, preview: Preview) -> list[Path]:
    """Draw the figures of a pretraining run and write report.html. Return the files written and the export's files.

    All ranks call it, because the model may be sharded; rank 0 writes. The other ranks return an empty list.
    """
    folder = Path(config.folder)
    drawn: dict[str, Figure] = {}
    by_name = dict(zip(betas.names, betas.clamped().detach().cpu().tolist(), strict=True))
    if config.pixel.enabled and len(preview.images):
        images, values = preview.images.to(device()), figures.pixel_betas(config, by_name)
        drawn["reconstructions"] = figures.draw_reconstructions(model, config, images, values)
    if not is_main():
        return []
    all_rows = read_metrics(folder / "metrics.jsonl")
    rows = [row for row in all_rows if "loss/total" in row]
    errors = {f"{branch} error": figures.metric_names(rows, f"error/{branch}/") for branch in model.branches}
    drawn["losses"] = figures.curves(rows, {"loss": ["loss/total"], **errors})
    if by_name:
        drawn["betas"] = figures.curves(rows, {"betas": figures.metric_names(rows, "beta/")})
        farthest = float(max(config.grid) - 1) / 2
        drawn["weights"] = figures.weight_by_distance(by_name, farthest, config.dynamic.distance_norm)
    if evaluations := [row for row in all_rows if any(name.startswith("features/") for name in row)]:
        prefixes = {"k-NN accuracy in %": "knn/", "effective rank": "features/effective_rank/"}
        prefixes |= {"standard deviation": "features/std/"}
        groups = {panel: figures.metric_names(evaluations, prefix) for panel, prefix in prefixes.items()}
        drawn["probes"] = figures.curves(all_rows, {panel: names for panel, names in groups.items() if names})
    if any("collapse/warning" in row for row in rows):
        drawn["collapse"] = figures.collapse_curves(rows)
    drawn["rates"] = figures.curves(rows, {title: [metric] for title, metric in RATES.items()})
    files = _save_figures(drawn, folder)
    path = folder / "report.html"
    write_text(path, _run_page(config, rows, files, "Validation" if preview.held_out else "Training"))
    encoder = [folder / "encoder" / name for name in ("encoder.safetensors", "config.json", "README.md")]
    return [*files, *encoder, path]


def add_evaluation(folder: Path, drawn: dict[str, Figure]) -> list[Path]:
    """Save figures by name and show them with the folder's results.json on report_page(). Return the files written."""
    files = _save_figures(drawn, folder)
    path = report_page(folder)
    if path.parent == folder:
        text = render("evaluation", title=str(folder), evaluation=_evaluation(folder))
    else:
        before, start, after = path.read_text().partition(START)
        _, end, after = after.partition(END)
        if not (start and end):
            logger.warning("%s has no place for evaluations; %s is not shown there", path, folder)
            return files
        text = before + _evaluations(folder.parent) + after
    write_text(path, text)
    update_model_card(folder.parent)
    return [*files, path]


def report_page(evaluation: Path) -> Path:
    """Return the page that shows an evaluation: that of the run which contains its folder, or one of its own."""
    run_page = evaluation.parent / "report.html"
    return run_page if run_page.exists() else evaluation / "report.html"


def update_model_card(run: Path) -> None:
    """Rewrite the model card, README.md, of a run's export, if it has one."""
    if (run / "encoder" / "config.json").exists():
        settings = json.loads((run / "encoder" / "config.json").read_text())
        write_card(run / "encoder", "ddae", settings["model"], settings["normalisation"], run)


def summary(config: PretrainConfig) -> str:
    """Return where the results of a run are, as text."""
    lines = [f"figures and curves:   {Path(config.folder) / 'report.html'}"] if config.train.report else []
    if config.tracker.kind == "mlflow":
        mlflow = os.path.relpath(Path(sys.executable).with_name("mlflow"))
        lines.append(f"metrics in MLflow:    {mlflow} ui")
    return "\n".join([*lines, f"encoder:              {Path(config.folder) / 'encoder'}"])


def _save_figures(drawn: dict[str, Figure], folder: Path) -> list[Path]:
    """Write figures/NAME.png of each figure. Return the files."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    files = [folder / "figures" / f"{name}.png" for name in drawn]
    for figure, file in zip(drawn.values(), files, strict=True):
        figure.savefig(file, dpi=110)
    return files


def _run_page(config: PretrainConfig, rows: list[dict[str, float]], files: list[Path], images: str) -> str:
    """Return the page of a pretraining run. images: Validation or Training, for the captions."""
    first, last = rows[0], rows[-1]
    names = [name for name in last if name in first and name.startswith(("loss/", "error/", "beta/"))]
    values = [(name, f"{first[name]:.4f}", f"{last[name]:.4f}") for name in names]
    settings = [(key, json.dumps(value)) for key, value in flatten(config.to_dict()).items()]
    collapsed_at = next((int(row["step"]) for row in rows if row.get("collapse/warning")), None)
    length = f"{int(last['step'])} steps of {config.data.batch_size} images, {last['epoch']:.1f} epochs"
    return render(
        "run",
        title=config.preset,
        length=length,
        collapsed_at=collapsed_at,
        evaluations=Markup(_evaluations(Path(config.folder))),
        pictures=_pictures(files, images),
        metrics=values,
        settings=settings,
    )


def _evaluations(run: Path) -> str:
    """Return the HTML of all evaluations in a run's folder, enclosed by START and END."""
    folders = sorted(file.parent for file in run.glob("*/results.json"))
    evaluations = [_evaluation(each) for each in folders]
    return render("evaluations", evaluations=evaluations, start=Markup(START), end=Markup(END))


def _evaluation(folder: Path) -> dict[str, Any]:
    """Return what a page shows of an evaluation: verdict, figures and results.json."""
    results = {k: v for k, v in flatten(json.loads((folder / "results.json").read_text())).items() if v is not None}
    shown = {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in results.items()}
    kinds = list(CAPTIONS)
    files = sorted((folder / "figures").glob("*.png"), key=lambda file: (kinds.index(_kind(file)), file.stem))
    return {
        "name": folder.name,
        "verdict": results.get("verdict"),
        "outdated": is_outdated(folder.parent, results),
        "pictures": _pictures(files, "Example"),
        "results": list(shown.items()),
    }


def _kind(file: Path) -> str:
    """Return the key of a figure's caption: the first word of its file name."""
    return file.stem.split("_")[0]


def _pictures(files: list[Path], images: str) -> list[Picture]:
    """Return figures with their captions. images: what the images are, for the captions."""
    return [picture(file, CAPTIONS[_kind(file)].format(images=images)) for file in files]
