"""What serves an attention: which backend can, which measured as fastest, and PyTorch's own by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from convinit._checks import check_choice
from convinit.kernels import configs, tuned
from convinit.ops import native
from convinit.ops.transforms import exporting, transforms_active

__all__ = [
    "BACKENDS",
    "HAS_TRITON",
    "attention_by",
    "autocast",
    "check_backend",
    "serving",
    "tuned_choice",
]

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


def autocast(x: Tensor) -> Tensor:
    """x in the dtype that autocast gives PyTorch's ops."""
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
        inputs = (autocast(q), autocast(k), autocast(v))
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
