"""The CPU kernels of both attentions: what they serve, where they are faster, how they are called."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from convinit import _library  # noqa: F401  registers torch.ops.convinit
from convinit.kernels.tensor_views import image_gradient
from convinit.ops.cpu_products import MKL_USES_HALF_VECTORS, float32_is_exact
from convinit.ops.transforms import exporting, transforms_active

__all__ = [
    "apply_map",
    "backward",
    "check_native",
    "forward",
    "map_gradient",
    "prefers_native",
    "worthwhile",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Asked once, for torch.compile does not trace through the questions.
_VECTORS = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
_AMX = torch.cpu._is_amx_tile_supported()
_WORTHWHILE = 2**20  # B·heads·N²·r; below it an op's price in Python, 20 µs, outweighs what a kernel saves


def check_native(x: Tensor) -> None:
    """Raise if backend="native" cannot serve x [B, heads, N, r]: an explicit request never falls back."""
    if x.device.type != "cpu":
        raise ValueError(f'backend="native" needs tensors on the CPU, got {x.device}; use backend="auto"')
    dtype = _dtype(x)
    if dtype not in _DTYPES:
        raise TypeError(f'backend="native" takes float32, bfloat16 or float16, got {dtype}')


def prefers_native(op: str, x: Tensor) -> bool:
    """Whether backend="auto" takes the kernels of `op` for x [B, heads, N, r].

    "positional_attention": next to SDPA they measured as fast or faster in every shape from N = 64 to 2304
    and r = 32 and 64, forward and backward, with AVX-512 and with AVX2, unless the problem is tiny. Without
    either they do not compete, nor with AMX, whose tiles multiply 16-bit numbers many times faster than the
    vectors here.
    "shared_attention": next to one tall product a head 1.1 to 1.9 times as fast in float32 where MKL uses
    half of the CPU's vectors (committed rows), and 7 times and more in float16, for which PyTorch's product
    is not made (tried with AVX-512); in bfloat16 about even, so not taken. Where MKL uses all vectors nothing
    was measured.
    What is exported takes PyTorch's ops, which others can read; so do the transforms of torch.func and
    forward-mode AD, which ours do not know.
    """
    dtype = _dtype(x)
    if op != "shared_attention":
        faster = dtype in _DTYPES
    elif dtype == torch.float32:
        faster = MKL_USES_HALF_VECTORS and float32_is_exact()
    else:
        faster = dtype == torch.float16
    return (
        x.device.type == "cpu"
        and _VECTORS
        and faster
        and (dtype == torch.float32 or not _AMX)
        and not exporting()
        and not transforms_active()
        and worthwhile(x)
    )


def worthwhile(x: Tensor) -> bool:
    """Whether a problem with queries x [B, heads, N, r] is large enough for a kernel."""
    return x.shape[2] * x.numel() >= _WORTHWHILE


def forward(
    q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor | None, k_pos: Tensor | None, scale: float, alpha: float
) -> tuple[Tensor, Tensor]:
    """[B, N, heads·r], and the base-2 log-sum-exp of the logits [B, heads, N]."""
    batch, heads, tokens, rank = q.shape
    out = q.new_empty(batch, tokens, heads * rank)
    lse = q.new_empty(batch, heads, tokens, dtype=torch.float32)
    positions = (_narrow(q_pos), _narrow(k_pos))
    torch.ops.convinit.positional_attention_cpu(q, k, v, *positions, out, lse, scale, alpha)
    return out, lse


def backward(
    dout: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    scale: float,
    alpha: float,
    needs: Sequence[bool],
    image_gradients: Sequence[Tensor] | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs q, k, v, q_pos, k_pos; None where needs says False.

    Those of q, k and v are written to image_gradients, if given.
    """
    q, k, v, *given = inputs
    positions = [_narrow(x) for x in given]
    images = [image_gradient(q) for _ in range(3)] if image_gradients is None else image_gradients
    made = (*images, *(None if x is None else x.new_empty(x.shape) for x in positions))
    results = [x if need else None for x, need in zip(made, needs, strict=True)]
    torch.ops.convinit.positional_attention_backward_cpu(dout, q, k, v, *positions, *results, scale, alpha)
    pairs = zip(results, inputs, strict=True)
    return tuple(None if x is None or of is None else x.to(of.dtype) for x, of in pairs)


def apply_map(attention: Tensor, v: Tensor) -> Tensor:
    """attention [heads, N, N] · v [B, heads, N, r] → [B, N, heads·r]."""
    batch, heads, tokens, rank = v.shape
    out = v.new_empty(batch, tokens, heads * rank)
    torch.ops.convinit.apply_map_cpu(attention, v, out)
    return out


def map_gradient(dout: Tensor, v: Tensor) -> Tensor:
    """Σ over images of dout · vᵀ, [heads, N, N]."""
    _, heads, tokens, _ = v.shape
    dmap = v.new_empty(heads, tokens, tokens)
    torch.ops.convinit.map_gradient_cpu(dout, v, dmap)
    return dmap


def _dtype(x: Tensor) -> torch.dtype:
    casts = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64  # which autocast leaves alone
    return torch.get_autocast_dtype("cpu") if casts else x.dtype


def _narrow(position: Tensor | None) -> Tensor | None:
    return position.float() if position is not None and position.dtype == torch.float64 else position
