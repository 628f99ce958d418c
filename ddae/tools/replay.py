"""A dumped step (dump.py) run again, by one process and without DeepSpeed: which layer, which sample?"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ddae.config.pretrain import Config, beta_names
from ddae.data.loader import Batch
from ddae.distributed.checkpoint import STATE
from ddae.distributed.checkpoint_format import Fragment, load_weights
from ddae.distributed.comm import device
from ddae.errors import UserError
from ddae.method.betas import Betas
from ddae.method.model import Losses, Method, build_method
from ddae.method.teacher import Teacher
from ddae.models.tokenizer import Tokenizer
from ddae.models.vit import Encoder
from ddae.training.nonfinite import KEPT, Maxima
from ddae.training.step import build_tokenizer, forward, loss_kernels


class Bare:
    """The method in the precision that the engine trains it in, and what else a forward pass asks an engine for."""

    def __init__(self, method: Method, precision: str):
        self.device, self.dtype = device(), torch.bfloat16 if precision == "bf16" else torch.float32
        self.module = method.to(self.device, self.dtype)
        self._autocast = precision == "autocast"

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._autocast)

    def __call__(self, inputs: Any) -> Losses:
        with self.autocast():
            return self.module(inputs)


def replay(dump: Path) -> int:
    """Run every rank's micro-batches again, forward and backward, and print what each layer gave: 1 where a number is
    none, as in the run, else 0. UserError where the folder holds no dump."""
    missing = [name for name in ("config.json", STATE, "batch_00000.safetensors") if not (dump / name).exists()]
    if missing:
        raise UserError(f"{dump} is no dump: it has no {missing[0]}; name a folder dumps/step_N of a run")
    config = Config.from_dict(json.loads((dump / "config.json").read_text()))
    state = torch.load(dump / STATE, map_location="cpu", weights_only=True)
    method = build_method(config)
    load_weights(dump, "weight", method)
    engine, kernels, bad = Bare(method, config.engine.precision), loss_kernels(config), 0
    teacher = build_teacher(dump, config, engine)
    betas = Betas(beta_names(config), config.dynamic, config.optim.adam_betas, engine.device)
    betas.prepare(state["notes"]["betas"])
    print(f"{config.preset}, step {state['step'] + 1}, {config.engine.precision}, loss kernels: {kernels}")
    for file in sorted(dump.glob("batch_*.safetensors")):
        noted = json.loads((dump / f"layers_{file.stem.removeprefix('batch_')}.json").read_text())
        names = iter(noted["samples"])
        with Maxima(engine.module) as maxima:
            blamed = []
            for batch in _batches(file, engine.device):
                engine.module.zero_grad()
                losses = forward(
                    *(config, engine, teacher, betas),  # type: ignore[arg-type]  # all it asks of an engine is there
                    *(state["feature_weight"], state["share"], kernels, batch),
                )
                losses.total.backward()
                finite = [each.token_error.isfinite().all(2).all(0) for each in losses.branches.values()]
                whole = torch.stack(finite).all(0).tolist()
                blamed += [name for name, good in zip(names, whole, strict=False) if not good]
        bad += _show(file.stem.replace("batch_", "rank "), maxima.by_layer(), noted["layers"], engine.module, blamed)
    return int(bad > 0)


def build_teacher(dump: Path, config: Config, engine: Bare) -> Teacher | Tokenizer | None:
    if config.token.enabled:
        return build_tokenizer(config).to(engine.device)
    if not config.feature.enabled:
        return None
    encoder = Encoder(config.model)
    load_weights(dump, "teacher", encoder)
    fragments = [Fragment(name, 0, values.detach().flatten()) for name, values in encoder.named_parameters()]
    return Teacher(encoder.to(engine.device, engine.dtype), fragments, sharded=False)


def _batches(file: Path, on: torch.device) -> list[Batch]:
    with safe_open(file, "pt") as opened:
        numbers = sorted({int(key.split("/")[0]) for key in opened.keys()})  # noqa: SIM118 - it is no dict
        batches = [Batch(*(opened.get_tensor(f"{n}/{name}") for name in KEPT)) for n in numbers]
    return [batch._replace(images=batch.images.to(on)) for batch in batches]


def _show(
    who: str,
    layers: dict[str, dict[str, float]],
    noted: dict[str, dict[str, float]],
    method: Method,
    blamed: list[str],
) -> int:
    """Print a table of one rank; how many layers have numbers that are none."""
    weights = {name: _largest(module.parameters(recurse=False)) for name, module in method.named_modules()}
    print(
        f"\n{who}: largest absolute values\n{'layer':44}{'output':>12}{'in the run':>12}{'gradient':>12}{'weight':>12}"
    )
    bad = []
    for name, seen in layers.items():
        values = [seen.get("output"), noted.get(name, {}).get("output"), seen.get("gradient"), weights.get(name)]
        lost = any(value is not None and not math.isfinite(value) for value in values)
        bad += [name] * lost
        cells = "".join(f"{'' if value is None else f'{value:.4g}':>12}" for value in values)
        print(f"{name:44}{cells}{'   <-- no number' if lost else ''}")
    lost_forward = [name for name in bad if not math.isfinite(layers[name]["output"])]
    print(f"the first layer in the forward pass to give no number: {lost_forward[0] if lost_forward else 'none'}")
    print(f"samples whose loss is no number: {', '.join(blamed) or 'none'}")
    return len(bad)


def _largest(parameters: Any) -> float | None:
    values: list[Tensor] = [parameter.detach().abs().amax() for parameter in parameters]
    return float(torch.stack(values).amax()) if values else None
