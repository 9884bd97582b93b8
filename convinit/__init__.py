"""Convolutional initialization for Vision Transformers (arXiv 2401.12511)."""

from convinit._library import build_info
from convinit.fit import QKFit, fit_qk, fit_targets
from convinit.offsets import impulse_targets, sample_offsets
from convinit.ops.impulse_matrix import impulse_matrix

__version__ = "0.1.0"

__all__ = [
    "QKFit",
    "build_info",
    "fit_qk",
    "fit_targets",
    "impulse_matrix",
    "impulse_targets",
    "sample_offsets",
]
