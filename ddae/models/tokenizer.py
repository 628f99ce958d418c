"""Tokenizer: maps every patch of an image to a code of a codebook (BEiT-v2's VQ-KD).

    image -> ViT encoder of all patches -> two linear layers -> unit vectors -> nearest code by cosine similarity

It is trained by vector quantisation: a decoder reconstructs a teacher's features from the codes alone. Shape letters:
B images, N patches, E width of a code, C codes, F width of the teacher's features.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from ddae.config.pretrain import ModelConfig
from ddae.config.tokenizer import QuantizerConfig
from ddae.distributed.comm import is_main, mean_over_ranks, sum_over_ranks
from ddae.models.patches import normalise, sincos_positions
from ddae.models.vit import Encoder, LayerNorm, build_blocks

NORMALISATION = "half"  # the tokenizer's input is in [-1, 1]


class Tokenizer(nn.Module):
    """Encoder and codebook; codes(images) gives the targets of pretraining."""

    def __init__(self, shape: ModelConfig, codes: int, code_width: int):
        super().__init__()
        self.encoder = Encoder(shape)
        self.encoder.normalisation = NORMALISATION
        self.to_code = _two_layers(shape.width, code_width)
        self.codebook = nn.Buffer(torch.zeros(codes, code_width))

    def encode(self, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B N E"]:
        """Return a unit vector for each patch, before quantisation."""
        tokens = self.encoder(normalise(images, NORMALISATION, torch.float32))[:, 1:]
        with torch.autocast(tokens.device.type, enabled=False):  # bf16 would change the nearest of two close codes
            return F.normalize(self.to_code(tokens.float()), dim=-1)

    def nearest_code(self, vectors: Float[Tensor, "*B E"]) -> Int64[Tensor, "*B"]:
        """Return the index of the code nearest to each unit vector."""
        with torch.autocast(vectors.device.type, enabled=False):  # in bf16 many patches would get another code
            return (vectors @ self.codebook.T).argmax(-1)

    @torch.no_grad()
    def codes(self, images: UInt8[Tensor, "B 3 H W"]) -> Int64[Tensor, "B N"]:
        """Return the code of each patch, in row-major order of the patches."""
        return self.nearest_code(self.encode(images))


class Quantizer(nn.Module):
    """A tokenizer in training: with a decoder that predicts a teacher's features, and EMA updates of the codebook.

    The codebook has no gradient; it follows the vectors assigned to each code by exponential moving averages (van den
    Oord et al. 2017). config.decay: of the averages. A code whose share of patches is below config.dead / C is reset to
    the vector of a random patch. The decoder has the config's shape.
    """

    def __init__(self, tokenizer: Tokenizer, feature_width: int, config: QuantizerConfig):
        super().__init__()
        self.tokenizer, self.decay, self.dead = tokenizer, config.decay, config.dead
        (codes, code_width), width = tokenizer.codebook.shape, config.decoder_width
        self.embed = nn.Linear(code_width, width)
        self.pos_embed = nn.Buffer(sincos_positions(tokenizer.encoder.grid, width, "rowfirst")[:, 1:])
        self.blocks = build_blocks(width, config.decoder_depth, config.decoder_heads)
        self.norm = LayerNorm(width)
        self.to_feature = _two_layers(width, feature_width)
        self.share = nn.Buffer(torch.zeros(codes))  # EMA of each code's share of patches
        self.centre = nn.Buffer(torch.zeros(feature_width))  # EMA of the features' mean
        # Sums over the micro-batches of a step, their number, and the vectors of the last one.
        self._accumulated: tuple[Tensor, Tensor, int, Tensor] | None = None

    def forward(
        self, images: UInt8[Tensor, "B 3 H W"], features: Float[Tensor, "B N F"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "B N E"]]:
        """Return the loss, and the unit vectors for accumulate(). features: the teacher's.

        The loss is the mean of 1 - cosine similarity of predicted and centred features, plus the commitment loss: the
        mean squared difference of vectors and their codes.
        """
        vectors = self.tokenizer.encode(images)
        quantised = F.embedding(self.tokenizer.nearest_code(vectors), self.tokenizer.codebook)
        straight_through = vectors + (quantised - vectors).detach()  # its gradient is that of the vectors
        loss = (1 - self.cosine(self.decode_features(straight_through), features)).mean()
        return loss + (vectors - quantised).square().mean(), vectors.detach()

    def cosine(self, predicted: Float[Tensor, "B N F"], features: Float[Tensor, "B N F"]) -> Float[Tensor, "B N"]:
        """Return the cosine similarity of predicted features and the teacher's centred ones."""
        return F.cosine_similarity(predicted.float(), features.float() - self.centre, -1)

    def decode_features(self, quantised: Float[Tensor, "B N E"]) -> Float[Tensor, "B N F"]:
        """Predict the teacher's features from the vectors of codes."""
        tokens = self.embed(quantised)
        tokens = tokens + self.pos_embed.to(tokens.dtype)
        for block in self.blocks:
            tokens = block(tokens)
        return self.to_feature(self.norm(tokens))

    @torch.no_grad()
    def init_codebook(self, images: UInt8[Tensor, "B 3 H W"], features: Float[Tensor, "B N F"], seed: int) -> None:
        """Initialise the codebook with random patches of the first batch, and the centre with its mean."""
        self.tokenizer.codebook.copy_(self._random_vectors(self.tokenizer.encode(images).flatten(0, -2), seed))
        self.centre.copy_(mean_over_ranks(features.float().mean((0, 1))))
        self.share.fill_(1 / len(self.share))

    @torch.no_grad()
    def accumulate(self, vectors: Float[Tensor, "B N E"], features: Float[Tensor, "B N F"], first: bool) -> None:
        """Add a micro-batch's unit vectors and features to the step's sums. first: whether it is the step's first."""
        flat = vectors.flatten(0, -2)
        with_count = torch.cat([flat, torch.ones_like(flat[:, :1])], 1)
        sums = flat.new_zeros(len(self.share), with_count.shape[1])
        sums.index_add_(0, self.tokenizer.nearest_code(flat), with_count)
        centre, micro_batches = features.float().mean((0, 1)), 1
        if not first and self._accumulated is not None:
            old_sums, old_centre, old_micro_batches, _ = self._accumulated
            sums, centre, micro_batches = old_sums + sums, old_centre + centre, old_micro_batches + 1
        self._accumulated = sums, centre, micro_batches, flat

    @torch.no_grad()
    def update_codebook(self, seed: int, applied: Float[Tensor, ""]) -> None:
        """Move the codebook and the centre towards the step's averages over all ranks.

        applied: 1, or 0 to leave everything unchanged. seed: of the patches that replace dead codes.
        """
        assert self._accumulated is not None
        sums, centre, micro_batches, last_vectors = self._accumulated
        codebook, rate = self.tokenizer.codebook, 1 - self.decay
        buffers = codebook, self.centre, self.share
        old_buffers = [buffer.clone() for buffer in buffers]
        sums, counts = sum_over_ranks(sums).split([codebook.shape[1], 1], 1)
        self.centre.lerp_(mean_over_ranks(centre / micro_batches), rate)
        self.share.lerp_(counts[:, 0] / counts.sum(), rate)
        moved = F.normalize(codebook.lerp(F.normalize(sums, dim=-1), rate), dim=-1)
        codebook.copy_(torch.where(counts > 0, moved, codebook))
        dead = self.share < self.dead / len(self.share)
        codebook.copy_(torch.where(dead[:, None], self._random_vectors(last_vectors, seed), codebook))
        self.share.masked_fill_(dead, 1 / len(self.share))
        for buffer, old in zip(buffers, old_buffers, strict=True):
            buffer.copy_(torch.where(applied > 0, buffer, old))

    def _random_vectors(self, flat: Float[Tensor, "BN E"], seed: int) -> Float[Tensor, "C E"]:
        """Return one of the main rank's vectors for each code, drawn with replacement, equal on all ranks."""
        picks = torch.randint(len(flat), (len(self.share),), generator=torch.Generator().manual_seed(seed))
        picked = flat[picks.to(flat.device)]
        return sum_over_ranks(picked if is_main() else torch.zeros_like(picked))


def codebook_usage(share: Float[Tensor, " C"]) -> tuple[float, float]:
    """Return the percentage of codes in use and the perplexity, from each code's share (or count) of patches.

    The perplexity is the number of equally frequent codes with the same entropy.
    """
    used = share[share > 0] / share.sum()
    return 100 * len(used) / len(share), float(torch.exp(-(used * used.log()).sum()))


def _two_layers(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, out))
