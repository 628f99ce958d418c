"""Bytes that one forward and backward moves, counted: by torch's operators, and by the kernels in Triton's interpreter.

    TRITON_INTERPRET=1 python kernels/bench/traffic.py [--figure docs/kernel_traffic.png]

Per number of the predictions in bf16, K = 4 taps, an upstream gradient of 1. An operator is counted with all it reads
and writes, as if no cache held anything between two operators; a kernel with each load and store it makes.
"""

import argparse
from collections.abc import Callable
from typing import Any

import ddae_kernels as dk
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from triton.runtime.interpreter import InterpreterBuilder

K, B, M, PATCH = 4, 1, 12, 16
# pred read, gradient written, target read once: a tap each, or all. instance: features, target_norm instance_layer.
FLOOR = {"mse": 4.5, "feature": 6.0, "instance": 6.0, "pixel": 4.25}


class Operators(TorchDispatchMode):
    """Bytes of every torch operator that runs; views move none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs, outputs = ([t for t in tree_flatten(x)[0] if isinstance(t, Tensor)] for x in ((args, kwargs), result))
        known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        is_view = (
            all(tensor.untyped_storage().data_ptr() in known for tensor in outputs) and not func._schema.is_mutable
        )
        if not is_view:
            held = (min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in (*inputs, *outputs))
            self.bytes += sum(held)
        return result


class Kernels:
    """Bytes that interpreted kernels load from and store to each of the named tensors, and elsewhere ("else")."""

    def __init__(self, **tensors: Tensor):
        self.ranges = {name: (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for name, t in tensors.items()}
        self.bytes: dict[str, int] = {}

    def __enter__(self) -> "Kernels":
        self._plain = {kind: getattr(InterpreterBuilder, f"create_masked_{kind}") for kind in ("load", "store")}
        for kind, plain in self._plain.items():
            setattr(InterpreterBuilder, f"create_masked_{kind}", self._counting(kind, plain))
        return self

    def __exit__(self, *_: object) -> None:
        for kind, plain in self._plain.items():
            setattr(InterpreterBuilder, f"create_masked_{kind}", plain)

    def _counting(self, kind: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def counted(builder, pointers, *arguments):
            mask = arguments[0] if kind == "load" else arguments[1]
            addresses = pointers.data[mask.data]
            if addresses.size:
                first = addresses.ravel()[0]
                names = [name for name, (low, high) in self.ranges.items() if low <= first < high]
                name = f"{kind} {names[0] if names else 'else'}"
                size = pointers.get_element_ty().primitive_bitwidth // 8
                self.bytes[name] = self.bytes.get(name, 0) + addresses.size * size
            return plain(builder, pointers, *arguments)

        return counted


def step(loss: str, impl: str) -> tuple[int, int]:
    """One forward and backward: bytes moved, and numbers in the predictions."""
    pred = torch.randn(K, B, M, 3 * PATCH**2, dtype=torch.bfloat16, requires_grad=True)
    vectors = torch.ones(B, M), torch.zeros(K, requires_grad=True), torch.ones(K)
    if loss == "pixel":
        call: Callable[..., dk.DynamicLoss] = dk.dynamic_pixel_mse
        images = torch.zeros(B, 3, 64, 64, dtype=torch.uint8)
        middle: tuple[Tensor, ...] = images, torch.arange(M).expand(B, M)
        how: dict[str, Any] = {"patch": PATCH, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    else:
        call = dk.dynamic_mse if loss == "mse" else dk.dynamic_feature_mse
        middle = (torch.randn_like(pred[0] if loss == "mse" else pred),)
        how = {"target_norm": "instance_layer"} if loss == "instance" else {}
    counter = Operators() if impl == "reference" else Kernels()
    with counter:
        call(pred, *middle, *vectors, impl=impl, **how).loss.backward()
    moved = counter.bytes if isinstance(counter, Operators) else sum(counter.bytes.values())
    return moved, pred.numel()


def draw(rows: dict[str, dict[str, float]], path: str) -> None:
    """Bars of bytes a number, a group for each loss."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 3.2), layout="constrained")
    labels = {
        "torch": "torch, operator by operator",
        "triton": "ddae_kernels",
        "floor": "floor: each tensor moved once",
    }
    colours = {"torch": "#999999", "triton": "#0072b2", "floor": "#e69f00"}
    for place, (kind, label) in enumerate(labels.items()):
        at = [3.6 * (len(rows) - i) - place for i in range(len(rows))]
        bars = axes.barh(at, [row[kind] for row in rows.values()], 0.9, color=colours[kind], label=label)
        axes.bar_label(bars, fmt="%.2f" if kind != "torch" else "%.0f", padding=3, fontsize=9)
    calls = {"mse": "dynamic_mse", "instance": "dynamic_feature_mse,\ninstance_layer"}
    names = [calls.get(name, f"dynamic_{name}_mse") for name in rows]
    axes.set_yticks([3.6 * (len(rows) - i) - 1 for i in range(len(rows))], names)
    axes.set_xlabel("bytes moved for each number of the predictions (bf16, K = 4, forward + backward)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.08)
    figure.legend(frameon=False, fontsize=9, loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the bytes that the losses move.")
    parser.add_argument("--figure", help="file to draw the counts into")
    figure = parser.parse_args().figure
    rows = {}
    for loss, floor in FLOOR.items():
        counts = {kind: step(loss, impl) for kind, impl in (("torch", "reference"), ("triton", "triton"))}
        rows[loss] = {kind: moved / numbers for kind, (moved, numbers) in counts.items()} | {"floor": floor}
        print(f"{loss:8}" + "".join(f"  {kind} {moved:6.2f}" for kind, moved in rows[loss].items()), "bytes a number")
    if figure:
        draw(rows, figure)


if __name__ == "__main__":
    main()
