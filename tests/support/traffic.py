"""One rank of tests/tools/test_traffic.py: count the bytes that a training step sends, by part.

Reads command-line arguments from standard input, one JSON list a line. For each, rank 0 prints as JSON after the word
SENT three counts of the step after the second update, each the mean over the ranks:

    ring     size of the tensors of each collective, times the share that a ring algorithm sends of them
    wire     bytes that the kernel has sent over this process's TCP connections
    headers  gloo's own bytes among them: of as many collectives of the same kinds with next to no content
"""

import contextlib
import json
import os
import socket
import struct
import sys
from collections import Counter

import torch
import torch.distributed as dist
from memory import batch_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddae.config import deepspeed as ds_config
from ddae.config.cli import parse
from ddae.config.pretrain import beta_names
from ddae.distributed.comm import barrier, gather, is_main, world_size
from ddae.distributed.engine import Engine, start_process_group, stop_process_group
from ddae.method.betas import Betas
from ddae.method.model import build_model
from ddae.training.metrics import LossMeter
from ddae.training.optimizer import build_optimizer
from ddae.training.step import ForwardPass, TeacherTargets, build_targets, resolve_auto

SHARES = {"allreduce_": 2, "_allgather_base_": 1, "_reduce_scatter_base_": 1}  # times (ranks - 1) / ranks
BYTES_SENT = 200  # offset of tcpi_bytes_sent in Linux's struct tcp_info, before tcpi_bytes_retrans
CALLS = 50  # of a collective, to measure its headers
STEPS = 3  # the first update allocates state, and DeepSpeed records ZeRO-3's order of modules in the first step


class Collectives(TorchDispatchMode):
    """Adds up the bytes of every collective, by phase and kind."""

    def __init__(self):
        super().__init__()
        self.bytes, self.calls, self.phase = Counter(), Counter(), ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            # The largest tensor is a gather's output and a scatter's input; lists are of one tensor each.
            sizes = [each.nbytes for each in tree_leaves(args) if isinstance(each, torch.Tensor)]
            if name != "barrier":
                self.bytes[self.phase, name] += max(sizes)
                self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def bytes_on_the_wire() -> int:
    """Return the bytes that this process has sent over all its TCP connections."""
    total = 0
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(descriptor))) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                sent, again = struct.unpack_from("QQ", info, BYTES_SENT)
                total += sent - again
    return total


def measure(args: list[str]) -> dict[str, dict[str, float]]:
    """Return the bytes of the last step by phase (forward, backward, step, betas, teacher, log), headers by kind."""
    config = parse(args)
    resolved = ds_config.resolve(ds_config.load(config.ds_config), config, world_size())
    model = build_model(resolve_auto(config, resolved.json))
    engine = Engine(model, build_optimizer(model, config.optim), resolved.json, config.engine.gradient_reduction)
    targets = build_targets(config, engine)
    betas = Betas(beta_names(config), config.dynamic, config.optim.adam_betas, engine.device)
    accumulation = resolved.json["gradient_accumulation_steps"]
    forward = ForwardPass(config, engine, targets, betas, 1 / accumulation, "reference")
    meter, wire = LossMeter(engine.module.metric_names()), Counter()
    with Collectives() as collectives:

        @contextlib.contextmanager
        def phase(name: str):
            barrier()
            collectives.phase, before = name, bytes_on_the_wire()
            yield
            wire[name] += bytes_on_the_wire() - before

        for step in range(STEPS):
            collectives.bytes.clear()
            collectives.calls.clear()
            wire.clear()
            meter.reset()
            for _ in range(accumulation):
                with phase("forward"):
                    losses = forward(batch_of(config, resolved.micro_batch), 1.0, step, measure=True)
                with phase("backward"):
                    engine.backward(losses.total)
                meter.add(losses.total, losses.metrics())
                with phase("step"):
                    applied = engine.step(1e-4)
            with phase("betas"):
                betas.step(1e-4, applied)
            with phase("teacher"):
                targets.update(0.99, applied)
                if isinstance(targets, TeacherTargets):
                    _ = targets.teacher.module  # waits for the weights of the other ranks
            with phase("log"):
                row = meter.read(betas)
                if forward.monitor is not None:
                    forward.monitor.read(row, warmed_up=False)
    ring = Counter()
    for (name, kind), size in collectives.bytes.items():
        part = {"step": "gather", "teacher": "teacher"}.get(name, "prefetch") if kind == "_allgather_base_" else name
        ring[part] += size * SHARES[kind] * (world_size() - 1) / world_size()
    headers = {kind: count * header_bytes(kind) for kind, count in collectives.calls.items()}
    return {"ring": dict(ring), "wire": dict(wire), "headers": headers}


def header_bytes(kind: str) -> float:
    """Return the bytes on the wire of a collective with a byte of each rank."""
    whole, part = torch.zeros(world_size(), dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)
    run = {
        "allreduce_": lambda: dist.all_reduce(whole),
        "_allgather_base_": lambda: dist.all_gather_into_tensor(whole, part),
        "_reduce_scatter_base_": lambda: dist.reduce_scatter_tensor(part, whole),
    }[kind]
    run()  # connects
    barrier()
    before = bytes_on_the_wire()
    for _ in range(CALLS):
        run()
    return (bytes_on_the_wire() - before) / CALLS


if __name__ == "__main__":
    start_process_group()
    for line in sys.stdin:
        of_ranks = gather(measure(json.loads(line)))
        if is_main():
            means = {
                kind: {name: sum(each[kind].get(name, 0) for each in of_ranks) / len(of_ranks) for name in names}
                for kind, names in of_ranks[0].items()
            }
            print("SENT", json.dumps(means), flush=True)
    stop_process_group()
