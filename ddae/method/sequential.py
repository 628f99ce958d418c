"""A loss of several parts, each forward and backward before the next one begins: what a part keeps for its backward
pass is gone by then, so that the largest part alone decides on the memory.

For autograd it is one operation, whose gradients are ready when it has run. Parameters get theirs in the backward pass,
once, as from any other: DeepSpeed's hooks notice nothing.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

TapFn = Callable[..., tuple[Tensor, Tensor, Tensor]]  # (number, *inputs) -> loss [], values [1, ..] and values [1, ..]


def sequential_backward(
    run: TapFn, parts: int, inputs: Sequence[Tensor], parameters: Sequence[nn.Parameter]
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the parts' losses, differentiable, and the two other values of each, [parts, ..], detached.

    run(number, *inputs) computes a part from the inputs and the parameters.
    """
    return _OneByOne.apply(run, parts, len(inputs), *inputs, *parameters)  # type: ignore[return-value]


class _OneByOne(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run: TapFn, parts: int, count: int, *tensors: Tensor):  # type: ignore[override]
        inputs = [each.detach().requires_grad_(each.requires_grad) for each in tensors[:count]]
        leaves = [*inputs, *tensors[count:]]
        places = [place for place, leaf in enumerate(leaves) if leaf.requires_grad]
        sums: list[Tensor | None] = [None] * len(leaves)
        results = []
        for number in range(parts):
            with torch.enable_grad():
                loss, *others = run(number, *inputs)
            found = torch.autograd.grad(loss, [leaves[place] for place in places], allow_unused=True)
            for place, gradient in zip(places, found, strict=True):
                if gradient is not None:
                    sums[place] = _add(sums[place], gradient)
            results.append((loss.detach(), *others))
            del loss, found
        ctx.gradients, ctx.dtypes = sums, [leaf.dtype for leaf in leaves]
        losses, *others = zip(*results, strict=True)
        outputs = torch.stack(losses).sum(), *(torch.cat(each) for each in others)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)  # no zeros for the outputs that are not differentiated
        return outputs

    @staticmethod
    def backward(ctx, upstream: Tensor, *_: object):  # type: ignore[override]
        sums, ctx.gradients = ctx.gradients, None
        scaled = (None if each is None else each * upstream for each in sums)
        return (
            None,
            None,
            None,
            *(None if each is None else each.to(dtype) for each, dtype in zip(scaled, ctx.dtypes, strict=True)),
        )


def _add(before: Tensor | None, gradient: Tensor) -> Tensor:
    """Their sum, in fp32 where they are of less."""
    if before is not None:
        return before + gradient  # not in place: what autograd gives may be another gradient's, too
    return gradient.float() if gradient.dtype in (torch.bfloat16, torch.float16) else gradient
