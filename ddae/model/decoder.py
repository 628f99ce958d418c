"""The light decoder: from visible tokens to something of every masked patch. Written once, built once for pixels and
once for features.

Shape letters: B images (K taps stacked on them), N patches, V visible, M masked, D encoder width, P output width.
"""

import torch
from torch import Tensor, nn

from ddae.model.vit import LayerNorm, build_blocks, run_block
from ddae.patches import gather_tokens, sincos_positions


class Decoder(nn.Module):
    """Linear projection, mask tokens, positions, transformer blocks, norm, linear head.

    Tokens stand in the order cls, visible, masked: attention does not mind, and nothing needs to be shuffled back.
    Only the masked tokens, which the loss reads, pass the norm and the head.
    """

    def __init__(
        self, in_width: int, width: int, depth: int, heads: int, out_width: int, grid: tuple[int, int], positions: str
    ):
        super().__init__()
        self.recompute = False  # activations in the backward pass
        self.embed = nn.Linear(in_width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", sincos_positions(grid, width, positions))
        self.blocks = build_blocks(width, depth, heads)
        self.norm = LayerNorm(width)
        self.head = nn.Linear(width, out_width)

    def forward(self, tokens: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """[B, 1 + V, D] (cls first), int64 [B, V], int64 [B, M] -> [B, M, P]."""
        positions = self.pos_embed.to(tokens.dtype).expand(len(tokens), -1, -1)
        shown = torch.cat([torch.zeros_like(visible[:, :1]), 1 + visible], 1)  # cls has the table's first row
        tokens = torch.cat(
            [
                self.embed(tokens) + gather_tokens(positions, shown),
                self.mask_token + gather_tokens(positions, 1 + masked),
            ],
            1,
        )
        for block in self.blocks:
            tokens = run_block(block, tokens, self.recompute)
        return self.head(self.norm(tokens[:, shown.shape[1] :]))
