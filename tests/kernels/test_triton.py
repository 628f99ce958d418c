"""The Triton kernels against the float64 reference, on a GPU if there is one, otherwise in Triton's interpreter.

The interpreter takes about 1 ms per patch and tap, so the cases are small.
"""

import contextlib
import json
import logging
import os
import subprocess
import sys

import ddae_kernels as dk
import equations
import numpy as np
import pytest
import torch
import traffic
import triton
from ddae_kernels import implementation, operators
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_edt
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BETAS = (-3.0, -0.5, 0.0, 0.7)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
UPSTREAM = 3.0
ROUNDING_ULP = {torch.bfloat16: 2.0} if DEVICE == "cpu" else {}  # default 1; the interpreter truncates bf16
# Relative to the value, the largest gradient, or the sum of beta's terms: see kernels/README.md, section Tolerances.
FP32 = 2e-6


@pytest.fixture(autouse=True)
def fill_empty_with_nan():
    """torch.empty returns NaN, so that elements which no kernel writes fail the comparisons."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


class Case:
    """Random inputs of one call, stored in float64, with values that the tested dtype represents exactly."""

    def __init__(self, kind="shared", taps=4, images=2, patches=7, width=48, dtype=torch.float32, seed=0, side=4):
        rng = torch.Generator().manual_seed(seed)
        self.kind, self.dtype = kind, dtype
        width = 3 * side**2 if kind == "pixel" else width
        self.pred = torch.randn(taps, images, patches, width, generator=rng).to(dtype).double()
        shape = self.pred.shape[1:] if kind == "shared" else self.pred.shape
        self.target = (0.7 + 2 * torch.randn(shape, generator=rng)).to(dtype).double()
        self.distance = torch.randint(1, 60, (images, patches), generator=rng).float().sqrt().double()
        self.beta = torch.tensor([BETAS[(seed + k) % 4] for k in range(taps)]).double()
        self.tap_weight = torch.linspace(0.75, 1, taps).double()
        self.images = torch.randint(0, 256, (images, 3, 3 * side, side * (patches // 3 + 2)), generator=rng).byte()
        self.images[0, :, :side, :side] = 200  # a constant patch has variance 0
        indices = [torch.randperm(3 * (patches // 3 + 2), generator=rng)[:patches] for _ in range(images)]
        self.masked, self.side = torch.stack(indices), side
        self.patch_weight = None  # [B, M], set by some tests
        self.subset = None  # [B, S], set by some tests; pred then has S patches
        self.masked[0, 0] = 0

    def __call__(self, impl, call=dk.dynamic_mse, change=lambda tensor: tensor, **options):
        """Return loss, tap_loss, token_error and gradients of pred and beta. change: alters the layout of inputs."""
        dtype = torch.float64 if impl == "reference" else torch.float32
        device = "cpu" if impl == "reference" else DEVICE
        input_dtype = dtype if impl == "reference" else self.dtype
        pred = self.pred.to(device, input_dtype, copy=True).requires_grad_()
        beta = self.beta.to(device, dtype, copy=True).requires_grad_()
        distance, tap_weight = self.distance.to(device, dtype), self.tap_weight.to(device, dtype)
        if self.patch_weight is not None:
            options = {"patch_weight": change(self.patch_weight.to(device, dtype))} | options
        if self.subset is not None:
            options = {"subset": change(self.subset.to(device))} | options
        if self.kind == "pixel":
            call, target = dk.dynamic_pixel_mse, (change(self.images.to(device)), change(self.masked.to(device)))
            options = {"patch": self.side, "mean": MEAN, "std": STD} | options
        else:
            target = (change(self.target.to(device, input_dtype)),)
        result = call(change(pred), *target, change(distance), beta, change(tap_weight), impl=impl, **options)
        (UPSTREAM * result.loss).backward()
        return [*result, pred.grad, beta.grad]

    def check(self, **options):
        """Compare the five results of Triton with those of the reference."""
        actual = [tensor.detach().cpu() for tensor in self("triton", **options)]
        options.pop("change", None)
        expected = [tensor.detach() for tensor in self("reference", **options)]
        assert [tensor.dtype for tensor in actual] == [*[torch.float32] * 3, self.dtype, torch.float32]
        # r = exp(d^beta - max): a relative error of d^beta becomes a relative error of r times d^beta
        relative = FP32 * max(1.0, (self.distance[..., None] ** self.beta).max().item())
        for one, other in zip(actual[:3], expected[:3], strict=True):
            np.testing.assert_allclose(one, other, rtol=relative, atol=0)
        rounding = 0  # the gradient is rounded twice: when stored, and when scaled by the upstream gradient
        if self.dtype != torch.float32:
            limits = torch.finfo(self.dtype)
            ulp = limits.eps * (expected[3].abs() + limits.smallest_normal)
            rounding = ROUNDING_ULP.get(self.dtype, 1.0) * ulp
        assert ((actual[3].double() - expected[3]).abs() <= relative * expected[3].abs().max() + rounding).all()
        terms = UPSTREAM * self.tap_weight * self.beta_terms(expected[2].numpy(), options.get("rescale_grad", "full"))
        assert ((actual[4].double() - expected[4]).abs() <= relative * terms).all()

    def beta_terms(self, error, rescale_grad):
        """Return the sums of absolute terms of beta's gradient, r e (|growth| + |anchor|), which cancel in it: [K]."""
        distance, terms = self.distance.numpy(), []
        for k, beta in enumerate(self.beta.tolist()):
            relative = equations.relative_weights(distance, beta)
            growth = distance**beta * np.log(distance)
            anchor = growth - equations.relative_slope(distance, beta, rescale_grad) / relative
            if self.patch_weight is not None:
                relative = relative * self.patch_weight.numpy()
            if self.subset is not None:
                relative, growth, anchor = (
                    np.take_along_axis(np.broadcast_to(each, distance.shape), self.subset.numpy(), 1)
                    for each in (relative, growth, anchor)
                )
            terms.append((relative * error[k] * (np.abs(growth) + np.abs(anchor))).mean())
        return torch.tensor(terms)


@pytest.mark.parametrize("rescale_grad", ["full", "detach"])
@pytest.mark.parametrize("kind", ["shared", "per_tap", "pixel"])
@pytest.mark.parametrize("seed", range(4))  # every tap is combined with every beta
def test_values_and_gradients(kind, rescale_grad, seed):
    Case(kind, seed=seed).check(rescale_grad=rescale_grad)


@pytest.mark.parametrize("rescale_grad", ["full", "detach"])
@pytest.mark.parametrize("kind", ["shared", "pixel", "feature"])
@pytest.mark.parametrize("seed", range(4))  # every tap is combined with every beta
def test_max_norm_distances(seed, kind, rescale_grad):
    """distance_norm max: distances <= 1, so a negative beta gives powers far above 1."""
    case = Case(kind, seed=seed)
    case.distance = (case.distance / case.distance.amax(1, keepdim=True)).float().double()
    case.check(rescale_grad=rescale_grad, **({"call": dk.dynamic_feature_mse} if kind == "feature" else {}))


@pytest.mark.parametrize("norm_pred", [True, False])
@pytest.mark.parametrize("target_norm", ["layer", "instance_layer", "batch_layer", "none"])
@pytest.mark.parametrize("kind", ["shared", "per_tap"])
def test_feature_normalisation(kind, target_norm, norm_pred):
    Case(kind).check(call=dk.dynamic_feature_mse, norm_pred=norm_pred, target_norm=target_norm)


@pytest.mark.parametrize("target_norm", ["instance_layer", "batch_layer"])
@pytest.mark.parametrize("patches, width", [(1, 16), (17, 130), (40, 768)])
def test_channel_standardisation_at_any_size(target_norm, patches, width):
    case = Case("per_tap", taps=2, patches=patches, width=width)
    case.target[..., 0] = 5.3  # a channel without variance
    case.target = case.target.float().double()
    # The target of a single token is 0; the gradient through the norm of the prediction then cancels to rounding noise.
    case.check(call=dk.dynamic_feature_mse, target_norm=target_norm, norm_pred=patches > 1)


@pytest.mark.parametrize("kind", ["shared", "pixel", "feature"])
@pytest.mark.parametrize("rescale_grad", ["full", "detach"])
def test_patch_weights(kind, rescale_grad):
    case = Case(kind)
    case.patch_weight = 1 + torch.rand(2, 7, generator=torch.Generator().manual_seed(0)).float().double()
    options = {"call": dk.dynamic_feature_mse} if kind == "feature" else {}
    case.check(rescale_grad=rescale_grad, **options)


@pytest.mark.parametrize("kind", ["shared", "per_tap", "pixel", "feature", "instance feature"])
@pytest.mark.parametrize("rescale_grad", ["full", "detach"])
def test_subsets(kind, rescale_grad):
    """Predictions of some masked patches, in any order; weights and standardisation are over all of them."""
    case = Case("per_tap" if "feature" in kind else kind, patches=9)
    case.patch_weight = 1 + torch.rand(2, 9, generator=torch.Generator().manual_seed(0)).float().double()
    case.subset = torch.tensor([[7, 2, 0, 5, 3], [8, 1, 4, 2, 6]])
    case.pred = case.pred[:, :, :5]
    options = {"call": dk.dynamic_feature_mse} if "feature" in kind else {}
    options |= {"target_norm": "instance_layer"} if "instance" in kind else {}
    case.check(rescale_grad=rescale_grad, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target_norm", ["layer", "instance_layer", "batch_layer", "none"])
def test_target_without_variance(target_norm, dtype):
    for kind, patches in (("shared", 1), ("per_tap", 5)):
        case = Case(kind, taps=2, patches=patches, width=16, dtype=dtype)
        case.target[:] = torch.linspace(-3, 9, 16).to(dtype).double()
        results = case("triton", call=dk.dynamic_feature_mse, target_norm=target_norm)
        assert all(tensor.isfinite().all() for tensor in results)
        case.check(call=dk.dynamic_feature_mse, target_norm=target_norm, norm_pred=False)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("norm, eps", [("per_channel", 1e-5), ("joint", 1e-6), ("joint", 0.1), ("none", None)])
@pytest.mark.parametrize("side", [4, 5])
def test_pixel_target_normalisation(side, norm, eps, unbiased):
    Case("pixel", side=side).check(norm=norm, eps=eps, unbiased=unbiased)


def test_pixel_targets_of_patch_size_16():
    Case("pixel", taps=2, patches=5, side=16).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["shared", "per_tap", "pixel"])
def test_half_precision(kind, dtype):
    Case(kind, dtype=dtype).check()
    if kind != "pixel":
        Case(kind, dtype=dtype).check(call=dk.dynamic_feature_mse)


@pytest.mark.parametrize("width", [1, 63, 384, 768, 1000, 1024, 2048, 4096])
def test_any_width(width):
    Case(width=width, patches=3).check()
    if width > 1:
        Case("per_tap", width=width, patches=3).check(call=dk.dynamic_feature_mse)


@pytest.mark.parametrize("taps", [1, 2, 3, 12])
@pytest.mark.parametrize("images, patches", [(1, 1), (1, 15), (3, 4)])
def test_any_number_of_taps_images_and_patches(taps, images, patches):
    Case(taps=taps, images=images, patches=patches, width=16).check()


def test_all_patches_but_one_masked():
    case = Case("pixel", patches=15)
    is_masked = torch.ones(2, 16, dtype=torch.bool)
    is_masked[:, 5] = False
    case.images = case.images[:, :, :12, :16].repeat(1, 1, 2, 1)[:, :, :16]
    case.masked = is_masked.nonzero()[:, 1].view(2, 15)
    case.distance = dk.patch_distance(is_masked, (4, 4), impl="reference")[is_masked].view(2, 15).double()
    case.check()


@pytest.mark.parametrize("rescale_grad", ["full", "detach"])
def test_more_patches_than_one_block(rescale_grad):
    Case(taps=1, images=1, patches=300, width=4, seed=1).check(rescale_grad=rescale_grad)
    Case(taps=1, images=1, patches=300, width=4, seed=2).check(rescale_grad=rescale_grad)  # beta 0: all patches tie


@settings(max_examples=25, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(
    kind=st.sampled_from(["shared", "per_tap", "pixel"]),
    taps=st.integers(1, 6),
    images=st.integers(1, 3),
    patches=st.integers(1, 11),
    width=st.integers(1, 130),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
    side=st.integers(2, 9),
    rescale_grad=st.sampled_from(["full", "detach"]),
)
def test_random_shapes(kind, taps, images, patches, width, dtype, seed, side, rescale_grad):
    Case(kind, taps, images, patches, width, dtype, seed, side).check(rescale_grad=rescale_grad)


def strided(tensor):
    """Return a non-contiguous tensor of the same values: every other element of a larger tensor."""
    wider = torch.stack([tensor, torch.zeros_like(tensor)], -1)
    return wider[..., 0]


@pytest.mark.parametrize("kind", ["shared", "per_tap", "pixel"])
@pytest.mark.parametrize("change", [strided, lambda t: t.transpose(0, -1).contiguous().transpose(0, -1)])
def test_non_contiguous_inputs(kind, change):
    Case(kind).check(change=change)


def test_inputs_are_not_modified():
    case = Case()
    tensors = [case.pred.float().to(DEVICE), case.target.float().to(DEVICE), case.distance.float().to(DEVICE)]
    before = [tensor.clone() for tensor in tensors]
    beta, tap_weight = case.beta.float().to(DEVICE), case.tap_weight.float().to(DEVICE)
    pred = tensors[0].detach().requires_grad_()
    (2 * dk.dynamic_mse(pred, *tensors[1:], beta, tap_weight, impl="triton").loss).backward()
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


@pytest.mark.parametrize("kind", ["shared", "pixel"])
def test_equal_runs_are_bit_identical(kind):
    runs = [Case(kind, images=3, patches=9, dtype=torch.bfloat16)("triton") for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def gradients(upstream, dtype=torch.float32, **shape):
    """Return the gradients of pred by Triton and by the reference, for a given upstream gradient."""
    case, results = Case(dtype=dtype, **shape), []
    for impl, input_dtype, device in (("triton", dtype, DEVICE), ("reference", torch.float64, "cpu")):
        pred = case.pred.to(device, input_dtype, copy=True).requires_grad_()
        wide = torch.float64 if input_dtype == torch.float64 else torch.float32
        vectors = [tensor.to(device, wide) for tensor in (case.distance, case.beta, case.tap_weight)]
        loss = dk.dynamic_mse(pred, case.target.to(device, input_dtype), *vectors, impl=impl).loss
        results.append(torch.autograd.grad(loss, pred, torch.tensor(upstream, device=device, dtype=wide))[0].cpu())
    return results


def test_fp16_gradients_do_not_underflow_before_loss_scaling():
    """Without the storage scale, division by B * M * D would lose their digits before the loss scale is applied."""
    actual, expected = gradients(65536.0, torch.float16, taps=1, images=16, patches=16, width=2048)
    assert expected.abs().max() / 65536 < 1e-4  # close to the smallest normal number of fp16, 6e-5
    np.testing.assert_allclose(actual.double(), expected, rtol=2.0**-10, atol=1e-6)


def test_upstream_gradient_of_one_and_of_zero():
    actual, expected = gradients(1.0)
    np.testing.assert_allclose(actual, expected, atol=FP32 * expected.abs().max().item())
    assert (gradients(0.0)[0] == 0).all()


def test_second_backward_raises():
    """The first backward returned the stored gradient itself: it may be scaled already or modified by the caller."""
    case = Case()
    pred = case.pred.float().to(DEVICE).requires_grad_()
    args = [t.float().to(DEVICE) for t in (case.target, case.distance, case.beta, case.tap_weight)]
    loss = dk.dynamic_mse(pred, *args, impl="triton").loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("requires_grad", ["pred", "beta", "neither"])
def test_only_requested_gradients_are_returned(requires_grad):
    case = Case()
    pred, target, distance, beta, tap_weight = (
        t.float().to(DEVICE) for t in (case.pred, case.target, case.distance, case.beta, case.tap_weight)
    )
    pred.requires_grad_(requires_grad == "pred")
    beta.requires_grad_(requires_grad == "beta")
    result = dk.dynamic_mse(pred, target, distance, beta, tap_weight, impl="triton")
    assert result.loss.requires_grad == (requires_grad != "neither")
    assert not result.tap_loss.requires_grad
    assert not result.token_error.requires_grad
    if requires_grad != "neither":
        result.loss.backward()
    assert (pred.grad is not None) == (requires_grad == "pred")
    assert (beta.grad is not None) == (requires_grad == "beta")
    with torch.no_grad():
        without_grad = dk.dynamic_mse(pred, target, distance, beta, tap_weight, impl="triton")
    for one, other in zip(result, without_grad, strict=True):  # the kernel compiled without the gradient
        torch.testing.assert_close(one, other, rtol=FP32, atol=0)
    assert not without_grad.loss.requires_grad


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", ["per_tap", "pixel"])
def test_compiled_without_a_graph_break(kind, backend):
    case = Case(kind)
    call = dk.dynamic_pixel_mse if kind == "pixel" else dk.dynamic_feature_mse

    def doubled(pred, *args, **options):
        result = call(2 * pred, *args, **options)
        return dk.DynamicLoss(result.loss + 1, *result[1:])

    compiled = torch.compile(doubled, fullgraph=True, backend=backend)
    if kind == "pixel":  # Case calls dk.dynamic_pixel_mse by name
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dk, "dynamic_pixel_mse", doubled)
            eager = case("triton")
            patch.setattr(dk, "dynamic_pixel_mse", compiled)
            actual = case("triton")
    else:
        eager, actual = case("triton", call=doubled), case("triton", call=compiled)
    for one, other in zip(eager, actual, strict=True):
        np.testing.assert_allclose(one.detach().cpu(), other.detach().cpu(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("grid", [(14, 14), (8, 8), (3, 20), (1, 7), (7, 1), (37, 37), (64, 64)])
def test_distances_are_exact(grid):
    masked = torch.rand(3, grid[0] * grid[1], generator=torch.Generator().manual_seed(0)) < 0.9
    masked[:, 0] = False
    masked[1, 1:] = True
    masked[2] = False
    distance = dk.patch_distance(masked.to(DEVICE), grid, impl="triton").cpu()
    for row, plane in zip(distance.numpy(), masked.view(-1, *grid).numpy(), strict=True):
        np.testing.assert_array_equal(row, distance_transform_edt(plane).astype(np.float32).ravel())
    assert torch.equal(distance, dk.patch_distance(masked, grid, impl="reference"))
    over_max = dk.patch_distance(masked.to(DEVICE), grid, impl="triton", norm="max").cpu()
    assert torch.equal(over_max, dk.patch_distance(masked, grid, impl="reference", norm="max"))


def test_distances_of_many_images_and_a_strided_mask():
    masked = torch.rand(500, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    masked[:, 0] = False
    mask = strided(masked).to(DEVICE)
    assert torch.equal(
        dk.patch_distance(mask, (3, 4), impl="triton").cpu(), dk.patch_distance(masked, (3, 4), impl="reference")
    )


@pytest.mark.skipif(DEVICE == "cpu", reason="needs 15 GB; the interpreter would take days")
def test_more_than_2_to_the_31_elements():
    generator = torch.Generator(DEVICE).manual_seed(0)
    pred = torch.randn(1, 15_000, 147, 1024, generator=generator, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    assert pred.numel() > 2**31
    target = torch.zeros_like(pred[0])
    distance = torch.ones(pred.shape[1:3], device=DEVICE)
    beta, tap_weight = torch.zeros(1, device=DEVICE), torch.ones(1, device=DEVICE)
    result = dk.dynamic_mse(pred, target, distance, beta, tap_weight, impl="triton")
    gradient = torch.autograd.grad(result.loss, pred, torch.tensor(2.0**30, device=DEVICE))[0]
    for image in (0, 14_999):
        values = pred.detach()[0, image].double()
        torch.testing.assert_close(result.token_error[0, image].double(), values.square().mean(-1), rtol=FP32, atol=0)
        exact = values * 2 * 2.0**30 / pred.numel()
        torch.testing.assert_close(gradient[0, image].double(), exact, rtol=2.0**-7, atol=0)
    torch.testing.assert_close(result.loss, result.token_error.double().mean().float(), rtol=FP32, atol=0)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter would take an hour")
@pytest.mark.parametrize("kind", ["shared", "per_tap"])
def test_training_size(kind):
    Case(kind, taps=4, images=64, patches=147, width=768, dtype=torch.bfloat16).check()


def test_more_partial_sums_than_one_block():
    rng = torch.Generator().manual_seed(0)
    partial_sums = torch.randn(2, 3, 3000, generator=rng).to(DEVICE)
    tap_weight = torch.rand(3, generator=rng).to(DEVICE)
    loss, tap_loss, beta_grad = (torch.empty(shape, device=DEVICE) for shape in ((), 3, 3))
    outputs = loss, tap_loss, beta_grad
    operators.kernels.sum_kernel[(1,)](partial_sums, tap_weight, *outputs, 3, 3000, 7, BLOCK_K=4, BLOCK=2048)
    expected = partial_sums.double().sum(-1) / 7
    torch.testing.assert_close(tap_loss.double(), expected[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(beta_grad.double(), tap_weight * expected[1], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(loss.double(), (tap_weight * expected[0]).sum(), rtol=1e-5, atol=1e-4)


def test_missing_upstream_gradient_gives_no_gradient():
    class DropGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, upstream):
            return None

    case = Case()
    pred = case.pred.float().to(DEVICE).requires_grad_()
    args = [t.float().to(DEVICE) for t in (case.target, case.distance, case.beta, case.tap_weight)]
    DropGradient.apply(dk.dynamic_mse(pred, *args, impl="triton").loss).backward()
    assert pred.grad is None


def test_operators_pass_opcheck():
    grad, beta_grad, upstream = (torch.ones(shape, device=DEVICE) for shape in ((2, 3), 2, ()))
    masked = torch.tensor([[True, False]], device=DEVICE)
    torch.library.opcheck(operators._distance_operator, (masked, 1, 2, False))
    torch.library.opcheck(operators._scale_operator, (grad, beta_grad, upstream, 1.0))


def direct_and_by_operator(monkeypatch, run):
    """Return the results of `run` with kernels launched directly, and through torch.library's operators."""
    direct = run()
    monkeypatch.setattr(operators, "is_intercepted", lambda tensor: True)
    return direct, run()


@pytest.mark.parametrize(
    "kind, dtype", [("shared", torch.float32), ("pixel", torch.bfloat16), ("instance feature", torch.float16)]
)
def test_direct_launches_equal_the_operators(kind, dtype, monkeypatch):
    """Results and gradients to the bit, also under autocast."""
    case = Case("per_tap" if "feature" in kind else kind, taps=2, patches=5, dtype=dtype)
    options = {"call": dk.dynamic_feature_mse, "target_norm": "instance_layer"} if "feature" in kind else {}

    def run():
        with torch.autocast(DEVICE, torch.bfloat16):
            mixed = case("triton", **options)
        return [*case("triton", **options), *mixed]

    direct, operator = direct_and_by_operator(monkeypatch, run)
    assert all(torch.equal(one, other) for one, other in zip(direct, operator, strict=True))


@pytest.mark.parametrize("requires_grad", [(True, True), (True, False), (False, True), (False, False)])
def test_direct_launches_differentiate_as_the_operators(requires_grad, monkeypatch):
    """The same gradients are returned, none of them differentiable again, and a second backward pass is refused."""
    case = Case(taps=2, patches=5)

    def run():
        pred, target, distance, beta, tap_weight = (
            t.float().to(DEVICE) for t in (case.pred, case.target, case.distance, case.beta, case.tap_weight)
        )
        for leaf, required in zip((pred, beta), requires_grad, strict=True):
            leaf.requires_grad_(required)
        loss = dk.dynamic_mse(pred, target, distance, beta, tap_weight, impl="triton").loss
        leaves = [leaf for leaf in (pred, beta) if leaf.requires_grad]
        found = [loss.detach(), loss.requires_grad]
        if leaves:
            upstream = torch.tensor(3.0, device=DEVICE, requires_grad=True)
            gradients = torch.autograd.grad(loss, leaves, upstream, create_graph=True)
            found += [*gradients, *(gradient.requires_grad for gradient in gradients)]
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(loss, leaves)
        return found

    direct, operator = direct_and_by_operator(monkeypatch, run)
    assert len(direct) == len(operator) == 2 + 2 * sum(requires_grad)
    for one, other in zip(direct, operator, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    assert not any(direct[2 + sum(requires_grad) :])


def test_modes_and_fake_tensors_see_the_operators(monkeypatch):
    """A dispatch mode sees each launch as one operator; fake tensors launch nothing."""
    monkeypatch.setenv("DDAE_CHECK", "0")  # fake tensors have no values
    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    case = Case()
    with Record():
        case("triton", call=dk.dynamic_feature_mse, target_norm="instance_layer")
    ours = [name.removeprefix("ddae_kernels::") for name in seen if name.startswith("ddae_kernels::")]
    assert ours == ["token_statistics", "dynamic_loss", "scale_gradients"]
    mode = FakeTensorMode()
    fake = [mode.from_tensor(each.float()) for each in (case.pred, case.target, case.distance, case.beta)]
    masked = mode.from_tensor(torch.tensor([[True, False]]))
    for inside in (True, False):
        with mode if inside else contextlib.nullcontext():
            pred = fake[0].detach().requires_grad_()
            result = dk.dynamic_mse(pred, *fake[1:], fake[3], impl="triton")
            (gradient,) = torch.autograd.grad(result.loss, pred)
            distance = operators.patch_distance(masked, 1, 2)
        assert isinstance(result.loss, FakeTensor)
        assert isinstance(distance, FakeTensor)
        assert gradient.shape == pred.shape


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter takes minutes for these")
def test_distances_of_a_large_batch():
    masked = torch.rand(4096, 4096, generator=torch.Generator().manual_seed(0)) < 0.75
    masked[:, 0] = False
    distance = dk.patch_distance(masked.to(DEVICE), (64, 64), impl="triton").cpu()
    assert torch.equal(distance[::64], dk.patch_distance(masked[::64], (64, 64), impl="reference"))


def test_image_without_visible_patch_has_infinite_distances():
    assert torch.isinf(operators.patch_distance(torch.ones(1, 6, dtype=torch.bool, device=DEVICE), 2, 3)).all()


@pytest.mark.skipif(DEVICE == "cuda", reason="traffic is counted in the interpreter")
@pytest.mark.parametrize("kind", ["shared", "per_tap", "feature", "pixel"])
def test_memory_traffic_is_within_2_percent_of_the_floor(kind):
    """Floor: pred and target are read once, the gradient is written once. All else adds less than 2 %."""
    taps, images, patches, side = 4, 1, 12, 16
    case = Case(kind, taps, images, patches, 768, torch.bfloat16, side=side)
    pred = case.pred.bfloat16().requires_grad_()
    target = case.images if kind == "pixel" else case.target.bfloat16()
    vectors = [case.distance.float(), case.beta.float().requires_grad_(), case.tap_weight.float()]
    with traffic.KernelTraffic(pred=pred, target=target) as counter:
        if kind == "pixel":
            options = {"patch": side, "mean": MEAN, "std": STD}
            result = dk.dynamic_pixel_mse(pred, target, case.masked, *vectors, **options, impl="triton")
        else:
            call = dk.dynamic_feature_mse if kind == "feature" else dk.dynamic_mse
            result = call(pred, target, *vectors, impl="triton")
    target_bytes = patches * 768 if kind == "pixel" else target.numel() * 2
    floor = 2 * pred.numel() * 2 + target_bytes
    assert counter.bytes.pop("load pred") == pred.numel() * 2
    assert counter.bytes.pop("load target") == target_bytes
    assert counter.bytes["store other"] >= pred.numel() * 2  # the gradient, plus errors and partial sums
    assert sum(counter.bytes.values()) - pred.numel() * 2 < 0.02 * floor

    with traffic.KernelTraffic() as counter:
        gradient = torch.autograd.grad(result.loss, pred)[0]
    assert sum(counter.bytes.values()) < 100  # upstream gradient 1: reads it, scales beta's gradient
    assert gradient.numel() == pred.numel()


@pytest.mark.skipif(DEVICE == "cuda", reason="the error appears only without a GPU")
def test_triton_never_falls_back_to_the_reference(monkeypatch):
    monkeypatch.setattr(implementation, "INTERPRETED", False)
    with pytest.raises(ValueError, match="impl='triton' cannot serve this call: the tensors are on the CPU"):
        Case()("triton")
    with pytest.raises(ValueError, match="cannot serve"):
        dk.patch_distance(torch.tensor([[True, False]]), (1, 2), impl="triton")


def test_triton_rejects_fp64():
    pred = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"torch\.float64 is supported by the reference only"):
        dk.dynamic_mse(pred, pred, torch.ones(1, 1), torch.ones(1), torch.ones(1), impl="triton")


def test_auto_logs_its_choice_once(caplog):
    implementation._log_choice.cache_clear()
    pred = torch.zeros(1, 1, 1, 1, device=DEVICE)
    args = pred, pred, *(torch.ones(shape, device=DEVICE) for shape in ((1, 1), 1, 1))
    with caplog.at_level(logging.INFO, logger="ddae_kernels"):
        for _ in range(3):
            dk.dynamic_mse(*args)
    resolved = "triton" if DEVICE == "cuda" else "reference"
    messages = [record.getMessage().split(" (")[0] for record in caplog.records]
    assert messages == [f"impl='auto' uses {resolved} for {DEVICE} tensors"]


SPILLING = "feature standardised D=1024"  # a loss kernel of which Triton 3.6 spills a few registers on sm_80


def start_resources(arch):
    """Start bench/resources.py for one architecture."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "kernels/bench/resources.py", "--json", "--arch", str(arch)]
    return subprocess.Popen(command, env=environment | {"PYTHONPATH": "kernels"}, stdout=subprocess.PIPE, text=True)


@pytest.mark.skipif(DEVICE == "cuda", reason="resources.py replaces the CUDA driver")
def test_kernels_compile_for_a100_and_h100_without_spills():
    """Loads and stores of predictions, float targets and gradients are 16 bytes wide; images are read byte by byte."""
    for process in [start_resources(arch) for arch in (80, 90)]:
        rows = [json.loads(line) for line in process.communicate(timeout=600)[0].splitlines()]
        assert process.returncode == 0
        assert {row["kernel"] for row in rows} == {
            *("distance_kernel", "statistics_kernel", "loss_kernel", "sum_kernel", "scale_kernel")
        }
        losses = [row for row in rows if row["kernel"] == "loss_kernel"]
        assert len(losses) == 19
        for row in rows:
            if row["call"] == SPILLING and row["arch"] == 80 and triton.__version__.startswith("3.6."):
                assert (row["stack"], row["local"]) <= (24, 0)  # of one of its variants
                continue
            assert (row["stack"], row["local"], row["spills"]) == (0, 0, 0), row
        for row in losses:
            width = int(row["call"].split("D=")[1])
            vectors = -(-width // 256)  # 16-byte accesses per lane for one row in bf16
            tensors = 1 if row["call"].startswith("pixel") else 2
            tensors += 4 if "standardised" in row["call"] else 0  # means and scales of channels in fp32
            size_ratio = 2 if "float32" in row["call"] else 1
            assert row["load_128"] == size_ratio * tensors * vectors, row
            assert row["store_128"] == size_ratio * vectors, row
            assert "load_16" not in row, row
