"""timm's VisionTransformer family: ViT, DeiT (also distilled), register tokens, CLIP's pre-norm, qk_norm."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from convinit.adapters.additive import AdditiveLayout, mlp_output
from convinit.adapters.layout import Layout, LinearWeights, SelfAttention, Slot, packed_qkv
from convinit.adapters.types import child_name, is_a, learned_norm


def adapt(module: Any, name: str) -> Layout | None:
    if not is_a(module, "timm.models.vision_transformer.VisionTransformer") or module.pos_embed is None:
        return None
    kinds = {type(block).__name__ for block in module.blocks if not hasattr(block, "attn")}
    if kinds:  # parallel ones
        raise ValueError(
            f"model must have blocks of one attention, then one MLP, got {', '.join(sorted(kinds))} of timm"
        )
    attentions = [
        attention(child, child_name(name, f"blocks.{i}.attn"), norm=_norm_before(block))
        for i, block in enumerate(module.blocks)
        if (child := getattr(block, "attn", None)) is not None
    ]
    known = [each for each in attentions if each is not None]
    if not known:  # another attention in timm's blocks; its own adapter may know it
        return None
    if len(known) < len(module.blocks):
        raise ValueError(
            f"model must have timm's Attention in every block, got {len(known)} in {len(module.blocks)} "
            f"blocks of type {type(module.blocks[0]).__name__}"
        )
    prefix = 0 if module.no_embed_class else module.num_prefix_tokens
    projection, patch_norm = (
        getattr(module.patch_embed, "proj", None),
        learned_norm(getattr(module.patch_embed, "norm", None)),
    )
    return AdditiveLayout(
        name,
        module,
        tuple(module.patch_embed.grid_size),
        known,
        position=Slot(module.pos_embed, (0, slice(prefix, None))),
        prefix=[Slot(token, 0) for token in _prefix_tokens(module)],
        prefix_position=Slot(module.pos_embed, (0, slice(prefix))) if prefix else None,
        entry=learned_norm(module.norm_pre),
        content=patch_norm or projection,
        writers=_writers(module),
        between=[patch_norm, *_between(module)] if patch_norm else _between(module),
        image_shape=functools.partial(_image_shape, module.patch_embed),
    )


def attention(module: Any, name: str, norm: nn.Module | None = None) -> SelfAttention | None:
    if not is_a(module, "timm.layers.attention.Attention"):
        return None
    query, key, value = packed_qkv(module.qkv, module.num_heads * module.head_dim)
    return SelfAttention(
        name, module, module.num_heads, module.head_dim, float(module.scale), query, key, value,
        LinearWeights.of(module.proj), norm, learned_norm(module.q_norm), learned_norm(module.k_norm),
    )  # fmt: skip


def _norm_before(block: Any) -> nn.Module | None:
    """A pre-norm block's norm1; that of a post-norm block comes behind its attention."""
    return None if is_a(block, "timm.models.vision_transformer.ResPostBlock") else learned_norm(block.norm1)


def _writers(module: Any) -> list[LinearWeights] | None:
    projection = getattr(module.patch_embed, "proj", None)
    if not isinstance(projection, nn.Conv2d):
        return None
    return [LinearWeights.of(projection), *(mlp_output(block.mlp) for block in module.blocks)]


def _image_shape(patch_embed: Any, grid_size: tuple[int, int]) -> tuple[int, int, int]:
    size = patch_embed.img_size or [n * p for n, p in zip(grid_size, patch_embed.patch_size, strict=True)]
    return next(patch_embed.parameters()).shape[1], size[0], size[1]


def _between(module: Any) -> list[nn.Module]:
    """LayerScales, and the norms of post-norm blocks, which stand behind their branches."""
    names = ["ls1", "ls2"]
    found = [getattr(block, name, None) for block in module.blocks for name in names]
    for block in module.blocks:
        if is_a(block, "timm.models.vision_transformer.ResPostBlock"):
            found += [block.norm1, block.norm2]
    return [part for part in found if part is not None]


def _prefix_tokens(module: Any) -> list[Tensor]:
    """[1, k, D] each, in the model's order."""
    tokens = [getattr(module, name, None) for name in ("cls_token", "dist_token", "reg_token")]
    return [token for token in tokens if token is not None]
