"""Model card: the README.md of an exported encoder, with its architecture, training, evaluations and usage."""

import contextlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ddae.config.base import height_width
from ddae.models.patches import NORMALISATIONS

USAGE = {
    "ddae": """import ddae

encoder = ddae.load_encoder("{folder}")
tokens = encoder(images)  # [B, 3, {height}, {width}] normalised -> [B, 1 + N, {features}], cls first""",
    "timm": """import timm

encoder = timm.create_model("local-dir:{folder}", pretrained=True, num_classes=0)
tokens = encoder.forward_features(images)  # [B, 3, {height}, {width}] -> [B, 1 + N, {features}], cls first""",
    "transformers": """from transformers import AutoImageProcessor, AutoModel

processor, model = AutoImageProcessor.from_pretrained("{folder}"), AutoModel.from_pretrained("{folder}")
tokens = model(**processor(photo, return_tensors="pt")).last_hidden_state  # [1, 1 + N, {features}], cls first""",
}


def write_card(folder: Path, form: str, shape: dict[str, Any], normalisation: str, source: Path) -> None:
    """Write README.md into an export.

    form: a key of encoder.WRITERS; shape: a ModelConfig as a dict; source: the run folder or file that the encoder was
    loaded from. The card lists the evaluations in the run folder; facts that the run did not record are left out.
    """
    mean, std = NORMALISATIONS[normalisation]
    (height, width), features, patch = height_width(shape["image_size"]), shape["width"], shape["patch_size"]
    rows = {
        "architecture": f"Vision Transformer, {shape['depth']} blocks of width {features}, {shape['heads']} heads",
        "input": f"{height} x {width} pixels (height x width) in patches of {patch} x {patch}",
        "normalisation": f"{normalisation}: mean {mean}, std {std}, of pixels in [0, 1]",
    }
    config, environment = _read_json(source / "config.json"), _read_json(source / "environment.json")
    if "train" in config:
        last = _last_training_row(source / "metrics.jsonl")
        names = " and ".join(name for name in ("pixel", "feature", "token") if config.get(name, {}).get("enabled"))
        masks = f"{config['mask']['kind']} masks of {config['mask']['ratio']:.0%}"
        length = f"{last['step']:.0f} steps of {config['data']['batch_size']} images, {last['epoch']:.1f} epochs"
        rows["pretraining"] = f"{config['preset']}: {names} branch, {masks}, seed {config['train']['seed']}"
        rows |= {"length": length, "data": config["data"]["train"]}
    else:
        rows["source"] = str(source)
    if environment:
        changed = ", with uncommitted changes" if environment.get("dirty") else ""
        versions = {name: version for name, version in environment["versions"].items() if version}
        rows["code"] = f"commit {environment['commit']}{changed}" if environment.get("commit") else "unknown commit"
        rows["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = ["# " + (config.get("preset") or source.stem), "", "Label-free pretrained encoder, written by ddae.", ""]
    lines += _table(("", ""), rows.items())
    if evaluations := _evaluations(source):
        head = ("task", "metric", "result", "untrained weights", "raw pixels", "chance")
        lines += ["", "## Evaluation", "", *_table(head, evaluations)]
    sizes = {"height": height, "width": width, "features": features}
    usage = USAGE.get(form, USAGE["ddae"]).format(folder=folder.name, **sizes)
    lines += ["", "## Usage", "", "```python", usage, "```", ""]
    (folder / "README.md").write_text("\n".join(lines))


def _evaluations(run: Path) -> list[tuple[str, ...]]:
    """Return task, metric, result and its baselines of each finished evaluation of a run's encoder."""
    rows = []
    for file in sorted(run.glob("*/results.json")):
        results = _read_json(file)
        if is_outdated(run, results):
            continue
        task = results.get("task", file.parent.name)
        if task == "segment":
            chance = _percent(results.get("chance", {}).get("miou"))
            for epoch in ("last", "best"):
                miou = _percent(results[epoch]["miou"])
                rows.append((task, f"{epoch} epoch, mIoU", miou, "not measured", "", chance))
        elif results.get("accuracy") is not None:
            evaluated = results["best"] if isinstance(results.get("best"), str) else "last epoch"
            value = _percent(results["accuracy"])
            if results.get("gain") is not None:
                value += f" ({results['gain']:+.1f} ± {results['standard_error']:.1f})"
            baselines = [_percent(results.get(name)) for name in ("untrained", "raw_pixels", "chance")]
            rows.append((task, f"{evaluated}, top-1", value, *baselines))
    return rows


def is_outdated(run: Path, results: dict[str, Any]) -> bool:
    """Return whether an evaluation in a run folder is of an encoder that has changed since."""
    current, evaluated = _read_json(run / "encoder" / "config.json").get("hash"), results.get("encoder_sha256")
    return None not in (current, evaluated) and current != evaluated


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f} %"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]


def _read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file, {} if it cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        if isinstance(content := json.loads(file.read_text()), dict):
            return content
    return {}


def _last_training_row(file: Path) -> dict[str, float]:
    """Return the last row of a metrics.jsonl that has an epoch, i.e. of a training step."""
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return next((row for row in reversed(rows) if "epoch" in row), {"step": 0, "epoch": 0.0})
