"""vit-pytorch's ViT (learned P) and SimpleViT (sin-cos P)."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from convinit.adapters.additive import AdditiveLayout
from convinit.adapters.layout import UNKNOWN_GRID, Layout, Linear, SelfAttention, Slot, packed_qkv
from convinit.adapters.types import child_name, is_a


def layout(module: Any, name: str) -> Layout | None:
    vit = is_a(module, "vit_pytorch.vit.ViT")
    if not vit and not is_a(module, "vit_pytorch.simple_vit.SimpleViT"):
        return None
    attentions = [
        attention(attn, child_name(name, f"transformer.layers.{i}.0"))
        for i, (attn, _) in enumerate(module.transformer.layers)
    ]
    position = module.pos_embedding
    first = module.cls_token.shape[0] if vit else 0

    return AdditiveLayout(
        name,
        module,
        _grid_size(position.shape[0] - first),
        attentions,
        position=Slot(position, slice(first, None)),
        prefix=[Slot(module.cls_token)] if first else [],
        prefix_position=Slot(position, slice(first)) if first else None,
        content=module.to_patch_embedding[-1],
    )


def attention(module: Any, name: str) -> SelfAttention | None:
    if not is_a(module, "vit_pytorch.vit.Attention", "vit_pytorch.simple_vit.Attention"):
        return None
    inner = module.to_qkv.weight.shape[0] // 3
    query, key, value = packed_qkv(module.to_qkv, inner)
    output = module.to_out[0] if isinstance(module.to_out, nn.Sequential) else module.to_out
    return SelfAttention(
        name, module.to_qkv, module.heads, inner // module.heads, float(module.scale), query, key, value,
        Linear.of(output) if isinstance(output, nn.Linear) else None, module.norm,
    )  # fmt: skip


def _grid_size(tokens: int) -> tuple[int, int]:
    """The models do not keep their grid: a square, if that many tokens make one; else it must be given."""
    side = math.isqrt(tokens)
    return (side, side) if side * side == tokens else UNKNOWN_GRID
