"""Memory of a GPU by part, estimated from a config.

The model counts what DeepSpeed and autograd keep; tests/tools/test_plan.py compares it with the storages of live
tensors and of saved ones (saved_tensors_hooks). Weights and gradients have the engine's precision. The optimizer has
fp32 master weights and Adam's two averages. The teacher has fp32 master weights with a compensation term, and a copy
that runs forward unless the master weights do. A block keeps

    16 D numbers a token    inputs of two norms (2D) and of four matrices (7D), q, k and v (3D), GELU's input (4D)

Shape letters: B images of a micro-batch, N patches, V visible, M masked, K taps, D width; n parameters, W GPUs. With
taps_per_step and decode_fraction, the decoders run on fewer taps and patches.
"""

from functools import cache
from typing import Any, NamedTuple

import torch

from ddae.config.pretrain import FeatureConfig, PixelConfig, PretrainConfig
from ddae.method.model import build_uninitialised_model
from ddae.training.flops import decoder_branches, encoder_patches
from ddae.training.optimizer import build_optimizer

GIB = 2**30
# DeepSpeed's defaults, in numbers: a bucket, parameters that ZeRO-3 gathers at a time, its largest unsharded parameter
BUCKET, LIVE, PERSISTENT = 500_000_000, 1_000_000_000, 100_000
USABLE = 0.92  # share of a GPU's memory; the rest goes to CUDA, NCCL and fragmentation


class Memory(NamedTuple):
    """Bytes on the GPU that has most."""

    weights: float  # that run forward; under ZeRO-3 this GPU's shard
    gradients: float  # after the backward pass
    optimizer: float  # fp32 master weights and Adam's averages
    teacher: float  # fp32 master weights with their compensation, and the copy that runs forward
    activations: float  # that the forward pass saves for the backward pass
    buffers: float  # DeepSpeed's buckets, parameters gathered by ZeRO-3, activations of a block that is recomputed
    update: float  # temporary, during the optimizer step; the activations are free by then

    @property
    def peak(self) -> float:
        """Largest sum at any time of a step."""
        permanent = self.weights + self.gradients + self.optimizer + self.teacher
        return permanent + max(self.activations + self.buffers, self.update)


class ParameterCounts(NamedTuple):
    """Parameters in the optimizer's groups, in order: numbers in each, and whether it belongs to the encoder."""

    groups: list[list[tuple[int, bool]]]

    @property
    def model(self) -> int:
        return sum(self.of_groups())

    @property
    def encoder(self) -> int:
        return sum(self.of_groups(encoder_only=True))

    def of_groups(self, encoder_only: bool = False) -> list[int]:
        """Return the numbers in each group."""
        return [sum(size for size, in_encoder in group if in_encoder or not encoder_only) for group in self.groups]

    def with_gradient(self, shards: int) -> int:
        """Return the numbers whose gradients the fullest of `shards` GPUs keeps under ZeRO-1 and 2.

        A group is split evenly; a parameter on the boundary of two shards keeps its whole gradient on both GPUs.
        """
        total = 0
        for group, group_size in zip(self.groups, self.of_groups(), strict=True):
            start, on_shard = 0, [0] * shards
            for size, _ in group:
                first, last = (int(place * shards // group_size) for place in (start, start + size - 1))
                for shard in range(first, last + 1):
                    on_shard[shard] += size
                start += size
            total += max(on_shard)
        return total


@cache
def count_parameters(config: PretrainConfig) -> ParameterCounts:
    """Count the parameters of a config's model, without allocating it."""
    with torch.device("meta"):
        model = build_uninitialised_model(config)
    encoder = {id(parameter) for parameter in model.encoder.parameters()}
    groups = build_optimizer(model, config.optim).param_groups
    return ParameterCounts([[(p.numel(), id(p) in encoder) for p in group["params"]] for group in groups])


def estimate_memory(config: PretrainConfig, settings: dict[str, Any], stage: int, gpus: int, images: int) -> Memory:
    """Estimate the memory of each of `gpus` GPUs at a ZeRO stage.

    settings: a DeepSpeed JSON, for its bucket sizes and offloading. images: of a micro-batch.
    """
    zero = settings.get("zero_optimization", {})
    counts = count_parameters(config)
    n, (weight_bytes, _), is_bf16 = counts.model, bytes_per_number(config), config.engine.precision == "bf16"
    shards = gpus if stage > 0 else 1
    weights = weight_bytes * n
    if stage == 3:
        threshold = zero.get("stage3_param_persistence_threshold", PERSISTENT)
        unsharded = sum(size for group in counts.groups for size, _ in group if size <= threshold)
        weights = weight_bytes * (n / gpus + (unsharded if gpus > 1 else 0))
    masters = 4 * n / shards if is_bf16 or stage > 0 else 0  # at stage 0 in fp32 the weights are the master weights
    optimizer, update = masters + 8 * n / shards, (4 * n / shards if is_bf16 else 0) + 8 * n / shards
    in_encoder = counts.encoder / shards  # at stage 3; at stages 1 and 2 the first GPUs own the encoder
    if stage in (1, 2):
        by_group = zip(counts.of_groups(), counts.of_groups(encoder_only=True), strict=True)
        in_encoder = sum(min(encoder, group / shards) for group, encoder in by_group)
    accumulates = stage == 1 and images * gpus < config.data.batch_size  # all gradients until the last micro-batch
    with_gradient = n if stage == 0 or accumulates else counts.with_gradient(shards) if stage < 3 else n / shards
    gradients = weight_bytes * with_gradient
    teacher_masters = 8 * in_encoder
    has_copy = weight_bytes < 4 or (stage > 0 and gpus > 1)  # otherwise the master weights run forward
    teacher_copy = weight_bytes * counts.encoder if has_copy else 0
    if (zero.get("offload_optimizer") or {}).get("device", "none") != "none":
        optimizer = teacher_masters = update = 0.0  # on the CPU
        teacher_copy = weight_bytes * counts.encoder
    teacher = teacher_masters + teacher_copy if config.feature.enabled else 0.0
    if config.token.enabled:
        teacher = 4 * counts.encoder  # the tokenizer, in fp32; assumed to have the encoder's size
    bucket = zero.get("reduce_bucket_size", BUCKET) * bytes_per_reduced_number(config)
    buffers = 0.0
    if stage in (1, 2):
        buffers += bucket * (2 if zero.get("overlap_comm", False) and gpus > 1 else 1)
    if stage == 3:
        buffers += bucket + weight_bytes * min(n, zero.get("stage3_max_live_parameters", LIVE)) * (1 - 1 / gpus)
    if config.engine.activation_checkpointing:
        stacks = block_stacks(config, images)
        buffers += max(block_bytes(config, width, heads) * tokens for width, heads, _, tokens in stacks)
    return Memory(weights, gradients, optimizer, teacher, activation_bytes(config, images), buffers, update)


def bytes_per_number(config: PretrainConfig) -> tuple[int, int]:
    """Return the bytes of a number in weights, norms and the residual stream, and of one in matrix products."""
    precision = config.engine.precision
    return 2 if precision == "bf16" else 4, 4 if precision == "fp32" else 2


def bytes_per_reduced_number(config: PretrainConfig) -> int:
    """Return the bytes of a gradient's number while the ranks sum it."""
    return 4 if config.engine.reduce_dtype == "fp32" else bytes_per_number(config)[0]


def block_stacks(config: PretrainConfig, images: int) -> list[tuple[int, int, int, int]]:
    """Return (width, heads, number of blocks, tokens of `images` images) of encoder, cls decoder, and decoders."""
    model, all_tokens = config.model, images * (1 + config.grid[0] * config.grid[1])
    decoder_tokens = all_tokens - images * (config.num_masked - config.num_decoded)
    stacks = [(model.width, model.heads, model.depth, images * (1 + encoder_patches(config)))]
    if config.token.enabled and config.token.cls:
        stacks.append((model.width, model.heads, config.token.cls_depth, all_tokens))
    for branch in decoder_branches(config):
        shape = branch.decoder_width, branch.decoder_heads, branch.decoder_depth
        stacks.append((*shape, config.num_step_taps(branch) * decoder_tokens))
    return stacks


def block_bytes(config: PretrainConfig, width: int, heads: int) -> float:
    """Return the bytes that one block saves of one token for its backward pass."""
    stream, product = bytes_per_number(config)
    statistics = 4 * heads + 4 * 4  # attention's log-sum-exp; mean and deviation of two norms
    scaled = 2 if config.model.layer_scale else 0  # inputs of the two layer scales
    return width * (2 * stream + (14 + scaled) * product) + statistics


def activation_bytes(config: PretrainConfig, images: int) -> float:
    """Return the bytes that the forward pass of a micro-batch saves for the backward pass."""
    stream, product = bytes_per_number(config)
    model, token, branches, visible = config.model, config.token, decoder_branches(config), encoder_patches(config)
    total = visible * model.patch_size**2 * 3 * product  # of an image: input of the patch embedding
    all_taps = {tap for branch in config.branches.values() for tap in branch.taps}
    total += len(all_taps) * (1 + visible) * model.width * stream  # input of the taps' norm
    stacks = block_stacks(config, 1)
    for width, heads, depth, tokens in stacks[: len(stacks) - len(branches)]:
        checkpointed = config.engine.activation_checkpointing
        total += tokens * depth * (width * stream if checkpointed else block_bytes(config, width, heads))
    if token.enabled:  # input of the head; log-softmax
        total += (len(token.taps) + token.cls) * config.num_masked * (model.width * product + token.codes * 4)
    tap_bytes = [(branch_bytes(config, branch), config.num_step_taps(branch)) for branch in branches]
    counts = count_parameters(config)
    if config.engine.tap_execution == "sequential":  # one tap of one branch at a time, and fp32 gradients of decoders
        total = images * (total + max(tap_bytes, default=(0, 0))[0]) + 4 * (counts.model - counts.encoder)
    else:
        total = images * (total + sum(size * taps for size, taps in tap_bytes))
    if config.engine.precision == "autocast":
        total += 2 * counts.of_groups()[0]  # bf16 copies of the matrices
    return total


def branch_bytes(config: PretrainConfig, branch: PixelConfig | FeatureConfig) -> float:
    """Return the bytes that a branch saves of one image at one tap."""
    stream, product = bytes_per_number(config)
    width, depth, encoder_width = branch.decoder_width, branch.decoder_depth, config.model.width
    masked, skips = config.num_decoded, config.engine.skip_unused_tokens
    context = 1 + config.grid[0] * config.grid[1] - config.num_masked
    tokens, per_token = context + masked, block_bytes(config, width, branch.decoder_heads)
    if config.engine.activation_checkpointing or config.engine.decoder_activation_checkpointing:
        total = width * stream * (depth * tokens - (masked if skips else 0))
    else:
        total = depth * tokens * per_token
        if skips:
            total -= width * masked * (stream + product)  # the first norm runs before mask tokens are added
            # The last block saves inputs, keys and values of all tokens, the rest of masked ones only, queries twice.
            total -= context * (per_token - width * (stream + 3 * product))
            total += width * masked * product if depth > 1 else 0
    total += context * encoder_width * product  # input of the decoder
    total += ((masked if skips else tokens) * stream + masked * product) * width  # inputs of the last norm and head
    if branch.cross_attention:
        queries = depth * tokens - (context if skips else 0)
        total += queries * width * (stream + 4 * product)
        total += depth * context * (encoder_width * (stream + product) + 2 * width * product)
    if isinstance(branch, PixelConfig):
        out_width, copies = config.model.patch_size**2 * 3, 1
    else:
        out_width, copies = encoder_width, 2
    return total + masked * out_width * (copies * 4 if config.engine.loss_backend == "reference" else product)  # loss


def largest_micro_batch(config: PretrainConfig, settings: dict[str, Any], stage: int, gpus: int, memory: float) -> int:
    """Return the largest micro-batch that fits and divides the global batch; 0 if none fits.

    memory: bytes of a GPU.
    """
    batch, usable = config.data.batch_size, USABLE * memory
    divisors = (micro for micro in range(batch // gpus, 0, -1) if batch % (micro * gpus) == 0)
    return next((n for n in divisors if estimate_memory(config, settings, stage, gpus, n).peak < usable), 0)


def explain_memory(config: PretrainConfig, settings: dict[str, Any], gpus: int, micro: int, memory: float) -> str:
    """Return what a GPU's memory holds, part by part, and the micro-batch that fits, for a run that lacks memory.

    settings: the DeepSpeed JSON. micro: the micro-batch that did not fit. memory: bytes of a GPU.
    """
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    planned = estimate_memory(config, settings, stage, gpus, micro)
    parts = ", ".join(f"{name} {value / GIB:.2f}" for name, value in planned._asdict().items())
    text = f"Planned for a micro-batch of {micro} at ZeRO {stage}, in GiB: {parts}; "
    text += f"at most {planned.peak / GIB:.2f} at a time, of {memory / GIB:.2f}. "
    fits = largest_micro_batch(config, settings, stage, gpus, memory)
    if fits >= micro:
        return f"{text}By the plan this fits: see whether other processes use the GPU, or halve the micro-batch."
    if fits:
        return f"{text}Set train_micro_batch_size_per_gpu to {fits} in the DeepSpeed JSON, which fits."
    return f"{text}No micro-batch fits: pass --engine.activation_checkpointing, or use a higher ZeRO stage."
