"""What a run will cost before it runs: memory of a GPU by part, work of an image, traffic of a step, days.

The memory is what DeepSpeed and autograd are seen to keep (tests/tools/test_plan.py sums the storages of
live tensors, and of saved ones by saved_tensors_hooks): weights and gradients in the precision of the engine, fp32 masters and Adam's two
averages, the teacher's fp32 master with its rounding and, where that is no master itself, its copy, and of every block

    16 D numbers a token    inputs of two norms (2D) and of four matrices (7D), q, k and v (3D), GELU's input (4D)

Shape letters: B images of a micro-batch, N patches, V visible, M masked, K taps, D width; n parameters, W GPUs.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ddae.config.pretrain import FeatureConfig, PixelConfig, PretrainConfig
from ddae.errors import UserError
from ddae.method.model import construct_model
from ddae.training.flops import GPUS, Gpu, count_flops, decoder_branches, encoder_patches
from ddae.training.optimizer import build_optimizer

GIB = 2**30
IMAGENET = 1_281_167  # images
# DeepSpeed's defaults: numbers in a bucket, in parameters gathered at once, in a parameter that is never cut
BUCKET, LIVE, PERSISTENT = 500_000_000, 1_000_000_000, 100_000


class Memory(NamedTuple):
    """Bytes on one GPU, the one that has most."""

    weights: float  # that run forward; under ZeRO-3 this GPU's part
    gradients: float  # after the backward pass
    optimizer: float  # fp32 masters and Adam's averages
    teacher: float  # fp32 masters with their rounding, and the copy that runs forward
    activations: float  # that the forward pass keeps for the backward pass
    buffers: float  # DeepSpeed's buckets, parameters gathered by ZeRO-3, a block that is recomputed
    update: float  # what the optimizer's step needs for a moment, when the activations are gone

    @property
    def peak(self) -> float:
        kept = self.weights + self.gradients + self.optimizer + self.teacher
        return kept + max(self.activations + self.buffers, self.update)


class Counts(NamedTuple):
    """Parameters of the method in the optimizer's two groups, in order: numbers in each, and whether it is the
    encoder's."""

    groups: list[list[tuple[int, bool]]]

    @property
    def method(self) -> int:
        return sum(self.of_groups())

    @property
    def encoder(self) -> int:
        return sum(self.of_groups(encoder_alone=True))

    def of_groups(self, encoder_alone: bool = False) -> list[int]:
        return [sum(size for size, of_encoder in group if of_encoder or not encoder_alone) for group in self.groups]

    def touched(self, shards: int) -> int:
        """Numbers in the parameters that the largest share of a group has a part in, over all groups: gradients of
        parameters that two GPUs share stay whole on both (ZeRO-1 and -2)."""
        total = 0
        for group in self.groups:
            share, start, held = sum(size for size, _ in group) / shards, 0, [0] * shards
            for size, _ in group:
                for shard in range(int(start // share), min(shards - 1, int((start + size - 1) // share)) + 1):
                    held[shard] += size
                start += size
            total += max(held)
        return total


def count_parameters(config: PretrainConfig) -> Counts:
    """Of the model that the config describes, which is not built for it."""
    with torch.device("meta"):
        method = construct_model(config)
    encoder = {id(parameter) for parameter in method.encoder.parameters()}
    groups = build_optimizer(method, config.optim).param_groups
    return Counts([[(p.numel(), id(p) in encoder) for p in group["params"]] for group in groups])


def memory(config: PretrainConfig, settings: dict[str, Any], stage: int, gpus: int, micro_batch: int) -> Memory:
    """On each of `gpus` GPUs at a ZeRO stage, with what a DeepSpeed JSON says of buckets and offload."""
    zero = settings.get("zero_optimization", {})
    counts = count_parameters(config)
    n, low, mixed = counts.method, bytes_of_weights(config), config.engine.precision == "bf16"
    shards = gpus if stage > 0 else 1
    weights = low * n
    if stage == 3:
        threshold = zero.get("stage3_param_persistence_threshold", PERSISTENT)
        whole = sum(size for group in counts.groups for size, _ in group if size <= threshold)
        weights = low * (n / gpus + (whole if gpus > 1 else 0))
    masters = 4 * n / shards if mixed or stage > 0 else 0  # at stage 0 in fp32 the weights are their own
    optimizer, update = masters + 8 * n / shards, (4 * n / shards if mixed else 0) + 8 * n / shards
    of_encoder = counts.encoder / shards  # spread evenly at stage 3; at 1 and 2 it comes first, on the first GPUs
    if stage in (1, 2):
        both = zip(counts.of_groups(), counts.of_groups(encoder_alone=True), strict=True)
        of_encoder = sum(min(encoder, whole / shards) for whole, encoder in both)
    whole = stage == 0 or (stage == 1 and micro_batch * gpus < config.data.batch_size)  # till the last micro-batch
    gradients = low * (n if whole else counts.touched(shards) if stage < 3 else n / shards)
    follower = 8 * of_encoder
    copy = low * counts.encoder if low < 4 or (stage > 0 and gpus > 1) else 0  # otherwise the masters run themselves
    if (zero.get("offload_optimizer") or {}).get("device", "none") != "none":
        optimizer = follower = update = 0.0  # on the CPU
        copy = low * counts.encoder
    teacher = follower + copy if config.feature.enabled else 0.0
    if config.token.enabled:
        teacher = 4 * counts.encoder  # the tokenizer, taken to be as large; it reads in fp32
    bucket = zero.get("reduce_bucket_size", BUCKET)
    buffers = 0.0
    if stage in (1, 2):
        buffers += low * bucket * (2 if zero.get("overlap_comm", False) and gpus > 1 else 1)
    if stage == 3:
        buffers += low * (bucket + min(n, zero.get("stage3_max_live_parameters", LIVE)) * (1 - 1 / gpus))
    if config.engine.activation_checkpointing:
        buffers += max(block_bytes(config, *shape) * rows for shape, _, rows in stacks(config, micro_batch))
    return Memory(weights, gradients, optimizer, teacher, activations(config, micro_batch), buffers, update)


def bytes_of_weights(config: PretrainConfig) -> int:
    return 2 if config.engine.precision == "bf16" else 4


def bytes_of_products(config: PretrainConfig) -> int:
    """Of what matrices read and give; norms and the residual stream have the weights' precision."""
    return 4 if config.engine.precision == "fp32" else 2


def stacks(config: PretrainConfig, images: int) -> list[tuple[tuple[int, int], int, int]]:
    """Of encoder and decoders: (width, heads), blocks, and rows of tokens of so many images."""
    patches, model = config.grid[0] * config.grid[1], config.model
    found = [((model.width, model.heads), model.depth, images * (1 + encoder_patches(config)))]
    for branch in decoder_branches(config):
        shape = (branch.decoder_width, branch.decoder_heads)
        found.append((shape, branch.decoder_depth, len(branch.taps) * images * (1 + patches)))
    if config.token.enabled and config.token.cls:
        found.append(((model.width, model.heads), config.token.cls_depth, images * (1 + patches)))
    return found


def block_bytes(config: PretrainConfig, width: int, heads: int) -> float:
    """What one block keeps of one token for its backward pass."""
    stream, product = bytes_of_weights(config), bytes_of_products(config)
    statistics = 4 * heads + 4 * 4  # attention's logarithms of sums; means and deviations of two norms
    scaled = 2 if config.model.layer_scale else 0  # what a layer scale multiplies
    return width * (2 * stream + (14 + scaled) * product) + statistics


def decoder_blocks(config: PretrainConfig, branch: PixelConfig | FeatureConfig, rows: int) -> float:
    """What the blocks of a decoder keep of so many rows, one an image and tap."""
    stream, product, width = bytes_of_weights(config), bytes_of_products(config), branch.decoder_width
    tokens, masked, short = 1 + config.grid[0] * config.grid[1], config.num_masked, config.engine.skip_unused_tokens
    whole = block_bytes(config, width, branch.decoder_heads)
    if config.engine.activation_checkpointing or config.engine.decoder_activation_checkpointing:
        return rows * width * stream * (branch.decoder_depth * tokens - (masked if short else 0))
    total = branch.decoder_depth * tokens * whole
    if short:
        unread = tokens - masked
        total -= width * masked * (stream + product)  # norm and its output before mask tokens come
        # The last block keeps inputs, keys and values of all tokens, and the rest of masked ones, the queries' twice.
        total -= unread * (whole - width * (stream + 3 * product))
        total += width * masked * product if branch.decoder_depth > 1 else 0
    return rows * total


def activations(config: PretrainConfig, images: int) -> float:
    """Bytes that the forward pass of a micro-batch keeps for the backward pass."""
    stream, product = bytes_of_weights(config), bytes_of_products(config)
    total = 0.0
    encoder, *others = stacks(config, images)
    for (width, heads), depth, rows in [encoder, *others[len(decoder_branches(config)) :]]:
        total += (
            rows
            * depth
            * (width * stream if config.engine.activation_checkpointing else block_bytes(config, width, heads))
        )
    width, patch_numbers = config.model.width, config.model.patch_size**2 * 3
    visible = encoder_patches(config)
    total += images * visible * patch_numbers * product  # what the projection reads
    all_taps = {tap for branch in config.branches.values() for tap in branch.taps}
    total += len(all_taps) * images * (1 + visible) * width * stream  # what the norm of the taps reads
    if config.token.enabled:
        masked = (len(config.token.taps) + config.token.cls) * images * config.num_masked
        total += masked * (width * product + config.token.codes * 4)  # what the head reads; logarithms of shares
    of_branches = [decoding(config, branch, images) for branch in decoder_branches(config)]
    if (
        config.engine.tap_execution == "sequential"
    ):  # one tap of one branch at a time, and its parameters' gradients, in fp32
        alone = max(part / len(branch.taps) for part, branch in zip(of_branches, decoder_branches(config), strict=True))
        counts = count_parameters(config)
        total += alone + 4 * (counts.method - counts.encoder)
    else:
        total += sum(of_branches)
    if config.engine.precision == "autocast":
        total += 2 * count_parameters(config).of_groups()[0]  # matrices, rounded once a step
    return total


def decoding(config: PretrainConfig, branch: PixelConfig | FeatureConfig, images: int) -> float:
    """Bytes that a branch keeps of all its taps."""
    stream, product = bytes_of_weights(config), bytes_of_products(config)
    read_width, visible, width = config.model.width, encoder_patches(config), branch.decoder_width
    taps, patches = len(branch.taps) * images, config.grid[0] * config.grid[1]
    masked, out = (
        taps * config.num_masked,
        config.model.patch_size**2 * 3 if isinstance(branch, PixelConfig) else read_width,
    )
    total = decoder_blocks(config, branch, taps)
    total += taps * (1 + visible) * read_width * product  # what the decoder reads
    left = masked if config.engine.skip_unused_tokens else taps * (1 + patches)
    total += (left * stream + masked * product) * width  # what its last norm and its head read
    copies = 1 if isinstance(branch, PixelConfig) else 2
    if branch.cross_attention:
        read = taps * (1 + visible) * (read_width * (stream + product) + 2 * width * product)
        outputs = branch.decoder_depth * taps * (1 + patches) - (
            taps * (1 + visible) if config.engine.skip_unused_tokens else 0
        )
        total += outputs * width * (stream + 4 * product) + branch.decoder_depth * read
    return total + masked * out * (copies * 4 if config.engine.loss_backend == "reference" else product)  # the loss


def traffic(config: PretrainConfig, stage: int, gpus: int, accumulation: int) -> float:
    """Bytes that a GPU sends in a step, by rings: gradients, weights, and under ZeRO the teacher's copy."""
    counts, low = count_parameters(config), bytes_of_weights(config)
    n, share = counts.method, (gpus - 1) / gpus
    # Over all numbers. DeepSpeed sums gradients by all-reduce (2) at stages 1 and 2 as well, then gathers weights (1).
    passes = {0: 2, 1: 2 + 1, 2: 2 * accumulation + 1, 3: 3 * accumulation}[stage]
    teacher = 2 * counts.encoder if stage > 0 and config.feature.enabled else 0
    return low * share * (passes * n + teacher)


def largest_micro_batch(config: PretrainConfig, settings: dict[str, Any], stage: int, gpus: int, gpu: Gpu) -> int:
    """The largest micro-batch that fits and divides the global batch; 0 where none does."""
    for micro in range(config.data.batch_size // gpus, 0, -1):
        divides = config.data.batch_size % (micro * gpus) == 0
        if divides and memory(config, settings, stage, gpus, micro).peak < ROOM * gpu.memory * GIB:
            return micro
    return 0


ROOM = 0.92  # of a GPU's memory; the rest is CUDA's, NCCL's, and what falls between blocks of memory


def show(
    config: PretrainConfig,
    settings: dict[str, Any],
    gpus: int,
    gpu_name: str,
    micro: int | None,
    images: int,
    mfu: float,
) -> str:
    """The plan as text. UserError where the GPU is unknown or the batch cannot be divided."""
    if gpu_name not in GPUS:
        raise UserError(f"--gpu {gpu_name} is not known: choose one of {', '.join(GPUS)}")
    for flag, value in {"gpus": gpus, "images": images, "mfu": mfu}.items():
        if value <= 0:
            raise UserError(f"--{flag} is {value}: give a number above 0")
    gpu, batch = GPUS[gpu_name], config.data.batch_size
    micro = int(micro or settings.get("train_micro_batch_size_per_gpu") or batch // gpus)
    if micro < 1 or batch % (micro * gpus):
        raise UserError(f"data.batch_size {batch} is not divisible by {gpus} GPUs x micro-batch {micro}: change one")
    counts, cost, accumulation = count_parameters(config), count_flops(config), batch // (micro * gpus)
    teraflops = gpu.in_fp32 if config.engine.precision == "fp32" else gpu.teraflops
    rate = gpus * teraflops * 1e12 / cost.total
    samples = config.num_steps(images) * batch
    days = samples / (mfu * rate) / 86400
    shares = ", ".join(f"{name} {value / cost.total:.0%}" for name, value in cost._asdict().items() if value)
    peak = f"{teraflops:g} TFLOP/s"
    lines = [
        f"{config.preset} on {gpus} x {gpu_name}, {config.engine.precision}: {counts.method / 1e6:.1f} million "
        f"parameters, {counts.encoder / 1e6:.1f} of the encoder",
        f"batch      {batch} = {gpus} GPUs x {micro} images x {accumulation}",
        f"work       {cost.total / 1e9:,.1f} GFLOP an image: {shares}",
        f"bound      {rate:,.0f} images/s if every GPU did {peak}; {mfu * rate:,.0f} at {mfu:.0%} of that",
        f"schedule   {samples / images:,.4g} epochs of {images:,} images at {mfu:.0%}: {days:.2f} days, "
        f"{24 * days * gpus:,.0f} GPU hours",
        "",
        f"GiB on a GPU that has {gpu.memory:g}; most: the largest micro-batch that fits; sent: by a GPU in a step",
        "ZeRO  weights  gradients  optimizer  teacher  activations  buffers     peak  fits   most    sent",
    ]
    for stage in range(4):
        parts = memory(config, settings, stage, gpus, micro)
        fits = "yes" if parts.peak < ROOM * gpu.memory * GIB else "no"
        most = largest_micro_batch(config, settings, stage, gpus, gpu)
        gib = [value / GIB for value in (*parts[:6], parts.peak)]
        numbers = "  ".join(f"{v:{w}.2f}" for v, w in zip(gib, (7, 9, 9, 7, 11, 7, 7), strict=True))
        sent = traffic(config, stage, gpus, accumulation) / GIB
        lines.append(f"{stage:4}  {numbers}  {fits:>4}  {most:5}  {sent:6.2f}")
    less = memory(
        replace(config, engine=replace(config.engine, activation_checkpointing=True)), settings, 2, gpus, micro
    )
    lines.append(f"with --engine.activation_checkpointing the activations are {less.activations / GIB:.2f} GiB")
    return "\n".join(lines)
