"""Branches: what supervises the taps of the encoder. A branch predicts from some taps and compares with a target.

    PixelBranch     the masked patches' pixels, normalised patch by patch               (paper Eq. 3)
    FeatureBranch   the teacher's tokens of the masked patches after the same blocks    (paper Eq. 5)
    TokenBranch     the masked patches' codes in a tokenizer's codebook                 (BEiT-v2)
    ClsBranch       the same codes, from the last cls token and an early block's tokens (BEiT-v2)

Shape letters: B images, N patches, V visible patches, M masked patches, S predicted ones of them (by default all),
K taps that a step supervises (by default all of the branch), T tokens, D width, P values of a patch, C codes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import ddae_kernels as dk
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from ddae.config.pretrain import DecoderBranchConfig, PretrainConfig, TokenConfig
from ddae.data.masking import Mask
from ddae.method.partial_supervision import draw_taps, spread_over_taps
from ddae.method.sequential import sequential_backward
from ddae.models.decoder import Decoder
from ddae.models.patches import NORMALISATIONS, cached_tensor, gather_tokens, sincos_layout
from ddae.models.vit import Encoder, LayerNorm, build_blocks, run_block


class Inputs(NamedTuple):
    """The inputs of a forward pass; each branch uses some of them."""

    images: UInt8[Tensor, "B 3 H W"]
    mask: Mask
    distance: Float[Tensor, "B M"]  # from each masked patch to the nearest visible one
    betas: Float[Tensor, " L"]  # all betas of the model
    feature_weight: Float[Tensor, ""]  # weight of the feature branch, 0 to 1
    share: float  # 1 / micro-batches of a step; a factor of the loss, so that gradients need no scaling afterwards
    loss_backend: str  # auto, reference or triton
    teacher_tokens: Float[Tensor, "K B M D"] | None = None  # after the step's taps, at masked patches
    teacher_event: torch.cuda.Event | None = None  # to wait for before teacher_tokens are used; of a side stream
    codes: Int64[Tensor, "B M"] | None = None  # of the masked patches, from the token branch's tokenizer
    patches: Float[Tensor, "B _ P"] | None = None  # normalised, visible ones first, if they are extracted already
    patch_weight: Float[Tensor, "B M"] | None = None  # fixed weights of the masked patches; None: 1
    subset: Int64[Tensor, "B S"] | None = None  # places of the predicted patches among the masked ones; None: all
    tap_seed: int = 0  # from which the step's taps are drawn


class Tokens(NamedTuple):
    """Encoder tokens by block, counted from 1: [B, 1 + V, D], or [B, 1 + N, D] if the encoder sees mask tokens."""

    raw: dict[int, Tensor]
    normed: dict[int, Tensor]  # after the encoder's final norm


class Branch(nn.Module):
    """Supervised taps, their weights, and the betas that weight their patches."""

    def __init__(self, taps: Sequence[int], tap_weights: Sequence[float], rescale_grad: str):
        super().__init__()
        self.taps, self.tap_weights, self.rescale_grad = tuple(taps), tuple(tap_weights), rescale_grad
        self.beta_indices: tuple[int, ...] = ()  # into Inputs.betas, one per tap; empty: patches are weighted equally
        self.normed_blocks = self.taps  # encoder blocks whose tokens are used after the encoder's final norm
        self.raw_blocks: tuple[int, ...] = ()  # encoder blocks whose tokens are used before any norm

    def loss_weights(
        self, inputs: Inputs, indices: Sequence[int] = (), scale: float = 1.0
    ) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"]]:
        """Return the beta and `scale` times the weight of each tap, or of those at the indices.

        With beta 0 (not dynamic) all patch weights are exactly 1.
        """
        indices = indices or range(len(self.taps))
        scaled = tuple(inputs.share * self.tap_weights[index] * scale for index in indices)
        tap_weight = cached_tensor(scaled, inputs.betas.device)
        if not self.beta_indices:
            return torch.zeros_like(tap_weight), tap_weight
        return torch.stack([inputs.betas[self.beta_indices[index]] for index in indices]), tap_weight

    def loss_options(self, inputs: Inputs, **options) -> dict[str, Any]:
        """Return the options that all loss functions have, and further ones."""
        return {"rescale_grad": self.rescale_grad, "patch_weight": inputs.patch_weight, **options}

    def forward(self, tokens: Tokens, inputs: Inputs) -> dk.DynamicLoss:
        """Return the weighted loss of all taps."""
        raise NotImplementedError


class DecoderBranch(Branch):
    """Branch with a decoder, which predicts something of every masked patch from the visible tokens.

    out_width: values that are predicted of a patch. context: encoder block that the decoder cross-attends to with
    branch.cross_attention, 0 for the tap itself.
    """

    def __init__(self, config: PretrainConfig, branch: DecoderBranchConfig, out_width: int, context: int):
        super().__init__(branch.taps, branch.tap_weights, config.dynamic.rescale_grad)
        self.taps_per_step = config.taps_per_step
        # Run the taps one after the other (method/sequential.py), not as one batch.
        self.sequential_backward = config.engine.tap_execution == "sequential"
        model = config.model
        self.decoder = Decoder(
            *(model.width, branch.decoder_width, branch.decoder_depth, branch.decoder_heads, out_width),
            grid=config.grid,
            positions=sincos_layout(model.positions),
            output_heads=len(branch.taps) if branch.per_tap_head else 1,
            cross_attention=branch.cross_attention,
        )
        self.decoder.skip_unused_tokens = config.engine.skip_unused_tokens
        self.decoder.visible_positions = branch.decoder_positions == "all"
        self.context = context if branch.cross_attention else None
        num_norms = len(branch.taps) - 1 if branch.per_tap_norm else 0  # the last tap uses the encoder's final norm
        self.norms = nn.ModuleList(LayerNorm(model.width) for _ in range(num_norms))
        context_blocks = () if self.context is None else (context,) if context else self.taps
        self.normed_blocks, self.raw_blocks = self.taps[num_norms:], (*self.taps[:num_norms], *context_blocks)

    def predict(self, tokens: Tokens, mask: Mask, tap_indices: Sequence[int] = ()) -> Float[Tensor, "K B S P"]:
        """Decode the masked patches of `mask` from the taps at these indices, by default all, in one batch."""
        tap_indices, num_norms = tap_indices or range(len(self.taps)), len(self.norms)
        taps = [self.taps[index] for index in tap_indices]
        normed = [
            self.norms[index](tokens.raw[tap]) if index < num_norms else tokens.normed[tap]
            for index, tap in zip(tap_indices, taps, strict=True)
        ]
        context = None if self.context is None else torch.cat([tokens.raw[self.context or tap] for tap in taps])
        return self.decoder(torch.cat(normed), *mask, context, tap_indices).unflatten(0, (len(taps), -1))

    def loss(
        self, pred: Float[Tensor, "K B S P"], inputs: Inputs, weights: tuple[Tensor, Tensor], part: slice
    ) -> dk.DynamicLoss:
        """Return the weighted loss of predictions of the step's taps in `part`; weights: their betas and weights."""
        raise NotImplementedError

    def forward(self, tokens: Tokens, inputs: Inputs) -> dk.DynamicLoss:
        """Return the loss, and NaN as the components of taps that the step does not supervise."""
        taps = draw_taps(len(self.taps), self.taps_per_step, inputs.tap_seed)
        scale, mask = len(self.taps) / len(taps), inputs.mask
        if inputs.subset is not None:
            mask = mask._replace(masked=mask.masked.gather(1, inputs.subset))
        if self.sequential_backward and torch.is_grad_enabled():
            result = self._sequential_loss(tokens, inputs, mask, taps, scale)
        else:
            weights = self.loss_weights(inputs, taps, scale)
            result = self.loss(self.predict(tokens, mask, taps), inputs, weights, slice(None))
        components = (spread_over_taps(each, taps, len(self.taps)) for each in result[1:])
        return dk.DynamicLoss(result.loss, *components)

    def _sequential_loss(
        self, tokens: Tokens, inputs: Inputs, mask: Mask, taps: Sequence[int], scale: float
    ) -> dk.DynamicLoss:
        raw_blocks, normed_blocks = self.raw_blocks, self.normed_blocks

        def run(number: int, *values: Tensor) -> dk.DynamicLoss:
            """Return the loss of one of the step's taps, from the tokens of all blocks and the betas."""
            *block_tokens, betas = values
            raw, normed = block_tokens[: len(raw_blocks)], block_tokens[len(raw_blocks) :]
            detached = Tokens(dict(zip(raw_blocks, raw, strict=True)), dict(zip(normed_blocks, normed, strict=True)))
            tap, leaf_inputs = taps[number : number + 1], inputs._replace(betas=betas)
            weights = self.loss_weights(leaf_inputs, tap, scale)
            return self.loss(self.predict(detached, mask, tap), leaf_inputs, weights, slice(number, number + 1))

        raw, normed = (tokens.raw[block] for block in raw_blocks), (tokens.normed[block] for block in normed_blocks)
        tensors = *raw, *normed, inputs.betas
        return dk.DynamicLoss(*sequential_backward(run, len(taps), tensors, list(self.parameters())))


class PixelBranch(DecoderBranch):
    """Reconstructs the pixels of the masked patches (paper Eq. 3)."""

    def __init__(self, config: PretrainConfig):
        super().__init__(config, config.pixel, config.model.patch_size**2 * 3, context=1)
        self.patch, self.norm = config.model.patch_size, config.pixel.norm
        self.mean, self.std = NORMALISATIONS[config.data.normalisation]

    def loss(
        self, pred: Float[Tensor, "K B S P"], inputs: Inputs, weights: tuple[Tensor, Tensor], part: slice
    ) -> dk.DynamicLoss:
        options = self.loss_options(inputs, patch=self.patch, norm=self.norm, impl=inputs.loss_backend)
        options |= {"mean": self.mean, "std": self.std, "subset": inputs.subset}
        return dk.dynamic_pixel_mse(pred, inputs.images, inputs.mask.masked, inputs.distance, *weights, **options)


class FeatureBranch(DecoderBranch):
    """Regresses the teacher's tokens of the masked patches (paper Eq. 5)."""

    def __init__(self, config: PretrainConfig):
        super().__init__(config, config.feature, config.model.width, context=0)
        self.target_norm = config.feature.target_norm

    def loss(
        self, pred: Float[Tensor, "K B S D"], inputs: Inputs, weights: tuple[Tensor, Tensor], part: slice
    ) -> dk.DynamicLoss:
        if inputs.teacher_tokens is None:
            raise ValueError("teacher_tokens is None; the feature branch needs them. Pass Teacher.targets().")
        if inputs.teacher_event is not None:
            inputs.teacher_event.wait()
        beta, tap_weight = weights
        vectors = inputs.distance, beta, tap_weight * inputs.feature_weight
        options = self.loss_options(inputs, target_norm=self.target_norm, impl=inputs.loss_backend)
        options |= {"norm_pred": self.target_norm != "none", "subset": inputs.subset}
        return dk.dynamic_feature_mse(pred, inputs.teacher_tokens[part], *vectors, **options)


class TokenBranch(Branch):
    """Classifies the code of each masked patch from its mask token, with one linear head for all taps (BEiT-v2)."""

    def __init__(self, width: int, config: TokenConfig, rescale_grad: str):
        super().__init__(config.taps, config.tap_weights, rescale_grad)
        self.head = nn.Linear(width, config.codes)

    def forward(self, tokens: Tokens, inputs: Inputs) -> dk.DynamicLoss:
        token_error = cross_entropy(self.head, [tokens.normed[tap] for tap in self.taps], inputs)
        weights = self.loss_weights(inputs)
        return dk.dynamic_error(token_error, inputs.distance, *weights, **self.loss_options(inputs))


class ClsBranch(Branch):
    """Classifies the codes from the last cls token and the patch tokens of an early block, with own blocks (BEiT-v2).

    The early tokens alone are not sufficient, so that the cls token learns to represent the whole image. Final norm,
    head and shared relative positions are those of the encoder and the token branch.
    """

    def __init__(self, encoder: Encoder, token_branch: TokenBranch, config: TokenConfig):
        shape = encoder.shape
        super().__init__((shape.depth,), (1.0,), "full")
        self.early_block = config.cls_block  # encoder block that the patch tokens are taken from
        self.normed_blocks, self.raw_blocks = (), (self.early_block, *self.taps)
        self.blocks = build_blocks(shape.width, config.cls_depth, shape.heads, shape.layer_scale)
        self.norm, self.head = encoder.norm, token_branch.head
        self.activation_checkpointing = False
        self.rel_pos_bias = encoder.rel_pos_bias if shape.relative_positions == "shared" else None

    def forward(self, tokens: Tokens, inputs: Inputs) -> dk.DynamicLoss:
        early, last = tokens.raw[self.early_block], tokens.raw[self.taps[0]]
        bias = None if self.rel_pos_bias is None else self.rel_pos_bias()
        combined = torch.cat([last[:, :1], early[:, 1:]], 1)
        for block in self.blocks:
            combined = run_block(block, self.activation_checkpointing, combined, bias)
        token_error = cross_entropy(self.head, [self.norm(combined)], inputs)
        return dk.dynamic_error(token_error, inputs.distance, *self.loss_weights(inputs))


def cross_entropy(head: nn.Module, tokens: list[Float[Tensor, "B T D"]], inputs: Inputs) -> Float[Tensor, "K B M"]:
    """Return the cross-entropy of the masked patches' codes in fp32, from the tokens [B, 1 + N, D] of K taps."""
    if inputs.codes is None:
        raise ValueError("codes is None; the token branch needs the tokenizer's codes. Pass Tokenizer.codes().")
    codes = inputs.codes.expand(len(tokens), -1, -1)
    logits = head(torch.stack([gather_tokens(each[:, 1:], inputs.mask.masked) for each in tokens]))
    return F.cross_entropy(logits.flatten(0, 2).float(), codes.flatten(), reduction="none").view_as(codes)
