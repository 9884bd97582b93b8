"""``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer``; grid and P come from the caller."""

from __future__ import annotations

from typing import Any

from torch import nn

from convinit.adapters.layout import LinearWeights, SelfAttention, Slot
from convinit.adapters.types import child_name


def attention(module: Any, name: str, norm: nn.Module | None = None) -> SelfAttention | None:
    # Of a decoder layer, its self-attention alone: the other one is between two sequences.
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        norm = module.norm1 if module.norm_first else None
        return attention(module.self_attn, child_name(name, "self_attn"), norm)
    if not isinstance(module, nn.MultiheadAttention):
        return None
    if module.bias_k is not None or module.add_zero_attn:
        raise ValueError(
            f"{name} must have neither bias_k nor add_zero_attn: they are tokens outside the grid"
        )
    dim = module.embed_dim
    rows = [slice(i * dim, (i + 1) * dim) for i in range(3)]
    if module.in_proj_weight is not None:
        weights = [Slot(module.in_proj_weight, row) for row in rows]
    elif module.kdim == module.vdim == dim:
        weights = [Slot(w) for w in (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)]
    else:
        return None  # cross-attention
    bias = module.in_proj_bias
    query, key, value = (
        LinearWeights(weight, None if bias is None else Slot(bias, row))
        for weight, row in zip(weights, rows, strict=True)
    )
    return SelfAttention(
        name, module, module.num_heads, module.head_dim, module.head_dim**-0.5, query, key, value,
        LinearWeights.of(module.out_proj), norm, batch_first=module.batch_first,
    )  # fmt: skip
