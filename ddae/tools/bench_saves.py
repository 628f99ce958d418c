"""How long training stops for a checkpoint: a save that training waits for, and one in the background, alternating.

Between two saves nothing is trained, so that the background thread has the machine for itself.
"""

import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from ddae.config import deepspeed as ds_config
from ddae.config.cli import parse
from ddae.config.pretrain import beta_names
from ddae.distributed.checkpoint import Background, Checkpoints
from ddae.distributed.checkpoint_format import Checkpointable
from ddae.distributed.comm import barrier, broadcast_from_main, is_main, world_size
from ddae.distributed.engine import Engine, start_process_group, stop_process_group
from ddae.method.betas import Betas
from ddae.method.model import build_model
from ddae.tools.bench_step import describe_environment, write_json
from ddae.training.optimizer import build_optimizer
from ddae.training.step import build_targets

TIMEOUT_S = 600.0  # that ranks wait for each other


def benchmark_saves(flags: Namespace, args: Sequence[str]) -> None:
    """Print and save the rows of both ways to save, for each preset. args: further ones of launch/pretrain.py.

    A launcher may start several ranks; their checkpoints go below the current folder.
    """
    start_process_group(TIMEOUT_S)
    rows = []
    for preset in flags.preset or ["ddae_vit_s16_100e"]:
        state = pretraining_state(["--preset", preset, "--data.batch_size", str(world_size()), *args])
        with tempfile.TemporaryDirectory(dir=".", prefix=".saves_") as own:
            folder = Path(broadcast_from_main(lambda own=own: own))
            ways = {"waits": Checkpoints(folder / "waits", 1)}
            ways["background"] = Checkpoints(folder / "background", 1, background=Background(TIMEOUT_S))
            seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}  # stopped, complete
            for step in range(flags.rounds + 1):
                for name, checkpoints in ways.items():
                    start = time.perf_counter()
                    checkpoints.save(step, state)
                    stopped = time.perf_counter() - start
                    checkpoints.wait()
                    seconds[name].append((stopped, time.perf_counter() - start))
            size = sum(file.stat().st_size for file in ways["waits"].folder.rglob("*") if file.is_file())
            barrier()  # before the folder is removed
        facts = {"preset": preset, "ranks": world_size(), "mib": round(size / 2**20)}
        for name, of_way in seconds.items():
            stopped, complete = zip(*of_way[1:], strict=True)  # the first save allocates memory
            row = {"saving": name, "stopped_s": round(median(stopped), 3), "complete_s": round(median(complete), 3)}
            row |= {"stopped_low": round(min(stopped), 3), "stopped_high": round(max(stopped), 3)}
            rows.append(describe_environment("bf16") | facts | row)
    if is_main():
        for row in rows:
            spread = f"({row['stopped_low']:.2f} to {row['stopped_high']:.2f})"
            print(
                f"{row['preset']}, {row['ranks']} ranks, {row['mib']} MiB, {row['saving']:10}: training stops for "
                f"{row['stopped_s']:.2f} s {spread}, complete after {row['complete_s']:.2f} s"
            )
        if flags.json:
            write_json(rows, Path(flags.json))
    stop_process_group()


def pretraining_state(args: list[str]) -> dict[str, Checkpointable]:
    """Return what pretraining with these arguments saves: the engine's state, the betas and the teacher."""
    config = parse([*args, "--data.backend", "synthetic", "--engine.loss_backend", "reference"])
    resolved = ds_config.resolve(ds_config.load(config.ds_config), config, world_size())
    model = build_model(config)
    engine = Engine(model, build_optimizer(model, config.optim), resolved.json)
    betas = Betas(beta_names(config), config.dynamic, config.optim.adam_betas, engine.device)
    return {"engine": engine, "betas": betas, **build_targets(config, engine).state}
