"""The papers' models, a page each."""

from convinit.models.convmixer import ConvMixer
from convinit.models.simple_vit import SimpleViT

__all__ = ["ConvMixer", "SimpleViT"]
