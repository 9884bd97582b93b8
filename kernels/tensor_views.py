"""How results lie in memory; known without Triton, for the ops' fake kernels need it too."""

from __future__ import annotations

from torch import Tensor


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, heads·r] as a view [B, heads, N, r]."""
    batch, tokens, width = x.shape
    return x.view(batch, tokens, heads, width // heads).transpose(1, 2)


def split_packed(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N, 3·heads·r] as views q, k, v, each [B, heads, N, r]."""
    batch, tokens, width = qkv.shape
    parts = qkv.view(batch, tokens, 3, heads, width // (3 * heads))  # unflatten, in half the time
    q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def image_gradient(x: Tensor) -> Tensor:
    """An empty [B, heads, N, r] whose memory is [B, N, heads, r], as that of queries, keys and values."""
    batch, heads, tokens, rank = x.shape
    return x.new_empty(batch, tokens, heads, rank).transpose(1, 2)
