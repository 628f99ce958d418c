"""The DeepSpeed engine: process group, forward, backward, optimizer step, fp32 master weights."""

import contextlib
import glob
import os
import socket
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddae.distributed.checkpoint_format import TensorShard
from ddae.distributed.comm import barrier, device, record_collectives, sum_over_ranks, world_size
from ddae.distributed.cores import bind_cores
from ddae.distributed.failures import operators_may_be_built
from ddae.distributed.gradient_reduction import replace_reduction
from ddae.distributed.logs import configure_logging
from ddae.distributed.zero_state import AVERAGES, ZeroState, deepspeed, set_world_group, skip_shared_memory_op
from ddae.errors import UserError, one_line

OTHER_LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # set by launchers that are not supported


def start_process_group(timeout_s: float = 600.0) -> None:
    """Join the ranks that the launcher started; without a launcher this process is the only rank.

    Each rank is bound to its own cores. timeout_s: seconds after which a rank that waits for another gives up. Raise
    UserError if the ranks cannot connect.
    """
    configure_logging()  # again: DeepSpeed has been imported
    if "RANK" not in os.environ:
        if launchers := [name for name in OTHER_LAUNCHERS if int(os.environ.get(name, "1")) > 1]:
            raise UserError(
                f"{launchers[0]} is set but RANK is not: these processes would train separately. "
                "Start them with deepspeed, torchrun or srun; docs/cluster.md has the commands."
            )
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ |= alone | {"MASTER_PORT": str(_free_port())}
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
        os.environ["LOCAL_RANK"] = str(device().index)  # which DeepSpeed reads
    if not dist.is_initialized():
        record_collectives()
        timeout = timedelta(seconds=timeout_s)
        if world_size() == 1:
            skip_shared_memory_op()
        try:
            with operators_may_be_built():
                deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=timeout)
        except RuntimeError as error:  # of the rendezvous store, or of gloo, which then connects pairs of ranks
            reason, port = str(error).splitlines()[0], os.environ.get("MASTER_PORT")
            if isinstance(error, dist.DistError):
                fix = "Free the port, or choose another with deepspeed --master_port."
                raise UserError(f"the ranks cannot connect on port {port} ({reason}). {fix}") from None
            if "connect" in reason:
                fix = "Set GLOO_SOCKET_IFNAME to the network interface that joins the nodes; see docs/cluster.md."
                raise UserError(f"the ranks cannot reach each other ({reason}). {fix}") from None
            raise
        set_world_group(dist.new_group(timeout=timeout))  # DeepSpeed's copy would keep torch's ten minutes
        barrier()
        _unlink_shared_memory()
        bind_cores()


def stop_process_group() -> None:
    """Destroy the process group on all ranks together: one that leaves early breaks the others' connections."""
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()


def _unlink_shared_memory() -> None:
    """Unlink DeepSpeed's shared-memory buffers on the CPU (69 MB a rank), which would outlive the process.

    All ranks have mapped them by now; the memory is freed when the last one ends, even if it is killed.
    """
    for buffer in glob.glob(f"/dev/shm/deepspeed_allreduce_buffer_*_{os.environ['MASTER_PORT']}_{os.environ['RANK']}"):
        with contextlib.suppress(OSError):
            os.unlink(buffer)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def plain_deepspeed(module: nn.Module, optimizer: torch.optim.Optimizer, ds_json: dict[str, Any]) -> Any:
    """Return DeepSpeed's engine without anything of this project's: the baseline of benchmarks."""
    return deepspeed.initialize(model=module, optimizer=optimizer, config=ds_json, dist_init_required=False)[0]


class Engine:
    """A module under DeepSpeed: forward and backward of micro-batches, then one optimizer step.

    A parameter group of the optimizer may have an `lr_scale`, a factor of the step's learning rate.

    DeepSpeed's check for non-finite gradients and its clipping synchronise host and device at every step, and launch
    eight small kernels a parameter. Where possible (ZeRO 1 and 2 without offload, ZeRO 0 without bf16) both are done
    here on the device instead: AdamW's fused kernel takes `found_inf` and `grad_scale`, as GradScaler uses them.
    """

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.AdamW, ds_json: dict[str, Any], gradient_reduction: str = "auto"
    ):
        """Raise UserError if DeepSpeed rejects the JSON. gradient_reduction: as in PretrainEngineConfig."""
        try:
            deepspeed.DeepSpeedConfig(ds_json)
        except Exception as error:  # pydantic's, DeepSpeed's own, assertions
            raise UserError(f"DeepSpeed rejects the JSON: {one_line(error, 300)}") from None
        zero, bf16 = ds_json.get("zero_optimization", {}), ds_json.get("bf16", {}).get("enabled", False)
        stage, offload = zero.get("stage", 0), (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
        self._check_on_device = (stage in (1, 2) and not offload) or (stage == 0 and not bf16)
        self._clip_grad = 0.0
        if self._check_on_device:
            self._clip_grad, ds_json = ds_json.get("gradient_clipping", 0.0), _without_gradient_check(ds_json)
        with operators_may_be_built():
            self.deepspeed, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=ds_json, dist_init_required=False
            )
        if gradient_reduction == "lean" or (gradient_reduction == "auto" and device().type == "cpu"):
            replace_reduction(self.deepspeed.optimizer, zero)
        self.adam = optimizer
        self.zero = ZeroState(self.deepspeed, optimizer)
        self.stage = self.zero.stage
        if self.stage == 0:
            optimizer.state.clear()  # in bf16 DeepSpeed has stepped on zero gradients, which Adam would count
        self.device = device()
        self._applied = torch.ones((), device=self.device)
        self._grad_norm: Tensor | None = None

    @property
    def module(self) -> Any:
        return self.deepspeed.module

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights that run forward."""
        return next(self.module.parameters()).dtype

    @property
    def sharded(self) -> bool:
        """Whether each rank owns a part of the master weights; otherwise every rank has them all."""
        return self.stage > 0 and world_size() > 1

    def autocast(self) -> torch.autocast:
        """Return the autocast context in which the student runs forward: bf16 products if the weights are fp32."""
        enabled = self.deepspeed.torch_autocast_enabled()
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def __call__(self, *inputs: object) -> Any:
        return self.deepspeed(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Compute gradients of one micro-batch. loss []: its share of the step's; the upstream gradient is 1."""
        # A view: given the very tensor that it returned, DeepSpeed 0.19.8 divides by the accumulation at stage 0.
        self.deepspeed.backward(loss.view_as(loss), scale_wrt_gas=False)

    def step(self, lr: float) -> Tensor:
        """End a micro-batch; after the last one of a step update the weights.

        Return float32 [], on the device: 1 if the weights were updated, 0 if a gradient was non-finite on any rank. The
        step then is skipped on all ranks.
        """
        for group in cast(torch.optim.Optimizer, self.deepspeed.optimizer).param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        boundary = self.deepspeed.is_gradient_accumulation_boundary()
        if boundary and self._check_on_device:
            self._check_and_clip()
        self.deepspeed.step()
        if boundary and not self._check_on_device:
            self._applied = torch.full((), float(self.deepspeed.was_step_applied()), device=self.device)
        return self._applied

    def grad_norm(self) -> float:
        """Return the norm of the last step's gradients before clipping. Synchronises host and device."""
        norm = self._grad_norm if self._check_on_device else self.deepspeed.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def _check_and_clip(self) -> None:
        """Tell AdamW, on the device, whether to skip this step and what to divide the gradients by."""
        squares = self.zero.gradient_norms().square().sum()
        if self.sharded:
            sum_over_ranks(squares)  # at stage 0 all ranks have the same gradients
        norm = squares.sqrt()
        self._grad_norm, self._applied = norm, norm.isfinite().float()
        scale = (norm / self._clip_grad).clamp(min=1) if self._clip_grad else None
        self.adam.found_inf = 1 - self._applied  # type: ignore[attr-defined]
        self.adam.grad_scale = scale  # type: ignore[attr-defined]

    def masters(self, module: nn.Module) -> list[TensorShard]:
        """Return this rank's slices of the fp32 master weights of the module or a submodule: views."""
        return self.zero.shards(module, "weight")

    def state_dict(self) -> int:
        """Return the number of updates, on which Adam's bias correction depends."""
        return int(next((state["step"] for state in self.adam.state.values()), 0))

    def load_state_dict(self, state: int) -> None:
        """Allocate Adam's averages, to be filled through local_shards(); sync_model_weights() comes last."""
        self.zero.allocate_averages(state)

    def local_shards(self) -> dict[str, list[TensorShard]]:
        """Return this rank's slices of the master weights and of Adam's averages: fp32 views."""
        return {kind: self.zero.shards(self.module, kind) for kind in ("weight", *AVERAGES)}

    def sync_model_weights(self) -> None:
        """Copy the master weights into the weights that run forward. All ranks call it."""
        self.zero.sync_model_weights()

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the whole fp32 master weights of the module or a submodule, on the CPU. All ranks call it."""
        shards: dict[str, list[TensorShard]] = {}
        for shard in self.masters(module):
            shards.setdefault(shard.name, []).append(shard)
        weights = {}
        for name, parameter in module.named_parameters():
            shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty placeholder
            whole = torch.zeros(shape.numel(), device=self.device)
            for shard in shards.get(name, []):
                whole[shard.start : shard.start + shard.values.numel()] = shard.values
            weights[name] = (sum_over_ranks(whole) if self.sharded else whole).view(shape).cpu()
        return weights


def _without_gradient_check(ds_json: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON with DeepSpeed's own gradient check and clipping switched off."""
    zero, bf16 = dict(ds_json.get("zero_optimization", {})), dict(ds_json.get("bf16", {}))
    bf16["check_grad_overflow"] = False
    if zero.get("stage", 0):
        zero["compute_grad_norm"] = False
    if zero.get("stage", 0) and world_size() == 1:
        zero["overlap_comm"] = False  # nothing to overlap, and DeepSpeed synchronises the device after it
    return ds_json | {"gradient_clipping": 0.0, "bf16": bf16} | ({"zero_optimization": zero} if zero else {})
