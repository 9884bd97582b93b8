"""Attention whose map does not depend on the image: one map for the whole batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from convinit._checks import check_probability, check_real, check_same_device, check_tensor
from convinit.ops import backends
from convinit.ops.map_op import apply_map
from convinit.ops.positional_attention import positional_attention

__all__ = ["shared_attention", "shared_attention_reference"]


def shared_attention(
    q_map: Tensor,
    k_map: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Apply one attention map to the values of every image.

    softmax(scale · q_map k_mapᵀ) v

    Args:
        q_map, k_map: [heads, N, r'], one floating dtype; r' may differ from the r of v.
        v: [B, heads, N, r], any strides; the map is cast to its dtype.
        scale: softmax temperature, a number; None means r'**-0.5. One to be learnt is multiplied into q_map.
        dropout_p: probability that an attention weight is dropped, in all images at once: the mask, like the
            map, is shared. Pass 0 in evaluation.
        backend: how the map meets the values. "triton": our kernels on CUDA, r up to 128. "native": our
            compiled kernels on the CPU, no float64. "sdpa":
            :func:`torch.nn.functional.scaled_dot_product_attention` with q_map and k_map expanded over the
            batch, so each image has a map and a dropout mask of its own. "eager": the formula. "auto": the
            fastest by measurements, of these and of one tall product for each head; docs/backends.md has the
            rules. An explicit choice never falls back.

    Returns:
        [B, N, heads·r], the heads side by side, ready for the output layer.

    Raises:
        ValueError: shapes, dropout_p or backend out of range; "triton" or "native" cannot serve device or
            shape. TypeError: dtypes. RuntimeError: "triton" without Triton. NotImplementedError: torch.func
            and forward-mode AD with "triton" or "native".

    Source: Models II and III of arXiv 2401.12511, which compute the map anew for every image.
    """
    scale, dropout_p = _check(q_map, k_map, v, scale, dropout_p)
    backends.check_backend(backend)
    if backend == "eager":
        return shared_attention_reference(q_map, k_map, v, scale=scale, dropout_p=dropout_p)
    if backend == "auto" and v.shape[0] == 1 and v.device.type == "cpu" and not torch.is_grad_enabled():
        q, k = (x.to(v.dtype).unsqueeze(0) for x in (q_map, k_map))
        if q.shape == v.shape:  # nothing is shared, and no [heads, N, N] map is written
            return positional_attention(q, k, v, scale=scale, dropout_p=dropout_p)
        backend = "sdpa"
    if backend == "sdpa":
        q, k = (x.to(v.dtype).expand(v.shape[0], *x.shape) for x in (q_map, k_map))
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale)
        return out.transpose(1, 2).flatten(2)
    serving = backends.serving("shared_attention", backend, v, 0.0, q_map, k_map)
    if q_map.dtype == torch.float16 and q_map.device.type == "cpu":
        q_map, k_map = (
            q_map.float(),
            k_map.float(),
        )  # float16 products are slow on CPUs (autocast's still are)
    attention = (scale * q_map @ k_map.mT).softmax(dim=-1).to(v.dtype)  # [heads, N, N]
    if dropout_p > 0:
        attention = F.dropout(attention, dropout_p)
    if serving == "kernels":
        return apply_map(attention, v)
    batch, heads, tokens, rank = v.shape
    # The images side by side make one tall product a head, and the gradient of the map sums over the batch
    # inside the matrix product instead of through a [B, heads, N, N] tensor. The two copies of v are cheap.
    columns = v.permute(1, 2, 0, 3).reshape(heads, tokens, batch * rank)
    out = torch.bmm(attention, columns).view(heads, tokens, batch, rank)
    return out.permute(2, 1, 0, 3).reshape(batch, tokens, heads * rank)


def shared_attention_reference(
    q_map: Tensor, k_map: Tensor, v: Tensor, *, scale: float | None = None, dropout_p: float = 0.0
) -> Tensor:
    """:func:`shared_attention` written out."""
    scale = q_map.shape[-1] ** -0.5 if scale is None else scale
    attention = (scale * q_map @ k_map.mT).softmax(dim=-1).to(v.dtype)  # [heads, N, N]
    if dropout_p > 0:
        attention = F.dropout(attention, dropout_p)
    return (attention @ v).transpose(1, 2).flatten(2)


def _check(
    q_map: Tensor, k_map: Tensor, v: Tensor, scale: float | None, dropout_p: float
) -> tuple[float, float]:
    """The two numbers as floats."""
    check_tensor("q_map", q_map, "[heads, N, r]", dims=3)
    check_tensor("k_map", k_map, "[heads, N, r]", dims=3)
    if k_map.shape != q_map.shape:
        raise ValueError(f"k_map must have the shape of q_map, {list(q_map.shape)}, got {list(k_map.shape)}")
    heads, tokens, rank = q_map.shape
    check_tensor("v", v, f"[B, {heads}, {tokens}, r]", dims=4)
    if v.shape[1:3] != q_map.shape[:2]:
        raise ValueError(f"v must be [B, {heads}, {tokens}, r], heads and N as in q_map, got {list(v.shape)}")
    if k_map.dtype != q_map.dtype:
        raise TypeError(
            f"q_map and k_map must have one floating-point dtype, got {q_map.dtype} and {k_map.dtype}"
        )
    for name, tensor in (("q_map", q_map), ("v", v)):
        if tensor.shape[-1] == 0:
            raise ValueError(f"{name} must have r of 1 or more, got {list(tensor.shape)}")
    check_same_device("v", v, q_map=q_map, k_map=k_map)
    scale = rank**-0.5 if scale is None else check_real("scale", scale)
    return scale, check_probability("dropout_p", dropout_p)
