"""Memory traffic of a forward and backward pass, counted for eager torch operators and for the interpreted kernels.

    TRITON_INTERPRET=1 python kernels/bench/traffic.py [--figure docs/kernel_traffic.png]

The unit is bytes per element of the predictions (bf16, K = 4 taps, upstream gradient 1). A torch operator counts with
all inputs and outputs, as if the cache were empty between operators. A kernel counts with every load and store.
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
# Minimum bytes per element: pred read, gradient written and target read once each. feature and instance have a target
# per tap; instance is dynamic_feature_mse with target_norm instance_layer.
FLOOR = {"mse": 4.5, "feature": 6.0, "instance": 6.0, "pixel": 4.25}


class OperatorTraffic(TorchDispatchMode):
    """Counter of the bytes that torch operators read and write; views count 0."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs, outputs = ([t for t in tree_flatten(x)[0] if isinstance(t, Tensor)] for x in ((args, kwargs), result))
        storages = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        aliases_inputs = all(tensor.untyped_storage().data_ptr() in storages for tensor in outputs)
        if not aliases_inputs or func._schema.is_mutable:
            sizes = (min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in (*inputs, *outputs))
            self.bytes += sum(sizes)
        return result


class KernelTraffic:
    """Context that counts the bytes which interpreted kernels load and store.

    `bytes` has keys such as "load pred" for the named tensors, and "load other", "store other" for all other memory.
    """

    def __init__(self, **tensors: Tensor):
        self.ranges = {name: (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for name, t in tensors.items()}
        self.bytes: dict[str, int] = {}

    def __enter__(self) -> "KernelTraffic":
        self._originals = {kind: getattr(InterpreterBuilder, f"create_masked_{kind}") for kind in ("load", "store")}
        for kind, original in self._originals.items():
            setattr(InterpreterBuilder, f"create_masked_{kind}", self._count(kind, original))
        return self

    def __exit__(self, *_: object) -> None:
        for kind, original in self._originals.items():
            setattr(InterpreterBuilder, f"create_masked_{kind}", original)

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
    pred = torch.randn(K, B, M, 3 * PATCH**2, dtype=torch.bfloat16, requires_grad=True)
    vectors = torch.ones(B, M), torch.zeros(K, requires_grad=True), torch.ones(K)
    if loss == "pixel":
        call: Callable[..., dk.DynamicLoss] = dk.dynamic_pixel_mse
        images = torch.zeros(B, 3, 64, 64, dtype=torch.uint8)
        target: tuple[Tensor, ...] = images, torch.arange(M).expand(B, M)
        options: dict[str, Any] = {"patch": PATCH, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    else:
        call = dk.dynamic_mse if loss == "mse" else dk.dynamic_feature_mse
        target = (torch.randn_like(pred[0] if loss == "mse" else pred),)
        options = {"target_norm": "instance_layer"} if loss == "instance" else {}
    counter = OperatorTraffic() if impl == "reference" else KernelTraffic()
    with counter:
        call(pred, *target, *vectors, impl=impl, **options).loss.backward()
    total = counter.bytes if isinstance(counter, OperatorTraffic) else sum(counter.bytes.values())
    return total / pred.numel()


def draw(rows: dict[str, dict[str, float]], path: str) -> None:
    """Save a bar chart of bytes per element, with one group of bars per loss."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 3.2), layout="constrained")
    labels = {
        "torch": "eager torch",
        "triton": "ddae_kernels (Triton)",
        "floor": "floor (each tensor moved once)",
    }
    colours = {"torch": "#999999", "triton": "#0072b2", "floor": "#e69f00"}
    for position, (kind, label) in enumerate(labels.items()):
        y = [3.6 * (len(rows) - i) - position for i in range(len(rows))]
        bars = axes.barh(y, [row[kind] for row in rows.values()], 0.9, color=colours[kind], label=label)
        axes.bar_label(bars, fmt="%.2f" if kind != "torch" else "%.0f", padding=3, fontsize=9)
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
        impls = {"torch": "reference", "triton": "triton"}
        rows[loss] = {kind: bytes_per_element(loss, impl) for kind, impl in impls.items()} | {"floor": floor}
        counts = "".join(f"  {kind} {count:6.2f}" for kind, count in rows[loss].items())
        print(f"{loss:8}{counts} bytes per element")
    if figure:
        draw(rows, figure)


if __name__ == "__main__":
    main()
