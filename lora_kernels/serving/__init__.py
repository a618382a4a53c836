"""Serving many adapters on one model."""

from .batch import Batch
from .pool import AdapterPool, Loaded

__all__ = ["AdapterPool", "Batch", "Loaded"]
