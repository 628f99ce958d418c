"""The Python API: pretrain(), embed(); ddae/__init__.py adds load_encoder()."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddae.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from ddae.eval.embed import Photo


def pretrain(images: str | Path | Sequence[str], out: str | Path, preset: str = "own", **settings: Any) -> Path:
    """Pretrain an encoder without labels, on all GPUs of this machine or its CPU. Return the run's folder.

    images: a folder of images, or shards (folder, pattern, URL; or several). out: the run's folder; a run that is there
    resumes. settings: any settings of `ddae pretrain --help`, by section: optim={"lr": 1e-3},
    train={"epochs": 30}, probe_every=1.0.

    Training runs in processes of its own, as `ddae pretrain` does, and prints its progress. Ctrl-C writes a checkpoint.
    Raise UserError for a mistake in the data or the settings, and if the run was stopped or failed.
    """
    sources = [str(images)] if isinstance(images, (str, Path)) else [str(each) for each in images]
    args = ["--data.train", *sources, "--run_dir", str(out), "--preset", preset, *flags(settings)]
    return _run(args, Path(out))


def flags(settings: dict[str, Any], prefix: str = "--") -> list[str]:
    """Return settings as flags of the command line: {"optim": {"lr": 1e-3}} -> ["--optim.lr", "0.001"]."""
    found = []
    for name, value in settings.items():
        if isinstance(value, dict):
            found += flags(value, f"{prefix}{name}.")
        elif isinstance(value, bool):
            found.append(f"{prefix}{'' if value else 'no_'}{name}")
        elif isinstance(value, (list, tuple)):
            found += [prefix + name, *map(str, value)]
        else:
            found += [prefix + name, str(value)]
    return found


def _run(args: list[str], out: Path) -> Path:
    """Run `ddae pretrain`, and pass its output on: in a notebook this process's own is not the terminal's."""
    command = [sys.executable, "-m", "ddae", "pretrain", *args]
    last = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                last = line.strip() or last
        except KeyboardInterrupt:  # the run has it, too, and writes a checkpoint
            print(process.stdout.read(), end="", flush=True)
            raise
    if process.returncode == 2:
        raise UserError(last.removeprefix("ddae: "))
    if process.returncode:
        outcome = "was stopped; the same call resumes it" if process.returncode in (75, 130) else "failed"
        raise UserError(f"the run {out} {outcome} (exit code {process.returncode}): {last}")
    return out


def embed(path: str | Path, images: "str | Path | Photo | Sequence[Photo]", workers: int = 0) -> "np.ndarray":
    """Return embeddings, float32 [N, D]: the mean patch token after the final norm, on a GPU if there is one.

    path: a run, export, checkpoint or published file, as load_encoder() takes. images: a folder of images (of any
    tree), an image file, a PIL image, or a list of files and PIL images. workers: processes that decode.

    Raise UserError if an image cannot be read.
    """
    from ddae.eval import embed as embedding
    from ddae.export.encoder import load_encoder

    if isinstance(images, (str, Path)):
        photos: list[Any] = list(embedding.find_photos([Path(images)]))
    else:
        photos = list(images) if isinstance(images, (list, tuple)) else [images]
    encoder = embedding.on_device(load_encoder(path))
    embeddings = embedding.embed(encoder, photos, workers)
    if embeddings.unreadable:
        raise UserError(embeddings.unreadable[min(embeddings.unreadable)])
    return embeddings.values
