"""Sequential forward and backward of the parts of a loss: each part's activations are freed before the next one runs,
so that peak memory is that of the largest part.

For autograd it is one operation, which computes its gradients in the forward pass. Parameters receive theirs in the
backward pass, once, so that DeepSpeed's gradient hooks work unchanged.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

TapFn = Callable[..., tuple[Tensor, Tensor, Tensor]]  # (index, *inputs) -> loss [], two detached tensors [1, ..]


def sequential_backward(
    run: TapFn, parts: int, inputs: Sequence[Tensor], parameters: Sequence[nn.Parameter]
) -> tuple[Float[Tensor, ""], Float[Tensor, "K ..."], Float[Tensor, "K ..."]]:
    """Return the differentiable sum of the losses of K parts, and their two detached outputs, concatenated.

    run(index, *inputs) computes one part from the inputs and the parameters.
    """
    return _SequentialBackward.apply(run, parts, len(inputs), *inputs, *parameters)  # type: ignore[return-value]


class _SequentialBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run: TapFn, parts: int, num_inputs: int, *tensors: Tensor):  # type: ignore[override]
        inputs = [each.detach().requires_grad_(each.requires_grad) for each in tensors[:num_inputs]]
        leaves = [*inputs, *tensors[num_inputs:]]
        trainable = [index for index, leaf in enumerate(leaves) if leaf.requires_grad]
        sums: list[Tensor | None] = [None] * len(leaves)
        results = []
        for part in range(parts):
            with torch.enable_grad():
                loss, *others = run(part, *inputs)
            gradients = torch.autograd.grad(loss, [leaves[index] for index in trainable], allow_unused=True)
            for index, gradient in zip(trainable, gradients, strict=True):
                if gradient is not None:
                    sums[index] = _add(sums[index], gradient)
            results.append((loss.detach(), *others))
            del loss, gradients  # frees the part's graph before the next one runs
        ctx.gradients, ctx.dtypes = sums, [leaf.dtype for leaf in leaves]
        losses, *others = zip(*results, strict=True)
        outputs = torch.stack(losses).sum(), *(torch.cat(each) for each in others)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)  # no zero gradients for the detached outputs
        return outputs

    @staticmethod
    def backward(ctx, upstream: Tensor, *_: object):  # type: ignore[override]
        sums, ctx.gradients = ctx.gradients, None
        pairs = zip(sums, ctx.dtypes, strict=True)
        return None, None, None, *(None if each is None else (each * upstream).to(dtype) for each, dtype in pairs)


def _add(total: Tensor | None, gradient: Tensor) -> Tensor:
    """Add a gradient to the sum so far; sums of bf16 and fp16 gradients are fp32."""
    if total is not None:
        return total + gradient  # not in place: autograd may return the same tensor for several inputs
    return gradient.float() if gradient.dtype in (torch.bfloat16, torch.float16) else gradient
