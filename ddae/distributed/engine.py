"""DeepSpeed: start, step, and the fp32 masters of the encoder. With checkpoint.py the only file that knows it."""

import contextlib
import glob
import logging
import os
import socket
from datetime import timedelta
from typing import Any, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch import Tensor, nn

from ddae.distributed.checkpoint_format import Fragment
from ddae.distributed.comm import barrier, device, rank, sum_over_ranks, world_size
from ddae.errors import UserError

OTHER_LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # whose words are not read


def start_process_group(patience: float = 600.0) -> None:
    """Join the ranks that the launcher started; a process without a launcher is the only rank.

    A rank that has waited `patience` seconds for another gives up.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    if "RANK" not in os.environ:
        others = [name for name in OTHER_LAUNCHERS if int(os.environ.get(name, "1")) > 1]
        if others:
            raise UserError(
                f"{others[0]} says that there are several processes, but RANK is not set: start them with deepspeed, "
                "torchrun or srun (docs/cluster.md has the lines)"
            )
        os.environ |= alone | {"MASTER_PORT": str(_free_port())}
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    if not dist.is_initialized():
        try:
            deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=timedelta(seconds=patience))
        except RuntimeError as error:  # of the store that they meet at, or of gloo, which then connects them in pairs
            reason, port = str(error).splitlines()[0], os.environ.get("MASTER_PORT")
            if isinstance(error, dist.DistError):
                mend = "free it or choose another with deepspeed --master_port"
                raise UserError(f"the ranks cannot meet on port {port} ({reason}): {mend}") from None
            if "connect" in reason:
                mend = "name the network that joins the nodes in GLOO_SOCKET_IFNAME (docs/cluster.md says where)"
                raise UserError(f"the ranks do not reach each other ({reason}): {mend}") from None
            raise
        # DeepSpeed's copy of the group, which reduces and gathers, would give up after torch's ten minutes.
        groups._WORLD_GROUP = dist.new_group(timeout=timedelta(seconds=patience))
        barrier()
        _remove_buffers()


def stop_process_group() -> None:
    """Leave together: a rank that goes early breaks the connections of one that still draws or uploads."""
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()


def _remove_buffers() -> None:
    """Take the names of DeepSpeed's shared-memory buffers on the CPU (69 MB a rank), which would outlive their process:
    all ranks have them open by now, and they go with the last one, however that ends."""
    for buffer in glob.glob(f"/dev/shm/deepspeed_allreduce_buffer_*_{os.environ['MASTER_PORT']}_{os.environ['RANK']}"):
        with contextlib.suppress(OSError):
            os.unlink(buffer)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _unguarded(ds_json: dict[str, Any]) -> dict[str, Any]:
    """The JSON without DeepSpeed's own look at the gradients."""
    zero, bf16 = dict(ds_json.get("zero_optimization", {})), dict(ds_json.get("bf16", {}))
    bf16["check_grad_overflow"] = False
    if zero.get("stage", 0):
        zero["compute_grad_norm"] = False
    if zero.get("stage", 0) and world_size() == 1:
        zero["overlap_comm"] = False  # there is nothing to overlap, and DeepSpeed waits for the device after it
    return ds_json | {"gradient_clipping": 0.0, "bf16": bf16} | ({"zero_optimization": zero} if zero else {})


class Engine:
    """A module under DeepSpeed: forward and backward of micro-batches, then one update a step.

    A parameter group of the optimizer may have an `lr_scale`, its learning rate over the step's.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.AdamW, ds_json: dict[str, Any]):
        try:
            deepspeed.DeepSpeedConfig(ds_json)
        except Exception as error:  # pydantic's, DeepSpeed's own and assertions: whatever it has against the JSON
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"DeepSpeed refuses the JSON: {reason}") from None
        zero, low = ds_json.get("zero_optimization", {}), ds_json.get("bf16", {}).get("enabled", False)
        stage, offload = zero.get("stage", 0), (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
        # Where it can be told on the device whether gradients are numbers, and how long they are, that is done here:
        # DeepSpeed would ask the device at each step, with eight small kernels a parameter.
        self._looks = (stage in (1, 2) and not offload) or (stage == 0 and not low)
        self._clip = 0.0
        if self._looks:
            self._clip, ds_json = ds_json.get("gradient_clipping", 0.0), _unguarded(ds_json)
        self.deepspeed, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=ds_json, dist_init_required=False
        )
        self.stage = self.deepspeed.zero_optimization_stage()
        if self.stage == 0:
            optimizer.state.clear()  # in bf16 DeepSpeed has stepped on zero gradients, which Adam would count
        self.adam = optimizer
        self.device = device()
        self._applied = torch.ones((), device=self.device)
        self._grad_norm: Tensor | None = None

    @property
    def module(self) -> Any:
        return self.deepspeed.module

    @property
    def _zero(self) -> Any:
        """DeepSpeed's optimizer, which differs from stage to stage."""
        return self.deepspeed.optimizer

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights that run forward."""
        return next(self.module.parameters()).dtype

    @property
    def sharded(self) -> bool:
        """Whether each rank owns a part of the masters; otherwise every rank has them all."""
        return self.stage > 0 and world_size() > 1

    def autocast(self) -> torch.autocast:
        """The context in which the student runs forward, for the teacher: bf16 products where the weights are fp32."""
        enabled = self.deepspeed.torch_autocast_enabled()
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def __call__(self, *inputs: object) -> Any:
        return self.deepspeed(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Gradients of one micro-batch, whose loss is a share of the step's: an upstream gradient of exactly 1."""
        # A view: given the very tensor that it returned, DeepSpeed 0.19.8 divides by the accumulation at stage 0.
        self.deepspeed.backward(loss.view_as(loss), scale_wrt_gas=False)

    def update(self, lr: float) -> Tensor:
        """End a micro-batch; after a step's last one update the weights. float32 []: 1 where they were updated, else 0.

        A step with a gradient that is no number, on whichever rank, updates nothing on any. At stages 1 and 2, and at 0
        without bf16, the device decides that by itself; at the others, and with offload, DeepSpeed asks it.
        """
        for group in cast(torch.optim.Optimizer, self.deepspeed.optimizer).param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        ends = self.deepspeed.is_gradient_accumulation_boundary()
        if ends and self._looks:
            self._look()
        self.deepspeed.step()
        if ends and not self._looks:
            self._applied = torch.full((), float(self.deepspeed.was_step_applied()), device=self.device)
        return self._applied

    def grad_norm(self) -> float:
        """Of the last step's gradients, before clipping; asks the device."""
        norm = self._grad_norm if self._looks else self.deepspeed.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def _look(self) -> None:
        """Tell AdamW, on the device, whether to leave this step out and what to divide the gradients by."""
        if self.stage == 0:
            gradients = [parameter.grad for parameter in self.module.parameters()]
        else:
            gradients = [gradient for group in self._zero.averaged_gradients.values() for gradient in group]
        norms = torch._foreach_norm([each for each in gradients if each is not None], dtype=torch.float32)
        squares = torch.stack(list(norms)).square().sum()
        if self.sharded:
            sum_over_ranks(squares)  # at stage 0 all ranks have the same gradients
        norm = squares.sqrt()
        self._grad_norm, self._applied = norm, norm.isfinite().float()
        self.adam.found_inf = 1 - self._applied  # type: ignore[attr-defined]  # as torch's own GradScaler has it
        self.adam.grad_scale = (norm / self._clip).clamp(min=1) if self._clip else None  # type: ignore[attr-defined]

    def masters(self, module: nn.Module) -> list[Fragment]:
        """This rank's slices of the fp32 masters of the module or a part of it, at any ZeRO stage and precision: views,
        not copies."""
        return self._fragments(module, "weight")

    def state(self) -> dict[str, list[Fragment]]:
        """This rank's slices of all that an update changes: weights and Adam's two averages, fp32 views."""
        return {of: self._fragments(self.module, of) for of in ("weight", "exp_avg", "exp_avg_sq")}

    def note(self) -> int:
        """How often the weights were updated, which Adam's corrections depend on."""
        return int(next((state["step"] for state in self.adam.state.values()), 0))

    def prepare(self, note: int) -> None:
        """Have Adam's averages, to be filled through state(); then comes publish()."""
        for master in self._masters():
            averages = {name: torch.zeros_like(master) for name in ("exp_avg", "exp_avg_sq")}
            step = torch.tensor(float(note), device=master.device)
            self.adam.state[master] = {"step": step, **averages}

    def publish(self) -> None:
        """Bring the masters into the weights that run forward; all ranks call it."""
        optimizer = self._zero
        if self.stage == 3:
            for group in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if kept := optimizer.persistent_parameters:  # small ones, which every rank has whole
                kept[0].partition(kept)
                kept[0].all_gather(kept)
            optimizer.invalidate_secondary_tensor()  # of zero_hpz_partition_size: a copy within each node
        elif self.stage > 0:
            optimizer.update_lp_params()
        else:
            with torch.no_grad():
                for parameter, master in self._masters_by_parameter().items():
                    parameter.copy_(master)

    def _fragments(self, module: nn.Module, of: str) -> list[Fragment]:
        """This rank's slices of the masters of a module ("weight"), or of an average that Adam keeps of them."""
        if of != "weight" and not self.adam.state:
            self.prepare(0)

        def pick(master: Tensor) -> Tensor:
            return master if of == "weight" else self.adam.state[master][of]

        fragments = []
        whole = self._masters_by_parameter() if self.stage == 0 else {}
        for name, parameter in module.named_parameters():
            if self.stage == 3:
                key = None if of == "weight" else of
                values, _ = self._zero._get_fp32_opt_state_partition(parameter, True, key)
                start = rank() * values.numel()
                values = values.detach()[: max(0, parameter.ds_numel - start)]  # type: ignore[attr-defined]  # the last is padded
            elif self.stage > 0:
                mapping = parameter._hp_mapping  # type: ignore[attr-defined]
                if mapping is None:
                    continue
                flat = pick(self._zero.single_partition_of_fp32_groups[mapping.param_group_index])
                place = mapping.get_hp_fragment_address()
                start, values = mapping.lp_fragment_address.start, flat.detach().narrow(0, place.start, place.numel)
            else:
                start, values = 0, pick(whole.get(parameter, parameter)).detach().flatten()
            if values.numel():
                fragments.append(Fragment(name, start, values))
        return fragments

    def _masters(self) -> list[Tensor]:
        """The fp32 tensors that Adam updates."""
        if self.stage == 3:
            return self._zero.fp32_partitioned_groups_flat
        if self.stage > 0:
            return self._zero.single_partition_of_fp32_groups
        whole = self._masters_by_parameter()
        parameters: list[nn.Parameter] = list(self.module.parameters())
        return [whole.get(parameter, parameter) for parameter in parameters]

    def _masters_by_parameter(self) -> dict[torch.nn.Parameter, Tensor]:
        """Stage 0 in bf16: DeepSpeed's optimizer keeps one fp32 tensor a parameter."""
        groups = (
            getattr(self.deepspeed.optimizer, "fp16_groups", []),
            getattr(self.deepspeed.optimizer, "fp32_groups", []),
        )
        return {p: m for low, high in zip(*groups, strict=True) for p, m in zip(low, high, strict=True)}

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """The fp32 masters of the module or a part of it, whole, on the CPU of every rank."""
        fragments: dict[str, list[Fragment]] = {}
        for fragment in self.masters(module):
            fragments.setdefault(fragment.name, []).append(fragment)
        weights = {}
        for name, parameter in module.named_parameters():
            shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty placeholder
            whole = torch.zeros(shape.numel(), device=self.device)
            for fragment in fragments.get(name, []):
                whole[fragment.start : fragment.start + fragment.values.numel()] = fragment.values
            weights[name] = (sum_over_ranks(whole) if self.sharded else whole).view(shape).cpu()
        return weights
