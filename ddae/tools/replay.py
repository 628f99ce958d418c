"""Replay of a dumped step (training/nonfinite.py) in one process, without DeepSpeed, to find layer and sample."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ddae.config.pretrain import PretrainConfig, beta_names
from ddae.data.loader import Batch
from ddae.distributed.checkpoint_format import STATE, TensorShard, load_weights
from ddae.distributed.comm import device
from ddae.errors import UserError
from ddae.method.betas import Betas
from ddae.method.model import Losses, PretrainModel, build_model
from ddae.method.teacher import Teacher
from ddae.models.vit import Encoder
from ddae.training.nonfinite import DUMPED, LayerMaxima
from ddae.training.step import ForwardPass, Targets, TeacherTargets, TokenTargets, build_tokenizer, resolve_loss_backend

Maxima = dict[str, dict[str, float]]  # by layer: output and gradient


class EagerEngine:
    """Stands in for Engine in a forward pass: the model in the precision in which it was trained, without DeepSpeed."""

    def __init__(self, model: PretrainModel, precision: str):
        self.device, self.dtype = device(), torch.bfloat16 if precision == "bf16" else torch.float32
        self.module = model.to(self.device, self.dtype)
        self._autocast = precision == "autocast"

    def autocast(self) -> torch.autocast:
        """Return the autocast context of the forward pass."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._autocast)

    def __call__(self, inputs: Any) -> Losses:
        with self.autocast():
            return self.module(inputs)


def replay(dump: Path) -> int:
    """Run every rank's micro-batches again and print each layer's maxima.

    Return 1 if a value is non-finite, as in the run, else 0. For a supervised task, whose loss is not in the dump,
    print the maxima that the run recorded. Raise UserError if the folder is not a dump.
    """
    missing = [name for name in ("config.json", STATE, "batch_00000.safetensors") if not (dump / name).exists()]
    if missing:
        raise UserError(f"{dump} is not a dump: {missing[0]} is missing. Name a folder dumps/step_N of a run.")
    ranks = {file.stem.removeprefix("batch_"): file for file in sorted(dump.glob("batch_*.safetensors"))}
    recorded = {rank: json.loads((dump / f"layers_{rank}.json").read_text()) for rank in ranks}
    if "mask" not in json.loads((dump / "config.json").read_text()):
        print(f"{dump}: recorded by the run, not computed again")
        return int(sum(_print_table(f"rank {rank}", each["layers"], {}, {}, []) for rank, each in recorded.items()) > 0)
    config = PretrainConfig.read(dump / "config.json")
    facts = torch.load(dump / STATE, map_location="cpu", weights_only=True)
    model = build_model(config)
    load_weights(dump, "weight", model)
    engine: Any = EagerEngine(model, config.engine.precision)
    loss_backend = resolve_loss_backend(config)
    betas = Betas(beta_names(config), config.dynamic, config.optim.adam_betas, engine.device)
    betas.load_state_dict(facts["states"]["betas"])
    forward = ForwardPass(config, engine, _targets(dump, config, engine), betas, facts["share"], loss_backend)
    print(f"{config.preset}, step {facts['step'] + 1}, {config.engine.precision}, loss backend {loss_backend}")
    weights = {name: _largest(module.parameters(recurse=False)) for name, module in model.named_modules()}
    nonfinite = 0
    for rank, file in ranks.items():
        names = iter(recorded[rank]["samples"])
        with LayerMaxima(engine.module) as maxima:
            samples = []  # whose loss is non-finite
            for batch in _batches(file, engine.device):
                engine.module.zero_grad()
                losses = forward(batch, facts["feature_weight"], facts["step"])
                losses.total.backward()
                finite = [each.token_error.isfinite().all(2).all(0) for each in losses.branches.values()]
                is_finite = torch.stack(finite).all(0).tolist()
                samples += [name for name, good in zip(names, is_finite, strict=False) if not good]
        nonfinite += _print_table(f"rank {rank}", maxima.by_layer(), recorded[rank]["layers"], weights, samples)
    return int(nonfinite > 0)


def _targets(dump: Path, config: PretrainConfig, engine: Any) -> Targets:
    if config.token.enabled:
        return TokenTargets(config, build_tokenizer(config).to(engine.device))
    if not config.feature.enabled:
        return Targets()
    encoder = Encoder(config.model)
    load_weights(dump, "teacher", encoder)
    shards = [TensorShard(name, 0, values.detach().flatten()) for name, values in encoder.named_parameters()]
    return TeacherTargets(config, engine, Teacher(encoder.to(engine.device, engine.dtype), shards, sharded=False))


def _batches(file: Path, on: torch.device) -> list[Batch]:
    with safe_open(file, "pt") as opened:
        numbers = sorted({int(key.split("/")[0]) for key in opened.keys()})  # noqa: SIM118 - not a dict
        batches = [Batch(*(opened.get_tensor(f"{n}/{name}") for name in DUMPED)) for n in numbers]
    return [batch._replace(images=batch.images.to(on)) for batch in batches]


def _print_table(
    title: str, layers: Maxima, recorded: Maxima, weights: dict[str, float | None], samples: list[str]
) -> int:
    """Print one rank's table. Return the number of layers with non-finite values."""
    head = f"{'layer':44}{'output':>12}{'in the run':>12}{'gradient':>12}{'weight':>12}"
    print(f"\n{title}: largest absolute values\n{head}")
    nonfinite = []
    for name, maxima in layers.items():
        in_run = recorded.get(name, {}).get("output")
        values = [maxima.get("output"), in_run, maxima.get("gradient"), weights.get(name)]
        if any(value is not None and not math.isfinite(value) for value in values):
            nonfinite.append(name)
        cells = "".join(f"{'' if value is None else f'{value:.4g}':>12}" for value in values)
        print(f"{name:44}{cells}{'   <-- non-finite' if name in nonfinite else ''}")
    forward = [name for name in nonfinite if not math.isfinite(layers[name]["output"])]
    print(f"first layer in the forward pass with a non-finite output: {forward[0] if forward else 'none'}")
    print(f"samples with a non-finite loss: {', '.join(samples) or 'none'}")
    return len(nonfinite)


def _largest(parameters: Any) -> float | None:
    values: list[Tensor] = [parameter.detach().abs().amax() for parameter in parameters]
    return float(torch.stack(values).amax()) if values else None
