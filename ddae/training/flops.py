"""What a step works: floating-point operations of one image, counted from the shapes, and what GPUs are able to do.

D width, T tokens, M masked patches.
"""

from dataclasses import replace
from typing import NamedTuple

import torch

from ddae.config.pretrain import FeatureConfig, PixelConfig, PretrainConfig


class Gpu(NamedTuple):
    memory: float  # GiB that a process can have
    teraflops: float  # dense bf16, the vendor's figure
    in_fp32: float  # the same without bf16 (and without TF32)


GPUS = {
    "a100-40g": Gpu(39.4, 312, 19.5),
    "a100-80g": Gpu(79.2, 312, 19.5),
    "h100-80g": Gpu(79.1, 989, 67),
    "h200": Gpu(139.8, 989, 67),
    "l40s": Gpu(44.4, 362, 91.6),
    "a10g": Gpu(22.1, 70, 35),
}


class Flops(NamedTuple):
    """Floating-point operations of one image, forward and backward (twice the forward's; the teacher has none)."""

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
    """A product of numbers and its addition are two; a block has 24 D^2 + 4 T D a token, T tokens in all. Work that is
    done once for all images, on mask tokens before they mix with others, counts as none."""
    patches = config.grid[0] * config.grid[1]
    visible, width, masked = encoder_patches(config), config.model.width, config.num_masked
    patch_numbers, engine = config.model.patch_size**2 * 3, config.engine

    def blocks(depth: int, tokens: int, width: int) -> float:
        return depth * tokens * (24 * width**2 + 4 * tokens * width)

    def saved(tokens: int, width: int) -> float:
        """What a last block leaves out that works on masked patches alone: query, attention, output and MLP."""
        return (tokens - masked) * (20 * width**2 + 4 * tokens * width)

    def inside(branch: PixelConfig | FeatureConfig) -> float:
        """The blocks of a decoder, for one tap."""
        inner, read, depth = branch.decoder_width, 1 + visible, branch.decoder_depth
        total, crossing = blocks(depth, 1 + patches, inner), 0.0
        outputs = depth * (1 + patches)
        if engine.skip_unused_tokens:  # and the first one leaves out queries, keys and values of mask tokens
            total -= saved(1 + patches, inner) + 6 * masked * inner**2
            outputs -= read
        if branch.cross_attention:  # query and output, key and value of the context, attention
            crossing = outputs * (4 * inner**2 + 4 * read * inner) + depth * 4 * read * width * inner
        return total + crossing

    def decoder(branch: PixelConfig | FeatureConfig, out: int) -> float:
        if not branch.enabled:
            return 0.0
        ends = 2 * branch.decoder_width * ((1 + visible) * width + masked * out)
        again = engine.activation_checkpointing or engine.decoder_activation_checkpointing
        return len(branch.taps) * ((4 if again else 3) * inside(branch) + 3 * ends)

    encoder = blocks(config.model.depth, 1 + visible, width)
    of_teacher, of_token, token = 0.0, 0.0, config.token
    if config.feature.enabled:
        of_teacher = blocks(max(config.feature.taps), 1 + patches, width) + 2 * patches * patch_numbers * width
        of_teacher -= saved(1 + patches, width) if engine.skip_unused_tokens else 0
    if token.enabled:  # the tokenizer is taken to be as large as the encoder
        of_teacher = blocks(config.model.depth, 1 + patches, width) + 2 * patches * patch_numbers * width
        heads = 2 * (len(token.taps) + token.cls) * masked * width * token.codes
        own_blocks = token.cls * blocks(token.cls_depth, 1 + patches, width)
        of_token = 3 * (heads + own_blocks)
    return Flops(
        (4 if engine.activation_checkpointing else 3) * encoder + 3 * 2 * visible * patch_numbers * width,
        of_teacher,
        decoder(config.pixel, patch_numbers),
        decoder(config.feature, width),
        of_token,
    )


def encoder_patches(config: PretrainConfig) -> int:
    """Patches of an image that the encoder works on, mask tokens among them."""
    patches = config.grid[0] * config.grid[1]
    return patches if config.mask.use_mask_token else patches - config.num_masked


def decoder_branches(config: PretrainConfig) -> list[PixelConfig | FeatureConfig]:
    return [branch for branch in (config.pixel, config.feature) if branch.enabled]


def count_model_flops(config: PretrainConfig) -> Flops:
    """Return the operations that the model needs, without those that activation checkpointing repeats."""
    once = {"activation_checkpointing": False, "decoder_activation_checkpointing": False, "skip_unused_tokens": True}
    return count_flops(replace(config, engine=replace(config.engine, **once)))
