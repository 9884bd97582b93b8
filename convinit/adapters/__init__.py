"""Initialises models that are already there: one file for each library, `init_vit_` on top."""

from convinit.adapters import timm, transformers
from convinit.adapters.additive import AdditiveLayout
from convinit.adapters.init_vit import init_vit_
from convinit.adapters.layout import Layout, LinearWeights, SelfAttention, Slot, packed_qkv
from convinit.adapters.measure import head_maps
from convinit.adapters.report import InitReport
from convinit.records import LayerRecord

__all__ = [
    "AdditiveLayout",
    "InitReport",
    "LayerRecord",
    "Layout",
    "LinearWeights",
    "SelfAttention",
    "Slot",
    "head_maps",
    "init_vit_",
    "packed_qkv",
    "timm",
    "transformers",
]
