"""A model that nobody knows: grid and position embedding are given, the rest is found around them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from convinit.adapters.additive import AdditiveLayout
from convinit.adapters.layout import LinearWeights, SelfAttention, Slot

_TOKENS = ("cls", "class", "dist", "reg", "token")  # in the names of learned tokens


def by_hand(
    model: nn.Module, grid_size: tuple[int, int], attentions: Sequence[SelfAttention], pos_embed: Tensor
) -> AdditiveLayout:
    """The layout of `attentions` over P [N, D].

    Writers to the residual stream are the linear layers and convolutions that make D numbers: the first one,
    which embeds the patches, and all in the blocks that hold an attention, but for queries, keys and values.
    A forward pass then shows whether anything else writes there.
    """
    dim = pos_embed.shape[1]
    inner = {
        id(linear.weight.tensor)
        for attention in attentions
        for linear in (attention.query, attention.key, attention.value)
        if linear is not None
    }
    blocks = {name.rpartition(".")[0] if "." in name else name for name in (a.name for a in attentions)}
    outside, inside = [], []
    for name, layer in model.named_modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d)) or len(layer.weight) != dim:
            continue
        owner, _, last = name.rpartition(".")
        if last == "linear1" and isinstance(model.get_submodule(owner), nn.TransformerEncoderLayer):
            continue  # as wide as the tokens, but what it makes is not added to them
        if any(not block or name == block or name.startswith(f"{block}.") for block in blocks):
            if id(layer.weight) not in inner:
                inside.append(layer)
        else:
            outside.append(layer)
    stem = next((layer for layer in outside if isinstance(layer, nn.Conv2d)), next(iter(outside), None))
    tokens = [
        Slot(parameter.view(-1, dim) if parameter.dim() != 2 else parameter)
        for name, parameter in model.named_parameters()
        if parameter.shape[-1:] == (dim,)
        and 0 < parameter.numel() < 32 * dim
        and any(word in name.rpartition(".")[2].lower() for word in _TOKENS)
    ]
    base = pos_embed._base
    if base is not None and base.shape[-1:] == (dim,) and base.is_contiguous() and pos_embed.is_contiguous():
        first = (pos_embed.storage_offset() - base.storage_offset()) // dim
        if first:  # the rows of P before the patches'
            tokens.append(Slot(base.view(-1, dim), slice(first)))
    return AdditiveLayout(
        "",
        model,
        grid_size,
        attentions,
        position=Slot(pos_embed),
        prefix=tokens,
        content=stem,
        writers=[LinearWeights.of(layer) for layer in (stem, *inside) if layer is not None],
        image_shape=functools.partial(_image_shape, stem) if isinstance(stem, nn.Conv2d) else None,
        position_is_given=True,
        prefix_is_unknown=True,
    )


def _image_shape(stem: Any, grid_size: tuple[int, int]) -> tuple[int, int, int]:
    return stem.in_channels, grid_size[0] * stem.stride[0], grid_size[1] * stem.stride[1]
