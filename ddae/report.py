"""What a run leaves to look at: the pictures under figures/, and report.html, one page that needs nothing beside it."""

import base64
import html
import json
import os
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from ddae import figures
from ddae.betas import Betas
from ddae.config import Config, flatten, tap_name
from ddae.data.preview import Preview
from ddae.distributed import device, is_main
from ddae.masks import Mask, sample_mask
from ddae.method import Method
from ddae.tracker import read_metrics

NUM_IMAGES = 8
CAPTIONS = {
    "reconstructions": "{images} images (left), the patches that the encoder sees (rows take turns between the run's "
    "own masks and random ones), what the decoder rebuilds from each tapped block, the distance of each masked patch "
    "to the nearest visible one, and each block's weights.",
    "losses": "Mean squared error of masked patches by tapped block: plain means, not weighted by distance.",
    "betas": "The learnable exponents: below 0 a block works on patches near visible ones, above 0 on far ones.",
    "weights": "How much a masked patch counts at each distance, with the betas at the end.",
    "rates": "Learning rate, images per second, and seconds of a step spent waiting for data.",
}
STYLE = """body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:1180px;margin:2em auto;padding:0 1em}
h1{margin-bottom:0}h2{margin-top:2em}img{max-width:100%}table{border-collapse:collapse;font-size:13px}
td,th{padding:2px 10px 2px 0;text-align:left;border-bottom:1px solid #eee}.sub{color:#777;margin-top:0}
details{margin:1em 0}figure{margin:1em 0}figcaption{color:#555;font-size:13px}"""


def show_run(config: Config, method: Method, betas: Betas, preview: Preview) -> list[Path]:
    """Draw everything; all ranks call it (the model may be sharded), rank 0 writes. The files written."""
    folder = Path(config.folder)
    drawn: dict[str, Figure] = {}
    by_name = dict(zip(betas.names, betas.used().detach().cpu().tolist(), strict=True))
    if config.pixel.enabled:
        images = preview.images.to(device())
        if len(images):
            kinds = [config.mask.kind if i % 2 == 0 else "random" for i in range(len(images))]
            seeds = torch.arange(len(images)) + 1
            by_row = [
                sample_mask(k, s[None], config.grid, config.num_masked) for k, s in zip(kinds, seeds, strict=True)
            ]
            mask = Mask(*(torch.cat(positions).to(images.device) for positions in zip(*by_row, strict=True)))
            rebuilt = figures.reconstruct(method, images, mask)
            prefix = "" if config.dynamic.shared else "pixel/"
            names = {tap: prefix + tap_name(tap) for tap in config.pixel.taps}
            values = {tap: by_name[name] for tap, name in names.items() if name in by_name and config.pixel.dynamic}
            drawn["reconstructions"] = figures.reconstruction_grid(
                images, mask, kinds, config.model.patch_size, rebuilt, values
            )
    if not is_main():
        return []
    rows = read_metrics(folder / "metrics.jsonl")
    groups = {"loss": ["loss/total"]}
    for branch in method.branches:
        groups[f"{branch} error"] = figures.metric_names(rows, f"error/{branch}/")
    drawn["losses"] = figures.curves(rows, groups, "")
    if by_name:
        drawn["betas"] = figures.curves(rows, {"betas": figures.metric_names(rows, "beta/")}, "")
        farthest = float(max(config.grid) - 1) / 2
        drawn["weights"] = figures.weight_by_distance(by_name, farthest)
    groups = {name: [name] for name in ("lr", "rate/images_per_s", "time/data_wait")}
    drawn["rates"] = figures.curves(rows, groups, "")
    files = [_save(figure, folder / "figures" / f"{name}.png") for name, figure in drawn.items()]
    page = folder / "report.html"
    unfinished = page.with_suffix(".part")
    unfinished.write_text(_page(config, rows, files, preview.held_out))
    unfinished.replace(page)
    encoder = [folder / "encoder" / name for name in ("encoder.safetensors", "config.json")]
    return [*files, *encoder, page]


def summary(config: Config) -> str:
    """Where to look at a run."""
    page = Path(config.folder) / "report.html"
    lines = [f"pictures and curves:  {page}"] if config.train.report else []
    if config.tracker.kind == "mlflow":
        mlflow = os.path.relpath(Path(sys.executable).with_name("mlflow"))
        lines.append(f"metrics in MLflow:    {mlflow} ui")
    return "\n".join([*lines, f"encoder:              {Path(config.folder) / 'encoder'}"])


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _page(config: Config, rows: list[dict[str, float]], files: list[Path], held_out: bool) -> str:
    first, last = rows[0], rows[-1]
    figures_html = ""
    for file in files:
        picture = base64.b64encode(file.read_bytes()).decode()
        caption = html.escape(CAPTIONS[file.stem].format(images="Held-out" if held_out else "Training"))
        figures_html += f'<figure><img alt="{file.stem}" src="data:image/png;base64,{picture}">'
        figures_html += f"<figcaption>{caption}</figcaption></figure>\n"
    compared = [n for n in last if n.startswith(("loss/", "error/", "beta/"))]
    numbers = [(n, f"{first[n]:.4f}", f"{last[n]:.4f}") for n in compared]
    settings = [(key, json.dumps(value)) for key, value in flatten(config.to_dict()).items()]
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(config.preset)}</title>
<style>{STYLE}</style></head><body>
<h1>{html.escape(config.preset)}</h1>
<p class="sub">{int(last["step"])} steps of {config.data.batch_size} images, {last["epoch"]:.1f} epochs</p>
{figures_html}
<h2>From the first step to the last</h2>{_table(("metric", "first", "last"), numbers)}
<details><summary>All settings</summary>{_table(("field", "value"), settings)}</details>
</body></html>
"""


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    def line(cells: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(head, "th") + "".join(line(row, "td") for row in rows) + "</table>"
