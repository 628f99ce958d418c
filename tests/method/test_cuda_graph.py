"""The teacher as a CUDA graph: a fake graph on any machine, equality to the bit on a GPU."""

import pytest
import torch

from ddae.config.pretrain import ModelConfig
from ddae.data.masking import Mask
from ddae.distributed.checkpoint_format import TensorShard
from ddae.method.cuda_graph import WARMUP_CALLS, GraphedFunction
from ddae.method.teacher import Teacher
from ddae.models.vit import Encoder, initialise

GPU_ONLY = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class FakeCapture:
    """Stands in for capture(): a replay runs the function again, into the output of the capture."""

    def __init__(self):
        self.captures = self.replays = 0

    def __call__(self, function):
        self.captures += 1
        output = torch.full_like(function(), torch.nan)  # a capture computes nothing

        def replay():
            self.replays += 1
            with torch.no_grad():
                output.copy_(function())

        return replay, output


def test_calls_are_eager_until_the_capture_and_replays_after_it():
    capture, eager = FakeCapture(), []

    def scale(values, factor):
        eager.append(values)
        return values * factor

    graphed = GraphedFunction(scale, capture)
    for call in range(WARMUP_CALLS + 3):
        values = torch.full((2,), float(call))
        result = graphed(values, 3)
        assert torch.equal(result, 3 * values)
        assert capture.captures == int(call >= WARMUP_CALLS)
        assert capture.replays == max(0, call + 1 - WARMUP_CALLS)
    assert all(each is not values for each in eager[WARMUP_CALLS:])  # replays read their own buffer
    assert result is graphed(values, 3)


@pytest.mark.parametrize(
    "changed", [(torch.ones(3), 3), (torch.ones(2).double(), 3), (torch.ones(2), 4)], ids=["shape", "dtype", "value"]
)
def test_other_arguments_are_captured_again(changed):
    capture = FakeCapture()
    graphed = GraphedFunction(lambda values, factor: values * factor, capture)
    for args in ((torch.ones(2), 3), changed, (torch.ones(2), 3)):
        captures = capture.captures
        for _ in range(WARMUP_CALLS + 2):
            assert torch.equal(graphed(*args), args[0] * args[1])
        assert capture.captures == captures + 1


def test_autograd_refuses_an_overwritten_output():
    graphed, weight = GraphedFunction(lambda values: 2 * values, FakeCapture()), torch.ones(2, requires_grad=True)
    for _ in range(WARMUP_CALLS):
        graphed(torch.ones(2))
    loss = (weight * graphed(torch.ones(2))).sum()
    graphed(torch.ones(2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_counted_operators_are_those_of_the_function():
    from torch.utils.flop_counter import FlopCounterMode

    capture = FakeCapture()
    graphed = GraphedFunction(lambda values: values @ values, capture)
    for _ in range(WARMUP_CALLS + 1):
        graphed(torch.ones(2, 2))
    with FlopCounterMode(display=False) as counter:
        graphed(torch.ones(2, 2))
    assert counter.get_total_flops() == 2 * 2**3
    assert capture.replays == 1


def student_and_teacher(dtype, device, sharded=False):
    """Return the student's slices of master weights and a teacher in this dtype."""
    shape = ModelConfig(width=24, depth=3, heads=2, image_size=32, patch_size=8)
    encoder = Encoder(shape).to(device)
    initialise(encoder, torch.Generator(device).manual_seed(0))
    shards = [TensorShard(name, 0, values.detach().flatten()) for name, values in encoder.named_parameters()]
    return shards, Teacher(Encoder(shape).to(device, dtype), shards, sharded)


def inputs_of(images, dtype, device, seed):
    """Return random patches [images, N, P] and a mask."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(images, 16, generator=generator).argsort(1).to(device)
    patches = torch.rand(images, 16, 192, generator=generator).to(device, dtype)
    return patches, Mask(order[:, :4].contiguous(), order[:, 4:].contiguous())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sharded", [False, True])
def test_the_weights_of_the_teacher_keep_their_addresses(dtype, sharded):
    """After EMA updates, and after a checkpoint has been loaded into its slices."""
    shards, teacher = student_and_teacher(dtype, "cpu", sharded)
    tensors = [*teacher.module.parameters(), *teacher.module.buffers()]
    before = [each.data_ptr() for each in tensors]
    for shard in shards:
        shard.values.add_(1)
    teacher.update(0.5)
    for shard in (each for of in teacher.local_shards().values() for each in of):
        shard.values.fill_(0.25)
    teacher.sync_model_weights()
    assert all((parameter == 0.25).all() for parameter in teacher.module.parameters())
    assert [each.data_ptr() for each in (*teacher.module.parameters(), *teacher.module.buffers())] == before


def assert_targets_equal_eager_ones(device, dtype, capture=None, stream=None):
    """Compare targets to the bit while weights, masks and the number of images change."""
    shards, teacher = student_and_teacher(dtype, device)
    options = {} if capture is None else {"capture": capture}
    graphed, teacher.stream = GraphedFunction(teacher.compute_targets, **options), stream
    with torch.no_grad():
        for step in range(3 * WARMUP_CALLS + 6):
            patches, mask = inputs_of(5 if step < 2 * WARMUP_CALLS else 3, dtype, device, step)
            teacher.graph = None
            expected = teacher.targets(patches, (1, 3), mask)
            teacher.graph = graphed
            targets, event = teacher.start_targets(patches, (1, 3), mask)
            if event is not None:
                event.wait()
            assert torch.equal(targets, expected)
            for shard in shards:
                shard.values.mul_(1.1)
            teacher.update(0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_targets_of_a_fake_graph_equal_eager_ones(dtype):
    capture = FakeCapture()
    assert_targets_equal_eager_ones("cpu", dtype, capture)
    assert capture.captures == 2  # of five images, and of three
    assert capture.replays > 2


@GPU_ONLY
@pytest.mark.parametrize("with_stream", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_targets_of_a_graph_equal_eager_ones(dtype, with_stream):
    assert_targets_equal_eager_ones("cuda", dtype, stream=torch.cuda.Stream() if with_stream else None)
