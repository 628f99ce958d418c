"""The light decoder: from visible tokens to something of every masked patch. Written once, built once for pixels and
once for features.

Shape letters: B images, N patches, V visible, M masked, K taps, D encoder width, P output width, T tokens, W width,
H heads.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddae.models.patches import sincos_positions
from ddae.models.vit import Block, LayerNorm, MaskTokens, build_blocks, run_block


class CrossAttention(nn.Module):
    """Attention of [B, T, W] to a context [B, 1 + V, D], which passes a norm of its own first."""

    def __init__(self, width: int, heads: int, context_width: int):
        super().__init__()
        self.heads = heads
        self.norm = LayerNorm(context_width)
        self.q, self.kv = nn.Linear(width, width), nn.Linear(context_width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        def by_head(each: Tensor) -> Tensor:
            return each.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        key, value = self.kv(self.norm(context)).chunk(2, -1)
        seen = F.scaled_dot_product_attention(by_head(self.q(tokens)), by_head(key), by_head(value))
        return self.proj(seen.transpose(1, 2).flatten(2))


class CrossBlock(Block):
    """A pre-norm transformer block that attends to a context between its attention and its MLP (BootMAE)."""

    def __init__(self, width: int, heads: int, context_width: int):
        super().__init__(width, heads)
        self.norm_cross, self.cross = LayerNorm(width), CrossAttention(width, heads, context_width)

    def forward(  # type: ignore[override]
        self, tokens: Tensor, context: Tensor, wanted: int | None = None, masked: MaskTokens | None = None
    ) -> Tensor:
        tokens = self.attend(tokens, wanted, masked)
        tokens = tokens + self.cross(self.norm_cross(tokens), context)
        return tokens + self.mlp(self.norm2(tokens))


class Decoder(nn.Module):
    """Linear projection, mask tokens, positions, transformer blocks, norm, linear head.

    Tokens stand in the order cls, visible, masked: attention does not mind, and nothing needs to be shuffled back.
    Only the masked tokens, which the loss reads, pass the norm and the head. num_heads > 1: so many linear heads, one a
    tap. crosses: its blocks attend to a context, too.
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
        num_heads: int = 1,
        crosses: bool = False,
    ):
        super().__init__()
        self.activation_checkpointing = False  # activations in the backward pass
        # The same outputs with less work: mask tokens enter the first block once a step, where they are alike in all
        # images, and only masked patches leave the last one.
        self.enter_once, self.leave_masked = True, True
        self.places_visible = True  # visible tokens get positions, too; otherwise mask tokens alone (BootMAE)
        self.embed = nn.Linear(in_width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", sincos_positions(grid, width, positions))
        if crosses:
            self.blocks = nn.ModuleList([CrossBlock(width, heads, in_width) for _ in range(depth)])
        else:
            self.blocks = build_blocks(width, depth, heads)
        self.norm = LayerNorm(width)
        if num_heads == 1:
            self.head = nn.Linear(width, out_width)
        else:
            self.heads = nn.ModuleList([nn.Linear(width, out_width) for _ in range(num_heads)])

    def forward(
        self,
        tokens: Tensor,
        visible: Tensor,
        masked: Tensor,
        context: Tensor | None = None,
        places: Sequence[int] = (0,),
    ) -> Tensor:
        """[K * B, 1 + V, D] (cls first), int64 [B, V], int64 [B, M], context [K * B, 1 + V, D] -> [K * B, M, P].

        places: of the heads that the taps have, where each has its own.
        """
        positions, num_masked = self.pos_embed[0].to(tokens.dtype), masked.shape[1]
        tokens = self.embed(tokens)
        if self.places_visible:
            shown = torch.cat([torch.zeros_like(visible[:, :1]), 1 + visible], 1)  # cls has the table's first row
            tokens = (tokens.unflatten(0, (-1, len(shown))) + F.embedding(shown, positions)).flatten(0, 1)
        to_come: MaskTokens | None = MaskTokens(self.mask_token[0] + positions[1:], masked)
        if not self.enter_once:
            tokens, to_come = to_come.after(tokens), None
        for number, block in enumerate(self.blocks, 1):
            wanted = num_masked if self.leave_masked and number == len(self.blocks) else None
            tokens = run_block(block, self.activation_checkpointing, tokens, context, wanted, to_come)
            to_come = None
        normed = self.norm(tokens[:, tokens.shape[1] - num_masked :])
        if not hasattr(self, "heads"):
            return self.head(normed)
        parts = zip(places, normed.chunk(len(places)), strict=True)
        return torch.cat([self.heads[place](part) for place, part in parts])
