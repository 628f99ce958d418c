"""What the tasks of trainer.fit() share: the start of a run, the results of a finished one, and its report."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from ddae.atomic import write_json
from ddae.config import deepspeed as ds_config
from ddae.config.base import Experiment
from ddae.config.evaluation import Evaluation
from ddae.distributed.comm import is_main, world_size
from ddae.distributed.engine import Engine
from ddae.distributed.preemption import StopSignal
from ddae.eval import baselines
from ddae.eval.dataset import ExampleReader, Labels, val_location
from ddae.eval.knn import raw_pixel_accuracy
from ddae.export.encoder import encoder_hash
from ddae.models.vit import Encoder
from ddae.report import html as report
from ddae.training.run import Run
from ddae.training.schedules import warmup_cosine
from ddae.training.tracker import run_id_of


def deepspeed_run(config: Experiment, stop: StopSignal | None) -> Run:
    """Return a Run with the config's DeepSpeed JSON. Raise UserError if the two contradict each other."""
    resolved = ds_config.resolve(ds_config.load(config.ds_config), config, world_size())
    return Run(config, stop, resolved.json, resolved.micro_batch)


class SupervisedTask:
    """Base class of tasks: finish() evaluates if no evaluation was made yet, and writes results, weights and report."""

    schedule = staticmethod(warmup_cosine)
    engine: Engine
    optimizable: Any
    description: str
    counts: Tensor  # of the last evaluation, over all ranks
    encoder_hash = ""  # of the weights that are evaluated, before any training
    evaluated = False  # set by evaluate(); false if an earlier start of the run made the last evaluation

    def __init__(self, config: Any, val: Any, evaluate_every: float, source: str):
        """evaluate_every: epochs. source: path of the encoder to evaluate or to learn from; empty: none."""
        self.config, self.val, self.evaluate_every = config, val, evaluate_every
        self.folder, self.parent = Path(config.folder), run_id_of(Path(source)) if source else ""

    def after_step(self, applied: Tensor) -> None:
        """Nothing to update."""

    def evaluate(self, poll: Callable[[], None]) -> Any:
        """Return metrics by name, over all ranks."""

    def gather(self, heartbeat: Callable[[], None]) -> Any:
        """Return what results() needs of all ranks, which all call it."""

    def results(self, rows: list[dict[str, float]], gathered: Any) -> Any:
        """Write the trained weights, and return results.json. rows: all rows of metrics."""

    def figures(self, rows: list[dict[str, float]], results: dict[str, Any]) -> Any:
        """Return the figures of the report by name."""

    def finish(self, run: Run, heartbeat: Callable[[], None]) -> list[Path]:
        if not self.evaluated:
            self.evaluate(heartbeat)
        gathered = self.gather(heartbeat)
        if not is_main():
            return []
        rows = run.rows()
        results = self.results(rows, gathered)
        write_json(self.folder / "results.json", results)
        return report.add_evaluation(self.folder, self.figures(rows, results)) if self.config.train.report else []

    def facts(self, num_classes: int, images: dict[str, int]) -> dict[str, Any]:
        """Return the first entries of an evaluation's results.json. images: number by split."""
        config, data = self.config, self.config.to_dict()["data"]["train"]
        facts = {"task": config.TASK, "encoder": config.encoder, "encoder_sha256": self.encoder_hash}
        facts |= {"recipe": config.preset, "data": data}
        return facts | {"classes": num_classes, "images": images}


class ClassificationTask(SupervisedTask):
    """Base class of tasks that classify images, and compare their accuracy with baselines."""

    def __init__(self, config: Evaluation, encoder: Encoder, labels: Labels, val: ExampleReader, evaluate_every: float):
        super().__init__(config, val, evaluate_every, config.encoder)
        self.encoder, self.labels, self.encoder_hash = encoder, labels, encoder_hash(encoder)

    def raw_pixel_accuracy(self, heartbeat: Callable[[], None]) -> float:
        """Return the k-NN accuracy, in per cent, of raw pixels. All ranks call it."""
        source = val_location(self.config.data.train, self.config.val)
        return raw_pixel_accuracy(self.config.data, source, self.encoder.shape.image_size, heartbeat)

    def compare(self, correct: Tensor, untrained: Tensor | None, raw: float, metric: str) -> dict[str, Any]:
        """Return facts() and the comparison with baselines; see baselines.compare() and Comparison.results()."""
        images = {"train": len(self.labels.targets), "val": len(self.val)}
        chance = baselines.chance(self.labels.targets, self.val.labels)
        comparison = baselines.compare(correct, untrained, raw, chance)
        return self.facts(self.labels.num_classes, images) | comparison.results(
            metric, baselines.baseline_name(self.encoder)
        )
