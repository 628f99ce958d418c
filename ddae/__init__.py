"""Label-free pretraining of Vision Transformers by deep dynamic supervision (DDAE)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddae.api import embed, pretrain
    from ddae.export.encoder import load_encoder

__version__ = "0.2.0"
__all__ = ["embed", "load_encoder", "pretrain"]
_MODULES = {"embed": "ddae.api", "load_encoder": "ddae.export.encoder", "pretrain": "ddae.api"}


def __getattr__(name: str) -> Any:
    """Return a function of the API, imported when it is asked for: importing ddae alone imports no torch."""
    if name not in _MODULES:
        raise AttributeError(f"module 'ddae' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
