"""One rank of tests/distributed/test_numerics.py: compare gradients with plain autograd, and the teacher with float64.

Reads command-line arguments from standard input, one JSON list a line. For each, rank 0 prints the relative errors as
JSON after the word ERRORS, the largest of all ranks.
"""

import copy
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


def compare(args: list[str]) -> dict[str, float]:
    """Return the relative errors of the parameters' gradients, the betas' gradients and the EMA teacher.

    An error of parameters is relative to the largest gradient of their layer. "reduction" is the largest difference
    between gradients that this project and DeepSpeed have reduced, "fp32_sums" whether ranks sum in fp32, "gather" the
    difference between the teacher's weights that run forward and the master weights of all ranks.
    """
    config = parse(args)
    resolved = ds_config.resolve(ds_config.load(config.ds_config), config, world_size())
    accumulation = config.data.batch_size // (resolved.micro_batch * world_size())
    engine = Engine(*with_optimizer(config), copy.deepcopy(resolved.json), "lean")
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
    plain = EagerEngine(build_model(config), config.engine.precision)
    plain_betas = new_betas()
    for batch in batches:
        plain_forward = ForwardPass(config, plain, TeacherTargets(config, plain, teacher), plain_betas, *share)
        plain_forward(batch, 0.5).total.backward()
    expected = {}
    for name, parameter in plain.module.named_parameters():
        gradient = parameter.grad.clone()
        dist.all_reduce(gradient)
        expected[name] = gradient / world_size()

    other = Engine(*with_optimizer(config), copy.deepcopy(resolved.json), "deepspeed")
    betas, other_betas = new_betas(), new_betas()
    for each, of_betas in ((other, other_betas), (engine, betas)):
        for batch in batches:
            losses = ForwardPass(config, each, targets, of_betas, *share)(batch, 0.5)
            each.backward(losses.total)
            if batch is not batches[-1]:
                each.step(0.0)
    reduced = torch.cat([full_gradient(engine, parameter).float() for parameter in engine.module.parameters()])
    by_deepspeed = torch.cat([full_gradient(other, parameter).view(-1) for parameter in other.module.parameters()])
    reduction = float((reduced - by_deepspeed).abs().max())
    fp32_sums = set(getattr(engine.deepspeed.optimizer, "ipg_buckets", {})) == {torch.float32}
    layers: dict[str, list[tuple[float, float]]] = {}
    for name, parameter in engine.module.named_parameters():
        gradient = full_gradient(engine, parameter).view_as(expected[name])
        error = float((gradient - expected[name]).abs().max())
        layers.setdefault(name.rsplit(".", 2)[0], []).append((error, float(expected[name].abs().max())))
    worst = max(max(e for e, _ in of_layer) / max(m for _, m in of_layer) for of_layer in layers.values())

    engine.step(0.0)
    betas.step(0.0, torch.ones(()))
    all_seeds = torch.cat([torch.cat(list(each)) for each in gather([batch.seeds for batch in batches])])
    mask = sample_mask(config.mask.kind, all_seeds, config.grid, config.num_masked)
    values = plain_betas.values.detach().clone().requires_grad_()
    norm = dk.weight_norm(masked_distance(mask, config.grid, "reference"), values, config.dynamic.norm_batch).sum()
    (config.dynamic.weight_norm_coef * norm + config.dynamic.beta_l2 / 2 * values.square().sum()).backward()
    loss_gradient = plain_betas.values.grad.clone()
    dist.all_reduce(loss_gradient)
    expected_betas = loss_gradient / world_size() + values.grad
    betas_error = float((betas.gradient - expected_betas).abs().max() / expected_betas.abs().max())
    errors = {"parameters": worst, "betas": betas_error, "reduction": reduction, "fp32_sums": fp32_sums}
    errors["teacher"] = teacher_error(engine, teacher)
    return errors | {"gather": gather_error(teacher)}


def with_optimizer(config) -> tuple[torch.nn.Module, torch.optim.AdamW]:
    """Return a new model and its optimizer."""
    model = build_model(config)
    return model, build_optimizer(model, config.optim)


def full_gradient(engine: Engine, parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return the averaged gradient of a parameter, from the partitions of all ranks."""
    averaged = getattr(engine.deepspeed.optimizer, "averaged_gradients", {})
    if not any(hasattr(of_group, "flat_partition") for of_group in averaged.values()):
        return safe_get_full_grad(parameter).flatten()
    whole, mapping = torch.zeros(parameter.numel()), parameter._hp_mapping
    if mapping is not None:
        address, start = mapping.get_hp_fragment_address(), mapping.lp_fragment_address.start
        flat = averaged[mapping.param_group_index].flat_partition
        whole[start : start + address.numel] = flat.narrow(0, address.start, address.numel)
    dist.all_reduce(whole)
    return whole


def teacher_error(engine: Engine, teacher) -> float:
    """Return the teacher's error after 1,000 updates at momentum 0.99999, with weights 1 % away.

    It is the norm of the difference from float64, divided by the norm of the change.
    """
    steps, momentum = 1000, 0.99999
    shards = engine.masters(engine.module.encoder)
    starts = [master.double() for master in teacher.masters]
    goals = [(master * 1.01).float() for master in teacher.masters]
    for shard, goal in zip(shards, goals, strict=True):
        shard.values.copy_(goal)
    for _ in range(steps):
        teacher.update(momentum)
    error = change = 0.0
    for start, goal, master in zip(starts, goals, teacher.masters, strict=True):
        exact = goal.double() + (start - goal.double()) * momentum**steps
        error += float((master.double() - exact).square().sum())
        change += float((exact - start).square().sum())
    totals = gather((error, change))
    return (sum(each[0] for each in totals) / sum(each[1] for each in totals)) ** 0.5


def gather_error(teacher) -> float:
    """Return the largest difference between the teacher's weights and the sum of all ranks' rounded master weights."""
    error = 0.0
    for name, parameter in teacher.module.named_parameters():
        whole = torch.zeros_like(parameter).flatten()
        for shard in teacher.local_shards()["teacher"]:
            if shard.name == name:
                whole[shard.start : shard.start + shard.values.numel()] = shard.values
        if teacher.sharded:
            dist.all_reduce(whole)
        error = max(error, float((whole.view_as(parameter) - parameter).abs().max()))
    return error


if __name__ == "__main__":
    start_process_group()
    for line in sys.stdin:
        of_ranks = gather(compare(json.loads(line)))
        if is_main():
            largest = {name: max(each[name] for each in of_ranks) for name in of_ranks[0]}
            print("ERRORS", json.dumps(largest), flush=True)
    stop_process_group()
