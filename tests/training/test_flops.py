"""ddae/training/flops.py: planned operations against the matrix products of real training steps."""

import re
from dataclasses import replace

import pytest
from memory import batch_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from ddae.config.cli import parse
from ddae.config.pretrain import beta_names
from ddae.data.rng import fold
from ddae.method.betas import Betas
from ddae.method.model import build_model
from ddae.method.teacher import Teacher, TensorShard
from ddae.models.tokenizer import Tokenizer
from ddae.models.vit import Encoder
from ddae.tools.replay import EagerEngine
from ddae.training.flops import CODE_WIDTH, count_flops
from ddae.training.step import ForwardPass, Targets, TeacherTargets, TokenTargets, configure_teacher, step_taps

TOLERANCE = 0.05  # of the ratio of planned and counted operations
SHAPE = (
    "--model.width 32 --model.depth 12 --model.heads 2 --model.image_size 64 --model.patch_size 8 "
    "--pixel.decoder_width 24 --pixel.decoder_heads 2 --feature.decoder_width 32 --feature.decoder_heads 2 "
    "--engine.precision fp32"
).split()
CASES = [
    "mae_vit_b16_100e",
    "dds_mae_vit_b16_100e",
    "ddae_vit_b16_100e",
    "ddae_vit_b16_100e --engine.no_skip_unused_tokens --pixel.cross_attention --feature.cross_attention",
    "ddae_vit_b16_100e --taps_per_step 1",
    "ddae_vit_b16_100e --decode_fraction 0.5",
    "bootmae_vit_b16_100e",
    "beitv2_vit_b16_100e",
    "dds_beitv2_vit_b16_100e",
]
MATRIX_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}  # operator -> place of its left factor
UNCOUNTED = re.compile("attention|conv|dot|mv|einsum|linear")  # operators that would multiply matrices, too


class Products(TorchDispatchMode):
    """Counts the operations of all matrix products by the shapes of their factors."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result, name = func(*args, **(kwargs or {})), func._schema.name.removeprefix("aten::")
        if name in MATRIX_PRODUCTS:
            self.operations += 2 * result.numel() * args[MATRIX_PRODUCTS[name]].shape[-1]
        assert not UNCOUNTED.search(name), name
        return result


def build_step(config) -> ForwardPass:
    """Return the forward pass of a step without DeepSpeed."""
    engine = EagerEngine(build_model(config), config.engine.precision)
    targets = Targets()
    if config.token.enabled:
        targets = TokenTargets(config, Tokenizer(config.model, config.token.codes, CODE_WIDTH))
    elif config.feature.enabled:
        encoder = Encoder(config.model)
        shards = [TensorShard(name, 0, values.detach().flatten()) for name, values in encoder.named_parameters()]
        teacher = Teacher(encoder, shards, sharded=False)
        configure_teacher(teacher, config)
        targets = TeacherTargets(config, engine, teacher)
    betas = Betas(beta_names(config), config.dynamic, config.optim.adam_betas, engine.device)
    return ForwardPass(config, engine, targets, betas, 1.0, "reference")


def count_products(config, step: int) -> int:
    """Return the operations of an image in one step: targets, forward and backward pass.

    The difference between two images and one, without what is done once for all images.
    """
    counts = []
    for images in (1, 2):
        with sdpa_kernel(SDPBackend.MATH), Products() as products:
            build_step(config)(batch_of(config, images), 1.0, step).total.backward()
        counts.append(products.operations)
    return counts[1] - counts[0]


@pytest.mark.parametrize("case", CASES)
def test_planned_operations_equal_products_of_a_step(case, record_result):
    """Planned operations of an image against the matrix products of a real step with teacher or tokenizer."""
    config = parse(["--preset", *case.split(), *SHAPE])
    if config.token.enabled:  # attention with relative positions is the same products
        config = replace(config, model=replace(config.model, positions="rowfirst", relative_positions="none"))
    seeds = {step: int(fold(config.train.seed, step)) if config.taps_per_step else 0 for step in range(20)}
    step_of_taps = {step_taps(config, seed): step for step, seed in seeds.items()}  # each set of taps once
    counted = [count_products(config, step) for step in step_of_taps.values()]
    ratio = count_flops(config).total / (sum(counted) / len(counted))
    assert abs(ratio - 1) < TOLERANCE
    record_result(f"planned over counted {ratio:.3f}")
