"""Hugging Face transformers: ViT, DeiT (class and distillation token) and the encoder of ViTMAE."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from convinit.adapters.additive import AdditiveLayout, mlp_output
from convinit.adapters.layout import Layout, LinearWeights, SelfAttention, Slot
from convinit.adapters.types import child_name, is_a

_MODELS = {
    f"transformers.models.{package}.modeling_{package}.{model}": f"{stem}Attention"
    for package, model, stem in (
        ("vit", "ViTModel", "ViT"),
        ("deit", "DeiTModel", "DeiT"),
        ("vit_mae", "ViTMAEModel", "ViTMAE"),
    )
}
_ATTENTIONS = tuple(f"{path.rpartition('.')[0]}.{name}" for path, name in _MODELS.items())


def adapt(module: Any, name: str) -> Layout | None:
    if not is_a(module, *_MODELS) or not hasattr(module, "layers"):  # as of transformers 5
        return None
    embeddings = module.embeddings
    attentions = [
        attention(layer.attention, child_name(name, f"layers.{i}.attention"), norm=layer.layernorm_before)
        for i, layer in enumerate(module.layers)
    ]
    tokens = [getattr(embeddings, token, None) for token in ("cls_token", "distillation_token")]
    special = [token for token in tokens if token is not None]
    position = embeddings.position_embeddings
    patches = embeddings.patch_embeddings
    height, width = (patches.image_size[i] // patches.patch_size[i] for i in range(2))

    return AdditiveLayout(
        name,
        module,
        (height, width),
        attentions,
        position=Slot(position, (0, slice(len(special), None))),
        prefix=[Slot(token, 0) for token in special],
        prefix_position=Slot(position, (0, slice(len(special)))),
        content=patches.projection,
        writers=[LinearWeights.of(patches.projection), *(mlp_output(layer.mlp) for layer in module.layers)],
        image_shape=functools.partial(_image_shape, patches),
        whole_grid=functools.partial(_unmasked, embeddings),
    )


def _image_shape(patches: Any, grid_size: tuple[int, int]) -> tuple[int, int, int]:
    return patches.num_channels, patches.image_size[0], patches.image_size[1]


@contextmanager
def _unmasked(embeddings: Any) -> Iterator[None]:
    """A masked autoencoder that masks nothing and leaves the tokens in their order."""
    if not hasattr(embeddings, "random_masking"):
        yield
        return

    def keep_all(sequence: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        batch, tokens = sequence.shape[:2]
        order = torch.arange(tokens, device=sequence.device).expand(batch, -1)
        return sequence, sequence.new_zeros(batch, tokens), order

    embeddings.random_masking = keep_all
    try:
        yield
    finally:
        del embeddings.random_masking


def attention(module: Any, name: str, norm: nn.Module | None = None) -> SelfAttention | None:
    if not is_a(module, *_ATTENTIONS):
        return None
    return SelfAttention(
        name, module, module.num_attention_heads, module.head_dim, float(module.scaling),
        LinearWeights.of(module.q_proj), LinearWeights.of(module.k_proj), LinearWeights.of(module.v_proj),
        LinearWeights.of(module.o_proj), norm,
    )  # fmt: skip
