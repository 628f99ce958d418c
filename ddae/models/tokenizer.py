"""A tokenizer: every patch of an image becomes one of a codebook's codes (BEiT-v2's VQ-KD).

    image -> encoder that sees all patches -> two layers -> unit vectors -> the nearest code, by cosine

Trained by vector quantisation: a decoder has to tell a teacher's features from the codes alone. B images, N patches,
D width of the encoder, W width of a code, C codes, F width of the teacher's features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddae.config.pretrain import ModelConfig
from ddae.distributed.comm import is_main, mean_over_ranks, sum_over_ranks
from ddae.models.patches import normalise, sincos_positions
from ddae.models.vit import Encoder, LayerNorm, build_blocks

NORMALISATION = "half"  # pixels reach a tokenizer in [-1, 1]


class Tokenizer(nn.Module):
    """codes(images) is what pretraining asks for."""

    def __init__(self, shape: ModelConfig, codes: int, code_width: int):
        super().__init__()
        self.encoder = Encoder(shape)
        self.encoder.normalisation = NORMALISATION
        self.to_code = _two_layers(shape.width, code_width)
        self.codebook: Tensor
        self.register_buffer("codebook", torch.zeros(codes, code_width))

    def encode(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> unit vectors [B, N, W]."""
        tokens = self.encoder(normalise(images, NORMALISATION, torch.float32))[:, 1:]
        with torch.autocast(tokens.device.type, enabled=False):  # which of two near codes it is shall not be rounded
            return F.normalize(self.to_code(tokens.float()), dim=-1)

    def nearest(self, vectors: Tensor) -> Tensor:
        """The nearest code of each unit vector: [.., W] -> int64 [..]."""
        with torch.autocast(vectors.device.type, enabled=False):  # rounded, many a patch would have another code
            return (vectors @ self.codebook.T).argmax(-1)

    @torch.no_grad()
    def codes(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> int64 [B, N], patches row by row."""
        return self.nearest(self.encode(images))


class Quantizer(nn.Module):
    """A tokenizer in training: with a decoder towards a teacher's features, and a codebook that follows what it is
    given, by moving averages (van den Oord et al. 2017), not by a gradient.

    decay: of the averages; a code whose share of patches falls below `dead` / C begins anew at a random patch.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        feature_width: int,
        depth: int,
        width: int,
        heads: int,
        decay: float = 0.99,
        dead: float = 0.01,
    ):
        super().__init__()
        self.tokenizer, self.decay, self.dead = tokenizer, decay, dead
        codes, code_width = tokenizer.codebook.shape
        self.embed = nn.Linear(code_width, width)
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", sincos_positions(tokenizer.encoder.grid, width, "rowfirst")[:, 1:])
        self.blocks = build_blocks(width, depth, heads)
        self.norm = LayerNorm(width)
        self.to_feature = _two_layers(width, feature_width)
        self.share: Tensor
        self.register_buffer("share", torch.zeros(codes))  # of patches that take each code, averaged; 0 at the start
        self.centre: Tensor
        self.register_buffer(
            "centre", torch.zeros(feature_width)
        )  # of the features: what all patches have says nothing

    def forward(self, images: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 images, the teacher's features [B, N, F] -> loss [], unit vectors [B, N, W] for `gather`.

        The loss is 1 - cosine of told and real features, the latter without their centre, and the mean square of how
        far vectors are from their codes.
        """
        vectors = self.tokenizer.encode(images)
        quantised = F.embedding(self.tokenizer.nearest(vectors), self.tokenizer.codebook)
        told = self.decode_features(
            vectors + (quantised - vectors).detach()
        )  # the gradient passes as if nothing were quantised
        loss = (1 - self.cosine(told, features)).mean()
        return loss + (vectors - quantised).square().mean(), vectors.detach()

    def cosine(self, told: Tensor, features: Tensor) -> Tensor:
        """[B, N, F] each -> [B, N]."""
        return F.cosine_similarity(told.float(), features.float() - self.centre, -1)

    def decode_features(self, quantised: Tensor) -> Tensor:
        """Codes' vectors [B, N, W] -> features [B, N, F]."""
        tokens = self.embed(quantised)
        tokens = tokens + self.pos_embed.to(tokens.dtype)
        for block in self.blocks:
            tokens = block(tokens)
        return self.to_feature(self.norm(tokens))

    @torch.no_grad()
    def init_codebook(self, images: Tensor, features: Tensor, seed: int) -> None:
        """Have a codebook of some patches of a first batch, and its centre."""
        self.tokenizer.codebook.copy_(self._picked(self.tokenizer.encode(images).flatten(0, -2), seed))
        self.centre.copy_(mean_over_ranks(features.float().mean((0, 1))))
        self.share.fill_(1 / len(self.share))

    @torch.no_grad()
    def accumulate(self, vectors: Tensor, features: Tensor, first: bool) -> None:
        """Note the unit vectors [B, N, W] and features [B, N, F] of a micro-batch, the step's first or a later one."""
        flat = vectors.flatten(0, -2)
        both = torch.cat([flat, torch.ones_like(flat[:, :1])], 1)
        sums = flat.new_zeros(len(self.share), both.shape[1]).index_add_(0, self.tokenizer.nearest(flat), both)
        centre = features.float().mean((0, 1))
        kept = None if first else self._gathered
        self._gathered = (sums, centre, 1) if kept is None else (kept[0] + sums, kept[1] + centre, kept[2] + 1)
        self._last = flat

    @torch.no_grad()
    def update_codebook(self, seed: int, applied: Tensor) -> None:
        """Move codebook and centre towards what all ranks have accumulated in this step.

        applied: float32 []; with 0 nothing changes. seed: by which unused codes choose new vectors.
        """
        assert self._gathered is not None
        assert self._last is not None
        before = [self.tokenizer.codebook.clone(), self.centre.clone(), self.share.clone()]
        sums, centre, micro_batches = self._gathered
        codebook = self.tokenizer.codebook
        sums, counts = sum_over_ranks(sums).split([codebook.shape[1], 1], 1)
        self.centre.lerp_(mean_over_ranks(centre / micro_batches), 1 - self.decay)
        self.share.lerp_(counts[:, 0] / counts.sum(), 1 - self.decay)
        moved = F.normalize(codebook.lerp(F.normalize(sums, dim=-1), 1 - self.decay), dim=-1)
        codebook.copy_(torch.where(counts > 0, moved, codebook))
        dead = self.share < self.dead / len(self.share)
        codebook.copy_(torch.where(dead[:, None], self._picked(self._last, seed), codebook))
        self.share.masked_fill_(dead, 1 / len(self.share))
        for buffer, old in zip((codebook, self.centre, self.share), before, strict=True):
            buffer.copy_(torch.where(applied > 0, buffer, old))

    def _picked(self, flat: Tensor, seed: int) -> Tensor:
        """A vector of the main rank's for every code."""
        picks = torch.randint(len(flat), (len(self.share),), generator=torch.Generator().manual_seed(seed))
        picked = flat[picks.to(flat.device)]
        return sum_over_ranks(picked if is_main() else torch.zeros_like(picked))


def usage(share: Tensor) -> tuple[float, float]:
    """Of a codebook, from each code's share of patches [C]: the codes taken at all, in per cent, and how many codes
    were as good if all were taken alike (perplexity)."""
    taken = share[share > 0] / share.sum()
    return 100 * len(taken) / len(share), float(torch.exp(-(taken * taken.log()).sum()))


def _two_layers(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, out))
