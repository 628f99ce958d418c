"""What a step works: floating-point operations of one image, counted from the shapes.

D width, T tokens, M masked patches.
"""

from typing import NamedTuple

from ddae.config import Config, FeatureConfig, PixelConfig


class Work(NamedTuple):
    """Floating-point operations of one image, forward and backward (twice the forward's; the teacher has none)."""

    encoder: float
    teacher: float
    pixel: float
    feature: float
    token: float

    @property
    def total(self) -> float:
        return sum(self)


def work(config: Config) -> Work:
    """A product of numbers and its addition are two; a block has 24 D^2 + 4 T D a token, T tokens in all."""
    patches = config.grid[0] * config.grid[1]
    visible, width = seen(config), config.model.width
    patch_numbers = config.model.patch_size**2 * 3

    def blocks(depth: int, tokens: int, width: int) -> float:
        return depth * tokens * (24 * width**2 + 4 * tokens * width)

    def decoder(branch: PixelConfig | FeatureConfig, out: int) -> float:
        if not branch.enabled:
            return 0.0
        inner, read = branch.decoder_width, 1 + visible
        ends = 2 * inner * (read * width + config.num_masked * out)
        crossing = 0.0
        if branch.cross_attention:  # query and output, key and value of the context, attention
            crossing = (1 + patches) * (4 * inner**2 + 4 * read * inner) + 4 * read * width * inner
        own = blocks(branch.decoder_depth, 1 + patches, inner) + branch.decoder_depth * crossing
        return 3 * len(branch.taps) * (own + ends)

    again = 1 if config.engine.recompute else 0  # the blocks' forward pass
    encoder = blocks(config.model.depth, 1 + visible, width)
    of_teacher, of_token, token = 0.0, 0.0, config.token
    if config.feature.enabled:
        of_teacher = blocks(max(config.feature.taps), 1 + patches, width) + 2 * patches * patch_numbers * width
    if token.enabled:  # the tokenizer is taken to be as large as the encoder
        of_teacher = blocks(config.model.depth, 1 + patches, width) + 2 * patches * patch_numbers * width
        heads = 2 * (len(token.taps) + token.cls) * config.num_masked * width * token.codes
        own_blocks = token.cls * blocks(token.cls_depth, 1 + patches, width)
        of_token = 3 * (heads + own_blocks)
    extra = [
        again * len(b.taps) * blocks(b.decoder_depth, 1 + patches, b.decoder_width) if b.enabled else 0.0
        for b in (config.pixel, config.feature)
    ]
    return Work(
        (3 + again) * encoder + 3 * 2 * visible * patch_numbers * width,
        of_teacher,
        decoder(config.pixel, patch_numbers) + extra[0],
        decoder(config.feature, width) + extra[1],
        of_token,
    )


def seen(config: Config) -> int:
    """Patches of an image that the encoder works on, mask tokens among them."""
    patches = config.grid[0] * config.grid[1]
    return patches if config.mask.replaced else patches - config.num_masked


def decoded(config: Config) -> list[PixelConfig | FeatureConfig]:
    return [branch for branch in (config.pixel, config.feature) if branch.enabled]
