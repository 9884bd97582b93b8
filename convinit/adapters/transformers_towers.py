"""Hugging Face transformers: the vision towers of CLIP and SigLIP, and DINOv2 with and without registers."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from convinit.adapters.additive import AdditiveLayout, mlp_output
from convinit.adapters.layout import Layout, LinearWeights, SelfAttention, Slot
from convinit.adapters.types import child_name, is_a

_CONTRASTIVE = (
    "transformers.models.clip.modeling_clip.CLIPVisionModel",
    "transformers.models.siglip.modeling_siglip.SiglipVisionModel",
)
_DINO = (
    "transformers.models.dinov2.modeling_dinov2.Dinov2Model",
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersModel",
)
_BEIT = "transformers.models.beit.modeling_beit.BeitModel"


def adapt(module: Any, name: str) -> Layout | None:
    if is_a(module, *_CONTRASTIVE) and hasattr(module, "embeddings"):  # as of transformers 5
        return _contrastive(module, name)
    if is_a(module, *_DINO) and hasattr(module.encoder.layer[0].attention, "q_proj"):
        return _dino(module, name)
    if is_a(module, _BEIT):
        raise ValueError(
            "model must add a position embedding to its tokens, which BEiT does not: it learns a table of "
            "biases for pairs of tokens, of which convinit knows those of Swin alone"
        )
    return None


def _contrastive(module: Any, name: str) -> Layout:
    embeddings, table = module.embeddings, module.embeddings.position_embedding.weight
    token = getattr(embeddings, "class_embedding", None)
    prefix = int(token is not None)
    side = embeddings.image_size // embeddings.patch_size
    attentions = []
    for i, layer in enumerate(module.encoder.layers):
        attn = layer.self_attn
        attentions.append(
            SelfAttention(
                child_name(name, f"encoder.layers.{i}.self_attn"), attn, attn.num_heads, attn.head_dim,
                float(attn.scale), LinearWeights.of(attn.q_proj), LinearWeights.of(attn.k_proj),
                LinearWeights.of(attn.v_proj), LinearWeights.of(attn.out_proj), layer.layer_norm1,
            )
        )  # fmt: skip
    return AdditiveLayout(
        name,
        module,
        (side, side),
        attentions,
        position=Slot(table, slice(prefix, None)),
        prefix=[] if token is None else [Slot(token.view(1, -1))],
        prefix_position=Slot(table, slice(1)) if prefix else None,
        entry=getattr(module, "pre_layrnorm", None),
        content=embeddings.patch_embedding,
        writers=[
            LinearWeights.of(embeddings.patch_embedding),
            *(mlp_output(layer.mlp) for layer in module.encoder.layers),
        ],
        image_shape=functools.partial(_square, embeddings.patch_embedding, embeddings.image_size),
    )


def _dino(module: Any, name: str) -> Layout:
    embeddings, layers = module.embeddings, module.encoder.layer
    patches, position = embeddings.patch_embeddings, embeddings.position_embeddings
    height, width = (patches.image_size[i] // patches.patch_size[i] for i in range(2))
    attentions = []
    for i, layer in enumerate(layers):
        attn = layer.attention
        attentions.append(
            SelfAttention(
                child_name(name, f"encoder.layer.{i}.attention"), attn, attn.num_attention_heads,
                attn.head_dim, float(attn.scaling), LinearWeights.of(attn.q_proj),
                LinearWeights.of(attn.k_proj), LinearWeights.of(attn.v_proj),
                LinearWeights.of(attn.o_proj), layer.norm1,
            )
        )  # fmt: skip
    tokens = [embeddings.cls_token, getattr(embeddings, "register_tokens", None)]
    return AdditiveLayout(
        name,
        module,
        (height, width),
        attentions,
        position=Slot(position, (0, slice(1, None))),
        prefix=[Slot(token, 0) for token in tokens if token is not None],
        prefix_position=Slot(position, (0, slice(1))),  # of the class token alone
        content=patches.projection,
        writers=[
            LinearWeights.of(patches.projection),
            LinearWeights(Slot(embeddings.mask_token, 0)),  # takes the place of masked content
            *(mlp_output(layer.mlp) for layer in layers),
        ],
        between=[scale for layer in layers for scale in (layer.layer_scale1, layer.layer_scale2)],
        image_shape=functools.partial(_rectangle, patches),
    )


def _square(projection: nn.Conv2d, side: int, grid_size: tuple[int, int]) -> tuple[int, int, int]:
    return projection.in_channels, side, side


def _rectangle(patches: Any, grid_size: tuple[int, int]) -> tuple[int, int, int]:
    return patches.num_channels, patches.image_size[0], patches.image_size[1]
