"""Expected duration of a run, from its FLOPs and the speed of this device at a matrix product of the model's size."""

import time

import torch

from ddae.config.pretrain import PretrainConfig
from ddae.data.reader import RankBatch
from ddae.distributed.comm import device
from ddae.training.flops import count_model_flops, encoder_patches

# Share of the measured product's rate that a whole training step reaches. CPU: median of the presets demo and own on
# two cores (docs/performance.md); GPU: assumed.
EFFICIENCY = {"cpu": 0.3, "cuda": 0.5}
REPEATS, MEASURE_S = 10, 0.01  # measurements, of which the fastest counts, and the shortest time of one


def expected_seconds(config: PretrainConfig, num_steps: int, batch: RankBatch) -> float:
    """Return the time of so many steps on this device, without evaluations; good to a factor of about 1.5."""
    flops = count_model_flops(config).total * batch.batch_size / batch.world_size
    return num_steps * flops / (EFFICIENCY[device().type] * product_rate(config, batch.micro_batch))


def product_rate(config: PretrainConfig, images: int) -> float:
    """Return the FLOP/s of this device at the first layer of an MLP, for the encoder's tokens of so many images."""
    width, tokens = config.model.width, images * (1 + encoder_patches(config))
    dtype = torch.float32 if config.engine.precision == "fp32" else torch.bfloat16
    left = torch.randn(tokens, width, device=device(), dtype=dtype)
    right = torch.randn(width, 4 * width, device=device(), dtype=dtype)

    def seconds(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            left @ right
        if left.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    count = 1
    while min(seconds(count), seconds(count)) < MEASURE_S:  # other work on the machine makes single ones slow
        count *= 2
    return 2 * tokens * width * 4 * width * count / min(seconds(count) for _ in range(REPEATS))
