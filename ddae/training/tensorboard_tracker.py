"""Tracking by TensorBoard: `tensorboard --logdir runs` shows all runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from ddae.training.tracker import GuardedTracker

FOLDER = "tensorboard"  # in the run directory


class TensorBoardTracker(GuardedTracker):
    """Also writes event files. A resumed run removes what it had written beyond its checkpoint from the view."""

    NAME = "TensorBoard"

    def __init__(self, folder: Path, step: int, params: dict[str, Any]):
        super().__init__(folder, step)
        self._writer = SummaryWriter(str(folder / FOLDER), purge_step=step + 1 if step else None)
        self._step = step
        self._guard(lambda: self._writer.add_text("settings", f"    {json.dumps(params, indent=4)}", 0))

    def log(self, row: dict[str, float]) -> None:
        super().log(row)
        self._step = int(row["step"])
        for name, value in row.items():
            if name != "step":
                self._guard(lambda name=name, value=value: self._writer.add_scalar(name, value, self._step))

    def finish(self, files: list[Path], status: str = "FINISHED", timeout_s: float = 60.0) -> None:
        super().finish(files)
        for file in files:
            if file.suffix == ".png":
                self._guard(lambda file=file: self._add_image(file))
        self._guard(self._writer.close)

    def _add_image(self, file: Path) -> None:
        with Image.open(file) as image:
            self._writer.add_image(file.stem, np.asarray(image.convert("RGB")), self._step, dataformats="HWC")
