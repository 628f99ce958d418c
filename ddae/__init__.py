"""Label-free pretraining of Vision Transformers by deep dynamic supervision (DDAE)."""

__version__ = "0.1.0"
