"""The reference against the float64 NumPy transcription in equations.py: values, gradients, argument checks."""

import itertools
import types
import typing

import ddae_kernels as dk
import equations
import jaxtyping
import numpy as np
import pytest
import torch
from beartype import beartype

BETAS = [-3.0, -0.5, 0.0, 0.7]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def block_mask(batch, grid):
    """Return one large rectangle per image, so that distances grow: bool [B, N]."""
    masked = np.zeros((batch, *grid), bool)
    for b in range(batch):
        masked[b, b % 3 : b % 3 + 9, 1:12] = True
    return masked.reshape(batch, -1)


def random_mask(batch, grid):
    """Return a uniformly random mask: bool [B, N]."""
    scores = np.random.default_rng(0).random((batch, grid[0] * grid[1]))
    return scores.argsort(1).argsort(1) >= 97  # 99 masked patches, as in block_mask


def random_problem(kind, taps, width=48, shared=False, dtype=torch.float32):
    rng = np.random.default_rng(7)
    grid, batch = (14, 14), 6
    masked = (block_mask if kind == "block" else random_mask)(batch, grid)
    distance = equations.nearest_visible(masked, grid)[masked].reshape(batch, 99)
    pred = rng.normal(size=(taps, batch, 99, width))
    target = rng.normal(size=(batch, 99, width) if shared else pred.shape)
    tap_weight = np.linspace(0.75, 1, taps)
    tensors = [torch.tensor(array, dtype=dtype) for array in (pred, target, distance, tap_weight)]
    return [tensor.double().numpy() for tensor in tensors], tensors  # identical values in both formats


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("taps", [1, 4])
@pytest.mark.parametrize("kind", ["block", "random"])
@pytest.mark.parametrize("rescale_grad", ["full", "detach"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-10)])
def test_dynamic_mse_equals_eqs_2_and_3(beta, taps, kind, rescale_grad, dtype, tolerance):
    exact, (pred, target, distance, tap_weight) = random_problem(kind, taps, shared=taps == 1, dtype=dtype)
    betas = (torch.full((taps,), beta, dtype=dtype) * torch.linspace(1, 1.2, taps, dtype=dtype)).requires_grad_()
    pred.requires_grad_()
    result = dk.dynamic_mse(pred, target, distance, betas, tap_weight, rescale_grad=rescale_grad)
    result.loss.backward()

    loss, tap_loss, pred_grad, beta_grad, beta_terms = equations.dynamic_loss(
        exact[0], exact[1], exact[2], betas.detach().double().numpy(), exact[3], rescale_grad
    )
    assert result.loss.dtype == dtype
    np.testing.assert_allclose(result.loss.item(), loss, rtol=tolerance)
    np.testing.assert_allclose(result.tap_loss, tap_loss, rtol=tolerance)
    np.testing.assert_allclose(result.token_error, ((exact[0] - exact[1]) ** 2).mean(-1), rtol=tolerance)
    largest = np.abs(pred_grad).max()
    np.testing.assert_allclose(pred.grad, pred_grad, rtol=0, atol=tolerance * largest)
    assert (np.abs(betas.grad.double().numpy() - beta_grad) <= tolerance * beta_terms).all()


@pytest.mark.parametrize("rescale_grad", ["full", "detach"])
@pytest.mark.parametrize("loss", ["mse", "features", "pixels", "error"])
def test_mean_over_all_subsets_is_the_full_loss(loss, rescale_grad):
    """Loss, gradient of the predictions and gradient of the betas, with fixed patch weights, exactly (float64)."""
    generator = torch.Generator().manual_seed(0)
    distance = torch.tensor([[1, 1, 2, 5, 8], [1, 2, 2, 4, 13]]).double().sqrt()
    full = torch.randn(4, 2, 5, 12, dtype=torch.float64, generator=generator).requires_grad_()
    target = torch.randn(4, 2, 5, 12, dtype=torch.float64, generator=generator)
    images = torch.randint(0, 256, (2, 3, 6, 8), dtype=torch.uint8, generator=generator)
    masked = torch.tensor([[0, 1, 4, 7, 11], [2, 3, 5, 6, 10]])
    beta = torch.tensor(BETAS, dtype=torch.float64, requires_grad=True)
    patch_weight = 1 + torch.rand(2, 5, dtype=torch.float64, generator=generator)
    weights = distance, beta, torch.linspace(0.75, 1, 4).double()
    options = {"rescale_grad": rescale_grad, "patch_weight": patch_weight}

    def compute(subset=None):
        pred = full if subset is None else full.gather(2, subset[None, :, :, None].expand(4, -1, -1, 12))
        match loss:
            case "mse":
                result = dk.dynamic_mse(pred, target, *weights, **options, subset=subset)
            case "features":
                norm = {"target_norm": "instance_layer"}
                result = dk.dynamic_feature_mse(pred, target, *weights, **norm, **options, subset=subset)
            case "pixels":
                pixels = {"patch": 2, "mean": MEAN, "std": STD}
                result = dk.dynamic_pixel_mse(pred, images, masked, *weights, **pixels, **options, subset=subset)
            case _:
                result = dk.dynamic_error(pred.square().mean(-1), *weights, **options, subset=subset)
        return [result.loss, *torch.autograd.grad(result.loss, (full, beta))]

    pairs = list(itertools.permutations(range(5), 2))
    chosen = [(pair, pairs[(number + 7) % len(pairs)]) for number, pair in enumerate(pairs)]  # of the two images
    sums = [torch.stack(each).mean(0) for each in zip(*(compute(torch.tensor(each)) for each in chosen), strict=True)]
    for actual, expected in zip(sums, compute(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "subset, message",
    [
        (torch.zeros(2, 3), "subset is torch.float32"),
        (torch.zeros(2, 4, dtype=torch.int64), r"subset is torch.int64 \[2, 4\]; expected int64 \[2, 3\]"),
        (torch.full((2, 3), 5), "subset contains an index outside 0 to 4"),
        (torch.full((2, 3), -1), "subset contains an index outside 0 to 4"),
    ],
)
def test_wrong_subsets_are_refused(subset, message):
    with pytest.raises(ValueError, match=message):
        dk.dynamic_error(torch.ones(1, 2, 3), torch.ones(2, 5), torch.zeros(1), torch.ones(1), subset=subset)


@pytest.mark.parametrize("beta", BETAS)
def test_weights_and_weight_norm(beta):
    (_, _, exact, _), (_, _, distance, _) = random_problem("block", 1, dtype=torch.float64)
    betas = torch.tensor([beta, beta / 2], dtype=torch.float64, requires_grad=True)
    relative = dk.distance_weights(distance, betas)
    assert relative.shape == (2, *distance.shape)
    assert (relative.amax(-1) == 1).all()
    assert (relative > 0).all()
    np.testing.assert_allclose(relative[0].detach(), equations.relative_weights(exact, beta), rtol=1e-10)
    norm = dk.weight_norm(distance, betas)
    norm.sum().backward()
    np.testing.assert_allclose(norm.detach(), equations.weight_norm(exact, [beta, beta / 2]), rtol=1e-10)
    np.testing.assert_allclose(betas.grad, equations.weight_norm_slope(exact, [beta, beta / 2]), rtol=1e-8, atol=1e-15)
    np.testing.assert_allclose(dk.weight_norm(distance, betas, 256).detach(), 16 * norm.detach(), rtol=1e-10)
    square, slope = dk.weight_norm_and_slope(distance, betas)
    np.testing.assert_allclose(square.detach(), norm.detach().square(), rtol=1e-10)
    np.testing.assert_allclose(slope.detach(), 2 * norm.detach() * betas.grad, rtol=1e-8, atol=1e-15)


def test_dynamic_mse_hand_computed():
    """Two masked patches at distances 1 and 2, beta 1: weights e^1 and e^2, rescaled e^-1 and 1."""
    pred = torch.tensor([1.0, 3.0]).view(1, 1, 2, 1)
    target = torch.tensor([0.0, 1.0]).view(1, 2, 1)
    result = dk.dynamic_mse(pred, target, torch.tensor([[1.0, 2.0]]), torch.ones(1), torch.tensor([0.5]))
    assert result.token_error.flatten().tolist() == [1, 4]
    np.testing.assert_allclose(result.tap_loss.item(), (np.exp(-1) * 1 + 1 * 4) / 2, rtol=1e-6)
    np.testing.assert_allclose(result.loss.item(), 0.5 * result.tap_loss.item(), rtol=1e-6)


def test_beta_zero_gives_equal_weights():
    _, (_, _, distance, _) = random_problem("block", 1)
    assert (dk.distance_weights(distance, torch.zeros(3)) == 1).all()


def test_negative_beta_bounds_the_weights_below_by_1_over_e():
    _, (_, _, distance, _) = random_problem("block", 1)
    relative = dk.distance_weights(distance, torch.tensor([-1000.0]))
    assert relative.min() >= np.exp(-1) - 1e-6


@pytest.mark.parametrize("norm, unbiased, eps", [("per_channel", False, 1e-5), ("joint", True, 1e-6), ("none", 0, 0)])
def test_pixel_target_from_images(norm, unbiased, eps):
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (2, 3, 24, 40), dtype=np.uint8)
    images[0, :, :8, :8] = 200  # a constant patch: variance 0
    masked = np.stack([rng.permutation(15)[:9] for _ in range(2)])
    masked[0, 0] = 0
    target = equations.pixel_target(images, masked, 8, MEAN, STD, norm, unbiased, eps or 1)
    distance, pred = 1 + 3 * rng.random((2, 9)), rng.normal(size=(4, 2, 9, 192))
    beta, tap_weight = np.array(BETAS), np.array([0.75, 0.75, 0.75, 1])
    loss, *_ = equations.dynamic_loss(pred, target, distance, beta, tap_weight)
    args = [torch.tensor(x) for x in (pred, images, masked, distance, beta, tap_weight)]
    result = dk.dynamic_pixel_mse(*args, patch=8, mean=MEAN, std=STD, norm=norm)
    np.testing.assert_allclose(result.loss.item(), loss, rtol=1e-10)
    explicit = dk.dynamic_pixel_mse(*args, patch=8, mean=MEAN, std=STD, norm=norm, unbiased=bool(unbiased), eps=eps)
    assert explicit.loss == result.loss
    is_masked = torch.zeros(2, 15, dtype=torch.bool).scatter_(1, args[2], True)
    args[2] = args[2].sort(1).values
    by_index = dk.dynamic_pixel_mse(*args, patch=8, mean=MEAN, std=STD, norm=norm)
    args[2] = is_masked
    assert by_index.loss == dk.dynamic_pixel_mse(*args, patch=8, mean=MEAN, std=STD, norm=norm).loss


TARGET_NORMS = ["layer", "instance_layer", "batch_layer", "none"]


@pytest.mark.parametrize("norm_pred", [True, False])
@pytest.mark.parametrize("target_norm", TARGET_NORMS)
@pytest.mark.parametrize("shared", [True, False])
def test_feature_loss_normalises(shared, target_norm, norm_pred):
    (pred, target, distance, tap_weight), tensors = random_problem("random", 4, shared=shared, dtype=torch.float64)
    target = equations.feature_target(target[None] if shared else target, target_norm)
    pred = equations.layer_norm(pred) if norm_pred else pred
    loss, *_ = equations.dynamic_loss(pred, target, distance, BETAS, tap_weight)
    args = (*tensors[:3], torch.tensor(BETAS, dtype=torch.float64), tensors[3])
    result = dk.dynamic_feature_mse(*args, norm_pred=norm_pred, target_norm=target_norm)
    np.testing.assert_allclose(result.loss.item(), loss, rtol=1e-10)


def test_target_norms_hand_computed():
    """Two images, two masked tokens, two channels. With pred = 0 the loss is the mean square of the target.

    Image 0 has tokens (1, 10) and (3, 10), image 1 (5, 20) and (5, 40). LayerNorm of two channels: (-1, 1) or (1, -1).
    Standardised over the tokens of an image: (-1, 0), (1, 0) and (0, -1), (0, 1), whose LayerNorm is (-1, 1), (1, -1)
    and (1, -1), (-1, 1). No normalisation: squares 1, 100, 9, 100 and 25, 400, 25, 1600.
    """
    target = torch.tensor([[[1.0, 10], [3, 10]], [[5, 20], [5, 40]]], dtype=torch.float64)
    ones = torch.ones(2, 2, dtype=torch.float64)

    def loss(target_norm, pred):
        pred = torch.tensor(pred, dtype=torch.float64).expand(1, 2, 2, 2)
        zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        return dk.dynamic_feature_mse(pred, target, ones, zero, one, norm_pred=False, target_norm=target_norm).loss

    assert loss("none", [0, 0]) == pytest.approx((1 + 100 + 9 + 100 + 25 + 400 + 25 + 1600) / 8)
    assert loss("layer", [-1, 1]) == pytest.approx(0, abs=1e-6)  # the second channel is larger in every token
    assert loss("instance_layer", [-1, 1]) == pytest.approx(2, abs=1e-3)  # in half of the tokens: errors 0 and 4
    # Over both images: means 3.5 and 20, variances 2.75 and 150; (-2.5, -10), (-0.5, -10), (1.5, 0), (1.5, 20) become
    # (-1.51, -0.82), (-0.30, -0.82), (0.90, 0), (0.90, 1.63): the second channel is larger in tokens 1 and 4.
    assert loss("batch_layer", [-1, 1]) == pytest.approx(2, abs=1e-3)
    assert loss("batch_layer", [[[-1, 1], [1, -1]], [[1, -1], [-1, 1]]]) == pytest.approx(0, abs=1e-3)


def test_patch_weights_hand_computed():
    """Errors 4 and 1 with weights 1.5 and 2, in an image of two patches at distance 1: (1.5 * 4 + 2 * 1) / 2 = 4."""
    pred = torch.tensor([[[[2.0], [1.0]]]], requires_grad=True)
    one = torch.ones(1)
    args = pred, torch.zeros(1, 2, 1), torch.ones(1, 2), torch.zeros(1), one
    result = dk.dynamic_mse(*args, patch_weight=torch.tensor([[1.5, 2.0]]))
    result.loss.backward()
    assert result.loss == 4
    assert result.token_error.flatten().tolist() == [4, 1]  # unweighted
    assert pred.grad.flatten().tolist() == [3, 2]  # 2 * weight * pred / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target_norm", TARGET_NORMS)
@pytest.mark.parametrize("patches", [1, 9])
def test_target_without_variance_gives_finite_losses_and_gradients(patches, target_norm, dtype):
    """A single token, or identical tokens, with equal or different channels; the prediction is constant, too."""
    for target in (torch.full((48,), 5.3), torch.linspace(-3, 9, 48)):
        pred = torch.full((2, 3, patches, 48), 0.7, dtype=dtype, requires_grad=True)
        beta = torch.tensor([-0.5, 0.0], requires_grad=True)
        target = target.to(dtype).expand(3, patches, 48)
        args = target, torch.ones(3, patches), beta, torch.ones(2)
        result = dk.dynamic_feature_mse(pred, *args, target_norm=target_norm, norm_pred=target_norm != "none")
        result.loss.backward()
        assert all(tensor.isfinite().all() for tensor in (result.loss, pred.grad, beta.grad))
        if target_norm in ("instance_layer", "batch_layer"):
            assert result.loss == 0  # both sides are 0, not rounding errors scaled to unit variance


def test_bf16_inputs_are_computed_in_fp32_and_not_modified():
    _, (pred, target, distance, tap_weight) = random_problem("block", 4)
    pred, target = pred.bfloat16().requires_grad_(), target.bfloat16()
    before = [t.detach().clone() for t in (pred, target, distance)]
    result = dk.dynamic_mse(pred, target, distance, torch.tensor(BETAS), tap_weight)
    result.loss.backward()
    exact = dk.dynamic_mse(pred.detach().float(), target.float(), distance, torch.tensor(BETAS), tap_weight)
    assert result.loss.dtype == torch.float32
    assert result.loss == exact.loss
    assert pred.grad.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(before, (pred, target, distance), strict=True))


def call_with(**changes):
    """Call dynamic_mse with valid arguments, except for `changes`."""
    args = {
        "pred": torch.zeros(4, 2, 5, 3),
        "target": torch.zeros(2, 5, 3),
        "distance": torch.ones(2, 5),
        "beta": torch.zeros(4),
        "tap_weight": torch.ones(4),
    } | changes
    options = {k: args.pop(k) for k in ("rescale_grad", "impl", "patch_weight") if k in args}
    return dk.dynamic_mse(*args.values(), **options)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pred": torch.zeros(2, 5, 3)}, "pred is"),
        ({"target": torch.zeros(2, 5, 4)}, "target is"),
        ({"target": torch.zeros(2, 5, 3, dtype=torch.int64)}, "target is"),
        ({"tap_weight": torch.tensor([1, 1, torch.inf, 1])}, "tap_weight contains a non-finite value"),
        ({"tap_weight": torch.ones(4, dtype=torch.bool)}, "tap_weight is"),
        ({"distance": torch.ones(2, 6)}, "distance is"),
        ({"distance": torch.zeros(2, 5)}, "non-finite or <= 0"),
        ({"beta": torch.zeros(3)}, "beta is"),
        ({"beta": torch.tensor([0, 0, torch.nan, 0])}, "beta contains a non-finite value"),
        ({"tap_weight": torch.ones(3)}, "tap_weight is"),
        ({"patch_weight": torch.ones(2, 4)}, "patch_weight"),
        ({"patch_weight": torch.full((2, 5), torch.nan)}, "patch_weight contains a non-finite value"),
        ({"rescale_grad": "half"}, "rescale_grad is"),
        ({"impl": "cuda"}, "impl is"),
        ({"pred": torch.zeros(4, 2, 5, 0), "target": torch.zeros(2, 5, 0)}, "pred is"),
        ({"pred": torch.zeros(4, 2, 0, 3), "distance": torch.ones(2, 0)}, "distance is"),
        ({"target": torch.zeros(3, 2, 5, 3)}, "target is"),
        ({"target": torch.zeros(2, 5, 3, requires_grad=True)}, "target requires a gradient"),
        ({"tap_weight": torch.ones(4, requires_grad=True)}, "tap_weight requires a gradient"),
        ({"distance": torch.ones(2, 5, device="meta")}, "distance is on meta"),
    ],
)
def test_invalid_arguments_raise(changes, message):
    assert call_with().loss == 0
    with pytest.raises(ValueError, match=message):
        call_with(**changes)


def test_invalid_images_raise():
    def call_pixel_mse(pred_width=48, images=None, masked=None, **options):
        if images is None:
            images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
        vectors = torch.ones(1, 2), torch.zeros(1), torch.ones(1)
        options = {"patch": 4, "mean": MEAN, "std": STD} | options
        pred = torch.zeros(1, 1, 2, pred_width)
        return dk.dynamic_pixel_mse(
            pred, images, torch.tensor([[0, 1]]) if masked is None else masked, *vectors, **options
        )

    call_pixel_mse()
    for message, changes in {
        "expected uint8": {"images": torch.zeros(1, 3, 8, 8)},
        "expected multiples of patch, which is 4": {"images": torch.zeros(1, 3, 8, 10, dtype=torch.uint8)},
        "pred has 20 values per patch; expected 48": {"pred_width": 20},
        "norm is": {"norm": "global"},
        "patch is -4": {"patch": -4},
        "patch is 0": {"patch": 0},
        "mean is": {"mean": (0.5,)},
        "std is": {"std": (0.5, 0.5, 0.5, 0.5)},
        "std is .*all > 0": {"std": (0.5, 0.0, 0.5)},
        "an index outside 0 to 3": {"masked": torch.tensor([[0, 4]])},
        "does not mark 2 patches": {"masked": torch.tensor([[True, False, False, False]])},
        "masked is": {"masked": torch.tensor([[0, 1, 2]])},
    }.items():
        with pytest.raises(ValueError, match=message):
            call_pixel_mse(**changes)


def with_checked_shapes(function):
    """Return `function` with its annotations, which otherwise exist for type checkers only, checked in every call."""
    checked = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
    checked.__kwdefaults__ = function.__kwdefaults__
    checked.__annotations__ = typing.get_type_hints(function, localns=vars(jaxtyping))
    return jaxtyping.jaxtyped(checked, typechecker=beartype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shared", [True, False])
def test_annotated_shapes_hold(shared, dtype):
    calls = {name: with_checked_shapes(getattr(dk, name)) for name in dk.__all__ if name != "DynamicLoss"}
    checked = types.SimpleNamespace(**calls)
    is_masked = torch.ones(2, 6, dtype=torch.bool)
    is_masked[:, 0] = False
    masked = is_masked.nonzero()[:, 1].view(2, 5)
    distance = checked.patch_distance(is_masked, (2, 3)).gather(1, masked)
    beta, tap_weight, patch_weight = torch.zeros(4), torch.ones(4), torch.ones(2, 5)
    assert checked.distance_weights(distance, beta).shape == (4, 2, 5)
    assert checked.weight_norm(distance, beta).shape == (4,)
    pred = torch.zeros(4, 2, 5, 48, dtype=dtype)
    target = pred[0] if shared else pred
    checked.dynamic_mse(pred, target, distance, beta, tap_weight, patch_weight=patch_weight)
    checked.dynamic_feature_mse(pred, target, distance, beta, tap_weight, patch_weight=patch_weight)
    images = torch.zeros(2, 3, 8, 12, dtype=torch.uint8)
    options = {"patch": 4, "mean": MEAN, "std": STD, "patch_weight": patch_weight}
    checked.dynamic_pixel_mse(pred, images, masked if shared else is_masked, distance, beta, tap_weight, **options)
    checked.dynamic_error(pred[..., 0], distance, beta, tap_weight, patch_weight=patch_weight)
    with pytest.raises(jaxtyping.TypeCheckError, match=r"B M"):
        checked.dynamic_mse(pred, target, distance[:, 1:], beta, tap_weight)
