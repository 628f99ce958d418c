"""The DeepSpeed JSON merged with the config: derived keys, refused keys."""

import base64
import json
from dataclasses import replace
from pathlib import Path

import pytest

from ddae.config.deepspeed import load, resolve
from ddae.config.presets import preset
from ddae.errors import UserError

DEMO = preset("demo")
CONFIG = replace(DEMO, engine=replace(DEMO.engine, precision="bf16"), data=replace(DEMO.data, batch_size=32))
SHIPPED = sorted(Path("ds_configs").glob("*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_name_nothing_that_the_config_owns(path):
    resolved = resolve(load(str(path)), CONFIG, ranks=2)
    assert resolved.micro_batch == 16
    assert resolved.json["zero_optimization"]["stage"] == int(path.stem.removesuffix("_offload")[-1])
    assert resolved.json["gradient_clipping"] == 0
    assert resolved.json["bf16"]["enabled"]


def test_all_stages_are_shipped():
    assert [path.stem for path in SHIPPED] == ["zero0", "zero1", "zero2", "zero2_offload", "zero3"]


def test_accumulation_is_derived():
    resolved = resolve({"train_micro_batch_size_per_gpu": 4}, CONFIG, ranks=2)
    assert resolved.micro_batch == 4
    assert resolved.json["gradient_accumulation_steps"] == 4
    assert resolved.json["train_batch_size"] == 32


@pytest.mark.parametrize(
    "precision, blocks", [("bf16", (True, False)), ("autocast", (False, True)), ("fp32", (False, False))]
)
def test_precision(precision, blocks):
    joined = resolve({}, replace(CONFIG, engine=replace(CONFIG.engine, precision=precision)), 1).json
    assert (joined["bf16"]["enabled"], joined["torch_autocast"]["enabled"]) == blocks


def test_gradients_are_summed_in_fp32_on_request():
    reduced = replace(CONFIG, engine=replace(CONFIG.engine, reduce_dtype="fp32"))
    assert resolve({}, reduced, 1).json["communication_data_type"] == "fp32"
    assert "communication_data_type" not in resolve({}, CONFIG, 1).json
    with pytest.raises(UserError, match=r"Remove it from the DeepSpeed JSON; use --engine\.reduce_dtype"):
        resolve({"communication_data_type": "fp32"}, CONFIG, 1)
    with pytest.raises(UserError, match=r"sums the gradients of engine\.precision autocast in bf16"):
        resolve({}, replace(reduced, engine=replace(reduced.engine, precision="autocast")), 1)


@pytest.mark.parametrize(
    "settings, ranks, message",
    [
        ({}, 3, "data.batch_size is 32; expected a multiple of 3 ranks"),
        ({"train_micro_batch_size_per_gpu": 5}, 1, "x micro-batch 5"),
        ({"train_batch_size": 64}, 1, "train_batch_size = 64"),
        ({"gradient_clipping": 1.0}, 1, "gradient_clipping = 1.0"),
        ({"bf16": {"enabled": False}}, 1, "--engine.precision"),
        ({"fp16": {"enabled": True}}, 1, "--engine.precision"),
        ({"gradient_accumulation_steps": 2}, 1, "gradient_accumulation_steps = 2"),
        ({"gradient_accumulation_steps": 2}, 1, "takes 1. Remove it: it follows from them"),
        ({"train_micro_batch_size_per_gpu": "4"}, 1, "= '4'; expected a whole number. Write it without quotes"),
        ({"fp16": {"enabled": True}}, 1, "fp16 is unsupported: it needs loss scaling"),
        ({"zero_optimization": {"cpu_offload": True}}, 1, "cpu_offload, which is outdated"),
        ({"zero_force_ds_cpu_optimizer": True}, 1, "zero_force_ds_cpu_optimizer would replace the config's AdamW"),
        ({"comet": {"enabled": True}}, 1, "enables comet_ml, which is not installed"),
        ({"zero_optimization": {"cpu_offload_params": True}}, 1, "cpu_offload_params, which is outdated"),
        ({"train_micro_batch_size_per_gpu": "auto"}, 1, "'auto'; expected a whole number. Remove it"),
        ({"train_micro_batch_size_per_gpu": "16"}, 1, "'16'; expected a whole number. Write it without quotes"),
        ({"optimizer": {"type": "Adam"}}, 1, "'optimizer'"),
        ({"scheduler": {}}, 1, "'scheduler'"),
        ({"bfloat16": {"enabled": False}}, 1, "'bfloat16'"),
        ({"data_types": {"grad_accum_dtype": "fp16"}}, 1, "'data_types'"),
        ({"torch_autocast": {"enabled": False, "dtype": "float16"}}, 1, "torch_autocast.dtype"),
        ({"bf16": True}, 1, "expected an object"),
        ({"bf16": {"check_grad_overflow": False}}, 1, "check_grad_overflow"),
        ({"zero_optimization": {"compute_grad_norm": False}}, 1, "compute_grad_norm"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, 1, "nvme is unsupported"),
        ({"activation_checkpointing": {"profile": True}}, 1, "--engine.activation_checkpointing"),
        ({"bf16": {"bf16_optimizer_states": True}}, 1, "bf16_optimizer_states"),
        ({"managed_gradient_accumulation": False}, 1, "may change what is learnt. Remove it"),
        ({"gradient_allreduce_op": "sum"}, 1, "'gradient_allreduce_op', which may change"),
        ({"wall_clock_breakdwn": True}, 1, "Write 'wall_clock_breakdown'"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, 1, "zero_quantized_gradients"),
        ({"zero_optimization": {"offload_optimizer": {"super_offload": True}}}, 1, "super_offload is unsupported"),
    ],
)
def test_contradictions_are_refused(settings, ranks, message):
    with pytest.raises(UserError, match=message):
        resolve(settings, CONFIG, ranks)


def test_offload_keeps_the_configs_optimizer():
    settings = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    assert resolve(settings, CONFIG, 1).json["zero_force_ds_cpu_optimizer"] is False


def test_the_users_settings_are_kept_and_not_written_to():
    settings = {"bf16": {"immediate_grad_update": False}, "zero_optimization": {"stage": 1}}
    before = json.dumps(settings)
    assert resolve(settings, CONFIG, 1).json["bf16"] == {"immediate_grad_update": False, "enabled": True}
    assert json.dumps(settings) == before


def test_the_autotuners_base64_is_read():
    settings = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 2}
    assert load(base64.urlsafe_b64encode(json.dumps(settings).encode()).decode()) == settings


def test_the_autotuners_batch_is_the_configs():
    """It tries micro-batches and stages, each with a global batch that follows from them."""
    settings = {"autotuning": {"enabled": True}, "zero_optimization": {"stage": 1}}
    tried = settings | {"train_micro_batch_size_per_gpu": 4, "train_batch_size": 8, "gradient_accumulation_steps": 1}
    joined, micro = resolve(tried, CONFIG, 2)
    assert (micro, joined["train_batch_size"], joined["gradient_accumulation_steps"]) == (4, 32, 4)
    assert joined["autotuning"] == {"enabled": True}


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot be read"),
        ("{", "is not valid JSON"),
        ("\xff\xfe", "is not valid JSON"),
        ("[]", "expected a JSON object"),
    ],
)
def test_bad_files(content, message, tmp_path):
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        load(str(path))


def test_shipped_files_have_names_everywhere(monkeypatch, tmp_path):
    shipped = load("ds_configs/zero3.json")
    monkeypatch.chdir(tmp_path)
    assert load("zero3") == load("zero3.json") == load("ds_configs/zero3.json") == shipped
    assert load("") == load("zero2") != shipped
    (tmp_path / "zero3").write_text('{"steps_per_print": 7}')  # a file of that name comes first
    assert load("zero3") == {"steps_per_print": 7}
    with pytest.raises(UserError, match=r"--ds_config zero4 cannot be read .*one of zero0, zero1, zero2"):
        load("zero4")
    with pytest.raises(UserError, match="cannot be read"):
        load("elsewhere/zero2.json")


def test_nvme_without_libaio_is_refused_at_once(monkeypatch):
    settings = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/nvme"}}}
    monkeypatch.setattr("ddae.config.deepspeed.find_library", lambda name: None)
    with pytest.raises(UserError, match="needs libaio, which is not installed"):
        resolve(settings, DEMO, ranks=1)
    monkeypatch.setattr("ddae.config.deepspeed.find_library", lambda name: "libaio.so.1")
    assert resolve(settings, DEMO, ranks=1).json["zero_optimization"]["stage"] == 3
