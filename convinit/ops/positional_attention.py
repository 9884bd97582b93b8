"""Attention whose queries and keys mix content with a positional term that all images share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from convinit._checks import check_int, check_probability, check_real, check_same_device, check_tensor
from convinit.kernels.tensor_views import split_packed
from convinit.ops import backends, native
from convinit.ops.positional_op import fused_packed_attention, fused_positional_attention
from convinit.ops.transforms import transforms_active

__all__ = ["packed_attention", "positional_attention", "positional_attention_reference"]


def positional_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    *,
    scale: float | None = None,
    alpha: float = 1.0,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Attention with queries α q + q_pos and keys α k + k_pos.

    softmax(scale · (α q + q_pos)(α k + k_pos)ᵀ) v

    With q = x W_q and q_pos = (1−α) P W_q this is (α x + (1−α) P) W_q, at the price of one projection of x:
    the positional term is the same for every image of the batch.

    Args:
        q, k, v: [B, heads, N, r], any strides, one floating dtype, or under autocast any; r ≥ 1.
        q_pos, k_pos: [heads, N, r] or None, on the device of q; cast to its dtype.
        scale: softmax temperature, a number; None means r**-0.5. One to be learnt is multiplied into q.
        alpha: content share α of queries and keys, a number. One to be learnt is multiplied into q and k.
        dropout_p: probability that an attention weight is dropped. Pass 0 in evaluation.
        backend: "triton": our kernels on CUDA, r up to 128, no dropout. "native": our compiled kernels on the
            CPU, no float64, no dropout. "sdpa": mixed q and k go to
            :func:`torch.nn.functional.scaled_dot_product_attention`. "eager": the formula. "auto": the one of
            these that measured as fastest; docs/backends.md has the rules. An explicit choice never falls
            back.

    Derivatives: under torch.func and forward-mode AD "auto" is "eager". Second derivatives are those of the
    formula, which keeps its [B, heads, N, N] map; in "sdpa" PyTorch's fused kernels have none.

    Returns:
        [B, N, heads·r], the heads side by side, ready for the output layer.

    Raises:
        ValueError: shapes, dropout_p or backend out of range; "triton" or "native" cannot serve device, shape
            or dropout. TypeError: dtypes. RuntimeError: "triton" without Triton. NotImplementedError:
            torch.func and forward-mode AD with "triton" or "native".

    Source: Model I of arXiv 2401.12511, with the sum taken after the projection instead of before it.
    """
    scale, alpha, dropout_p = _check(q, k, v, q_pos, k_pos, scale, alpha, dropout_p)
    backends.check_backend(backend)
    serving = backends.serving("positional_attention", backend, q, dropout_p, k, v, q_pos, k_pos)
    if serving == "kernels":
        return fused_positional_attention(q, k, v, q_pos, k_pos, scale, alpha)
    return _by_torch(serving, backend, q, k, v, q_pos, k_pos, scale, alpha, dropout_p)


def packed_attention(
    qkv: Tensor,
    num_heads: int,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    *,
    scale: float | None = None,
    alpha: float = 1.0,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """:func:`positional_attention` of queries, keys and values in one product.

    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)

    The same to the last bit. With "triton" and "native" the gradient of qkv is written in place of three
    that autograd would have to copy together.

    Args:
        qkv: [B, N, 3·heads·r], as an ``nn.Linear`` makes it.
        num_heads: heads.
        Others: as in :func:`positional_attention`.

    Returns:
        [B, N, heads·r].
    """
    check_tensor("qkv", qkv, "[B, N, 3·heads·r]", dims=3)
    num_heads = check_int("num_heads", num_heads)
    if qkv.shape[2] % (3 * num_heads):
        raise ValueError(
            f"qkv must be [B, N, 3·num_heads·r] with num_heads = {num_heads}, got {list(qkv.shape)}"
        )
    q, k, v = split_packed(qkv, num_heads)
    scale, alpha, dropout_p = _check(q, k, v, q_pos, k_pos, scale, alpha, dropout_p)
    backends.check_backend(backend)
    serving = backends.serving("positional_attention", backend, q, dropout_p, k, v, q_pos, k_pos)
    if serving == "kernels":
        return fused_packed_attention(qkv, num_heads, q_pos, k_pos, scale, alpha)
    return _by_torch(serving, backend, q, k, v, q_pos, k_pos, scale, alpha, dropout_p)


def positional_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    *,
    scale: float | None = None,
    alpha: float = 1.0,
    dropout_p: float = 0.0,
) -> Tensor:
    """:func:`positional_attention` written out."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q = alpha * q if q_pos is None else alpha * q + q_pos.to(q.dtype)
    k = alpha * k if k_pos is None else alpha * k + k_pos.to(k.dtype)
    attention = (scale * q @ k.mT).softmax(dim=-1)  # [B, heads, N, N]
    if dropout_p > 0:
        attention = F.dropout(attention, dropout_p)
    return (attention @ v).transpose(1, 2).flatten(2)


def _by_torch(
    serving: str,
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    scale: float,
    alpha: float,
    dropout_p: float,
) -> Tensor:
    """By the formula where its derivatives may be asked for, else by the back end that `serving` names."""
    differentiable = backend == "auto" and (
        transforms_active() or _may_be_differentiated_twice(q, k, v, q_pos, k_pos, dropout_p=dropout_p)
    )
    if backend == "eager" or differentiable:
        return positional_attention_reference(
            q, k, v, q_pos, k_pos, scale=scale, alpha=alpha, dropout_p=dropout_p
        )
    q, k = _mix(q, q_pos, alpha), _mix(k, k_pos, alpha)
    return backends.attention_by(serving, q, k, v, dropout_p, scale).transpose(1, 2).flatten(2)


def _mix(content: Tensor, position: Tensor | None, alpha: float) -> Tensor:
    if position is None:
        return content if alpha == 1 else alpha * content
    return torch.add(position.to(content.dtype), content, alpha=alpha)


def _may_be_differentiated_twice(*inputs: Tensor | None, dropout_p: float) -> bool:
    """Whether a CPU's small problem records a graph: SDPA's kernel there has no second derivative."""
    q = inputs[0]
    return (
        q is not None
        and q.device.type == "cpu"
        and q.dtype in (torch.float32, torch.float64)
        and dropout_p == 0  # else SDPA is itself the formula
        and torch.is_grad_enabled()
        and any(x is not None and x.requires_grad for x in inputs)
        and (q.dtype == torch.float64 or not native.worthwhile(q))
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"))
    )


def _casts(x: Tensor) -> bool:
    """Whether autocast brings all inputs to one dtype."""
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    scale: float | None,
    alpha: float,
    dropout_p: float,
) -> tuple[float, float, float]:
    """The three numbers as floats."""
    check_tensor("q", q, "[B, heads, N, r]", dims=4)
    for name, tensor in (("k", k), ("v", v)):
        check_tensor(name, tensor, "[B, heads, N, r]", dims=4)
        if tensor.shape != q.shape:
            raise ValueError(f"{name} must have the shape of q, {list(q.shape)}, got {list(tensor.shape)}")
        if tensor.dtype != q.dtype and not _casts(q):
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {tensor.dtype}")
    if q.shape[3] == 0:
        raise ValueError(f"q must have r of 1 or more, got {list(q.shape)}")
    for name, position in (("q_pos", q_pos), ("k_pos", k_pos)):
        if position is not None and check_tensor(name, position, "[heads, N, r]").shape != q.shape[1:]:
            raise ValueError(
                f"{name} must be [heads, N, r] = {list(q.shape[1:])}, the same for every image, "
                f"got {list(position.shape)}"
            )
    check_same_device("q", q, k=k, v=v, q_pos=q_pos, k_pos=k_pos)
    scale = q.shape[3] ** -0.5 if scale is None else check_real("scale", scale)
    return scale, check_real("alpha", alpha), check_probability("dropout_p", dropout_p)
