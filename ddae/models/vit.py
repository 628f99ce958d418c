"""ViT encoder: timm blocks, fixed sin-cos positions, a cls token; optional relative positions and layer scale (BEiT).

Shape letters: B images, N patches, V visible patches, M masked patches, K taps, T and S tokens of a sequence, D width,
H heads, P values of a patch. Parameters have timm's and MAE's names, so that their state dicts load.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import timm.layers.mlp as timm_mlp
import timm.models.vision_transformer as timm_vit
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from PIL import Image
from timm.layers import DropPath, RelPosBias, resample_abs_pos_embed
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from ddae.config.base import ImageSize
from ddae.config.pretrain import EncoderShape, ModelConfig
from ddae.data.photo import central_crop, upright_rgb
from ddae.models.patches import gather_tokens, normalise, patchify, sincos_layout, sincos_positions

QUERIES, KEYS_AND_VALUES = range(2)  # parts of QKVLinear
TOKEN_STD = 0.02  # initial standard deviation of cls and mask tokens, and of BEiT's weight matrices


class LayerNorm(nn.LayerNorm):
    """LayerNorm with the eps of 1e-6 that ViTs use."""

    def __init__(self, width: int, **options):
        super().__init__(width, eps=1e-6, **options)


class RelativePositions(RelPosBias):
    """BEiT's relative position bias, to be added to the attention logits."""

    def forward(self) -> Float[Tensor, "1 H T T"]:  # type: ignore[override]
        return self.get_bias()  # through forward(): ZeRO-3 gathers the table in a forward hook


class QKVLinear(nn.Linear):
    """Linear layer of queries, keys and values, [.., D] -> [.., 3 D]; it can also compute only one part of them."""

    def forward(self, tokens: Float[Tensor, "*B D"], part: int | None = None) -> Float[Tensor, "*B E"]:  # type: ignore[override]
        """part: QUERIES for [.., D], KEYS_AND_VALUES for [.., 2 D], None for all."""
        if part is None:
            return super().forward(tokens)
        sizes = [self.in_features, 2 * self.in_features]
        return F.linear(tokens, self.weight.split(sizes)[part], self.bias.split(sizes)[part])


class MaskTokens(NamedTuple):
    """Mask tokens before the first block: one per patch position, the same in all images."""

    table: Float[Tensor, "N D"]
    masked: Int64[Tensor, "B M"]  # positions of the masked patches

    def append_to(
        self, tokens: Float[Tensor, "KB T D"], table: Float[Tensor, "N D"] | None = None
    ) -> Float[Tensor, "KB TM D"]:
        """Append to each sequence the rows of its image's masked patches: [K * B, T, D] -> [K * B, T + M, D].

        table: what to append instead of the mask tokens, e.g. their keys.
        """
        rows = F.embedding(self.masked, self.table if table is None else table)
        repeated = rows.expand(len(tokens) // len(rows), *rows.shape).flatten(0, 1)
        return torch.cat([tokens, repeated], 1) if tokens.shape[1] else repeated


class Mlp(timm_mlp.Mlp):
    """timm's MLP, which can recompute GELU's output in the backward pass instead of saving it."""

    save_gelu_output = True

    def forward(self, tokens: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        if self.save_gelu_output or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return super().forward(tokens)
        hidden = self.fc1(tokens)
        activated = self.act(hidden)
        storage, gelu_input = activated.untyped_storage()._cdata, hidden.detach()

        def pack(saved: Tensor) -> Tensor | torch.Size:
            return saved.shape if saved.untyped_storage()._cdata == storage else saved

        def unpack(saved: Tensor | torch.Size) -> Tensor:
            return self.act(gelu_input).view(saved) if isinstance(saved, torch.Size) else saved

        with saved_tensors_hooks(pack, unpack):
            return self.fc2(activated)

    def call_functions(self, tokens: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Compute forward() by functions of the weights; saves GELU's output."""
        fc1, fc2 = self.fc1, self.fc2
        return F.linear(F.gelu(F.linear(tokens, fc1.weight, fc1.bias)), fc2.weight, fc2.bias)


class Block(timm_vit.Block):
    """timm's pre-norm transformer block, which can skip computing unused output tokens."""

    # Compute with the weights of the submodules without calling these: equal outputs with less work for the host. Hooks
    # of the submodules do not run, among them those by which ZeRO-3 gathers weights; nor does stochastic depth.
    direct_calls = False

    def __init__(self, width: int, heads: int, **options):
        shared: dict[str, Any] = {"mlp_ratio": 4, "qkv_bias": True, "norm_layer": LayerNorm, "mlp_layer": Mlp}
        super().__init__(width, heads, **shared, **options)
        self.attn.qkv = QKVLinear(width, 3 * width)

    def forward(  # type: ignore[override]
        self,
        tokens: Float[Tensor, "B T D"],
        bias: Float[Tensor, "1 H T T"] | None = None,
        num_outputs: int | None = None,
        mask_tokens: MaskTokens | None = None,
    ) -> Float[Tensor, "B S D"]:
        """Transform a sequence of tokens; S = T by default. bias: added to the attention logits.

        num_outputs: compute only the last `num_outputs` tokens; the others serve as keys and values. S = num_outputs.
        mask_tokens: further tokens after the T given ones, whose norm and qkv are computed once for all images. Both
        options equal the plain computation up to rounding, and exclude bias and stochastic depth.
        """
        if num_outputs is None and mask_tokens is None:
            return self._call_functions(tokens, bias) if self.direct_calls else super().forward(tokens, bias)
        tokens = self.attend(tokens, num_outputs, mask_tokens)
        return tokens + self.ls2(self.mlp(self.norm2(tokens)))

    def _call_functions(
        self, tokens: Float[Tensor, "B T D"], bias: Float[Tensor, "1 H T T"] | None
    ) -> Float[Tensor, "B T D"]:
        """Compute forward() without options by functions of the weights."""
        block: Any = self  # type checkers know no submodules
        norm1, norm2, attn, mlp = block.norm1, block.norm2, block.attn, block.mlp
        qkv, proj = attn.qkv, attn.proj
        batch, length, width = tokens.shape
        normed = F.layer_norm(tokens, norm1.normalized_shape, norm1.weight, norm1.bias, norm1.eps)
        heads = F.linear(normed, qkv.weight, qkv.bias).view(batch, length, 3, attn.num_heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind()
        if not isinstance(attn.q_norm, nn.Identity):  # of some published encoders
            query, key = attn.q_norm(query), attn.k_norm(key)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        update = F.linear(attended.transpose(1, 2).reshape(batch, length, width), proj.weight, proj.bias)
        if has_layer_scale := not isinstance(self.ls1, nn.Identity):
            update = self.ls1(update)
        tokens = tokens + update
        normed = F.layer_norm(tokens, norm2.normalized_shape, norm2.weight, norm2.bias, norm2.eps)
        update = mlp.call_functions(normed) if mlp.save_gelu_output else mlp(normed)
        return tokens + (self.ls2(update) if has_layer_scale else update)

    def attend(
        self, tokens: Float[Tensor, "B T D"], num_outputs: int | None, mask_tokens: MaskTokens | None
    ) -> Float[Tensor, "B S D"]:
        """Compute the attention half of forward(), with its residual connection."""
        attn: Any = self.attn  # type checkers know no submodules
        normed, first_output = self.norm1(tokens), 0
        if num_outputs is not None:
            num_masked = 0 if mask_tokens is None else mask_tokens.masked.shape[1]
            first_output = tokens.shape[1] + num_masked - num_outputs
        if first_output:
            query_tokens = normed[:, first_output:]  # empty if only mask tokens are queries
            queries = attn.qkv(query_tokens, QUERIES) if query_tokens.shape[1] else query_tokens
            qkv = [queries, *attn.qkv(normed, KEYS_AND_VALUES).chunk(2, -1)]
        else:
            qkv = attn.qkv(normed).chunk(3, -1)
        residual = tokens[:, first_output:]
        if mask_tokens is not None:
            tables = attn.qkv(self.norm1(mask_tokens.table)).chunk(3, -1)
            qkv = [mask_tokens.append_to(part, table) for part, table in zip(qkv, tables, strict=True)]
            residual = mask_tokens.append_to(residual)
        query, key, value = (part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in qkv)
        query, key = attn.q_norm(query), attn.k_norm(key)  # identities, but in some published encoders
        attended = F.scaled_dot_product_attention(query, key, value)
        return residual + self.ls1(attn.proj(attended.transpose(1, 2).flatten(2)))


def build_blocks(width: int, depth: int, heads: int, layer_scale: float = 0.0, qk_norm: bool = False) -> nn.ModuleList:
    """Return `depth` blocks with biases and an MLP ratio of 4. layer_scale: its initial value, 0 for none."""
    options: dict[str, Any] = {"init_values": layer_scale or None, "qk_norm": qk_norm}
    return nn.ModuleList([Block(width, heads, **options) for _ in range(depth)])


def run_block(
    block: nn.Module, activation_checkpointing: bool, *inputs: object, preserve_rng_state: bool = False
) -> Tensor:
    """Return a block's output. activation_checkpointing: save only its inputs and recompute it in the backward pass.

    preserve_rng_state: recompute with the same random numbers; needed for stochastic depth.
    """
    if activation_checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=preserve_rng_state)  # type: ignore[return-value]
    return block(*inputs)


def initialise(module: nn.Module, generator: torch.Generator, scheme: str = "bootmae") -> None:
    """Initialise every parameter but layer scales and positions, which keep the values they were built with.

    Biases and relative positions are zero, norm weights 1, tokens normal with a standard deviation of 0.02. Matrices by
    scheme (ModelConfig.init):

    bootmae  Xavier-uniform; queries, keys and values as three matrices; cls token with 1e-6 (MoCo v3, BootMAE)
    mae      Xavier-uniform; qkv as one matrix (MAE)
    beit     normal with 0.02, truncated at one standard deviation; attn.proj and mlp.fc2 of block l are divided by
             sqrt(2 l) (BEiT)
    """
    cls_std = 1e-6 if scheme == "bootmae" else TOKEN_STD
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            is_matrix = parameter.ndim >= 2 and not name.endswith("relative_position_bias_table")
            if name.endswith("pos_embed"):
                continue  # sin-cos positions, from which learned ones start
            if name.endswith(("cls_token", "reg_token", "mask_token")):
                parameter.normal_(std=cls_std if name.endswith("cls_token") else TOKEN_STD, generator=generator)
            elif is_matrix and scheme == "beit":
                within_std = math.erf(0.5**0.5)  # probability of a normal variable within one standard deviation
                parameter.uniform_(-within_std, within_std, generator=generator).erfinv_()
                parameter.mul_(TOKEN_STD * 2**0.5).clamp_(-TOKEN_STD, TOKEN_STD)
            elif is_matrix:
                fan_out, fan_in = parameter.flatten(1).shape
                fan_out = fan_in if scheme == "bootmae" and name.endswith("qkv.weight") else fan_out
                bound = math.sqrt(6 / (fan_in + fan_out))
                parameter.uniform_(-bound, bound, generator=generator)
            elif not name.endswith("gamma"):
                parameter.fill_(1 if name.endswith("weight") else 0)
        if scheme == "beit":
            _rescale_by_depth(module)


def _rescale_by_depth(module: nn.Module) -> None:
    """Divide attn.proj and mlp.fc2 of block l by sqrt(2 l), l counted from 1 (BEiT's fix_init_weight).

    Blocks of a module with `early_block` follow that encoder block, and are counted from it.
    """
    for submodule in module.modules():
        if isinstance(blocks := getattr(submodule, "blocks", None), nn.ModuleList):
            for number, block in enumerate(blocks, 1 + getattr(submodule, "early_block", 0)):
                block.attn.proj.weight /= math.sqrt(2 * number)  # type: ignore[union-attr,operator]
                block.mlp.fc2.weight /= math.sqrt(2 * number)  # type: ignore[union-attr,operator]


class PatchProjection(nn.Module):
    """Convolution with stride = kernel = patch size, computed as a matrix product on extracted patches.

    The weight has the convolution's shape [D, 3, patch, patch], as in published state dicts.
    """

    def __init__(self, patch: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 3, patch, patch))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, patches: Float[Tensor, "*B P"]) -> Float[Tensor, "*B D"]:
        return F.linear(patches, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)


class Transform(NamedTuple):
    """From a PIL image of any mode to an encoder's input."""

    image_size: ImageSize
    normalisation: str

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 H W"]:
        """Return the crop of evaluations (sampling.central_crops), resized and normalised."""
        return normalise(
            torch.from_numpy(central_crop(upright_rgb(image), self.image_size)), self.normalisation, torch.float32
        )


class Encoder(nn.Module):
    """ViT encoder of all patches or of the visible ones; returns the final tokens or those after given blocks.

    Registers, which some published encoders have, follow the cls token within the encoder; its output lacks them.
    """

    def __init__(self, shape: ModelConfig):
        super().__init__()
        shape = shape if isinstance(shape, EncoderShape) else EncoderShape(**asdict(shape))
        self.shape, self.activation_checkpointing, self.drop_path = shape, False, 0.0
        self.normalisation = "half"  # of the images it was trained on, a key of NORMALISATIONS; loaders set it
        self.report: dict[str, list[str]] = {}  # of the file it came from: see ConvertedWeights
        self.initial_path: Path | None = None  # of the encoder that its pretraining started from, if not a random one
        self.patch_embed = nn.ModuleDict({"proj": PatchProjection(shape.patch_size, shape.width)})
        self.cls_token = nn.Parameter(torch.empty(1, 1, shape.width))
        self.reg_token = nn.Parameter(torch.empty(1, shape.registers, shape.width)) if shape.registers else None
        has_positions = shape.positions != "none"
        table = torch.zeros(1, 1 + self.grid[0] * self.grid[1], shape.width)
        if has_positions:
            table = sincos_positions(self.grid, shape.width, sincos_layout(shape.positions))
        is_learned = shape.positions == "learned"
        self.pos_embed = nn.Parameter(table) if is_learned else nn.Buffer(table, persistent=has_positions)
        self.blocks = build_blocks(shape.width, shape.depth, shape.heads, shape.layer_scale, shape.qk_norm)
        self.norm = LayerNorm(shape.width)
        self._segment_fn: Callable[..., Tensor] = Encoder._segment  # compile_segments() replaces it
        if shape.relative_positions == "shared":
            self.rel_pos_bias = RelativePositions(self.grid, shape.heads, prefix_tokens=1)
        elif shape.relative_positions == "each":
            for block in self.blocks:
                block.attn.rel_pos_bias = RelativePositions(self.grid, shape.heads, prefix_tokens=1)  # type: ignore[union-attr]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches in an image."""
        return self.shape.grid

    def forward(
        self,
        images: Float[Tensor, "B C H W"] | Float[Tensor, "B V P"],
        layers: Sequence[int] = (),
        visible: Int64[Tensor, "B V"] | None = None,
        mask_token: Float[Tensor, "1 1 D"] | None = None,
        num_outputs: int | None = None,
    ) -> Float[Tensor, "B T D"] | list[Float[Tensor, "B _ D"]]:
        """Encode normalised images [B, 3, H, W]; return tokens [B, T, D] after the final norm, cls token first.

        layers: return a list of the tokens after these blocks (counted from 1) instead, before any norm; later blocks
            are not computed.
        visible: encode only the patches at these positions, T = 1 + V. The images may then be given as their extracted
            patches [B, V, P], in the same order.
        mask_token: with `visible`, encode all patches and replace the embeddings of the others by it, T = 1 + N.
        num_outputs: compute only the last `num_outputs` tokens in the last block that runs.

        Raise ValueError if the image size is not the encoder's, or if an encoder with relative positions gets visible
        patches only.
        """
        expected = (3, *self.shape.height_width)
        if images.ndim == 3 and visible is not None:
            patches = images
        elif images.ndim == 4 and tuple(images.shape[1:]) == expected:
            patches = patchify(images, self.shape.patch_size)
        else:
            shapes = (
                f"images have shape {list(images.shape)}; this encoder expects [B, {', '.join(map(str, expected))}]"
            )
            raise ValueError(f"{shapes}. Resize them, or load the encoder with this image_size.")
        if visible is not None and mask_token is None:
            if self.shape.relative_positions != "none":
                raise ValueError("visible is set, but relative positions need all patches. Pass a mask_token, too.")
            if patches is not images:
                patches = gather_tokens(patches, visible)
        shared_bias = self.rel_pos_bias() if self.shape.relative_positions == "shared" else None
        tokens, first, outputs, last = patches, 0, {}, max(layers, default=len(self.blocks))
        for stop in sorted({*layers, last}):
            embedding = (visible, mask_token) if first == 0 else None
            of_segment = num_outputs if stop == last else None
            blocks = [*self.blocks][first:stop]
            tokens = self._segment_fn(self, tokens, blocks, shared_bias, of_segment, embedding)
            first, outputs[stop] = stop, self._without_registers(tokens, of_segment)
        return [outputs[number] for number in layers] if layers else self.norm(outputs[last])

    def compile_segments(self, **options) -> None:
        """Let torch.compile compile the blocks from one layer of forward() to the next as one function.

        The backward pass of a compiled function returns all its gradients when it ends. With segments, the gradients of
        the last blocks are ready while those of the first blocks are computed. options: of torch.compile.
        """
        self._segment_fn = torch.compile(Encoder._segment, dynamic=False, **options)

    def _segment(
        self,
        tokens: Float[Tensor, "B N P"] | Float[Tensor, "B T D"],
        blocks: Sequence[nn.Module],
        shared_bias: Float[Tensor, "1 H T T"] | None,
        num_outputs: int | None,
        embedding: tuple[Int64[Tensor, "B V"] | None, Float[Tensor, "1 1 D"] | None] | None,
    ) -> Float[Tensor, "B S D"]:
        """Run consecutive blocks. num_outputs: of the last one; None: all.

        embedding: `visible` and `mask_token` of forward(), if the tokens are patches, to be embedded first.
        """
        if embedding is not None:
            tokens = self._embed(tokens, *embedding)
        stochastic = self.training and self.drop_path > 0
        for number, block in enumerate(blocks, 1):
            has_own_bias = self.shape.relative_positions == "each"
            bias = block.attn.rel_pos_bias() if has_own_bias else shared_bias  # type: ignore[union-attr]
            inputs = tokens, bias, num_outputs if number == len(blocks) else None
            tokens = run_block(block, self.activation_checkpointing, *inputs, preserve_rng_state=stochastic)
        return tokens

    def _embed(
        self,
        patches: Float[Tensor, "B N P"],
        visible: Int64[Tensor, "B V"] | None,
        mask_token: Float[Tensor, "1 1 D"] | None,
    ) -> Float[Tensor, "B T D"]:
        """Return the tokens before the first block. visible, mask_token: of forward()."""
        table = self.pos_embed.to(patches.dtype)  # DeepSpeed may leave buffers in fp32
        positions = table[:, 1:]
        if visible is not None and mask_token is None:
            positions = F.embedding(visible, positions[0])
        tokens = self.patch_embed["proj"](patches)
        if visible is not None and mask_token is not None:
            is_visible = torch.zeros_like(tokens[..., :1], dtype=torch.bool).scatter_(1, visible[:, :, None], True)
            tokens = torch.where(is_visible, tokens, mask_token)
        tokens = tokens + positions
        # tokens.shape[0]: len() would be a constant in an exported program
        cls = (self.cls_token + table[:, :1]).expand(tokens.shape[0], -1, -1)
        registers = [] if self.reg_token is None else [self.reg_token.expand(tokens.shape[0], -1, -1)]
        return torch.cat([cls, *registers, tokens], 1)

    def _without_registers(self, tokens: Float[Tensor, "B T D"], num_outputs: int | None) -> Float[Tensor, "B S D"]:
        """Return the tokens without the registers; num_outputs: how many of the last ones there are, None for all."""
        if not self.shape.registers or num_outputs is not None:
            return tokens
        return torch.cat([tokens[:, :1], tokens[:, 1 + self.shape.registers :]], 1)

    @property
    def transform(self) -> "Transform":
        """Function from a PIL image to the encoder's input: float32 [3, H, W], the crop of evaluations, normalised."""
        return Transform(self.shape.image_size, self.normalisation)

    def features(self, images: Float[Tensor, "B C H W"], layers: Sequence[int]) -> list[Float[Tensor, "B T D"]]:
        """Return the tokens [B, 1 + N, D] after each of the given blocks (counted from 1), before any norm."""
        if not layers or min(layers) < 1 or max(layers) > len(self.blocks):
            raise ValueError(f"layers are {list(layers)}; expected one or more blocks from 1 to {len(self.blocks)}.")
        return self(images, layers=tuple(layers))

    def set_image_size(self, image_size: ImageSize) -> None:
        """Change the input size: resample positions bicubically, and relative positions as BEiT does."""
        old_grid, self.shape = self.grid, replace(self.shape, image_size=image_size)
        table = resample_abs_pos_embed(self.pos_embed.detach(), list(self.grid), list(old_grid))
        self.pos_embed = nn.Parameter(table) if isinstance(self.pos_embed, nn.Parameter) else table
        for module in self.modules():
            if isinstance(module, RelPosBias):
                module.set_window_size(self.grid)

    def make_positions_learnable(self) -> None:
        """Turn the position table, which is fixed in pretraining, into a parameter."""
        if self.shape.positions != "none":
            table = self.pos_embed.clone()
            del self.pos_embed
            self.pos_embed = nn.Parameter(table)

    def set_drop_path(self, rate: float) -> None:
        """Enable stochastic depth (Huang et al. 2016): in training skip each residual branch of each image at random.

        The rate grows linearly from 0 in the first block to `rate` in the last.
        """
        self.drop_path = rate
        for block, block_rate in zip(self.blocks, torch.linspace(0, rate, len(self.blocks)).tolist(), strict=True):
            block.drop_path1, block.drop_path2 = DropPath(block_rate), DropPath(block_rate)
