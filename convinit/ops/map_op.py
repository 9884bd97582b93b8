"""One map for all images as a torch op, on both devices.

    convinit::apply_map      map · v for every image
    convinit::map_gradient   Σ over images of dout · vᵀ

On CUDA they run `convinit.kernels`, which imports Triton, so the import waits for the first call. On a CPU
they run the compiled kernels of `convinit.ops.native`, which have no float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from convinit.kernels.tensor_views import split_heads
from convinit.ops import native
from convinit.ops.backends import autocast
from convinit.ops.op import Op
from convinit.ops.transforms import refuse_transforms

__all__ = ["apply_map"]


def apply_map(attention: Tensor, v: Tensor) -> Tensor:
    """attention [heads, N, N] · v [B, heads, N, r] → [B, N, heads·r]; cast under autocast, as for bmm."""
    refuse_transforms("the op that applies a map", 'backend="eager"', attention, v)
    return _apply_map(autocast(attention), autocast(v))


def _apply_map_run(attention: Tensor, v: Tensor) -> Tensor:
    if v.is_cuda:
        from convinit.kernels import launch

        with torch.cuda.device(v.device):
            return launch.apply_map(attention, v)
    return native.apply_map(attention, v)


def _map_gradient_run(dout: Tensor, v: Tensor) -> Tensor:
    """Σ over images of dout · vᵀ, [heads, N, N]."""
    if v.is_cuda:
        from convinit.kernels import launch

        with torch.cuda.device(v.device):
            return launch.map_gradient(dout, v)
    return native.map_gradient(dout, v)


def _apply_map_fake(attention, v):
    batch, heads, tokens, rank = v.shape
    return v.new_empty(batch, tokens, heads * rank)


def _map_gradient_fake(dout, v):
    _, heads, tokens, _ = v.shape
    return v.new_empty(heads, tokens, tokens)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_apply_map(ctx: Any, dout: Tensor) -> tuple[Tensor | None, Tensor | None]:
    attention, v = ctx.saved_tensors
    need_map, need_v = ctx.needs_input_grad
    dmap = _map_gradient(dout, v) if need_map else None
    dv = split_heads(_apply_map(attention.mT, split_heads(dout, v.shape[1])), v.shape[1]) if need_v else None
    return dmap, dv


def _differentiate_map_gradient(ctx: Any, ddmap: Tensor) -> tuple[Tensor | None, ...]:
    dout, v = ctx.saved_tensors
    need_dout, need_v = ctx.needs_input_grad
    ddout = _apply_map(ddmap, v) if need_dout else None
    heads = v.shape[1]
    dv = split_heads(_apply_map(ddmap.mT, split_heads(dout, heads)), heads) if need_v else None
    return ddout, dv


_apply_map = Op("convinit::apply_map", _apply_map_run, _apply_map_fake, _save, _differentiate_apply_map)
_map_gradient = Op(
    "convinit::map_gradient", _map_gradient_run, _map_gradient_fake, _save, _differentiate_map_gradient
)
