"""Layers."""

from convinit.nn.attention import ConvInitAttention
from convinit.nn.position import sincos_2d
from convinit.nn.spatial_conv import SpatialConv

__all__ = ["ConvInitAttention", "SpatialConv", "sincos_2d"]
