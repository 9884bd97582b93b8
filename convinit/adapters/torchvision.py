"""torchvision's VisionTransformer: packed weights of ``nn.MultiheadAttention``, one class token."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from convinit.adapters.additive import AdditiveLayout, mlp_output
from convinit.adapters.layout import Layout, LinearWeights, Slot
from convinit.adapters.torch_nn import attention
from convinit.adapters.types import child_name, is_a


def adapt(module: Any, name: str) -> Layout | None:
    if not is_a(module, "torchvision.models.vision_transformer.VisionTransformer"):
        return None
    side = module.image_size // module.patch_size
    attentions = [
        attention(
            block.self_attention,
            child_name(name, f"encoder.layers.{child}.self_attention"),
            norm=block.ln_1,
        )
        for child, block in module.encoder.layers.named_children()
    ]
    projection = module.conv_proj  # a convolution, or a stem that ends in one
    if isinstance(projection, nn.Sequential):
        projection = projection.conv_last

    return AdditiveLayout(
        name,
        module,
        (side, side),
        attentions,
        position=Slot(module.encoder.pos_embedding, (0, slice(1, None))),
        prefix=[Slot(module.class_token, 0)],
        prefix_position=Slot(module.encoder.pos_embedding, (0, slice(1))),
        content=projection,
        writers=[LinearWeights.of(projection), *(mlp_output(block.mlp) for block in module.encoder.layers)],
        image_shape=functools.partial(_image_shape, module),
    )


def _image_shape(module: Any, grid_size: tuple[int, int]) -> tuple[int, int, int]:
    first = next(layer for layer in module.conv_proj.modules() if isinstance(layer, nn.Conv2d))
    return first.in_channels, module.image_size, module.image_size
