"""Positional attention as torch ops, of q, k, v or of one packed product, on both devices.

    convinit::positional_attention   softmax(scale · (α q + q_pos)(α k + k_pos)ᵀ) v   and its backward
    convinit::packed_attention       the same of qkv [B, N, 3·heads·r]                and its backward

On CUDA they run `convinit.kernels`, which imports Triton, so the import waits for the first call. On a CPU
they run the compiled kernels of `convinit.ops.native`, which have no float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from convinit.kernels.tensor_views import image_gradient, split_packed
from convinit.ops import native
from convinit.ops.backends import autocast
from convinit.ops.op import Op
from convinit.ops.transforms import refuse_transforms

__all__ = ["fused_packed_attention", "fused_positional_attention"]

Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]  # q, k, v, q_pos, k_pos


def fused_positional_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    scale: float,
    alpha: float,
) -> Tensor:
    """Positional attention as one op, [B, N, heads·r]; q, k, v are cast under autocast, as for SDPA."""
    refuse_transforms("positional attention's op", 'backend="eager"', q, k, v, q_pos, k_pos)
    return _positional(autocast(q), autocast(k), autocast(v), q_pos, k_pos, scale, alpha)[0]


def fused_packed_attention(
    qkv: Tensor,
    heads: int,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    scale: float,
    alpha: float,
) -> Tensor:
    """The same of one packed product qkv [B, N, 3·heads·r], whose gradient is written packed, uncopied."""
    refuse_transforms("positional attention's op", 'backend="eager"', qkv, q_pos, k_pos)
    return _packed(autocast(qkv), heads, q_pos, k_pos, scale, alpha)[0]


# --- the two directions, by device ------------------------------------------------------------------------


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    scale: float,
    alpha: float,
) -> tuple[Tensor, Tensor]:
    """Output [B, N, heads·r], and the base-2 log-sum-exp of the logits [B, heads, N] in float32."""
    if q.is_cuda:
        from convinit.kernels import launch

        with torch.cuda.device(q.device):
            return launch.positional_forward(q, k, v, q_pos, k_pos, scale, alpha)
    return native.forward(q, k, v, q_pos, k_pos, scale, alpha)


def _gradients(
    dout: Tensor,
    inputs: Inputs,
    out: Tensor,
    lse: Tensor,
    scale: float,
    alpha: float,
    needs: Sequence[bool],
    image_gradients: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs; None where needs says False.

    Those of q, k and v are written to image_gradients, if given.
    """
    if dout.is_cuda:
        from convinit.kernels import launch

        with torch.cuda.device(dout.device):
            return launch.positional_backward(dout, *inputs, out, lse, scale, alpha, needs, image_gradients)
    return native.backward(dout, inputs, scale, alpha, needs, image_gradients)


def _mixed(x: Tensor, pos: Tensor | None, alpha: float) -> Tensor:
    """α x + pos, in float32 or float64."""
    x = alpha * x.to(torch.promote_types(x.dtype, torch.float32))
    return x if pos is None else x + pos.to(x.dtype)


def _filled(gradients: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """An op returns tensors: empty ones for gradients that nobody needs."""
    return tuple(like.new_empty(0) if x is None else x for x in gradients)


def _differentiable_gradients(
    dout: Tensor,
    inputs: Sequence[Tensor | None],
    split: Callable[..., tuple[Tensor, ...]],
    scale: float,
    alpha: float,
) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs from the formula, with a graph of their own: for create_graph=True.

    split: q, k, v, q_pos, k_pos of the inputs. Those that need no gradient get None.
    """
    # Copies of the references: what the inputs were made of, and share, is the engine's to follow.
    inputs = [x if x is None else x.view_as(x) for x in inputs]
    q, k, v, q_pos, k_pos = split(*inputs)
    q_mixed, k_mixed, values = _mixed(q, q_pos, alpha), _mixed(k, k_pos, alpha), _mixed(v, None, 1.0)
    out = ((scale * q_mixed @ k_mixed.mT).softmax(-1) @ values).transpose(1, 2).flatten(2).to(q.dtype)
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    gradients = iter(torch.autograd.grad(out, wanted, dout, create_graph=True))
    return tuple(next(gradients) if x is not None and x.requires_grad else None for x in inputs)


# --- of q, k and v ----------------------------------------------------------------------------------------


def _positional_backward_run(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    alpha: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, q_pos, k_pos; an empty tensor where needs says False."""
    gradients = _gradients(dout, (q, k, v, q_pos, k_pos), out, lse, scale, alpha, needs)
    dq, dk, dv, dq_pos, dk_pos = _filled(gradients, q)
    return dq, dk, dv, dq_pos, dk_pos


def _positional_fake(q, k, v, q_pos, k_pos, scale, alpha):
    batch, heads, tokens, rank = q.shape
    lse = q.new_empty(batch, heads, tokens, dtype=torch.float32)
    return q.new_empty(batch, tokens, heads * rank), lse


def _positional_backward_fake(dout, q, k, v, q_pos, k_pos, out, lse, scale, alpha, needs):
    images = [image_gradient(x) if need else None for x, need in zip((q, k, v), needs, strict=False)]
    return *_filled(images, q), *_fake_positions(q, q_pos, k_pos, *needs[3:])


def _fake_positions(like, q_pos, k_pos, need_q_pos, need_k_pos):
    positions = ((q_pos, need_q_pos), (k_pos, need_k_pos))
    return tuple(x.new_empty(x.shape) if need else like.new_empty(0) for x, need in positions)


def _save_positional(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.alpha = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _differentiate_positional(
    ctx: Any, dout: Tensor | None, _dlse: Tensor | None
) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:5])
    if dout is None or not any(needs):
        return (None,) * 7
    q, k, v, q_pos, k_pos, out, lse = ctx.saved_tensors
    if torch.is_grad_enabled():
        inputs = (q, k, v, q_pos, k_pos)
        made = _differentiable_gradients(dout, inputs, lambda *all: all, ctx.scale, ctx.alpha)
        return *made, None, None
    gradients = _positional_backward(dout, q, k, v, q_pos, k_pos, out, lse, ctx.scale, ctx.alpha, needs)
    return *(x if need else None for x, need in zip(gradients, needs, strict=True)), None, None


_positional = Op(
    "convinit::positional_attention", _forward, _positional_fake, _save_positional, _differentiate_positional
)
_positional_backward = Op(
    "convinit::positional_attention_backward", _positional_backward_run, _positional_backward_fake
)


# --- of a packed product: autograd of its views would copy the three gradients together --------------------


def _packed_run(
    qkv: Tensor,
    heads: int,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    scale: float,
    alpha: float,
) -> tuple[Tensor, Tensor]:
    return _forward(*split_packed(qkv, heads), q_pos, k_pos, scale, alpha)


def _packed_backward_run(
    dout: Tensor,
    qkv: Tensor,
    heads: int,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    alpha: float,
    need_q_pos: bool,
    need_k_pos: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv, q_pos and k_pos; of the last two an empty tensor where it is not needed."""
    dqkv = qkv.new_empty(qkv.shape)
    inputs, needs = (*split_packed(qkv, heads), q_pos, k_pos), (True, True, True, need_q_pos, need_k_pos)
    parts = split_packed(dqkv, heads)
    *_, dq_pos, dk_pos = _filled(_gradients(dout, inputs, out, lse, scale, alpha, needs, parts), qkv)
    return dqkv, dq_pos, dk_pos


def _packed_fake(qkv, heads, q_pos, k_pos, scale, alpha):
    batch, tokens, width = qkv.shape
    return qkv.new_empty(batch, tokens, width // 3), qkv.new_empty(batch, heads, tokens, dtype=torch.float32)


def _packed_backward_fake(dout, qkv, heads, q_pos, k_pos, out, lse, scale, alpha, need_q_pos, need_k_pos):
    return qkv.new_empty(qkv.shape), *_fake_positions(qkv, q_pos, k_pos, need_q_pos, need_k_pos)


def _save_packed(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.heads, q_pos, k_pos, ctx.scale, ctx.alpha = inputs
    ctx.save_for_backward(qkv, q_pos, k_pos, *output)
    ctx.set_materialize_grads(False)


def _differentiate_packed(ctx: Any, dout: Tensor | None, _dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    need_qkv, _, need_q_pos, need_k_pos, *_ = ctx.needs_input_grad
    if dout is None or not (need_qkv or need_q_pos or need_k_pos):
        return (None,) * 6
    qkv, q_pos, k_pos, out, lse = ctx.saved_tensors
    options = (ctx.scale, ctx.alpha)
    dqkv = None
    if torch.is_grad_enabled():
        dqkv, dq_pos, dk_pos = _differentiable_gradients(
            dout, (qkv, q_pos, k_pos), lambda x, *given: (*split_packed(x, ctx.heads), *given), *options
        )
        return dqkv, None, dq_pos, dk_pos, None, None
    if need_qkv:
        dqkv, dq_pos, dk_pos = _packed_backward(
            dout, qkv, ctx.heads, q_pos, k_pos, out, lse, *options, need_q_pos, need_k_pos
        )
    else:
        needs = [False, False, False, need_q_pos, need_k_pos]
        parts = split_packed(qkv, ctx.heads)
        *_, dq_pos, dk_pos = _positional_backward(dout, *parts, q_pos, k_pos, out, lse, *options, needs)
    positions = (dq_pos if need_q_pos else None, dk_pos if need_k_pos else None)
    return dqkv, None, *positions, None, None


_packed = Op("convinit::packed_attention", _packed_run, _packed_fake, _save_packed, _differentiate_packed)
_packed_backward = Op("convinit::packed_attention_backward", _packed_backward_run, _packed_backward_fake)
