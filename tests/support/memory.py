"""One rank of tests/tools/test_plan.py: measure the bytes of live tensors by part after a backward pass.

Reads command-line arguments from standard input, one JSON list a line. For each, rank 0 prints the measured bytes as
JSON after the word MEASURED, the largest of all ranks.
"""

import gc
import json
import sys

import torch

from ddae.config import deepspeed as ds_config
from ddae.config.cli import parse
from ddae.config.pretrain import beta_names
from ddae.data.loader import Batch
from ddae.distributed.comm import gather, is_main, world_size
from ddae.distributed.engine import Engine, start_process_group, stop_process_group
from ddae.method.betas import Betas
from ddae.method.model import build_model
from ddae.training.optimizer import build_optimizer
from ddae.training.step import ForwardPass, TeacherTargets, build_targets


def storages() -> dict[int, int]:
    """Return the bytes of every storage of a live CPU tensor, by address."""
    sizes = {}
    for each in gc.get_objects():
        if issubclass(type(each), torch.Tensor) and each.device.type == "cpu":
            sizes[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
    return sizes


def batch_of(config, images: int) -> Batch:
    """Return random images uint8 [B, 3, H, W] with seeds and sample numbers 0 to B - 1."""
    pixels = torch.randint(0, 256, (images, 3, *config.model.height_width), dtype=torch.uint8)
    return Batch(pixels, torch.arange(images), torch.arange(images))


def measure(args: list[str]) -> dict[str, int]:
    """Return the bytes of weights, gradients, optimizer, teacher and all other tensors after a backward pass."""
    config = parse(args)
    before = storages()
    resolved = ds_config.resolve(ds_config.load(config.ds_config), config, world_size())
    model = build_model(config)
    engine = Engine(model, build_optimizer(model, config.optim), resolved.json)
    targets = build_targets(config, engine)
    assert isinstance(targets, TeacherTargets)
    teacher = targets.teacher
    betas = Betas(beta_names(config), config.dynamic, config.optim.adam_betas, engine.device)
    forward = ForwardPass(config, engine, targets, betas, 1.0, "reference")
    for step in range(2):  # the first update allocates Adam's averages
        losses = forward(batch_of(config, resolved.micro_batch), 1.0)
        engine.backward(losses.total)
        del losses
        if step == 0:
            engine.step(1e-4)
            teacher.update(0.99)
    gc.collect()
    live = {address: size for address, size in storages().items() if address not in before}
    parameters = list(engine.module.parameters())
    zero = engine.zero.optimizer
    if engine.stage == 3:
        gradients = [zero.grad_partitions_flat_buffer]
    elif engine.stage > 0:
        gradients = [each for group in zero.averaged_gradients.values() for each in group or ()]
    else:
        gradients = [parameter.grad for parameter in parameters]
    partitions = [parameter.ds_tensor for parameter in parameters if hasattr(parameter, "ds_tensor")]
    averages = [each for state in engine.adam.state.values() for each in state.values()]
    parts = {
        "weights": [*parameters, *partitions],
        "gradients": gradients,
        "optimizer": [*engine.zero.masters(), *averages],
        "teacher": [*teacher.masters, *teacher.compensation, *teacher.module.parameters()],
    }
    sizes = {}
    for name, tensors in parts.items():
        addresses = {each.untyped_storage().data_ptr() for each in tensors if each is not None}
        sizes[name] = sum(live.pop(address, 0) for address in addresses)
    sizes["rest"] = sum(live.values())
    return sizes


if __name__ == "__main__":
    start_process_group()
    for line in sys.stdin:
        of_ranks = gather(measure(json.loads(line)))
        gc.collect()
        if is_main():
            largest = {name: max(each[name] for each in of_ranks) for name in of_ranks[0]}
            print("MEASURED", json.dumps(largest), flush=True)
    stop_process_group()
