"""DeepSpeed's internals: where each ZeRO stage keeps fp32 master weights, Adam's averages and gradients.

Beside gradient_reduction.py the only module that reads undocumented attributes of DeepSpeed. REQUIRED lists them
by ZeRO stage; a DeepSpeed that lacks one is refused at start, by name.
"""

import importlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ddae.distributed.checkpoint_format import TensorShard
from ddae.distributed.comm import rank

# DeepSpeed's autotuner imports mlflow if it can, which takes a second on every rank: hide it meanwhile.
sys.modules.setdefault("mlflow", None)  # type: ignore[arg-type]
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns that it found no GPU
import deepspeed  # noqa: E402
from deepspeed.utils import groups  # noqa: E402

if sys.modules["mlflow"] is None:
    del sys.modules["mlflow"]
deepspeed_comm = importlib.import_module("deepspeed.comm.torch")  # deepspeed.comm.torch itself is PyTorch

REQUIRED = {  # ZeRO stage -> attributes of DeepSpeed's optimizer (ours itself at stage 0 in fp32)
    0: (),
    1: ("single_partition_of_fp32_groups", "averaged_gradients", "update_lp_params"),
    2: ("single_partition_of_fp32_groups", "averaged_gradients", "update_lp_params"),
    3: (
        *("fp32_partitioned_groups_flat", "persistent_parameters", "invalidate_secondary_tensor"),
        *("_reassign_or_swap_out_partitioned_parameters", "_get_fp32_opt_state_partition"),
    ),
}
REQUIRED_OF_PARAMETERS = {0: (), 1: ("_hp_mapping",), 2: ("_hp_mapping",), 3: ("ds_numel", "ds_shape", "ds_tensor")}
NORM_ROW = 4096  # numbers of a flat gradient whose norm is taken at a time: a CPU rounds longer sums visibly
AVERAGES = ("exp_avg", "exp_avg_sq")  # Adam's, beside "weight" for the master weights


def set_world_group(group: Any) -> None:
    """Replace the process group by which DeepSpeed reduces and gathers, for a timeout of our own."""
    assert hasattr(groups, "_WORLD_GROUP"), _changed("deepspeed.utils.groups._WORLD_GROUP")
    groups._WORLD_GROUP = group


def skip_shared_memory_op() -> None:
    """Do not build DeepSpeed's shared-memory collectives, which take 20 s to compile and serve several CPU ranks."""
    assert hasattr(deepspeed_comm, "build_shm_op"), _changed("deepspeed.comm.torch.build_shm_op")
    deepspeed_comm.build_shm_op = lambda: None  # type: ignore[attr-defined]


class ZeroState:
    """fp32 master weights, Adam's averages and gradients of a DeepSpeed engine, at any ZeRO stage and precision."""

    def __init__(self, engine: Any, adam: torch.optim.Optimizer):
        """Raise RuntimeError naming the attribute if this version of DeepSpeed lacks one that is read here."""
        self.module, self.optimizer, self.adam = engine.module, engine.optimizer, adam
        self.stage: int = engine.zero_optimization_stage()
        for name in REQUIRED[self.stage]:
            if not hasattr(self.optimizer, name):
                raise RuntimeError(_changed(f"{type(self.optimizer).__name__}.{name}"))
        parameter = next(iter(self.module.parameters()))
        for name in REQUIRED_OF_PARAMETERS[self.stage]:
            if not hasattr(parameter, name):
                raise RuntimeError(_changed(f"parameter.{name}"))

    def masters(self) -> list[Tensor]:
        """Return the fp32 tensors that Adam updates on this rank."""
        if self.stage == 3:
            return self.optimizer.fp32_partitioned_groups_flat
        if self.stage > 0:
            return self.optimizer.single_partition_of_fp32_groups
        by_parameter = self._masters_by_parameter()
        parameters: list[nn.Parameter] = list(self.module.parameters())
        return [by_parameter.get(parameter, parameter) for parameter in parameters]

    def gradient_norms(self) -> Tensor:
        """Return the norms of parts of this rank's averaged gradients before a step, at stages 0 to 2: float32 [n]."""
        if self.stage == 0:
            gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
            return torch.stack(torch._foreach_norm(gradients, dtype=torch.float32))
        norms: list[Tensor] = []
        for group in self.optimizer.averaged_gradients.values():
            if (flat := getattr(group, "flat_partition", None)) is None:
                norms += torch._foreach_norm(group, dtype=torch.float32)
                continue
            rows, rest = flat.split([flat.numel() // NORM_ROW * NORM_ROW, flat.numel() % NORM_ROW])
            norms.append(torch.linalg.vector_norm(rows.view(-1, NORM_ROW), dim=1, dtype=torch.float32))
            norms.append(torch.linalg.vector_norm(rest, dtype=torch.float32))
        return torch.cat([norm.view(-1) for norm in norms])

    def shards(self, module: nn.Module, kind: str) -> list[TensorShard]:
        """Return this rank's slices of a module's master weights (kind "weight") or of an average of Adam's: views."""
        return [shard for shard in self._shards(module, kind) if shard.values.numel()]

    def allocate_averages(self, step: int) -> None:
        """Give Adam zero averages and its step count, which DeepSpeed allocates only at the first step."""
        for master in self.masters():
            averages = {name: torch.zeros_like(master) for name in AVERAGES}
            self.adam.state[master] = {"step": torch.tensor(float(step), device=master.device), **averages}

    def sync_model_weights(self) -> None:
        """Copy the master weights into the weights that run forward. All ranks call it."""
        optimizer = self.optimizer
        if self.stage == 3:
            for group in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if persistent := optimizer.persistent_parameters:  # small ones, which every rank has whole
                persistent[0].partition(persistent)
                persistent[0].all_gather(persistent)
            optimizer.invalidate_secondary_tensor()  # of zero_hpz_partition_size: a copy within each node
        elif self.stage > 0:
            optimizer.update_lp_params()
        else:
            with torch.no_grad():
                for parameter, master in self._masters_by_parameter().items():
                    parameter.copy_(master)

    def _shards(self, module: nn.Module, kind: str) -> Iterator[TensorShard]:
        if kind != "weight" and not self.adam.state:
            self.allocate_averages(0)

        def pick(master: Tensor) -> Tensor:
            return master if kind == "weight" else self.adam.state[master][kind]

        whole = self._masters_by_parameter() if self.stage == 0 else {}
        for name, parameter in module.named_parameters():
            if self.stage == 3:
                key = None if kind == "weight" else kind
                values, _ = self.optimizer._get_fp32_opt_state_partition(parameter, True, key)
                start = rank() * values.numel()
                numel: int = parameter.ds_numel  # type: ignore[attr-defined]
                yield TensorShard(name, start, values.detach()[: max(0, numel - start)])  # the last one is padded
            elif self.stage > 0:
                mapping = parameter._hp_mapping  # type: ignore[attr-defined]
                if mapping is None:  # none of it is on this rank
                    continue
                flat = pick(self.optimizer.single_partition_of_fp32_groups[mapping.param_group_index])
                address = mapping.get_hp_fragment_address()
                values = flat.detach().narrow(0, address.start, address.numel)
                yield TensorShard(name, mapping.lp_fragment_address.start, values)
            else:
                yield TensorShard(name, 0, pick(whole.get(parameter, parameter)).detach().flatten())

    def _masters_by_parameter(self) -> dict[nn.Parameter, Tensor]:
        """Return stage 0's masters in bf16: DeepSpeed's optimizer keeps one fp32 tensor a parameter."""
        low = getattr(self.optimizer, "fp16_groups", [])
        high = getattr(self.optimizer, "fp32_groups", [])
        return {p: m for lows, highs in zip(low, high, strict=True) for p, m in zip(lows, highs, strict=True)}


def _changed(attribute: str) -> str:
    return (
        f"DeepSpeed {deepspeed.__version__} has no {attribute}, which ddae reads; "
        "expected deepspeed>=0.19.8,<0.20. Install the version that constraints.txt pins."
    )
