"""Floating-point operations of an image, counted by PyTorch on a meta model, and the peak rates of GPUs.

A multiplication and its addition are two operations. Only matrix products and attention count.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import combinations
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from ddae.config.pretrain import FeatureConfig, PixelConfig, PretrainConfig
from ddae.config.tokenizer import QuantizerConfig
from ddae.data.masking import Mask
from ddae.method.branches import Inputs, Tokens
from ddae.method.model import build_uninitialised_model
from ddae.models.tokenizer import Tokenizer
from ddae.models.vit import Encoder

CODE_WIDTH = QuantizerConfig().code_width  # of the tokenizer's codebook


class Gpu(NamedTuple):
    """Vendor's figures, but for the memory."""

    memory: float  # GiB that a process can allocate
    teraflops: float  # dense bf16
    in_fp32: float  # the same in fp32, without TF32
    memory_rate: float  # GB/s
    link: float  # GB/s in one direction to the GPUs of the same node: NVLink, otherwise PCIe


GPUS = {
    "a100-40g": Gpu(39.4, 312, 19.5, 1555, 300),
    "a100-80g": Gpu(79.2, 312, 19.5, 2039, 300),
    "h100-80g": Gpu(79.1, 989, 67, 3350, 450),
    "h200": Gpu(139.8, 989, 67, 4800, 450),
    "l40s": Gpu(44.4, 362, 91.6, 864, 32),
    "a10g": Gpu(22.1, 70, 35, 600, 32),
}


class Flops(NamedTuple):
    """Operations of one image, forward and backward; the teacher or tokenizer has no backward pass."""

    encoder: float
    teacher: float
    pixel: float
    feature: float
    token: float

    @property
    def total(self) -> float:
        return sum(self)

    def utilisation(self, images_per_s: float, precision: str) -> dict[str, float]:
        """Return TFLOP/s of one device, and the share of its peak (MFU) if its peak is known."""
        row = {"throughput/tflops": self.total * images_per_s / 1e12}
        name = torch.cuda.get_device_name().lower() if torch.cuda.is_available() else ""
        for gpu, known in GPUS.items():
            if gpu.partition("-")[0] in name:
                peak = known.in_fp32 if precision == "fp32" else known.teraflops
                return row | {"throughput/mfu": row["throughput/tflops"] / peak}
        return row


def count_flops(config: PretrainConfig) -> Flops:
    """Count the operations of one image, including those that activation checkpointing repeats.

    Work that is done once a step for all images is not counted: it is the difference between two images and one. With
    taps_per_step, the mean over the taps that may be drawn.
    """
    names = ("model", "mask", "pixel", "feature", "token", "engine", "taps_per_step", "decode_fraction")
    counted: dict[str, Any] = {name: getattr(config, name) for name in names}
    one, two = (_count(PretrainConfig(**counted), images) for images in (1, 2))
    return Flops(*(b - a for a, b in zip(one, two, strict=True)))


def count_model_flops(config: PretrainConfig) -> Flops:
    """Count the operations that the model needs, without those that activation checkpointing repeats."""
    once = {"activation_checkpointing": False, "decoder_activation_checkpointing": False, "skip_unused_tokens": True}
    return count_flops(replace(config, engine=replace(config.engine, **once)))


@cache
def _count(config: PretrainConfig, images: int) -> Flops:
    """Count the operations of so many images."""
    config = replace(config, engine=replace(config.engine, tap_execution="batched"))
    model, grid, num_masked = config.model, config.grid, config.num_masked
    num_patches = grid[0] * grid[1]
    with torch.device("meta"):
        pretrain_model = build_uninitialised_model(config)
        visible, masked = (torch.zeros(images, n, dtype=torch.int64) for n in (num_patches - num_masked, num_masked))
        inputs = Inputs(
            images=torch.zeros(images, 3, *model.height_width, dtype=torch.uint8),
            mask=Mask(visible, masked),
            distance=torch.ones(images, num_masked),
            betas=torch.zeros(2 * model.depth),
            feature_weight=torch.ones(()),
            share=1.0,
            loss_backend="reference",
            teacher_tokens=torch.zeros(config.num_step_taps(config.feature), images, num_masked, model.width),
            codes=masked,
            patches=torch.zeros(images, num_patches, model.patch_size**2 * 3),
            subset=None if config.num_decoded == num_masked else masked[:, : config.num_decoded],
        )
        patches = None if config.mask.use_mask_token else inputs.patches
        tokens = pretrain_model.encode(inputs.images, visible, patches)

        def encode() -> None:
            again = pretrain_model.encode(inputs.images, visible, patches)
            torch.stack([each.sum() for each in (*again.raw.values(), *again.normed.values())]).sum().backward()

        def run_branch(name: str) -> None:
            raw, normed = (
                {block: each.detach().requires_grad_() for block, each in of.items()}
                for of in (tokens.raw, tokens.normed)
            )
            pretrain_model.branches[name](Tokens(raw, normed), inputs).loss.backward()

        @torch.no_grad()
        def run_teacher(taps: tuple[int, ...]) -> None:
            short = num_masked if config.engine.skip_unused_tokens else None
            if config.token.enabled:  # its size is not in the config: an encoder as large as the student's is assumed
                tokenizer = Tokenizer(model, config.token.codes, CODE_WIDTH)  # its codes() cannot run on meta tensors
                tokens = tokenizer.encoder(torch.zeros(images, 3, *model.height_width))[:, 1:]
                _ = tokenizer.to_code(tokens) @ tokenizer.codebook.T
            elif config.feature.enabled:
                order = torch.zeros(images, num_patches, dtype=torch.int64)
                Encoder(model)(inputs.patches, taps, order, num_outputs=short)

        last_taps = [max(taps) for taps in combinations(config.feature.taps, config.num_step_taps(config.feature))]
        teacher = {tap: _flops_of(lambda tap=tap: run_teacher((tap,))) for tap in set(last_taps)}
        branches = {name: _flops_of(lambda name=name: run_branch(name)) for name in pretrain_model.branches}
        return Flops(
            encoder=_flops_of(encode),
            teacher=mean(teacher[tap] for tap in last_taps),
            pixel=branches.get("pixel", 0.0),
            feature=branches.get("feature", 0.0),
            token=branches.get("token", 0.0) + branches.get("cls", 0.0),
        )


def _flops_of(run: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def encoder_patches(config: PretrainConfig) -> int:
    """Return the number of patches that the encoder processes, mask tokens included."""
    patches = config.grid[0] * config.grid[1]
    return patches if config.mask.use_mask_token else patches - config.num_masked


def decoder_branches(config: PretrainConfig) -> list[PixelConfig | FeatureConfig]:
    """Return the enabled branches that have a decoder."""
    return [branch for branch in (config.pixel, config.feature) if branch.enabled]
