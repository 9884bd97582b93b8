"""vit-pytorch's ViT (learned P) and SimpleViT (sin-cos P)."""

from __future__ import annotations

import functools
import math
from typing import Any

from torch import Tensor, nn

from convinit.adapters.additive import AdditiveLayout, mlp_output
from convinit.adapters.layout import UNKNOWN_GRID, Layout, LinearWeights, SelfAttention, Slot, packed_qkv
from convinit.adapters.types import child_name, is_a


def adapt(module: Any, name: str) -> Layout | None:
    vit = is_a(module, "vit_pytorch.vit.ViT")
    if not vit and not is_a(module, "vit_pytorch.simple_vit.SimpleViT"):
        return None
    attentions = [
        attention(attn, child_name(name, f"transformer.layers.{i}.0"))
        for i, (attn, _) in enumerate(module.transformer.layers)
    ]
    position = module.pos_embedding
    if not isinstance(module.to_patch_embedding, nn.Sequential):
        return None
    first = module.cls_token.shape[0] if vit else 0
    *_, projection = (i for i, layer in enumerate(module.to_patch_embedding) if isinstance(layer, nn.Linear))

    return AdditiveLayout(
        name,
        module,
        _grid_size(position[first:], made=not vit),
        attentions,
        position=Slot(position, slice(first, None)),
        prefix=[Slot(module.cls_token)] if first else [],
        prefix_position=Slot(position, slice(first)) if first else None,
        content=module.to_patch_embedding[-1],
        writers=[
            LinearWeights.of(module.to_patch_embedding[projection]),
            *(mlp_output(mlp) for _, mlp in module.transformer.layers),
        ],
        between=list(module.to_patch_embedding[projection + 1 :]),
        patch_of_guessed_grid=_patch(module.to_patch_embedding) if vit else None,
        image_shape=functools.partial(_image_shape, module.to_patch_embedding),
    )


def attention(module: Any, name: str) -> SelfAttention | None:
    if not is_a(module, "vit_pytorch.vit.Attention", "vit_pytorch.simple_vit.Attention"):
        return None
    inner = module.to_qkv.weight.shape[0] // 3
    query, key, value = packed_qkv(module.to_qkv, inner)
    output = module.to_out[0] if isinstance(module.to_out, nn.Sequential) else module.to_out
    return SelfAttention(
        name, module.to_qkv, module.heads, inner // module.heads, float(module.scale), query, key, value,
        LinearWeights.of(output) if isinstance(output, nn.Linear) else None, module.norm,
    )  # fmt: skip


def _patch(patch_embedding: Any) -> tuple[int, int]:
    lengths = patch_embedding[0].axes_lengths
    return lengths["p1"], lengths["p2"]


def _image_shape(patch_embedding: Any, grid_size: tuple[int, int]) -> tuple[int, int, int]:
    height, width = _patch(patch_embedding)
    inputs = next(layer.in_features for layer in patch_embedding if isinstance(layer, nn.Linear))
    return inputs // (height * width), grid_size[0] * height, grid_size[1] * width


def _grid_size(position: Tensor, *, made: bool) -> tuple[int, int]:
    """The models do not keep their grid: a sin-cos P shows it, a drawn one is taken to be square."""
    if made:
        columns = position[:, : position.shape[1] // 2]  # the half that depends on x starts anew in each row
        again = (columns[1:] == columns[0]).all(dim=1).nonzero()
        width = int(again[0]) + 1 if len(again) else len(position)
        return len(position) // width, width
    side = math.isqrt(len(position))
    return (side, side) if side * side == len(position) else UNKNOWN_GRID
