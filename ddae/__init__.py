"""Label-free pretraining of Vision Transformers by deep dynamic supervision (DDAE)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddae.export.encoder import load_encoder

__version__ = "0.2.0"
__all__ = ["load_encoder"]


def __getattr__(name: str) -> Any:
    """`ddae.load_encoder`, resolved when asked for: importing ddae alone imports no torch."""
    if name == "load_encoder":
        from ddae.export.encoder import load_encoder

        return load_encoder
    raise AttributeError(f"module 'ddae' has no attribute {name!r}")
