"""Layers."""

from convinit.nn.attention import ConvInitAttention
from convinit.nn.linear import Linear
from convinit.nn.position import sincos_2d
from convinit.nn.spatial_conv import SpatialConv

__all__ = ["ConvInitAttention", "Linear", "SpatialConv", "sincos_2d"]
