"""Branches: what supervises the taps of the encoder. A branch predicts from some taps and compares with a target.

    PixelBranch     the masked patches' pixels, normalised patch by patch               (paper Eq. 3)
    FeatureBranch   the teacher's tokens of the masked patches after the same blocks    (paper Eq. 5)
    TokenBranch     the masked patches' codes in a tokenizer's codebook                 (BEiT-v2)
    ClsBranch       the same codes, from the last cls token and an early block's tokens (BEiT-v2)

Shape letters: B images, N patches, V visible patches, M masked patches, K taps of the branch, T tokens, D width,
P values of a patch, C codes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import ddae_kernels as dk
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from ddae.data.masking import Mask
from ddae.method.sequential import sequential_backward
from ddae.models.decoder import Decoder
from ddae.models.patches import NORMALISATIONS, cached_tensor, gather_tokens
from ddae.models.vit import Encoder, build_blocks, run_block


class Inputs(NamedTuple):
    """The inputs of a forward pass; each branch uses some of them."""

    images: UInt8[Tensor, "B 3 H W"]
    mask: Mask
    distance: Float[Tensor, "B M"]  # from each masked patch to the nearest visible one
    betas: Float[Tensor, " L"]  # all betas of the model
    feature_weight: Float[Tensor, ""]  # weight of the feature branch, 0 to 1
    share: float  # 1 / micro-batches of a step; a factor of the loss, so that gradients need no scaling afterwards
    loss_backend: str  # auto, reference or triton
    teacher_tokens: Float[Tensor, "K B M D"] | None = None  # after the feature branch's taps, at masked patches
    teacher_event: torch.cuda.Event | None = None  # to wait for before teacher_tokens are used; of a side stream
    codes: Int64[Tensor, "B M"] | None = None  # of the masked patches, from the token branch's tokenizer
    patches: Float[Tensor, "B _ P"] | None = None  # normalised, visible ones first, if they are extracted already
    patch_weight: Float[Tensor, "B M"] | None = None  # fixed weights of the masked patches; None: 1


class Tokens(NamedTuple):
    """Encoder tokens by block, counted from 1: [B, 1 + V, D], or [B, 1 + N, D] if the encoder sees mask tokens."""

    raw: dict[int, Tensor]
    normed: dict[int, Tensor]  # after the encoder's final norm


class Branch(nn.Module):
    """Supervised taps, their weights, and the betas that weight their patches."""

    def __init__(self, taps: Sequence[int], tap_weights: Sequence[float], rescale_grad: str):
        super().__init__()
        self.taps = tuple(taps)
        self.tap_weights = tuple(tap_weights)
        self.rescale_grad = rescale_grad
        self.beta_indices: tuple[int, ...] = ()  # into Inputs.betas, one per tap; empty: patches are weighted equally

    @property
    def normed_blocks(self) -> tuple[int, ...]:
        """Encoder blocks whose tokens this branch uses after the encoder's final norm."""
        return self.taps

    @property
    def raw_blocks(self) -> tuple[int, ...]:
        """Encoder blocks whose tokens this branch uses before any norm."""
        return ()

    def loss_weights(self, inputs: Inputs) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"]]:
        """Return the beta and the weight of each tap. With beta 0 (not dynamic) all patch weights are exactly 1."""
        tap_weight = cached_tensor(tuple(inputs.share * weight for weight in self.tap_weights), inputs.betas.device)
        if not self.beta_indices:
            return torch.zeros_like(tap_weight), tap_weight
        return torch.stack([inputs.betas[index] for index in self.beta_indices]), tap_weight

    def forward(self, tokens: Tokens, inputs: Inputs) -> dk.DynamicLoss:
        """Return the weighted loss of all taps."""
        raise NotImplementedError


class DecoderBranch(Branch):
    """Branch with a decoder, which predicts something of every masked patch from the visible tokens.

    norms: one per tap but the last, which uses the encoder's final norm; empty: all taps use it. context: encoder block
    that the decoder cross-attends to, 0 for the tap itself; None without cross-attention.
    """

    sequential_backward = False  # run the taps one after the other (method/sequential.py), not as one batch

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
    def normed_blocks(self) -> tuple[int, ...]:
        return self.taps[len(self.norms) :]

    @property
    def raw_blocks(self) -> tuple[int, ...]:
        context_blocks = () if self.context is None else (self.context,) if self.context else self.taps
        return (*self.taps[: len(self.norms)], *context_blocks)

    def predict(self, tokens: Tokens, mask: Mask, tap_indices: Sequence[int] = ()) -> Float[Tensor, "K B M P"]:
        """Decode the taps at these indices, by default all, in one batch."""
        tap_indices, num_norms = tap_indices or range(len(self.taps)), len(self.norms)
        taps = [self.taps[index] for index in tap_indices]
        normed = [
            self.norms[index](tokens.raw[tap]) if index < num_norms else tokens.normed[tap]
            for index, tap in zip(tap_indices, taps, strict=True)
        ]
        context = None
        if self.context is not None:
            context = torch.cat([tokens.raw[self.context or tap] for tap in taps])
        return self.decoder(torch.cat(normed), *mask, context, tap_indices).unflatten(0, (len(taps), -1))

    def loss(self, pred: Float[Tensor, "K B M P"], inputs: Inputs, tap_slice: slice) -> dk.DynamicLoss:
        """Return the weighted loss of the predictions of the taps in `tap_slice`."""
        raise NotImplementedError

    def forward(self, tokens: Tokens, inputs: Inputs) -> dk.DynamicLoss:
        if not (self.sequential_backward and torch.is_grad_enabled()):
            return self.loss(self.predict(tokens, inputs.mask), inputs, slice(None))
        raw_blocks, normed_blocks = self.raw_blocks, self.normed_blocks

        def run(index: int, *values: Tensor) -> dk.DynamicLoss:
            """Return the loss of one tap, from the tokens of all blocks and the betas."""
            *block_tokens, betas = values
            raw, normed = block_tokens[: len(raw_blocks)], block_tokens[len(raw_blocks) :]
            detached = Tokens(dict(zip(raw_blocks, raw, strict=True)), dict(zip(normed_blocks, normed, strict=True)))
            pred = self.predict(detached, inputs.mask, (index,))
            return self.loss(pred, inputs._replace(betas=betas), slice(index, index + 1))

        raw, normed = (tokens.raw[block] for block in raw_blocks), (tokens.normed[block] for block in normed_blocks)
        tensors = *raw, *normed, inputs.betas
        return dk.DynamicLoss(*sequential_backward(run, len(self.taps), tensors, list(self.parameters())))


class PixelBranch(DecoderBranch):
    """Reconstructs the pixels of the masked patches (paper Eq. 3)."""

    def __init__(self, *decoder_args, patch: int, norm: str, normalisation: str, **options):
        """decoder_args, options: of DecoderBranch. norm: of a target patch. normalisation: of the encoder's input."""
        super().__init__(*decoder_args, **options)
        self.patch, self.norm = patch, norm
        self.mean, self.std = NORMALISATIONS[normalisation]

    def loss(self, pred: Float[Tensor, "K B M P"], inputs: Inputs, tap_slice: slice) -> dk.DynamicLoss:
        beta, tap_weight = self.loss_weights(inputs)
        return dk.dynamic_pixel_mse(
            pred,
            inputs.images,
            inputs.mask.masked,
            inputs.distance,
            beta[tap_slice],
            tap_weight[tap_slice],
            patch=self.patch,
            mean=self.mean,
            std=self.std,
            norm=self.norm,
            rescale_grad=self.rescale_grad,
            patch_weight=inputs.patch_weight,
            impl=inputs.loss_backend,
        )


class FeatureBranch(DecoderBranch):
    """Regresses the teacher's tokens of the masked patches (paper Eq. 5)."""

    def __init__(self, *decoder_args, target_norm: str, **options):
        """decoder_args, options: of DecoderBranch. target_norm: normalisation of the teacher's tokens."""
        super().__init__(*decoder_args, **options)
        self.target_norm = target_norm

    def loss(self, pred: Float[Tensor, "K B M D"], inputs: Inputs, tap_slice: slice) -> dk.DynamicLoss:
        if inputs.teacher_tokens is None:
            raise ValueError("teacher_tokens is None; the feature branch needs them. Pass Teacher.targets().")
        if inputs.teacher_event is not None:
            inputs.teacher_event.wait()
        beta, tap_weight = self.loss_weights(inputs)
        return dk.dynamic_feature_mse(
            pred,
            inputs.teacher_tokens[tap_slice],
            inputs.distance,
            beta[tap_slice],
            (tap_weight * inputs.feature_weight)[tap_slice],
            norm_pred=self.target_norm != "none",
            target_norm=self.target_norm,
            rescale_grad=self.rescale_grad,
            patch_weight=inputs.patch_weight,
            impl=inputs.loss_backend,
        )


class TokenBranch(Branch):
    """Classifies the code of each masked patch from its mask token, with one linear head for all taps (BEiT-v2)."""

    def __init__(self, width: int, codes: int, taps, tap_weights, rescale_grad):
        super().__init__(taps, tap_weights, rescale_grad)
        self.head = nn.Linear(width, codes)

    def forward(self, tokens: Tokens, inputs: Inputs) -> dk.DynamicLoss:
        beta, tap_weight = self.loss_weights(inputs)
        token_error = cross_entropy(self.head, [tokens.normed[tap] for tap in self.taps], inputs)
        options = {"rescale_grad": self.rescale_grad, "patch_weight": inputs.patch_weight}
        return dk.dynamic_error(token_error, inputs.distance, beta, tap_weight, **options)


class ClsBranch(Branch):
    """Classifies the codes from the last cls token and the patch tokens of an early block, with own blocks (BEiT-v2).

    The early tokens alone are not sufficient, so that the cls token learns to represent the whole image. Final norm,
    head and shared relative positions are those of the encoder and the token branch.
    """

    def __init__(self, encoder: Encoder, token_branch: TokenBranch, early_block: int, depth: int):
        """early_block: encoder block that the patch tokens are taken from. depth: number of own blocks."""
        shape = encoder.shape
        super().__init__((shape.depth,), (1.0,), "full")
        self.early_block = early_block
        self.blocks = build_blocks(shape.width, depth, shape.heads, shape.layer_scale)
        self.norm, self.head = encoder.norm, token_branch.head
        self.activation_checkpointing = False
        self.rel_pos_bias = encoder.rel_pos_bias if shape.relative_positions == "shared" else None

    @property
    def normed_blocks(self) -> tuple[int, ...]:
        return ()

    @property
    def raw_blocks(self) -> tuple[int, ...]:
        return (self.early_block, *self.taps)

    def forward(self, tokens: Tokens, inputs: Inputs) -> dk.DynamicLoss:
        early, last = tokens.raw[self.early_block], tokens.raw[self.taps[0]]
        bias = None if self.rel_pos_bias is None else self.rel_pos_bias()
        combined = torch.cat([last[:, :1], early[:, 1:]], 1)
        for block in self.blocks:
            combined = run_block(block, self.activation_checkpointing, combined, bias)
        token_error = cross_entropy(self.head, [self.norm(combined)], inputs)
        beta, tap_weight = self.loss_weights(inputs)
        return dk.dynamic_error(token_error, inputs.distance, beta, tap_weight)


def cross_entropy(head: nn.Module, tokens: list[Float[Tensor, "B T D"]], inputs: Inputs) -> Float[Tensor, "K B M"]:
    """Return the cross-entropy of the masked patches' codes in fp32, from the tokens [B, 1 + N, D] of K taps."""
    if inputs.codes is None:
        raise ValueError("codes is None; the token branch needs the tokenizer's codes. Pass Tokenizer.codes().")
    codes = inputs.codes.expand(len(tokens), -1, -1)
    logits = head(torch.stack([gather_tokens(each[:, 1:], inputs.mask.masked) for each in tokens]))
    return F.cross_entropy(logits.flatten(0, 2).float(), codes.flatten(), reduction="none").view_as(codes)
