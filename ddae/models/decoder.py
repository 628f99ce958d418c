"""Light decoder: predicts something of every masked patch (pixels or features) from the visible tokens.

Shape letters: B images, N patches, V visible patches, M masked patches, K taps, S = 1 + V encoder tokens, T decoder
tokens, D encoder width, W decoder width, P predicted values per patch.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ddae.models.patches import sincos_positions
from ddae.models.vit import Block, LayerNorm, MaskTokens, build_blocks, run_block


class CrossAttention(nn.Module):
    """Cross-attention from decoder tokens to encoder tokens, which pass an own norm first."""

    def __init__(self, width: int, heads: int, context_width: int):
        super().__init__()
        self.heads = heads
        self.norm = LayerNorm(context_width)
        self.q, self.kv = nn.Linear(width, width), nn.Linear(context_width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Float[Tensor, "B T W"], context: Float[Tensor, "B S D"]) -> Float[Tensor, "B T W"]:
        def split_heads(values: Tensor) -> Tensor:
            return values.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        key, value = self.kv(self.norm(context)).chunk(2, -1)
        attended = F.scaled_dot_product_attention(split_heads(self.q(tokens)), split_heads(key), split_heads(value))
        return self.proj(attended.transpose(1, 2).flatten(2))


class CrossBlock(Block):
    """Pre-norm transformer block with cross-attention between its self-attention and its MLP (BootMAE)."""

    def __init__(self, width: int, heads: int, context_width: int):
        super().__init__(width, heads)
        self.norm_cross, self.cross = LayerNorm(width), CrossAttention(width, heads, context_width)

    def forward(
        self, tokens: Float[Tensor, "B T W"], context: Float[Tensor, "B S D"], *options
    ) -> Float[Tensor, "B U W"]:  # type: ignore[override]
        """Transform a sequence of tokens. options: num_outputs and mask_tokens of Block.forward()."""
        tokens = self.attend(tokens, *options)
        tokens = tokens + self.cross(self.norm_cross(tokens), context)
        return tokens + self.mlp(self.norm2(tokens))


class Decoder(nn.Module):
    """Linear embedding, mask tokens, positions, transformer blocks, norm, linear head.

    Tokens are ordered cls, visible, masked: attention is permutation-equivariant, so nothing is shuffled back. Only the
    masked tokens pass the norm and the head. in_width: of the encoder; out_width: values that are predicted of a patch;
    grid: (rows, columns) of patches; positions: as ModelConfig.positions; output_heads: linear heads, one per tap.
    """

    def __init__(
        self,
        in_width: int,
        width: int,
        depth: int,
        heads: int,
        out_width: int,
        grid: tuple[int, int],
        positions: str,
        output_heads: int = 1,
        cross_attention: bool = False,
    ):
        super().__init__()
        self.activation_checkpointing = False
        # Equal outputs with less computation: norm and qkv of the mask tokens are computed once for all images in the
        # first block, and the last block outputs masked tokens only.
        self.skip_unused_tokens = True
        self.visible_positions = True  # False: only mask tokens get positions (BootMAE)
        self.embed = nn.Linear(in_width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Buffer(sincos_positions(grid, width, positions))
        if cross_attention:
            self.blocks = nn.ModuleList(CrossBlock(width, heads, in_width) for _ in range(depth))
        else:
            self.blocks = build_blocks(width, depth, heads)
        self.norm = LayerNorm(width)
        if output_heads > 1:
            self.heads = nn.ModuleList(nn.Linear(width, out_width) for _ in range(output_heads))
        else:
            self.head = nn.Linear(width, out_width)

    def forward(
        self,
        tokens: Float[Tensor, "KB S D"],
        visible: Int64[Tensor, "B V"],
        masked: Int64[Tensor, "B M"],
        context: Float[Tensor, "KB S D"] | None = None,
        tap_indices: Sequence[int] = (0,),
    ) -> Float[Tensor, "KB M P"]:
        """Predict the masked patches from encoder tokens [K * B, 1 + V, D] of K taps, cls token first.

        visible, masked: positions of the patches. context: encoder tokens to cross-attend to, where the blocks do.
        tap_indices: the head of each of the K taps, where each tap has its own.
        """
        positions, num_masked = self.pos_embed[0].to(tokens.dtype), masked.shape[1]
        tokens = self.embed(tokens)
        if self.visible_positions:
            rows = F.pad(1 + visible, (1, 0))  # row 0 of the table is the cls token's
            tokens = (tokens.unflatten(0, (-1, len(rows))) + F.embedding(rows, positions)).flatten(0, 1)
        mask_tokens: MaskTokens | None = MaskTokens(self.mask_token[0] + positions[1:], masked)
        if not self.skip_unused_tokens:
            tokens, mask_tokens = mask_tokens.append_to(tokens), None
        for number, block in enumerate(self.blocks, 1):
            num_outputs = num_masked if self.skip_unused_tokens and number == len(self.blocks) else None
            tokens = run_block(block, self.activation_checkpointing, tokens, context, num_outputs, mask_tokens)
            mask_tokens = None  # appended by the first block
        normed = self.norm(tokens[:, tokens.shape[1] - num_masked :])
        if not hasattr(self, "heads"):
            return self.head(normed)
        parts = zip(tap_indices, normed.chunk(len(tap_indices)), strict=True)
        return torch.cat([self.heads[tap](part) for tap, part in parts])
