"""One rank of tests/distributed/test_numerics.py: gradients compared with plain autograd, the teacher with float64.

Reads lists of words from its standard input, one a line; rank 0 prints what it found as JSON, one a line.
"""

import json
import sys

import ddae_kernels as dk
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from memory import batch_of

from ddae.config import deepspeed as ds_config
from ddae.config.cli import parse
from ddae.config.pretrain import beta_names
from ddae.data.loader import Batch
from ddae.data.masking import sample_mask
from ddae.distributed.comm import gather, is_main, rank, world_size
from ddae.distributed.engine import Engine, start_process_group, stop_process_group
from ddae.method.betas import Betas
from ddae.method.distance import masked_distance
from ddae.method.model import build_model
from ddae.tools.replay import EagerEngine
from ddae.training.optimizer import build_optimizer
from ddae.training.step import ForwardPass, TeacherTargets, build_targets


def compare(words: list[str]) -> dict[str, float]:
    config = parse(words)
    resolved = ds_config.resolve(ds_config.load(config.ds_config), config, world_size())
    accumulation = config.data.batch_size // (resolved.micro_batch * world_size())
    method = build_model(config)
    engine = Engine(method, build_optimizer(method, config.optim), resolved.json)
    targets = build_targets(config, engine)
    assert isinstance(targets, TeacherTargets)
    teacher = targets.teacher
    new_betas = lambda: Betas(beta_names(config), config.dynamic, config.optim.adam_betas, engine.device)  # noqa: E731
    torch.manual_seed(rank())
    first = rank() * accumulation * resolved.micro_batch
    batches = []
    for number in range(accumulation):
        batch = batch_of(config, resolved.micro_batch)
        batches.append(Batch(batch.images, batch.seeds + first + number * resolved.micro_batch, batch.samples))

    share = (1 / accumulation, "reference")
    plain = EagerEngine(build_model(config), "fp32")
    plain_betas = new_betas()
    for batch in batches:
        plain_forward = ForwardPass(config, plain, TeacherTargets(config, plain, teacher), plain_betas, *share)
        plain_forward(batch, 0.5).total.backward()
    wanted = {}
    for name, parameter in plain.module.named_parameters():
        gradient = parameter.grad.clone()
        dist.all_reduce(gradient)
        wanted[name] = gradient / world_size()

    betas = new_betas()
    for batch in batches:
        losses = ForwardPass(config, engine, targets, betas, *share)(batch, 0.5)
        engine.backward(losses.total)
        if batch is not batches[-1]:
            engine.step(0.0)
    layers: dict[str, list[tuple[float, float]]] = {}
    for name, parameter in engine.module.named_parameters():
        given = safe_get_full_grad(parameter)
        apart = float((given.view_as(wanted[name]) - wanted[name]).abs().max())
        layers.setdefault(name.rsplit(".", 2)[0], []).append((apart, float(wanted[name].abs().max())))
    worst = max(max(a for a, _ in of_layer) / max(m for _, m in of_layer) for of_layer in layers.values())

    engine.step(0.0)
    betas.step(0.0, torch.ones(()))
    everyone = torch.cat([torch.cat(list(each)) for each in gather([batch.seeds for batch in batches])])
    mask = sample_mask(config.mask.kind, everyone, config.grid, config.num_masked)
    values = plain_betas.values.detach().clone().requires_grad_()
    norm = dk.weight_norm(masked_distance(mask, config.grid, "reference"), values, config.dynamic.norm_batch).sum()
    (config.dynamic.weight_norm_coef * norm + config.dynamic.beta_l2 / 2 * values.square().sum()).backward()
    of_loss = plain_betas.values.grad.clone()
    dist.all_reduce(of_loss)
    wanted_betas = of_loss / world_size() + values.grad
    of_betas = float((betas.gradient - wanted_betas).abs().max() / wanted_betas.abs().max())
    return {"parameters": worst, "betas": of_betas, "teacher": follow(engine, teacher)}


def follow(engine: Engine, teacher) -> float:
    """1,000 steps at m = 0.99999 towards weights 1 % away: the error against float64 over the distance travelled."""
    steps, momentum = 1000, 0.99999
    fragments = engine.masters(engine.module.encoder)
    starts = [master.double() for master in teacher.masters]
    goals = [(master * 1.01).float() for master in teacher.masters]
    for fragment, goal in zip(fragments, goals, strict=True):
        fragment.values.copy_(goal)
    for _ in range(steps):
        teacher.update(momentum)
    error = travelled = 0.0
    for start, goal, master in zip(starts, goals, teacher.masters, strict=True):
        exact = goal.double() + (start - goal.double()) * momentum**steps
        error += float((master.double() - exact).square().sum())
        travelled += float((exact - start).square().sum())
    totals = gather((error, travelled))
    return (sum(each[0] for each in totals) / sum(each[1] for each in totals)) ** 0.5


if __name__ == "__main__":
    start_process_group()
    for line in sys.stdin:
        found = gather(compare(json.loads(line)))
        if is_main():
            print("FOUND", json.dumps({name: max(each[name] for each in found) for name in found[0]}), flush=True)
    stop_process_group()
