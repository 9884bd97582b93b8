"""Vision Transformers of other libraries than timm, by the names that ``model.name`` takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["create_library_model"]


def create_library_model(
    name: str, image_size: Any, channels: int, num_classes: int, options: Mapping[str, Any]
) -> nn.Module:
    """The model `name` of `config.LIBRARY_MODELS`, with the weights that its library draws.

    Args:
        image_size: pixels, one number or (height, width); torchvision's is square.
        options: further arguments of the library's class, such as its width and depth.

    Raises:
        ImportError: the library is not installed. TypeError, AssertionError: the class refuses its arguments.
    """
    create = {"torchvision:VisionTransformer": _torchvision, "vit-pytorch:SimpleViT": _simple_vit}[name]
    try:
        return create(image_size, channels, num_classes, dict(options))
    except ImportError as error:
        library = name.split(":")[0]
        raise ImportError(
            f"model.name {name!r} needs {library}, which cannot be imported ({error}); pip install {library}"
        ) from error


def _simple_vit(image_size: Any, channels: int, num_classes: int, options: dict[str, Any]) -> nn.Module:
    from vit_pytorch import SimpleViT

    if channels == 1 and options.get("patch_size") in (1, (1, 1), [1, 1]):
        raise ValueError(
            "vit-pytorch's SimpleViT normalises the numbers of a patch, of which one grey pixel has one, so "
            "all images would look alike: give a larger model.patch_size"
        )
    return SimpleViT(image_size=image_size, channels=channels, num_classes=num_classes, **options)


def _torchvision(image_size: Any, channels: int, num_classes: int, options: dict[str, Any]) -> nn.Module:
    from torchvision.models import VisionTransformer

    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height != width:
        raise ValueError(f"torchvision's VisionTransformer takes square images, got {height} x {width}")
    network = VisionTransformer(image_size=height, num_classes=num_classes, **options)
    first = network.conv_proj
    if isinstance(first, nn.Conv2d) and channels != 3:  # which torchvision's has; drawn as torchvision does
        patch = (first.kernel_size[0], first.kernel_size[1])
        network.conv_proj = nn.Conv2d(channels, first.out_channels, patch, patch)
        nn.init.trunc_normal_(network.conv_proj.weight, std=math.sqrt(1 / (channels * math.prod(patch))))
        nn.init.zeros_(network.conv_proj.bias)
    return network
