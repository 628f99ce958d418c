"""Memory traffic of a forward and backward pass, counted for eager torch operators and for the interpreted kernels.

    TRITON_INTERPRET=1 python kernels/bench/traffic.py [--figure docs/kernel_traffic.png]

The unit is bytes per element of the predictions (bf16, K = 4 taps, upstream gradient 1). A torch operator counts with
all inputs and outputs, as if the cache were empty between operators. A kernel counts with every load and store.
"""

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from bench import LOSSES, PATCH, random_inputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from triton.runtime.interpreter import InterpreterBuilder

# Minimum bytes per element: pred read, gradient written and target read once each.
FLOOR = {"mse": 4.5, "feature": 6.0, "instance": 6.0, "pixel": 4.25}


class OperatorTraffic(TorchDispatchMode):
    """Counter of the bytes that torch operators read and write; views count 0."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs, outputs = ([t for t in tree_flatten(x)[0] if isinstance(t, Tensor)] for x in ((args, kwargs), result))
        storages = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        aliases_inputs = all(tensor.untyped_storage().data_ptr() in storages for tensor in outputs)
        if not aliases_inputs or func._schema.is_mutable:
            sizes = (min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in (*inputs, *outputs))
            self.bytes += sum(sizes)
        return result


class KernelTraffic(ExitStack):
    """Context that counts the bytes which interpreted kernels load and store.

    `bytes` has keys such as "load pred" for the named tensors, and "load other", "store other" for all other memory.
    """

    def __init__(self, **tensors: Tensor):
        super().__init__()
        self.ranges = {name: (t.data_ptr(), t.data_ptr() + t.nbytes) for name, t in tensors.items()}
        self.bytes: dict[str, int] = {}

    def __enter__(self) -> "KernelTraffic":
        for kind in ("load", "store"):
            name = f"create_masked_{kind}"
            counted = self._count(kind, getattr(InterpreterBuilder, name))
            self.enter_context(mock.patch.object(InterpreterBuilder, name, counted))
        return self

    def _count(self, kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def counted(builder, pointers, *args):
            mask = args[0] if kind == "load" else args[1]
            addresses = pointers.data[mask.data]
            if addresses.size:
                first = addresses.ravel()[0]
                names = [name for name, (low, high) in self.ranges.items() if low <= first < high]
                name = f"{kind} {names[0] if names else 'other'}"
                size = pointers.get_element_ty().primitive_bitwidth // 8
                self.bytes[name] = self.bytes.get(name, 0) + addresses.size * size
            return original(builder, pointers, *args)

        return counted


def bytes_per_element(loss: str, impl: str) -> float:
    """Return the bytes that a forward and backward pass moves, per element of the predictions."""
    inputs = random_inputs(loss, 3 * PATCH**2, 1, torch.device("cpu"))
    counter = OperatorTraffic() if impl == "reference" else KernelTraffic()
    with counter:
        LOSSES[loss](*inputs, impl=impl).loss.backward()
    total = counter.bytes if isinstance(counter, OperatorTraffic) else sum(counter.bytes.values())
    return total / inputs[0].numel()


def draw(rows: dict[str, dict[str, float]], path: str) -> None:
    """Save a bar chart of bytes per element, with one group of bars per loss."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    axes = figure.subplots()
    bars = (
        ("torch", "eager torch", "#999999"),
        ("triton", "ddae_kernels (Triton)", "#0072b2"),
        ("floor", "floor (each tensor moved once)", "#e69f00"),
    )
    for position, (kind, label, colour) in enumerate(bars):
        y = [3.6 * (len(rows) - i) - position for i in range(len(rows))]
        group = axes.barh(y, [row[kind] for row in rows.values()], 0.9, color=colour, label=label)
        axes.bar_label(group, fmt="%.2f" if kind != "torch" else "%.0f", padding=3, fontsize=9)
    calls = {"mse": "dynamic_mse", "instance": "dynamic_feature_mse,\ninstance_layer"}
    names = [calls.get(name, f"dynamic_{name}_mse") for name in rows]
    axes.set_yticks([3.6 * (len(rows) - i) - 1 for i in range(len(rows))], names)
    axes.set_xlabel("bytes moved per element of the predictions (bf16, K = 4, forward + backward)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.08)
    figure.legend(frameon=False, fontsize=9, loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the memory traffic of the losses.")
    parser.add_argument("--figure", help="file for a bar chart of the counts")
    figure = parser.parse_args().figure
    rows = {}
    for loss, floor in FLOOR.items():
        torch_bytes, triton_bytes = (bytes_per_element(loss, impl) for impl in ("reference", "triton"))
        rows[loss] = {"torch": torch_bytes, "triton": triton_bytes, "floor": floor}
        counts = "".join(f"  {kind} {count:6.2f}" for kind, count in rows[loss].items())
        print(f"{loss:8}{counts} bytes per element")
    if figure:
        draw(rows, figure)


if __name__ == "__main__":
    main()
