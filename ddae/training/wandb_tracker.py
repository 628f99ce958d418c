"""Tracking by Weights & Biases. The only import of wandb.

Its own process sends the rows, and keeps those of an outage in the run directory. Without an API key nothing is sent:
`wandb sync` uploads the run later.
"""

import logging
import os
from pathlib import Path
from typing import Any

import wandb

from ddae.training.tracker import GuardedTracker

RUN_ID = "wandb_run_id"  # file in the run directory, by which a resumed run continues the same run
INIT_TIMEOUT_S = 60.0
logger = logging.getLogger(__name__)


class WandbTracker(GuardedTracker):
    """Also sends settings, rows and figures to a run of Weights & Biases."""

    NAME = "Weights & Biases"

    def __init__(self, folder: Path, step: int, project: str, params: dict[str, Any], group: str = ""):
        super().__init__(folder, step)
        self._run: Any = None
        self._guard(lambda: self._start(folder, project, params, group))

    def _start(self, folder: Path, project: str, params: dict[str, Any], group: str) -> None:
        has_key = wandb.login(prompt=False)
        mode = os.environ.get("WANDB_MODE") or ("online" if has_key else "offline")
        if mode == "offline" and not has_key:
            logger.warning("Weights & Biases has no API key; wandb sync %s uploads the run later", folder / "wandb")
        known = (folder / RUN_ID).read_text().strip() if (folder / RUN_ID).exists() else None
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", project),
            name=folder.name,
            id=known,
            group=group or None,
            resume="allow",
            dir=folder,
            config=params,
            mode=mode,  # type: ignore[arg-type]
            settings=wandb.Settings(console="off", silent=True, init_timeout=INIT_TIMEOUT_S),
        )
        (folder / RUN_ID).write_text(self._run.id)

    def log(self, row: dict[str, float]) -> None:
        super().log(row)
        values = {name: value for name, value in row.items() if name != "step"}
        self._guard(lambda: self._run.log(values, step=int(row["step"])))

    def finish(self, files: list[Path], status: str = "FINISHED", timeout_s: float = 60.0) -> None:
        super().finish(files)
        images = [file for file in files if file.suffix == ".png"]
        if images:
            self._guard(lambda: self._run.log({file.stem: wandb.Image(str(file)) for file in images}))
        self._guard(lambda: self._run.finish(exit_code=0 if status == "FINISHED" else 1))
