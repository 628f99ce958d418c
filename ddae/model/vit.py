"""The encoder: a plain Vision Transformer (timm blocks, fixed sin-cos positions, a cls token), and BEiT's with relative
positions and layer scale.

Shape letters: B images, N patches, V visible patches, T tokens, D width, H heads. Parameters have the names that timm
and MAE give them, so that their files fit.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from timm.layers import DropPath, RelPosBias, resample_abs_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddae.config import ModelConfig
from ddae.patches import gather_tokens, patchify, sincos_positions


class LayerNorm(nn.LayerNorm):
    """Layer norm with the field's eps of 1e-6."""

    def __init__(self, width: int, **options):
        super().__init__(width, eps=1e-6, **options)


class RelativePositions(RelPosBias):
    """BEiT's relative positions: [1, H, T, T], to be added to the attention's logits."""

    def forward(self) -> Tensor:  # type: ignore[override]
        return self.get_bias()  # within a forward pass, or ZeRO-3 would not bring the table


def build_blocks(width: int, depth: int, heads: int, layer_scale: float = 0.0) -> nn.ModuleList:
    """`depth` pre-norm transformer blocks with biases and an MLP of four times the width.

    layer_scale: where the learnable factors of what a block adds begin; 0: there are none.
    """
    options = {"mlp_ratio": 4, "qkv_bias": True, "norm_layer": LayerNorm, "init_values": layer_scale or None}
    return nn.ModuleList([Block(width, heads, **options) for _ in range(depth)])


def run_block(
    block: nn.Module, tokens: Tensor, recompute: bool, other: Tensor | None = None, chance: bool = False
) -> Tensor:
    """A block's output; with `recompute` only its input is kept, and the block runs again in the backward pass.

    other: what the block takes beside its tokens: a context, or [1, H, T, T] to be added to the attention's logits.
    chance: the block drops paths, the same ones when run again.
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, tokens, other, use_reentrant=False, preserve_rng_state=chance)
    return block(tokens, other)


def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Every parameter of `module`: Xavier-uniform matrices, zero biases, unit norms, tokens of deviation 0.02; a layer
    scale stays as it was built, relative positions begin at zero.

    The query, key and value parts of a qkv matrix count as three square matrices (BEiT, BootMAE).
    """
    for name, parameter in module.named_parameters():
        with torch.no_grad():
            if name.endswith(("cls_token", "mask_token")):
                parameter.normal_(std=0.02, generator=generator)
            elif name.endswith("gamma"):
                continue
            elif parameter.ndim >= 2 and not name.endswith("relative_position_bias_table"):
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

    def __init__(self, shape: ModelConfig):
        super().__init__()
        self.shape = shape
        self.recompute = False  # activations in the backward pass
        self.drop_path = 0.0
        self.normalisation = "half"  # of the pixels it was trained on; a loaded encoder knows its own
        self.report: dict[str, list[str]] = {}  # of the file it was loaded from
        self.patch_embed = nn.ModuleDict({"proj": PatchProjection(shape.patch_size, shape.width)})
        self.cls_token = nn.Parameter(torch.empty(1, 1, shape.width))
        self.pos_embed: Tensor
        if shape.positions == "none":
            table = torch.zeros(1, 1 + self.grid[0] * self.grid[1], shape.width)
        else:
            table = sincos_positions(self.grid, shape.width, shape.positions)
        self.register_buffer("pos_embed", table, persistent=shape.positions != "none")
        self.blocks = build_blocks(shape.width, shape.depth, shape.heads, shape.layer_scale)
        self.norm = LayerNorm(shape.width)
        if shape.relative_positions == "shared":
            self.rel_pos_bias = RelativePositions(self.grid, shape.heads, prefix_tokens=1)
        elif shape.relative_positions == "each":
            for block in self.blocks:
                block.attn.rel_pos_bias = RelativePositions(self.grid, shape.heads, prefix_tokens=1)  # type: ignore[union-attr]

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of an image: rows and columns."""
        side = self.shape.image_size // self.shape.patch_size
        return side, side

    def forward(
        self,
        images: Tensor,
        layers: Sequence[int] = (),
        visible: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> Tensor | list[Tensor]:
        """Normalised images [B, 3, H, W] -> tokens [B, T, D], cls first, after the final norm.

        With `layers` (blocks counted from 1): a list of the tokens after those blocks instead, before any norm, and
        nothing is computed beyond the last of them. With `visible` (int64 [B, V]) the encoder sees those patches
        alone, T = 1 + V; or, with `mask_token` [1, 1, D] too, that token in the place of all others, T = 1 + N.
        ValueError where images are of another size, or relative positions are asked of visible patches.
        """
        side = self.shape.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, side, side):
            raise ValueError(f"images are {list(images.shape)}: this encoder reads [B, 3, {side}, {side}]")
        patches = patchify(images, self.shape.patch_size)
        table = self.pos_embed.to(images.dtype)  # DeepSpeed may leave buffers in fp32
        positions = table[:, 1:]
        if visible is not None and mask_token is None:
            if self.shape.relative_positions != "none":
                raise ValueError("an encoder with relative positions reads all patches, not the visible ones alone")
            patches = gather_tokens(patches, visible)
            positions = gather_tokens(positions.expand(len(visible), -1, -1), visible)
        tokens = self.patch_embed["proj"](patches)
        if visible is not None and mask_token is not None:
            seen = torch.zeros_like(tokens[..., :1], dtype=torch.bool).scatter_(1, visible[:, :, None], True)
            tokens = torch.where(seen, tokens, mask_token)
        tokens = tokens + positions
        # tokens.shape[0]: len() would be a constant in an exported program
        cls = (self.cls_token + table[:, :1]).expand(tokens.shape[0], -1, -1)
        tokens = torch.cat([cls, tokens], 1)
        shared = self.rel_pos_bias() if self.shape.relative_positions == "shared" else None
        outputs, chance = {}, self.training and self.drop_path > 0
        for number, block in enumerate(self.blocks[: max(layers, default=None)], 1):
            each = self.shape.relative_positions == "each"
            bias = block.attn.rel_pos_bias() if each else shared  # type: ignore[union-attr]
            outputs[number] = tokens = run_block(block, tokens, self.recompute, bias, chance)
        return [outputs[number] for number in layers] if layers else self.norm(tokens)

    def features(self, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Tokens [B, 1 + N, D] after each of the blocks `layers` (counted from 1), before any norm."""
        if not layers or min(layers) < 1 or max(layers) > len(self.blocks):
            raise ValueError(f"layers are {list(layers)}: name blocks from 1 to {len(self.blocks)}")
        return self(images, layers=tuple(layers))

    def resize(self, image_size: int) -> None:
        """Read images of another size from here on: positions are resampled bicubically, relative ones as BEiT does."""
        before, self.shape = self.grid, replace(self.shape, image_size=image_size)
        self.pos_embed = resample_abs_pos_embed(self.pos_embed, list(self.grid), list(before))
        for module in self.modules():
            if isinstance(module, RelPosBias):
                module.set_window_size(self.grid)

    def learn_positions(self) -> None:
        """Make the positions, which pretraining keeps fixed, a parameter."""
        if self.shape.positions != "none":
            table = self.pos_embed.clone()
            del self.pos_embed
            self.pos_embed = nn.Parameter(table)

    def drop_paths(self, rate: float) -> None:
        """In training leave out what a block adds, for an image at a time: rarely in early blocks, at this rate in the
        last (stochastic depth, Huang et al. 2016)."""
        self.drop_path = rate
        for block, rate_here in zip(self.blocks, torch.linspace(0, rate, len(self.blocks)).tolist(), strict=True):
            block.drop_path1, block.drop_path2 = DropPath(rate_here), DropPath(rate_here)
