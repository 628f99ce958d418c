"""The encoder: a plain Vision Transformer (timm blocks, fixed sin-cos positions, a cls token), and BEiT's with relative
positions and layer scale.

Shape letters: B images, N patches, V visible patches, M masked, T tokens, D width, H heads, P numbers of a patch.
Parameters have the names that timm and MAE give them, so that their files fit.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import timm.layers.mlp as timm_mlp
import timm.models.vision_transformer as timm_vit
import torch
import torch.nn.functional as F
from timm.layers import DropPath, RelPosBias, resample_abs_pos_embed
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from ddae.config.pretrain import ModelConfig
from ddae.models.patches import gather_tokens, patchify, sincos_positions


class LayerNorm(nn.LayerNorm):
    """Layer norm with the field's eps of 1e-6."""

    def __init__(self, width: int, **options):
        super().__init__(width, eps=1e-6, **options)


class RelativePositions(RelPosBias):
    """BEiT's relative positions: [1, H, T, T], to be added to the attention's logits."""

    def forward(self) -> Tensor:  # type: ignore[override]
        return self.get_bias()  # within a forward pass, or ZeRO-3 would not bring the table


class QKVLinear(nn.Linear):
    """Queries, keys and values in one product, [.., D] -> [.., 3 D]; or the queries alone, or the keys and values."""

    def forward(self, tokens: Tensor, part: int | None = None) -> Tensor:  # type: ignore[override]
        if part is None:
            return super().forward(tokens)
        sizes = [self.in_features, 2 * self.in_features]
        return F.linear(tokens, self.weight.split(sizes)[part], self.bias.split(sizes)[part])


QUERIES, KEYS_AND_VALUES = range(2)
TOKEN_STD = 0.02  # of cls and mask tokens, and of BEiT's matrices


class MaskTokens(NamedTuple):
    """The tokens of masked patches before anything has mixed with them: those of one patch are alike in all images."""

    table: Tensor  # [N, D]
    masked: Tensor  # int64 [B, M]

    def after(self, tokens: Tensor, table: Tensor | None = None) -> Tensor:
        """[K * B, T, D] -> [K * B, T + M, D]: the tokens, then those of their image's masked patches in a table."""
        each = F.embedding(self.masked, self.table if table is None else table)
        several = each.expand(len(tokens) // len(each), *each.shape).flatten(0, 1)
        return torch.cat([tokens, several], 1) if tokens.shape[1] else several


class Mlp(timm_mlp.Mlp):
    """timm's MLP, which need not keep GELU's output for the backward pass: it is computed again from GELU's input."""

    keeps_gelu = True

    def forward(self, tokens: Tensor) -> Tensor:
        if self.keeps_gelu or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return super().forward(tokens)
        entering = self.fc1(tokens)
        leaving = self.act(entering)
        storage, source = leaving.untyped_storage()._cdata, entering.detach()

        def pack(kept: Tensor) -> Tensor | torch.Size:
            return kept.shape if kept.untyped_storage()._cdata == storage else kept

        def unpack(kept: Tensor | torch.Size) -> Tensor:
            return self.act(source).view(kept) if isinstance(kept, torch.Size) else kept

        with saved_tensors_hooks(pack, unpack):
            return self.fc2(leaving)


class Block(timm_vit.Block):
    """timm's pre-norm block, which also leaves out what nobody asks for."""

    def __init__(self, width: int, heads: int, **options):
        super().__init__(width, heads, mlp_ratio=4, qkv_bias=True, norm_layer=LayerNorm, mlp_layer=Mlp, **options)
        self.attn.qkv = QKVLinear(width, 3 * width)

    def forward(  # type: ignore[override]
        self, tokens: Tensor, bias: Tensor | None = None, wanted: int | None = None, masked: MaskTokens | None = None
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]; bias [1, H, T, T] is added to the attention's logits. The same but for rounding, with

        wanted: of the last `wanted` tokens alone, [B, wanted, D]; the others are seen, and not worked on further.
        masked: more tokens after the T given, of which norm, queries, keys and values are computed once for all images.
        """
        if wanted is None and masked is None:
            return super().forward(tokens, bias)
        tokens = self.attend(tokens, wanted, masked)
        return tokens + self.ls2(self.mlp(self.norm2(tokens)))

    def attend(self, tokens: Tensor, wanted: int | None, masked: MaskTokens | None) -> Tensor:
        """The first half of forward(), without bias and dropped paths."""
        attn: Any = self.attn  # type checkers know no submodules
        normed, first = self.norm1(tokens), 0
        if wanted is not None:
            first = tokens.shape[1] + (0 if masked is None else masked.masked.shape[1]) - wanted
        if first:
            asking = normed[:, first:]
            queries = attn.qkv(asking, QUERIES) if asking.shape[1] else asking  # where mask tokens alone ask
            parts = [queries, *attn.qkv(normed, KEYS_AND_VALUES).chunk(2, -1)]
        else:
            parts = attn.qkv(normed).chunk(3, -1)
        kept = tokens[:, first:]
        if masked is not None:
            tables = attn.qkv(self.norm1(masked.table)).chunk(3, -1)
            parts = [masked.after(part, table) for part, table in zip(parts, tables, strict=True)]
            kept = masked.after(kept)
        query, key, value = (part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in parts)
        seen = F.scaled_dot_product_attention(query, key, value)
        return kept + self.ls1(attn.proj(seen.transpose(1, 2).flatten(2)))


def build_blocks(width: int, depth: int, heads: int, layer_scale: float = 0.0) -> nn.ModuleList:
    """`depth` blocks with biases and an MLP of four times the width.

    layer_scale: where the learnable factors of what a block adds begin; 0: there are none.
    """
    return nn.ModuleList([Block(width, heads, init_values=layer_scale or None) for _ in range(depth)])


def run_block(block: nn.Module, activation_checkpointing: bool, *inputs: object, chance: bool = False) -> Tensor:
    """A block's output; with `recompute` only its inputs are kept, and the block runs again in the backward pass.

    chance: the block drops paths, the same ones when run again.
    """
    if activation_checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=chance)  # type: ignore[return-value]
    return block(*inputs)


def initialise(module: nn.Module, generator: torch.Generator, kind: str = "bootmae") -> None:
    """Set every parameter of `module`: zero biases, unit norms, tokens of standard deviation 0.02, zero relative
    positions; a layer scale stays as it was built. Matrices by kind (ModelConfig.init):

    bootmae  Xavier-uniform; queries, keys and values count as three matrices; cls token of 1e-6 (MoCo v3, BootMAE)
    mae      Xavier-uniform; qkv counts as one matrix (MAE)
    beit     normal of 0.02, truncated at one standard deviation; attn.proj and mlp.fc2 of block l over sqrt(2 l) (BEiT)
    """
    cls_std = 1e-6 if kind == "bootmae" else TOKEN_STD
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(("cls_token", "mask_token")):
                parameter.normal_(std=cls_std if name.endswith("cls_token") else TOKEN_STD, generator=generator)
            elif name.endswith("gamma"):
                continue
            elif parameter.ndim >= 2 and not name.endswith("relative_position_bias_table"):
                if kind == "beit":
                    inside = math.erf(0.5**0.5)  # share of a normal within one standard deviation
                    parameter.uniform_(-inside, inside, generator=generator).erfinv_()
                    parameter.mul_(TOKEN_STD * 2**0.5).clamp_(-TOKEN_STD, TOKEN_STD)
                    continue
                fan_out, fan_in = parameter.flatten(1).shape
                fan_out = fan_in if kind == "bootmae" and name.endswith("qkv.weight") else fan_out
                bound = math.sqrt(6 / (fan_in + fan_out))
                parameter.uniform_(-bound, bound, generator=generator)
            elif name.endswith("weight"):
                parameter.fill_(1)
            else:
                parameter.zero_()
        if kind == "beit":
            _shrink_with_depth(module)


def _shrink_with_depth(module: nn.Module) -> None:
    """Divide what block l adds by sqrt(2 l), l counted from 1; blocks that follow an early one count on from it."""
    for part in module.modules():
        if isinstance(blocks := getattr(part, "blocks", None), nn.ModuleList):
            for number, block in enumerate(blocks, 1 + getattr(part, "early", 0)):
                block.attn.proj.weight /= math.sqrt(2 * number)  # type: ignore[union-attr,operator]
                block.mlp.fc2.weight /= math.sqrt(2 * number)  # type: ignore[union-attr,operator]


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
        self.activation_checkpointing = False  # activations in the backward pass
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
        wanted: int | None = None,
    ) -> Tensor | list[Tensor]:
        """Normalised images [B, 3, H, W] -> tokens [B, T, D], cls first, after the final norm.

        With `layers` (blocks counted from 1): a list of the tokens after those blocks instead, before any norm, and
        nothing is computed beyond the last of them; with `wanted` the last block gives its last `wanted` tokens alone.
        With `visible` (int64 [B, V]) the encoder sees those patches alone, T = 1 + V; or, with `mask_token` [1, 1, D]
        too, that token in the place of all others, T = 1 + N. Patches that are cut already, [B, V, P], may stand for
        the images, `visible` being their places in any order. ValueError where images are of another size, or relative
        positions are asked of visible patches.
        """
        side = self.shape.image_size
        if images.ndim == 3 and visible is not None:
            patches = images
        elif images.ndim == 4 and tuple(images.shape[1:]) == (3, side, side):
            patches = patchify(images, self.shape.patch_size)
        else:
            raise ValueError(f"images are {list(images.shape)}: this encoder reads [B, 3, {side}, {side}]")
        table = self.pos_embed.to(images.dtype)  # DeepSpeed may leave buffers in fp32
        positions = table[:, 1:]
        if visible is not None and mask_token is None:
            if self.shape.relative_positions != "none":
                raise ValueError("an encoder with relative positions reads all patches, not the visible ones alone")
            if patches is not images:
                patches = gather_tokens(patches, visible)
            positions = F.embedding(visible, positions[0])
        tokens = self.patch_embed["proj"](patches)
        if visible is not None and mask_token is not None:
            seen = torch.zeros_like(tokens[..., :1], dtype=torch.bool).scatter_(1, visible[:, :, None], True)
            tokens = torch.where(seen, tokens, mask_token)
        tokens = tokens + positions
        # tokens.shape[0]: len() would be a constant in an exported program
        cls = (self.cls_token + table[:, :1]).expand(tokens.shape[0], -1, -1)
        tokens = torch.cat([cls, tokens], 1)
        shared = self.rel_pos_bias() if self.shape.relative_positions == "shared" else None
        outputs, chance, last = {}, self.training and self.drop_path > 0, max(layers, default=len(self.blocks))
        for number, block in enumerate(self.blocks[:last], 1):
            each = self.shape.relative_positions == "each"
            bias = block.attn.rel_pos_bias() if each else shared  # type: ignore[union-attr]
            of_these = wanted if number == last else None
            tokens = run_block(block, self.activation_checkpointing, tokens, bias, of_these, chance=chance)
            outputs[number] = tokens
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
