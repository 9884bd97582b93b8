"""How results lie in memory; known without Triton, for the ops' fake kernels need it too."""

from __future__ import annotations

from torch import Tensor


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, heads·r] as a view [B, heads, N, r]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def image_gradient(x: Tensor) -> Tensor:
    """An empty [B, heads, N, r] whose memory is [B, N, heads, r], as that of queries, keys and values."""
    batch, heads, tokens, rank = x.shape
    return x.new_empty(batch, tokens, heads, rank).transpose(1, 2)
