"""Convolutional initialization for Vision Transformers (arXiv 2401.12511)."""

from convinit import init, models, nn
from convinit._library import build_info
from convinit.fit import QKFit, fit_qk, fit_targets
from convinit.nn import ConvInitAttention
from convinit.offsets import impulse_targets, sample_offsets
from convinit.ops.impulse_matrix import impulse_matrix
from convinit.ops.positional_attention import positional_attention
from convinit.ops.shared_attention import shared_attention

__version__ = "0.1.0"

__all__ = [
    "ConvInitAttention",
    "QKFit",
    "build_info",
    "fit_qk",
    "fit_targets",
    "impulse_matrix",
    "impulse_targets",
    "init",
    "models",
    "nn",
    "positional_attention",
    "sample_offsets",
    "shared_attention",
]
