"""The encoder: a plain Vision Transformer (timm blocks, fixed sin-cos positions, a cls token).

Shape letters: B images, N patches, V visible patches, T tokens, D width. Parameters have the names that timm and MAE
give them, so that their files fit.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddae.patches import gather_tokens, patchify, sincos_positions


class LayerNorm(nn.LayerNorm):
    """Layer norm with the field's eps of 1e-6."""

    def __init__(self, width: int, **options):
        super().__init__(width, eps=1e-6, **options)


def build_blocks(width: int, depth: int, heads: int) -> nn.ModuleList:
    """`depth` pre-norm transformer blocks with biases and an MLP of four times the width."""
    return nn.ModuleList([Block(width, heads, mlp_ratio=4, qkv_bias=True, norm_layer=LayerNorm) for _ in range(depth)])


def run_block(block: nn.Module, tokens: Tensor, recompute: bool) -> Tensor:
    """A block's output; with `recompute` only its input is kept, and the block runs again in the backward pass."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, tokens, use_reentrant=False, preserve_rng_state=False)  # there is no dropout
    return block(tokens)


def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Every parameter of `module`: Xavier-uniform matrices, zero biases, unit norms, tokens of deviation 0.02.

    The query, key and value parts of a qkv matrix count as three square matrices (BEiT, BootMAE).
    """
    for name, parameter in module.named_parameters():
        with torch.no_grad():
            if name.endswith(("cls_token", "mask_token")):
                parameter.normal_(std=0.02, generator=generator)
            elif parameter.ndim >= 2:
                fan_out, fan_in = parameter.flatten(1).shape
                fan_out = fan_in if name.endswith("qkv.weight") else fan_out
                bound = math.sqrt(6 / (fan_in + fan_out))
                parameter.uniform_(-bound, bound, generator=generator)
            elif name.endswith("weight"):
                parameter.fill_(1)
            else:
                parameter.zero_()


class PatchProjection(nn.Module):
    """A convolution of stride = kernel = patch, applied to cut patches as one matrix product: [.., P] -> [.., D].

    The weight keeps the convolution's shape [D, 3, patch, patch], as the published files have it.
    """

    def __init__(self, patch: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 3, patch, patch))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)


class Encoder(nn.Module):
    """ViT encoder that reads all patches or only the visible ones, and gives any blocks' outputs."""

    def __init__(self, width: int, depth: int, heads: int, image_size: int, patch_size: int, positions: str):
        super().__init__()
        self.patch_size, self.heads = patch_size, heads
        self.recompute = False  # activations in the backward pass
        self.normalisation = "half"  # of the pixels it was trained on; a loaded encoder knows its own
        self.report: dict[str, list[str]] = {}  # of the file it was loaded from
        self.grid = (image_size // patch_size, image_size // patch_size)
        self.patch_embed = nn.ModuleDict({"proj": PatchProjection(patch_size, width)})
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", sincos_positions(self.grid, width, positions))
        self.blocks = build_blocks(width, depth, heads)
        self.norm = LayerNorm(width)

    def forward(
        self, images: Tensor, layers: Sequence[int] = (), visible: Tensor | None = None
    ) -> Tensor | list[Tensor]:
        """Normalised images [B, 3, H, W] -> tokens [B, T, D], cls first, after the final norm.

        With `layers` (blocks counted from 1): a list of the tokens after those blocks instead, before any norm, and
        nothing is computed beyond the last of them. With `visible` (int64 [B, V]) the encoder sees those patches
        alone: T = 1 + V, otherwise 1 + N.
        """
        height, width = (side * self.patch_size for side in self.grid)
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, height, width):
            raise ValueError(f"images are {list(images.shape)}: this encoder reads [B, 3, {height}, {width}]")
        patches = patchify(images, self.patch_size)
        table = self.pos_embed.to(images.dtype)  # DeepSpeed may leave buffers in fp32
        positions = table[:, 1:]
        if visible is not None:
            patches = gather_tokens(patches, visible)
            positions = gather_tokens(positions.expand(len(visible), -1, -1), visible)
        tokens = self.patch_embed["proj"](patches) + positions
        cls = (self.cls_token + table[:, :1]).expand(len(tokens), -1, -1)
        tokens = torch.cat([cls, tokens], 1)
        outputs = {}
        for number, block in enumerate(self.blocks[: max(layers, default=None)], 1):
            outputs[number] = tokens = run_block(block, tokens, self.recompute)
        return [outputs[number] for number in layers] if layers else self.norm(tokens)

    def resize(self, image_size: int) -> None:
        """Read images of another size from here on: the positions are resampled, bicubically."""
        side = image_size // self.patch_size
        self.pos_embed = resample_abs_pos_embed(self.pos_embed, [side, side], list(self.grid))
        self.grid = (side, side)

    def features(self, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Tokens [B, 1 + N, D] after each of the blocks `layers` (counted from 1), before any norm."""
        if not layers or min(layers) < 1 or max(layers) > len(self.blocks):
            raise ValueError(f"layers are {list(layers)}: name blocks from 1 to {len(self.blocks)}")
        return self(images, layers=tuple(layers))
