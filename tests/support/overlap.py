"""Gradients reduced on a second stream, during the backward pass, are DeepSpeed's own to the bit, on one device.

    python tests/support/overlap.py

The other ranks are torch's fake process group, whose sums leave a rank's numbers as they are. Prints the largest
difference and the number of gradients; the exit code is 1 if they differ.
"""

import copy
import json
import sys

import torch
from memory import batch_of

from ddae.config import deepspeed as ds_config
from ddae.config.cli import parse
from ddae.config.pretrain import PretrainConfig, beta_names
from ddae.distributed.comm import device, world_size
from ddae.distributed.engine import Engine
from ddae.method.betas import Betas
from ddae.method.model import build_model
from ddae.tools.launch_count import RANKS, start_fake_process_group
from ddae.training.optimizer import build_optimizer
from ddae.training.step import ForwardPass, build_targets

STEPS = 4
BUCKET = 50_000  # numbers: many buckets in a backward pass
ARGUMENTS = ["--preset", "demo", "--data.batch_size", str(4 * RANKS), "--engine.precision", "bf16"]


class Run:
    """Backward passes by one gradient reduction."""

    def __init__(self, config: PretrainConfig, ds_json: dict, reduction: str):
        torch.manual_seed(0)
        model = build_model(config)
        self.engine = Engine(model, build_optimizer(model, config.optim), copy.deepcopy(ds_json), reduction)
        targets = build_targets(config, self.engine)
        betas = Betas(beta_names(config), config.dynamic, config.optim.adam_betas, self.engine.device)
        self.forward = ForwardPass(config, self.engine, targets, betas, 1.0, "reference")

    def gradients(self, batch) -> list[torch.Tensor]:
        """Return the averaged gradients of each parameter group of this rank's partition, after one backward pass."""
        self.engine.backward(self.forward(batch, 0.5).total)
        averaged = self.engine.deepspeed.optimizer.averaged_gradients
        flat = [torch.cat([each.flatten() for each in of_group]).clone() for of_group in averaged.values()]
        self.engine.step(1e-3)
        return flat


def main() -> int:
    start_fake_process_group()
    config = parse(ARGUMENTS)
    ds_json = ds_config.resolve(ds_config.load("zero2"), config, world_size()).json
    ds_json["zero_optimization"] |= {"overlap_comm": True, "reduce_bucket_size": BUCKET}
    lean, own = (Run(config, ds_json, reduction) for reduction in ("lean", "deepspeed"))
    difference, count = 0.0, 0
    for number in range(STEPS):
        torch.manual_seed(number)
        batch = batch_of(config, 4)
        batch = batch._replace(images=batch.images.to(device()))
        for ours, theirs in zip(lean.gradients(batch), own.gradients(batch), strict=True):
            size = min(ours.numel(), theirs.numel())  # a flat partition is padded
            difference = max(difference, float((ours[:size].float() - theirs[:size].float()).abs().max()))
            count += int((theirs[:size] != 0).sum())
    print(json.dumps({"device": str(device()), "difference": difference, "gradients": count, "steps": STEPS}))
    return int(difference > 0 or count == 0)


if __name__ == "__main__":
    sys.exit(main())
