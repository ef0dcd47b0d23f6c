"""Modules of `torch.nn` that measure the importance of neurons within their own backward pass."""

from .neurons.relu import ReLU as ReLU

__all__ = ["ReLU"]
