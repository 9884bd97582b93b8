"""The public names of convinit, all at once."""

from convinit import init, models, nn
from convinit._library import build_info
from convinit.adapters import InitReport, init_vit_
from convinit.drift import DriftMonitor
from convinit.fit import QKFit, fit_qk, fit_targets
from convinit.nn import ConvInitAttention
from convinit.offsets import impulse_targets, sample_offsets
from convinit.ops.impulse_conv import impulse_conv
from convinit.ops.impulse_matrix import impulse_matrix
from convinit.ops.positional_attention import positional_attention
from convinit.ops.shared_attention import shared_attention

__all__ = [
    "ConvInitAttention",
    "DriftMonitor",
    "InitReport",
    "QKFit",
    "build_info",
    "fit_qk",
    "fit_targets",
    "impulse_conv",
    "impulse_matrix",
    "impulse_targets",
    "init",
    "init_vit_",
    "models",
    "nn",
    "positional_attention",
    "sample_offsets",
    "shared_attention",
]
