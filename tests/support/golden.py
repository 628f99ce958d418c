"""Golden curves: losses, gradient norms, betas and sample keys of short runs of every method, which must not change.

As a program this module is one rank. It reads runs from standard input, one JSON list a line (the run's name,
`pretrain` or `finetune`, then command-line arguments), trains each, and on rank 0 prints the curves as JSON after the
word GOLDEN.
"""

import hashlib
import json
import sys
from pathlib import Path

STEPS, BF16_STEPS, DEMO_STEPS = 20, 5, 50
STAGES = {1: (0, 2, 3), 2: (0, 2, 3)}  # of ZeRO, by number of ranks
QUICK_STAGES = {1: (0, 2), 2: (0, 3)}
# Largest |measured - recorded| / (1 + |recorded|). Curves recorded with AVX-512 and one thread deviated by 5.6e-7
# (bf16: 2.9e-2) with ATEN_CPU_CAPABILITY=default and one thread, and by 4.9e-7 with avx2 and DDAE_TEST_THREADS=2.
TOLERANCE, BF16_TOLERANCE = 5e-6, 6e-2
FILE = Path(__file__).parents[1] / "golden_curves.json"
SMALL = (
    "--model.width 32 --model.depth 4 --model.heads 2 --model.image_size 32 --model.patch_size 4 "
    "--pixel.decoder_depth 2 --pixel.decoder_width 32 --pixel.decoder_heads 2 "
    "--feature.decoder_depth 1 --feature.decoder_width 32 --feature.decoder_heads 2 --teacher.momentum 0.9 "
    "--data.batch_size 16 --data.workers 0 --data.backend pillow --tracker.kind jsonl --train.no_report "
    "--train.log_every 1 --train.save_every 1000 --optim.lr 2e-3 --optim.min_lr 1e-4 --optim.warmup_epochs 1"
).split()
FOUR_TAPS, LAST_TAP = "1 2 3 4".split(), ["4"]
OPTIONS = {  # of a step's computation, which leave its result as it is
    "all off": "--engine.no_direct_calls --engine.no_skip_unused_tokens --engine.gradient_reduction deepspeed "
    "--engine.tap_execution batched",
    "modules": "--engine.no_direct_calls",
    "all tokens": "--engine.no_skip_unused_tokens",
    "deepspeed": "--engine.gradient_reduction deepspeed",
    "lean": "--engine.gradient_reduction lean",
    "batched": "--engine.tap_execution batched",
    "tap by tap": "--engine.tap_execution sequential",
    "checkpointed": "--engine.activation_checkpointing",
    "decoders checkpointed": "--engine.decoder_activation_checkpointing",
    "summed in fp32": "--engine.reduce_dtype fp32",
    "saved in the background": "--train.async_save --train.save_every 5",
    "profiled": "--train.profile_steps 3:5",
    "compiled": "--engine.compile --engine.tap_execution batched",
    "all on": "--engine.compile --engine.tap_execution sequential --engine.gradient_reduction lean "
    "--engine.reduce_dtype fp32 --engine.activation_checkpointing --train.async_save --train.save_every 5 "
    "--train.profile_steps 3:5",
}
METHODS = {  # preset, its branches, their taps
    "mae": ("mae_vit_s16_100e", ("pixel",), LAST_TAP),
    "dds_mae": ("dds_mae_vit_s16_100e", ("pixel",), FOUR_TAPS),
    "ddae": ("ddae_vit_s16_100e", ("pixel", "feature"), FOUR_TAPS),
    "bootmae": ("bootmae_vit_s16_100e", ("pixel", "feature"), LAST_TAP),
    "dds_beitv2": ("dds_beitv2_vit_s16_100e", ("token",), FOUR_TAPS),
}


def arguments(method: str, tokenizer: Path, precision: str, steps: int) -> list[str]:
    """Return the arguments of a pretraining run at the smallest shapes."""
    preset, branches, taps = METHODS[method]
    args = ["--preset", preset, *SMALL, "--engine.precision", precision, "--train.steps", str(steps)]
    for branch in branches:
        args += [f"--{branch}.taps", *taps]
    if method == "dds_beitv2":
        args += ["--token.tokenizer", str(tokenizer), "--token.codes", "24", "--token.cls_block", "2"]
    return args


def finetune_arguments(precision: str, steps: int) -> list[str]:
    """Return the arguments of a fine-tuning run.

    RandAugment, mixup, CutMix, erasing, stochastic depth and layer decay are on.
    """
    return [
        *"--preset demo --tracker.kind jsonl --train.no_report --train.log_every 1 --train.save_every 1000".split(),
        *"--data.workers 0 --data.batch_size 16 --data.backend pillow --tune.no_untrained".split(),
        *("--engine.precision", precision, "--train.steps", str(steps)),
    ]


def curves(rows: list[dict], grad_norms: list[float], keys: "hashlib._Hash") -> dict[str, object]:
    """Return what is compared: values per step, and one hash of all sample keys in their order."""
    steps = [row for row in rows if "loss/total" in row]
    names = ["loss/total", *(name for name in steps[0] if name.startswith("beta/"))]
    return {
        "keys": keys.hexdigest(),
        "grad/norm": grad_norms,
        **{name: [row[name] for row in steps] for name in names},
    }


def main() -> None:
    from ddae.config.cli import PRETRAINING, parse
    from ddae.config.evaluation import FINETUNING
    from ddae.data.loader import Loader
    from ddae.distributed.comm import gather, is_main
    from ddae.distributed.engine import Engine, stop_process_group
    from ddae.distributed.logs import configure_logging
    from ddae.eval.finetune import finetune
    from ddae.train import pretrain
    from ddae.training.tracker import read_metrics

    programs = {"pretrain": (pretrain, PRETRAINING), "finetune": (finetune, FINETUNING)}
    batches, optimizer_step = Loader.batches, Engine.step

    def recorded_batches(self, step):
        for batch in batches(self, step):
            samples.append([self.sample_name(sample).rpartition("/")[2] for sample in batch.samples.tolist()])
            yield batch

    def recorded_step(self, lr):
        is_last = self.deepspeed.is_gradient_accumulation_boundary()  # micro-batch of a step
        applied = optimizer_step(self, lr)
        if is_last:
            norms.append(self.grad_norm())
        return applied

    Loader.batches, Engine.step = recorded_batches, recorded_step
    configure_logging()
    for line in sys.stdin:
        name, program, *args = json.loads(line)
        samples: list[list[str]] = []
        norms: list[float] = []
        train, kind = programs[program]
        config = parse(args, kind)
        train(config)
        keys = hashlib.sha256(json.dumps(gather(samples)).encode())
        if is_main():
            rows = read_metrics(Path(config.folder) / "metrics.jsonl")
            print("GOLDEN", json.dumps([name, curves(rows, norms, keys)]), flush=True)
    stop_process_group()


if __name__ == "__main__":
    main()
