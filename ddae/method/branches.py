"""What is supervised: a branch decodes some taps of the encoder and compares them with a target.

    PixelBranch     the masked patches' own pixels, normalised patch by patch            (paper Eq. 3)
    FeatureBranch   the teacher's tokens after the same blocks, at the masked patches     (paper Eq. 5)
    TokenBranch     the masked patches' codes in a tokenizer's codebook, and                      (BEiT-v2)
    ClsBranch       the same from the last cls token and early patches

Shape letters: B images, V visible, M masked, K taps of the branch, D width, P numbers of a patch, C codes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import ddae_kernels as dk
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddae.data.masking import Mask
from ddae.method.sequential import sequential_backward
from ddae.models.decoder import Decoder
from ddae.models.patches import NORMALISATIONS, constant, gather_tokens
from ddae.models.vit import Encoder, build_blocks, run_block


class Inputs(NamedTuple):
    """The inputs of a step; each branch reads what it needs."""

    images: Tensor  # uint8 [B, 3, H, W]
    mask: Mask
    distance: Tensor  # float32 [B, M]: of masked patches to the nearest visible one
    betas: Tensor  # float32: all betas of the method
    feature_weight: Tensor  # float32 []: weight of the feature branch, 0 to 1
    share: float  # 1 / micro-batches of a step; part of the loss, so that gradients need no scaling afterwards
    loss_backend: str  # auto, reference or triton
    teacher_tokens: Tensor | None = None  # [K, B, M, D]: after the feature branch's taps, at masked patches
    teacher_event: torch.cuda.Event | None = None  # to wait for before teacher_tokens are read: another stream's
    codes: Tensor | None = None  # int64 [B, M]: of the masked patches, by the token branch's tokenizer
    patches: Tensor | None = None  # normalised [B, N, P], visible ones first, if they are extracted already
    patch_weight: Tensor | None = None  # float32 [B, M]: fixed weights of the masked patches; None: all 1


class Tokens(NamedTuple):
    """What the encoder made of a batch, by block: [B, 1 + V, D], or [B, 1 + N, D] where mask tokens stand for masked
    patches."""

    raw: dict[int, Tensor]
    normed: dict[int, Tensor]  # under the encoder's final norm


class Branch(nn.Module):
    """The taps that are supervised, their weights, and which of the method's betas weigh their patches."""

    def __init__(self, taps: Sequence[int], tap_weights: Sequence[float], rescale_grad: str):
        super().__init__()
        self.taps = tuple(taps)
        self.tap_weights = tuple(tap_weights)
        self.rescale_grad = rescale_grad
        self.beta_places: tuple[int, ...] = ()  # one a tap; empty: every patch weighs the same

    @property
    def reads(self) -> tuple[int, ...]:
        """The blocks whose tokens it wants under the encoder's final norm."""
        return self.taps

    @property
    def reads_raw(self) -> tuple[int, ...]:
        """Those that it wants as they are."""
        return ()

    def weights(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """beta [K] and tap weight [K]. A branch that is not dynamic has beta 0: all weights are exactly 1."""
        tap_weight = constant(tuple(inputs.share * weight for weight in self.tap_weights), inputs.betas.device)
        if not self.beta_places:
            return torch.zeros_like(tap_weight), tap_weight
        return torch.stack([inputs.betas[place] for place in self.beta_places]), tap_weight

    def forward(self, tokens: Tokens, inputs: Inputs) -> dk.DynamicLoss:
        raise TypeError("a branch says in its own forward what its target is")


class DecoderBranch(Branch):
    """A branch whose decoder turns visible tokens into something of every masked patch.

    norms: one for each tap but the last, which has the encoder's final one, or none: all have that. context: the block
    whose tokens the decoder's blocks attend to, 0 the tap's own; None where they attend to none.
    """

    sequential_backward = (
        False  # the taps pass the decoder one after the other (sequential_backward.py), not as one batch
    )

    def __init__(
        self,
        decoder: Decoder,
        taps: Sequence[int],
        tap_weights: Sequence[float],
        rescale_grad: str,
        norms: Sequence[nn.Module] = (),
        context: int | None = None,
    ):
        super().__init__(taps, tap_weights, rescale_grad)
        self.decoder, self.norms, self.context = decoder, nn.ModuleList(norms), context

    @property
    def reads(self) -> tuple[int, ...]:
        return self.taps[len(self.norms) :]

    @property
    def reads_raw(self) -> tuple[int, ...]:
        of_context = () if self.context is None else (self.context,) if self.context else self.taps
        return (*self.taps[: len(self.norms)], *of_context)

    def predict(self, tokens: Tokens, mask: Mask, places: Sequence[int] = ()) -> Tensor:
        """[K, B, M, P], all taps in one batch through the decoder, or those at some places among them."""
        places, num_norms = places or range(len(self.taps)), len(self.norms)
        taps = [self.taps[place] for place in places]
        normed = [
            self.norms[place](tokens.raw[tap]) if place < num_norms else tokens.normed[tap]
            for place, tap in zip(places, taps, strict=True)
        ]
        context = None
        if self.context is not None:
            context = torch.cat([tokens.raw[self.context or tap] for tap in taps])
        return self.decoder(torch.cat(normed), *mask, context, places).unflatten(0, (len(taps), -1))

    def loss(self, pred: Tensor, inputs: Inputs, places: slice) -> dk.DynamicLoss:
        """Of the prediction [K, B, M, P] of the taps at `places`."""
        raise TypeError("a branch says in its own loss what its target is")

    def forward(self, tokens: Tokens, inputs: Inputs) -> dk.DynamicLoss:
        if not (self.sequential_backward and torch.is_grad_enabled()):
            return self.loss(self.predict(tokens, inputs.mask), inputs, slice(None))
        raw, normed = self.reads_raw, self.reads

        def run(place: int, *values: Tensor) -> dk.DynamicLoss:
            """Of one tap, from the tokens of the blocks that are read and the betas."""
            *seen, betas = values
            own = Tokens(
                dict(zip(raw, seen[: len(raw)], strict=True)), dict(zip(normed, seen[len(raw) :], strict=True))
            )
            pred = self.predict(own, inputs.mask, (place,))
            return self.loss(pred, inputs._replace(betas=betas), slice(place, place + 1))

        tensors = *(tokens.raw[block] for block in raw), *(tokens.normed[block] for block in normed), inputs.betas
        return dk.DynamicLoss(*sequential_backward(run, len(self.taps), tensors, list(self.parameters())))


class PixelBranch(DecoderBranch):
    def __init__(self, *decoding, patch: int, norm: str, normalisation: str, **options):
        super().__init__(*decoding, **options)
        self.patch, self.norm = patch, norm
        self.mean, self.std = NORMALISATIONS[normalisation]

    def loss(self, pred: Tensor, inputs: Inputs, places: slice) -> dk.DynamicLoss:
        beta, tap_weight = self.weights(inputs)
        return dk.dynamic_pixel_mse(
            pred,
            inputs.images,
            inputs.mask.masked,
            inputs.distance,
            beta[places],
            tap_weight[places],
            patch=self.patch,
            mean=self.mean,
            std=self.std,
            norm=self.norm,
            rescale_grad=self.rescale_grad,
            patch_weight=inputs.patch_weight,
            impl=inputs.loss_backend,
        )


class FeatureBranch(DecoderBranch):
    def __init__(self, *decoding, target_norm: str, **options):
        super().__init__(*decoding, **options)
        self.target_norm = target_norm

    def loss(self, pred: Tensor, inputs: Inputs, places: slice) -> dk.DynamicLoss:
        if inputs.teacher_tokens is None:
            raise ValueError("the feature branch needs the teacher's tokens")
        if inputs.teacher_event is not None:
            inputs.teacher_event.wait()
        beta, tap_weight = self.weights(inputs)
        return dk.dynamic_feature_mse(
            pred,
            inputs.teacher_tokens[places],
            inputs.distance,
            beta[places],
            (tap_weight * inputs.feature_weight)[places],
            norm_pred=self.target_norm != "none",
            target_norm=self.target_norm,
            rescale_grad=self.rescale_grad,
            patch_weight=inputs.patch_weight,
            impl=inputs.loss_backend,
        )


class TokenBranch(Branch):
    """A linear head, shared by the taps, that tells each masked patch's code where the encoder saw a mask token."""

    def __init__(self, width: int, codes: int, taps, tap_weights, rescale_grad):
        super().__init__(taps, tap_weights, rescale_grad)
        self.head = nn.Linear(width, codes)

    def forward(self, tokens: Tokens, inputs: Inputs) -> dk.DynamicLoss:
        beta, tap_weight = self.weights(inputs)
        token_error = cross_entropy(self.head, [tokens.normed[tap] for tap in self.taps], inputs)
        weighing = {"rescale_grad": self.rescale_grad, "patch_weight": inputs.patch_weight}
        return dk.dynamic_error(token_error, inputs.distance, beta, tap_weight, **weighing)


class ClsBranch(Branch):
    """Blocks of its own over the last cls token and an early block's patches, which alone do not know enough: the cls
    token learns to say what the image is. Norm, head and relative positions are the encoder's and the token branch's.
    """

    def __init__(self, encoder: Encoder, tokens: TokenBranch, block: int, depth: int):
        shape = encoder.shape
        super().__init__((shape.depth,), (1.0,), "full")
        self.early = block
        self.blocks = build_blocks(shape.width, depth, shape.heads, shape.layer_scale)
        self.norm, self.head = encoder.norm, tokens.head
        self.activation_checkpointing = False  # activations in the backward pass
        self.rel_pos_bias = encoder.rel_pos_bias if shape.relative_positions == "shared" else None

    @property
    def reads(self) -> tuple[int, ...]:
        return ()

    @property
    def reads_raw(self) -> tuple[int, ...]:
        return (self.early, *self.taps)

    def forward(self, tokens: Tokens, inputs: Inputs) -> dk.DynamicLoss:
        early, last = tokens.raw[self.early], tokens.raw[self.taps[0]]
        bias = None if self.rel_pos_bias is None else self.rel_pos_bias()
        both = torch.cat([last[:, :1], early[:, 1:]], 1)
        for block in self.blocks:
            both = run_block(block, self.activation_checkpointing, both, bias)
        token_error = cross_entropy(self.head, [self.norm(both)], inputs)
        beta, tap_weight = self.weights(inputs)
        return dk.dynamic_error(token_error, inputs.distance, beta, tap_weight)


def cross_entropy(head: nn.Module, tokens: list[Tensor], inputs: Inputs) -> Tensor:
    """K tensors [B, 1 + N, D] -> [K, B, M]: of the masked patches' codes, in fp32."""
    if inputs.codes is None:
        raise ValueError("the token branch needs the tokenizer's codes")
    codes = inputs.codes.expand(len(tokens), -1, -1)
    logits = head(torch.stack([gather_tokens(each[:, 1:], inputs.mask.masked) for each in tokens]))
    return F.cross_entropy(logits.flatten(0, 2).float(), codes.flatten(), reduction="none").view_as(codes)
