"""The DeepSpeed JSON, merged with the settings that the training config owns.

The JSON sets what can only change speed or memory: ZeRO stage, buckets, overlap, offload, micro-batch. The config owns
what changes the loss curve; those keys are written here. A JSON that sets one of them to another value, or has an
unknown key, is refused.
"""

import base64
import difflib
import importlib.util
import json
from ctypes.util import find_library
from pathlib import Path
from typing import Any, NamedTuple

from ddae.config.base import Experiment, flatten
from ddae.errors import UserError

SHIPPED = Path(__file__).parent.parent / "ds_configs"  # a link to the checkout's ds_configs/
DEFAULT = "zero2"
OWNED = {  # keys that the training config owns -> its flag, "" if it has none
    "activation_checkpointing": "--engine.activation_checkpointing",
    "optimizer": "--optim.*",
    "scheduler": "--optim.*",
    **dict.fromkeys(("amp", "bfloat16", "data_types"), "--engine.precision"),
    "communication_data_type": "--engine.reduce_dtype",
    **dict.fromkeys(("bf16.bf16_master_weights_and_grads", "bf16.bf16_optimizer_states"), "--engine.precision"),
    **dict.fromkeys(("bf16.check_grad_overflow", "zero_optimization.compute_grad_norm"), ""),
}
ALLOWED = {  # top-level keys that change speed, memory or logging
    *("zero_optimization", "bf16", "fp16", "torch_autocast", "autotuning", "aio", "timers", "comms_logger"),
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "steps_per_print", "wall_clock_breakdown"),
    *("memory_breakdown", "dump_state", "log_level", "flops_profiler", "tensorboard", "csv_monitor", "wandb", "comet"),
    "disable_python_gc",
}
RETIRED = {  # keys of earlier versions of DeepSpeed -> what replaces them
    "zero_optimization.cpu_offload": "zero_optimization.offload_optimizer: {'device': 'cpu'}",
    "zero_optimization.cpu_offload_params": "zero_optimization.offload_param: {'device': 'cpu'}",
}
MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}  # block -> package it needs
LOSSY = ("zenflow", "zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
AUTOTUNED = ("train_batch_size", "gradient_accumulation_steps")
BLOCKS = ("zero_optimization", "bf16", "fp16", "torch_autocast")  # keys whose value is an object


class DeepSpeedJson(NamedTuple):
    """The JSON that DeepSpeed gets, and the micro-batch of one rank that follows from it."""

    json: dict[str, Any]
    micro_batch: int


def load(path: str) -> dict[str, Any]:
    """Read a DeepSpeed JSON: a file, or base64 as DeepSpeed's autotuner passes it. Raise UserError if it is neither.

    zero2 and ds_configs/zero2.json also name the file of that name in SHIPPED, wherever the command runs; an empty path
    names DEFAULT.
    """
    try:
        settings = json.loads(_from_base64(path) or _find(path or DEFAULT).read_text())
    except OSError as error:
        names = ", ".join(sorted(each.stem for each in SHIPPED.glob("*.json")))
        raise UserError(
            f"--ds_config {path} cannot be read ({error.strerror}). Name a file, or one of {names}."
        ) from None
    except ValueError as error:  # of JSON, or of text
        raise UserError(f"--ds_config {path} is not valid JSON: {error}.") from None
    if not isinstance(settings, dict):
        raise UserError(f"--ds_config {path} holds a {type(settings).__name__}; expected a JSON object.")
    return settings


def _find(path: str) -> Path:
    """Return the file that --ds_config names."""
    file, shipped = Path(path), SHIPPED / f"{Path(path).name.removesuffix('.json')}.json"
    is_shipped = file.parent.name in ("", "ds_configs") and not file.parent.is_absolute() and shipped.exists()
    return shipped if is_shipped and not file.is_file() else file


def _from_base64(text: str) -> str | None:
    try:
        decoded = base64.urlsafe_b64decode(text).decode()
    except ValueError:  # of base64, or of text
        return None
    return decoded if decoded.startswith("{") else None


def resolve(settings: dict[str, Any], config: Experiment, ranks: int) -> DeepSpeedJson:
    """Return the settings with the keys that the config owns. Raise UserError if the two contradict each other."""
    for block in BLOCKS:
        if not isinstance(settings.get(block, {}), dict):
            raise UserError(f"the DeepSpeed JSON has {block} = {settings[block]!r}; expected an object in braces.")
    if isinstance(settings.get("autotuning"), dict) and settings["autotuning"].get("enabled"):
        # DeepSpeed's autotuner varies the micro-batch and sets its own global batch, which the config owns
        settings = {key: value for key, value in settings.items() if key not in AUTOTUNED}
    flat = flatten(settings)
    _check_keys(settings, flat)
    batch = config.data.batch_size
    micro_batch = settings.get("train_micro_batch_size_per_gpu", batch // ranks)
    if not isinstance(micro_batch, int) or isinstance(micro_batch, bool):
        is_number = isinstance(micro_batch, str) and micro_batch.isdecimal()
        fix = "Write it without quotes, or remove it." if is_number else "Remove it for data.batch_size / ranks."
        raise UserError(
            f"the DeepSpeed JSON has train_micro_batch_size_per_gpu = {micro_batch!r}; expected a whole number. {fix}"
        )
    if micro_batch < 1 or batch % (micro_batch * ranks):
        raise UserError(
            f"data.batch_size is {batch}; expected a multiple of {ranks} ranks x micro-batch {micro_batch}. "
            "Change --data.batch_size, or train_micro_batch_size_per_gpu in the DeepSpeed JSON."
        )
    precision = config.engine.precision
    if config.engine.reduce_dtype == "fp32" and precision == "autocast":
        raise UserError(
            "engine.reduce_dtype is fp32, but DeepSpeed sums the gradients of engine.precision autocast in bf16. "
            "Pass --engine.precision bf16 or fp32."
        )
    owned = {
        "train_batch_size": (batch, "data.batch_size"),
        "train_micro_batch_size_per_gpu": (micro_batch, ""),
        "gradient_accumulation_steps": (batch // (micro_batch * ranks), "data.batch_size"),
        "gradient_clipping": (config.optim.clip_grad, "optim.clip_grad"),
        "bf16.enabled": (precision == "bf16", "engine.precision"),
        "fp16.enabled": (False, "engine.precision"),
        "torch_autocast.enabled": (precision == "autocast", "engine.precision"),
        "torch_autocast.dtype": ("bfloat16", "engine.precision"),
    }
    for key, (value, field) in owned.items():
        if key in flat and flat[key] != value:
            if key == "gradient_accumulation_steps":
                raise UserError(
                    f"the DeepSpeed JSON has {key} = {flat[key]!r}, but data.batch_size {batch} on {ranks} ranks with "
                    f"micro-batch {micro_batch} takes {value}. Remove it: it follows from them."
                )
            if key == "fp16.enabled":
                raise UserError(
                    "fp16 is unsupported: it needs loss scaling. Remove it and set --engine.precision bf16."
                )
            raise UserError(
                f"the DeepSpeed JSON has {key} = {flat[key]!r}, but {field} requires {value!r}. "
                f"Remove {key} from the JSON and set --{field}."
            )
    merged = json.loads(json.dumps(settings))
    for key, (value, _) in owned.items():
        block, _, name = key.rpartition(".")
        (merged.setdefault(block, {}) if block else merged)[name] = value
    if config.engine.reduce_dtype == "fp32":
        merged["communication_data_type"] = "fp32"
    if (settings.get("zero_optimization") or {}).get("offload_optimizer"):
        merged.setdefault("zero_force_ds_cpu_optimizer", False)  # keep the config's AdamW, on either device
    return DeepSpeedJson(merged, micro_batch)


def _check_keys(settings: dict[str, Any], flat: dict[str, Any]) -> None:
    """Raise UserError for keys that the config owns, that are unknown, or that no checkpoint or teacher supports."""
    for key, flag in OWNED.items():
        if key in settings or key in flat:
            use = f"use {flag}" if flag else "non-finite gradients are handled by the engine"
            raise UserError(f"{key!r} is set by the training config. Remove it from the DeepSpeed JSON; {use}.")
    unknown = [key for key in settings if key not in ALLOWED]
    for key in unknown + [key for key in LOSSY if key in settings.get("zero_optimization", {})]:
        nearest = difflib.get_close_matches(key, ALLOWED, 1, 0.85)
        fix = f"Write {nearest[0]!r}, or remove it." if nearest else "Remove it."
        raise UserError(f"the DeepSpeed JSON has {key!r}, which may change what is learnt. {fix}")
    for key, value in RETIRED.items():
        if key in flat:
            raise UserError(f"the DeepSpeed JSON has {key}, which is outdated. Write {value} instead.")
    if flat.get("zero_force_ds_cpu_optimizer"):
        raise UserError(
            "zero_force_ds_cpu_optimizer would replace the config's AdamW. Remove it from the DeepSpeed JSON."
        )
    for block, name in MONITORS.items():
        if flat.get(f"{block}.enabled") and importlib.util.find_spec(name) is None:
            raise UserError(
                f"the DeepSpeed JSON enables {name}, which is not installed. pip install {name}, or remove it."
            )
    if flat.get("zero_optimization.offload_optimizer.super_offload"):
        raise UserError("super_offload is unsupported: its optimizer state cannot be checkpointed. Remove it.")
    if flat.get("zero_optimization.offload_optimizer.device") == "nvme":
        raise UserError(
            "offload_optimizer.device nvme is unsupported: the EMA teacher cannot read master weights there. Use cpu."
        )
    if flat.get("zero_optimization.offload_param.device") == "nvme" and find_library("aio") is None:
        raise UserError(
            "offload_param.device nvme needs libaio, which is not installed. Install libaio-dev, or use cpu."
        )
