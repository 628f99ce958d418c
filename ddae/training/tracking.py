"""Experiment tracking by MLflow, TensorBoard or Weights & Biases, besides metrics.jsonl.

Each of these packages is imported by its own module, on rank 0, and only if it is chosen.
"""

import importlib.util
from pathlib import Path
from typing import Any

from ddae.config.base import TrackerConfig
from ddae.errors import UserError
from ddae.training.tracker import Tracker


def start_tracker(
    config: TrackerConfig, folder: Path, step: int, params: dict[str, Any], run_id: str = "", parent: str = ""
) -> Tracker:
    """Return rank 0's tracker of a run that continues at `step`.

    params: the nested config. run_id: MLflow's run as the checkpoint has it. parent: the one to nest it under.
    """
    if config.kind == "mlflow":
        from ddae.training.mlflow_tracker import MlflowTracker

        return MlflowTracker(folder, step, config.experiment, params, run_id, parent)
    if config.kind == "tensorboard":
        from ddae.training.tensorboard_tracker import TensorBoardTracker

        return TensorBoardTracker(folder, step, params)
    if config.kind == "wandb":
        from ddae.training.wandb_tracker import WandbTracker

        return WandbTracker(folder, step, config.experiment, params, parent)
    return Tracker(folder, step)


def check_installed(config: TrackerConfig) -> None:
    """Raise UserError if the tracker's package is not installed."""
    if config.kind != "jsonl" and importlib.util.find_spec(config.kind) is None:
        fix = f"pip install {config.kind}, or pass --tracker.kind jsonl."
        raise UserError(f"tracker.kind is {config.kind}, but the package {config.kind} is not installed. {fix}")
