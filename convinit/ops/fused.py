"""The fused kernels as torch ops: schemas, fake kernels, autograd, and what runs on which device.

    convinit::positional_attention   softmax(scale · (α q + q_pos)(α k + k_pos)ᵀ) v   and its backward
    convinit::apply_map              map · v for every image                          and its backward

On CUDA they run `convinit.kernels`, which imports Triton, so the import waits for the first call. On a CPU
they run the compiled kernels of `convinit.ops.native`; float64 runs plain PyTorch, for tests and
tracing.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convinit._checks import check_choice
from convinit.kernels import configs, tuned
from convinit.kernels.layout import image_gradient, split_heads, split_packed
from convinit.ops import native
from convinit.ops.transforms import exporting, refuse_transforms, transforms_active

__all__ = [
    "BACKENDS",
    "apply_map",
    "attention_by",
    "check_backend",
    "fused_packed_attention",
    "fused_positional_attention",
    "serving",
    "tuned_choice",
]

_EAGER = 'backend="eager"'
BACKENDS = ("auto", "triton", "native", "sdpa", "eager")
HAS_TRITON = importlib.util.find_spec("triton") is not None
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_backend(backend: str) -> None:
    check_choice("backend", backend, BACKENDS)


def _check_triton(x: Tensor) -> None:
    """Raise if backend="triton" cannot serve x [B, heads, N, r]: an explicit request never falls back."""
    if not HAS_TRITON:
        raise RuntimeError('backend="triton" needs Triton, which is not installed; use backend="auto"')
    if x.device.type != "cuda":
        raise ValueError(
            f'backend="triton" needs tensors on a CUDA device, got {x.device}; use backend="auto"'
        )
    dtype = _autocast_dtype(x)
    if dtype not in _DTYPES:
        raise TypeError(f'backend="triton" takes bfloat16, float16 or float32, got {dtype}')
    if x.shape[2] > configs.MAX_TOKENS or x.shape[3] > configs.MAX_RANK:
        raise ValueError(
            f'backend="triton" takes N up to {configs.MAX_TOKENS} and r up to {configs.MAX_RANK}, '
            f"got [B, heads, N, r] = {list(x.shape)}"
        )


def tuned_choice(op: str, x: Tensor, dropout_p: float, *others: Tensor | None) -> str:
    """The choice of backend="auto" on CUDA for x [B, heads, N, r]: one of `tuned.CHOICES`.

    others: the further inputs, positions last (two for "positional_attention").
    "torch" is PyTorch's choice by itself. It serves dropout, whatever is exported or traced, the transforms
    of torch.func, forward-mode AD, and sizes that torch.compile keeps open; compiled, its back ends are not
    chosen by name.
    """
    if not x.is_cuda or dropout_p > 0 or exporting() or transforms_active() or not _static(x.shape[1:]):
        return "torch"
    batch, heads, tokens, rank = x.shape
    positions = op == "positional_attention" and any(position is not None for position in others[-2:])
    training = torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in (x, *others))
    choice, least = tuned.choice(x.device.index, op, _autocast_dtype(x), tokens, rank, positions, training)
    if batch * heads < least or (choice not in ("torch", "triton") and torch.compiler.is_compiling()):
        return "torch"
    return choice


def _static(sizes: Sequence[int]) -> bool:
    if not torch.compiler.is_compiling():
        return all(type(size) is int for size in sizes)
    from torch.fx.experimental.symbolic_shapes import has_static_value  # takes a second to import

    return all(has_static_value(size) for size in sizes)


def serving(op: str, backend: str, x: Tensor, dropout_p: float = 0.0, *others: Tensor | None) -> str:
    """The implementation that serves an attention over x [B, heads, N, r]; raises if `backend` cannot.

    "kernels" are the fused ops; else PyTorch, as one of `tuned.CHOICES` says.

    Args:
        op: "positional_attention" or "shared_attention".
        dropout_p: inside the op. The shared map is dropped from before it gets there.
        others: the further inputs, positions last, of which a choice by measurements depends.
    """
    if backend in ("sdpa", "eager"):
        return "torch"
    if backend == "auto":
        choice = tuned_choice(op, x, dropout_p, *others)
        ours = choice == "triton" or (dropout_p == 0 and native.prefers_native(op, x))
        return "kernels" if ours else choice
    if dropout_p > 0:
        raise ValueError(
            f'backend="{backend}" has no dropout, got dropout_p = {dropout_p}; use backend="auto"'
        )
    (_check_triton if backend == "triton" else native.check_native)(x)
    return "kernels"


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
    refuse_transforms("positional attention's op", _EAGER, q, k, v, q_pos, k_pos)
    q, k, v = _autocast(q), _autocast(k), _autocast(v)
    return _positional(q, k, v, q_pos, k_pos, scale, alpha)[0]


def fused_packed_attention(
    qkv: Tensor,
    heads: int,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    scale: float,
    alpha: float,
) -> Tensor:
    """The same of one packed product qkv [B, N, 3·heads·r], whose gradient is written packed, uncopied."""
    refuse_transforms("positional attention's op", _EAGER, qkv, q_pos, k_pos)
    qkv = _autocast(qkv)
    return _packed(qkv, heads, q_pos, k_pos, scale, alpha)[0]


def apply_map(attention: Tensor, v: Tensor) -> Tensor:
    """attention [heads, N, N] · v [B, heads, N, r] → [B, N, heads·r]; cast under autocast, as for bmm."""
    refuse_transforms("the op that applies a map", _EAGER, attention, v)
    return _apply_map(_autocast(attention), _autocast(v))


def _autocast(x: Tensor) -> Tensor:
    return x.to(_autocast_dtype(x))


def _autocast_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    casts = torch.is_autocast_enabled(device) and x.dtype != torch.float64  # as torch's own ops
    return torch.get_autocast_dtype(device) if casts else x.dtype


def attention_by(choice: str, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, scale: float) -> Tensor:
    """PyTorch's attention, [B, heads, N, r], by one of its back ends where `choice` names one that serves.

    The back ends' ops are called themselves: `sdpa_kernel` changes the state of the whole process, for all
    its threads, and takes longer than a small attention.
    """
    if choice in _SERVES:
        inputs = (_autocast(q), _autocast(k), _autocast(v))
        if _SERVES[choice](torch.backends.cuda.SDPAParams(*inputs, None, 0.0, False, False)):
            return _sdpa_op(choice, *inputs, scale)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale)


_SERVES = {  # also: whether the user has it switched on
    "cudnn": torch.backends.cuda.can_use_cudnn_attention,
    "flash": torch.backends.cuda.can_use_flash_attention,
    "efficient": torch.backends.cuda.can_use_efficient_attention,
}


def _sdpa_op(choice: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    if choice == "flash":
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0]
    keep = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if choice == "cudnn":
        return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, keep, scale=scale)[0]
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, keep, scale=scale)[0]


# --- positional attention ---------------------------------------------------------------------------------


@torch.library.custom_op("convinit::positional_attention", mutates_args=(), device_types="cpu")
def _positional(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    scale: float,
    alpha: float,
) -> tuple[Tensor, Tensor]:
    if native.serves(q):
        return native.forward(q, k, v, q_pos, k_pos, scale, alpha)
    q_mixed, k_mixed, values = (
        _mixed(x, pos, alpha if mix else 1.0) for x, pos, mix in ((q, q_pos, 1), (k, k_pos, 1), (v, None, 0))
    )
    logits = scale * q_mixed @ k_mixed.mT  # [B, heads, N, N]
    lse = logits.logsumexp(-1)
    weights = (logits - lse.unsqueeze(-1)).exp()
    out = (weights @ values).transpose(1, 2).flatten(2)
    return out.to(q.dtype).contiguous(), (lse / math.log(2)).float().contiguous()


@torch.library.custom_op("convinit::positional_attention_backward", mutates_args=(), device_types="cpu")
def _positional_backward(
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
    if native.serves(q):
        inputs = (q, k, v, q_pos, k_pos)
        return _filled(q, native.backward(dout, inputs, scale, alpha, needs))
    heads = q.shape[1]
    q_mixed, k_mixed, values = _mixed(q, q_pos, alpha), _mixed(k, k_pos, alpha), _mixed(v, None, 1.0)
    dout, out = (split_heads(x, heads).to(values.dtype) for x in (dout, out))  # [B, heads, N, r]
    weights = (scale * q_mixed @ k_mixed.mT).softmax(-1)  # [B, heads, N, N]
    delta = (dout * out).sum(-1, keepdim=True)
    dlogits = scale * weights * (dout @ values.mT - delta)
    dq, dk, dv = dlogits @ k_mixed, dlogits.mT @ q_mixed, weights.mT @ dout
    full = (alpha * dq, alpha * dk, dv, dq.sum(0), dk.sum(0))
    results = _empty_gradients((q, k, v, q_pos, k_pos), needs)
    for result, gradient, need in zip(results, full, needs, strict=True):
        if need:
            result.copy_(gradient)
    return results


def _mixed(x: Tensor, pos: Tensor | None, alpha: float) -> Tensor:
    """α x + pos, in float32 or float64."""
    x = alpha * x.to(torch.promote_types(x.dtype, torch.float32))
    return x if pos is None else x + pos.to(x.dtype)


def _filled(
    like: Tensor, gradients: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """An op returns tensors: empty ones for gradients that nobody needs."""
    dq, dk, dv, dq_pos, dk_pos = (like.new_empty(0) if x is None else x for x in gradients)
    return dq, dk, dv, dq_pos, dk_pos


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


def _empty_gradients(
    inputs: Sequence[Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of q, k, v as [B, N, heads, r] in memory, and of q_pos, k_pos."""
    first = inputs[0]
    assert first is not None
    q, k, v, q_pos, k_pos = (
        x if x is not None and need else None for x, need in zip(inputs, needs, strict=True)
    )
    dq, dk, dv = (first.new_empty(0) if x is None else image_gradient(x) for x in (q, k, v))
    dq_pos, dk_pos = (first.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q_pos, k_pos))
    return dq, dk, dv, dq_pos, dk_pos


@_positional.register_fake
def _(q, k, v, q_pos, k_pos, scale, alpha):
    batch, heads, tokens, rank = q.shape
    lse_dtype = torch.float32
    return q.new_empty(batch, tokens, heads * rank), q.new_empty(batch, heads, tokens, dtype=lse_dtype)


@_positional_backward.register_fake
def _(dout, q, k, v, q_pos, k_pos, out, lse, scale, alpha, needs):
    return _empty_gradients((q, k, v, q_pos, k_pos), needs)


@_positional.register_kernel("cuda")
def _(q, k, v, q_pos, k_pos, scale, alpha):
    from convinit.kernels import launch

    with torch.cuda.device(q.device):
        return launch.positional_forward(q, k, v, q_pos, k_pos, scale, alpha)


@_positional_backward.register_kernel("cuda")
def _(dout, q, k, v, q_pos, k_pos, out, lse, scale, alpha, needs):
    from convinit.kernels import launch

    with torch.cuda.device(q.device):
        gradients = launch.positional_backward(dout, q, k, v, q_pos, k_pos, out, lse, scale, alpha, needs)
    return _filled(q, gradients)


def _setup_positional(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.alpha = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward_positional(ctx: Any, dout: Tensor | None, _dlse: Tensor | None) -> tuple[Tensor | None, ...]:
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


_positional.register_autograd(_backward_positional, setup_context=_setup_positional)


# --- the same of a packed product: autograd of its views would copy the three gradients together -----------


@torch.library.custom_op("convinit::packed_attention", mutates_args=())
def _packed(
    qkv: Tensor,
    heads: int,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    scale: float,
    alpha: float,
) -> tuple[Tensor, Tensor]:
    if native.serves(qkv):  # without the price of a second op
        q, k, v = split_packed(qkv, heads)
        return native.forward(q, k, v, q_pos, k_pos, scale, alpha)
    return _positional(*split_packed(qkv, heads), q_pos, k_pos, scale, alpha)


@torch.library.custom_op("convinit::packed_attention_backward", mutates_args=(), device_types="cpu")
def _packed_backward(
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
    needs = [True, True, True, need_q_pos, need_k_pos]
    dqkv = qkv.new_empty(qkv.shape)
    parts = split_packed(dqkv, heads)
    if native.serves(qkv):
        inputs = (*split_packed(qkv, heads), q_pos, k_pos)
        *_, dq_pos, dk_pos = _filled(qkv, native.backward(dout, inputs, scale, alpha, needs, parts))
        return dqkv, dq_pos, dk_pos
    *gradients, dq_pos, dk_pos = _positional_backward(
        dout, *split_packed(qkv, heads), q_pos, k_pos, out, lse, scale, alpha, needs
    )
    for part, gradient in zip(parts, gradients, strict=True):
        part.copy_(gradient)
    return dqkv, dq_pos, dk_pos


@_packed.register_fake
def _(qkv, heads, q_pos, k_pos, scale, alpha):
    batch, tokens, width = qkv.shape
    return qkv.new_empty(batch, tokens, width // 3), qkv.new_empty(batch, heads, tokens, dtype=torch.float32)


@_packed_backward.register_fake
def _(dout, qkv, heads, q_pos, k_pos, out, lse, scale, alpha, need_q_pos, need_k_pos):
    positions = ((q_pos, need_q_pos), (k_pos, need_k_pos))
    dq_pos, dk_pos = (x.new_empty(x.shape) if need else qkv.new_empty(0) for x, need in positions)
    return qkv.new_empty(qkv.shape), dq_pos, dk_pos


@_packed_backward.register_kernel("cuda")
def _(dout, qkv, heads, q_pos, k_pos, out, lse, scale, alpha, need_q_pos, need_k_pos):
    from convinit.kernels import launch

    dqkv = qkv.new_empty(qkv.shape)
    needs = (True, True, True, need_q_pos, need_k_pos)
    with torch.cuda.device(qkv.device):
        *_, dq_pos, dk_pos = launch.positional_backward(
            dout, *split_packed(qkv, heads), q_pos, k_pos, out, lse, scale, alpha, needs,
            image_gradients=split_packed(dqkv, heads),
        )  # fmt: skip
    return dqkv, *(qkv.new_empty(0) if x is None else x for x in (dq_pos, dk_pos))


def _setup_packed(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.heads, q_pos, k_pos, ctx.scale, ctx.alpha = inputs
    ctx.save_for_backward(qkv, q_pos, k_pos, *output)
    ctx.set_materialize_grads(False)


def _backward_packed(ctx: Any, dout: Tensor | None, _dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    need_qkv, _, need_q_pos, need_k_pos, *_ = ctx.needs_input_grad
    if dout is None or not (need_qkv or need_q_pos or need_k_pos):
        return (None,) * 6
    qkv, q_pos, k_pos, out, lse = ctx.saved_tensors
    options = (ctx.scale, ctx.alpha)
    if torch.is_grad_enabled():
        dqkv, dq_pos, dk_pos = _differentiable_gradients(
            dout, (qkv, q_pos, k_pos), lambda x, *given: (*split_packed(x, ctx.heads), *given),
            ctx.scale, ctx.alpha,
        )  # fmt: skip
        return dqkv, None, dq_pos, dk_pos, None, None
    if need_qkv:
        dqkv, dq_pos, dk_pos = _packed_backward(
            dout, qkv, ctx.heads, q_pos, k_pos, out, lse, *options, need_q_pos, need_k_pos
        )
    else:
        needs = [False, False, False, need_q_pos, need_k_pos]
        parts = split_packed(qkv, ctx.heads)
        *_, dq_pos, dk_pos = _positional_backward(dout, *parts, q_pos, k_pos, out, lse, *options, needs)
        dqkv = None
    positions = (dq_pos if need_q_pos else None, dk_pos if need_k_pos else None)
    return dqkv, None, *positions, None, None


_packed.register_autograd(_backward_packed, setup_context=_setup_packed)


# --- one map for all images -------------------------------------------------------------------------------


@torch.library.custom_op("convinit::apply_map", mutates_args=(), device_types="cpu")
def _apply_map(attention: Tensor, v: Tensor) -> Tensor:
    if native.serves(v):
        return native.apply_map(attention, v)
    return (attention @ v).transpose(1, 2).flatten(2).contiguous()


@torch.library.custom_op("convinit::map_gradient", mutates_args=(), device_types="cpu")
def _map_gradient(dout: Tensor, v: Tensor) -> Tensor:
    """Σ over images of dout · vᵀ, [heads, N, N]."""
    if native.serves(v):
        return native.map_gradient(dout, v)
    return torch.einsum("bnhr,bhmr->hnm", dout.unflatten(-1, (v.shape[1], -1)), v).contiguous()


@_apply_map.register_fake
def _(attention, v):
    batch, heads, tokens, rank = v.shape
    return v.new_empty(batch, tokens, heads * rank)


@_map_gradient.register_fake
def _(dout, v):
    _, heads, tokens, _ = v.shape
    return v.new_empty(heads, tokens, tokens)


@_apply_map.register_kernel("cuda")
def _(attention, v):
    from convinit.kernels import launch

    with torch.cuda.device(v.device):
        return launch.apply_map(attention, v)


@_map_gradient.register_kernel("cuda")
def _(dout, v):
    from convinit.kernels import launch

    with torch.cuda.device(v.device):
        return launch.map_gradient(dout, v)


def _save_inputs(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_apply_map(ctx: Any, dout: Tensor) -> tuple[Tensor | None, Tensor | None]:
    attention, v = ctx.saved_tensors
    need_map, need_v = ctx.needs_input_grad
    dmap = _map_gradient(dout, v) if need_map else None
    dv = split_heads(_apply_map(attention.mT, split_heads(dout, v.shape[1])), v.shape[1]) if need_v else None
    return dmap, dv


def _backward_map_gradient(ctx: Any, ddmap: Tensor) -> tuple[Tensor | None, ...]:
    dout, v = ctx.saved_tensors
    need_dout, need_v = ctx.needs_input_grad
    ddout = _apply_map(ddmap, v) if need_dout else None
    heads = v.shape[1]
    dv = split_heads(_apply_map(ddmap.mT, split_heads(dout, heads)), heads) if need_v else None
    return ddout, dv


_apply_map.register_autograd(_backward_apply_map, setup_context=_save_inputs)
_map_gradient.register_autograd(_backward_map_gradient, setup_context=_save_inputs)
