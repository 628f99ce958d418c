"""The DeepSpeed JSON, joined with what the config owns.

The JSON says what may only change speed or memory: ZeRO stage, buckets, overlap, offload, the micro-batch. The config
owns what changes the loss curve; those keys are written here, and a JSON that says otherwise is refused, or one with a
key that is not known here.
"""

import base64
import difflib
import json
from pathlib import Path
from typing import Any, NamedTuple

from ddae.config.base import Experiment, flatten
from ddae.errors import UserError

GUARD = "nothing (it keeps gradients that are no numbers out of the weights)"
FOREIGN = {  # keys of the JSON that are the config's -> the flag that says the same, if there is one
    "activation_checkpointing": "--engine.activation_checkpointing",
    "optimizer": "--optim.*",
    "scheduler": "--optim.*",
    **dict.fromkeys(("amp", "bfloat16", "data_types", "communication_data_type"), "--engine.precision"),
    **dict.fromkeys(("bf16.bf16_master_weights_and_grads", "bf16.bf16_optimizer_states"), "--engine.precision"),
    **dict.fromkeys(("bf16.check_grad_overflow", "zero_optimization.compute_grad_norm"), GUARD),
}
HARMLESS = {  # keys that change speed, memory or what is said; of all others this project does not know it
    *("zero_optimization", "bf16", "fp16", "torch_autocast", "autotuning", "aio", "timers", "comms_logger"),
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "steps_per_print", "wall_clock_breakdown"),
    *("memory_breakdown", "dump_state", "log_level", "flops_profiler", "tensorboard", "csv_monitor", "wandb", "comet"),
    "disable_python_gc",
}
LOSSY = ("zenflow", "zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
AUTOTUNED = ("train_batch_size", "gradient_accumulation_steps")
BLOCKS = ("zero_optimization", "bf16", "fp16", "torch_autocast")  # keys that hold a block


class Resolved(NamedTuple):
    """What DeepSpeed is given, and the micro-batch of one rank that follows from it."""

    json: dict[str, Any]
    micro_batch: int


def load(path: str) -> dict[str, Any]:
    """Read a DeepSpeed JSON, a file or, as DeepSpeed's autotuner writes it, base64; UserError where it is none."""
    if not path:
        raise UserError("no DeepSpeed JSON is named: add --ds_config ds_configs/zero2.json")
    try:
        settings = json.loads(_from_base64(path) or Path(path).read_text())
    except OSError as error:
        raise UserError(f"--ds_config {path} cannot be read ({error.strerror}): name one of ds_configs/") from None
    except ValueError as error:  # of JSON, or of text
        raise UserError(f"--ds_config {path} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"--ds_config {path} holds a {type(settings).__name__}: expected a JSON object")
    return settings


def _from_base64(word: str) -> str | None:
    try:
        text = base64.urlsafe_b64decode(word).decode()
    except ValueError:  # of base64, or of text
        return None
    return text if text.startswith("{") else None


def resolve(settings: dict[str, Any], config: Experiment, ranks: int) -> Resolved:
    """The settings with the keys that the config owns; UserError where the two contradict each other."""
    for block in BLOCKS:
        if not isinstance(settings.get(block, {}), dict):
            raise UserError(f"the DeepSpeed JSON has {block} = {settings[block]!r}: expected a block in braces")
    if isinstance(settings.get("autotuning"), dict) and settings["autotuning"].get("enabled"):
        # DeepSpeed's autotuner tries micro-batches with a global batch of its own, which is the config's to say
        settings = {key: value for key, value in settings.items() if key not in AUTOTUNED}
    said = flatten(settings)
    for key, flag in FOREIGN.items():
        if key in settings or key in said:
            raise UserError(f"the DeepSpeed JSON names {key!r}, which is the config's to say: use {flag} instead")
    unknown = [key for key in settings if key not in HARMLESS]
    for key in unknown + [key for key in LOSSY if key in settings.get("zero_optimization", {})]:
        nearest = difflib.get_close_matches(key, HARMLESS, 1, 0.85)
        mend = f"write {nearest[0]!r}, or take it out" if nearest else "take it out"
        raise UserError(f"the DeepSpeed JSON names {key!r}, which may change what is learnt: {mend}")
    if said.get("zero_optimization.offload_optimizer.super_offload"):
        raise UserError("the DeepSpeed JSON says super_offload, whose averages no checkpoint finds: take it out")
    if said.get("zero_optimization.offload_optimizer.device") == "nvme":
        raise UserError("the DeepSpeed JSON offloads the optimizer to nvme, where no teacher can follow: use cpu")
    batch = config.data.batch_size
    micro = settings.get("train_micro_batch_size_per_gpu", batch // ranks)
    if not isinstance(micro, int) or micro < 1 or batch % (micro * ranks):
        raise UserError(
            f"data.batch_size {batch} is not divisible by {ranks} ranks x micro-batch {micro}: "
            "change --data.batch_size or train_micro_batch_size_per_gpu in the DeepSpeed JSON"
        )
    precision = config.engine.precision
    owned = {
        "train_batch_size": (batch, "data.batch_size"),
        "train_micro_batch_size_per_gpu": (micro, ""),
        "gradient_accumulation_steps": (batch // (micro * ranks), "data.batch_size"),
        "gradient_clipping": (config.optim.clip_grad, "optim.clip_grad"),
        "bf16.enabled": (precision == "bf16", "engine.precision"),
        "fp16.enabled": (False, "engine.precision"),
        "torch_autocast.enabled": (precision == "autocast", "engine.precision"),
        "torch_autocast.dtype": ("bfloat16", "engine.precision"),
    }
    for key, (value, field) in owned.items():
        if key in said and said[key] != value:
            raise UserError(
                f"the DeepSpeed JSON says {key} = {said[key]!r}, the config {field} says {value!r}: "
                f"take {key} out of the JSON and set --{field}"
            )
    joined = json.loads(json.dumps(settings))
    for key, (value, _) in owned.items():
        block, _, name = key.rpartition(".")
        (joined.setdefault(block, {}) if block else joined)[name] = value
    if (settings.get("zero_optimization") or {}).get("offload_optimizer"):
        joined.setdefault("zero_force_ds_cpu_optimizer", False)  # AdamW stays the config's, on whichever device
    return Resolved(joined, micro)
