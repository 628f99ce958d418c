"""The README.md of an exported encoder: what it is, what it was trained on and how, what it knows, how to use it."""

import json
from pathlib import Path
from typing import Any

from ddae.models.patches import NORMALISATIONS

USE = {
    "ddae": """import ddae

encoder = ddae.load_encoder("{folder}")
tokens = encoder(images)  # [B, 3, {size}, {size}] normalised -> [B, 1 + N, {width}], cls first""",
    "timm": """import timm

encoder = timm.create_model("local-dir:{folder}", pretrained=True, num_classes=0)
tokens = encoder.forward_features(images)  # [B, 3, {size}, {size}] normalised -> [B, 1 + N, {width}], cls first""",
}


def write_card(folder: Path, form: str, shape: dict[str, Any], normalisation: str, source: Path) -> None:
    """Write README.md into an export. shape: as ModelConfig has it; source: the run that the encoder is of, or a file.

    Evaluations that lie in the run's folder are listed; what a run does not say is left out.
    """
    mean, std = NORMALISATIONS[normalisation]
    size, width = shape["image_size"], shape["width"]
    rows = {
        "architecture": f"Vision Transformer, {shape['depth']} blocks of width {width}, {shape['heads']} heads",
        "input": f"{size} x {size} pixels in patches of {shape['patch_size']}",
        "normalisation": f"{normalisation}: mean {mean}, std {std}, of pixels in [0, 1]",
    }
    config, environment = _read(source / "config.json"), _read(source / "environment.json")
    if "train" in config:
        last = _last_row(source / "metrics.jsonl")
        branches = [name for name in ("pixel", "feature", "token") if config.get(name, {}).get("enabled")]
        rows |= {
            "pretraining": f"{config['preset']}: {' and '.join(branches)} branch, {config['mask']['kind']} masks of "
            f"{config['mask']['ratio']:.0%}, seed {config['train']['seed']}",
            "length": f"{last['step']:.0f} steps of {config['data']['batch_size']} images, {last['epoch']:.1f} epochs",
            "data": config["data"]["train"],
        }
    else:
        rows["source"] = str(source)
    if environment:
        changed = ", with changes" if environment.get("dirty") else ""
        versions = {name: version for name, version in environment["versions"].items() if version}
        rows["code"] = f"commit {environment['commit']}{changed}" if environment.get("commit") else "of no commit"
        rows["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = ["# " + (config.get("preset") or source.stem), "", "Label-free pretrained encoder, written by ddae.", ""]
    lines += _table(("", ""), rows.items())
    if found := _evaluations(source):
        head = ("evaluation", "of", "result", "untrained weights", "raw pixels", "chance")
        lines += ["", "## Evaluation", "", *_table(head, found)]
    use = USE.get(form, USE["ddae"]).format(folder=folder.name, size=size, width=width)
    lines += ["", "## Use", "", "```python", use, "```", ""]
    (folder / "README.md").write_text("\n".join(lines))


def _evaluations(run: Path) -> list[tuple[str, ...]]:
    """Task, of what the number is, the number and its baselines, of each evaluation that is finished."""
    rows = []
    for file in sorted(run.glob("*/results.json")):
        results = _read(file)
        task = results.get("task", file.parent.name)
        if task == "segment":
            chance = results.get("chance", {}).get("miou")
            rows += [
                (task, f"{when} epoch, mIoU", _percent(results[when]["miou"]), "not measured", "", _percent(chance))
                for when in ("last", "best")
            ]
        elif results.get("accuracy") is not None:
            of = results["best"] if isinstance(results.get("best"), str) else "last epoch"
            value = _percent(results["accuracy"])
            if results.get("gain") is not None:
                value += f" ({results['gain']:+.1f} ± {results['standard_error']:.1f})"
            others = [_percent(results.get(name)) for name in ("untrained", "raw_pixels", "chance")]
            rows.append((task, f"{of}, top-1", value, *others))
    return rows


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f} %"


def _table(head: tuple[str, ...], rows: Any) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _last_row(file: Path) -> dict[str, float]:
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return next((row for row in reversed(rows) if "epoch" in row), {"step": 0, "epoch": 0.0})
