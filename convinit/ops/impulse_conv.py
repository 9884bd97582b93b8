"""The depthwise convolution whose filters are impulses: a shift of every channel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convinit import _library  # noqa: F401  registers torch.ops.convinit
from convinit._checks import check_offsets, check_same_device, check_tensor
from convinit.ops.transforms import transforms_active

__all__ = ["impulse_conv", "impulse_conv_reference"]


def impulse_conv(
    x: Tensor, offsets: Tensor, gain: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Every channel seen from an offset (dy, dx) of its own: a depthwise convolution with impulse filters.

    out[b, c, i, j] = gain[c] · x[b, c, i + dy_c, j + dx_c] + bias[c],   x = 0 outside the image

    It equals `F.conv2d(x, weight, bias, padding="same", groups=C)` of filters with one non-zero cell:
    weight[c, 0, dy_c + f // 2, dx_c + f // 2] = gain[c], f odd. Each value is read once, and no others: a NaN
    or an infinity in x stays where it is, while a convolution multiplies it by zero into its neighbours.

    Under autocast x is cast, as for `F.conv2d`. Differentiable, any number of times, in x, gain and bias; x
    is kept for the backward only where gain needs its gradient. Forward-mode AD and torch.func take PyTorch's
    ops.

    Args:
        x: [B, C, H, W], float64, float32, bfloat16 or float16. Contiguous or channels_last tensors are read
            as they are, others copied first.
        offsets: [C, 2], any integer dtype but uint64: (dy, dx) in pixels, of any size.
        gain, bias: [C] or None, any floating dtype; the arithmetic is float32 (float64 for float64).

    Returns:
        [B, C, H, W], dtype and memory format of x.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or device.

    Source: the frozen impulse filters of arXiv 2401.12511.
    """
    check_tensor("x", x, "[B, C, H, W]", dims=4)
    if x.shape[2] * x.shape[3] >= 2**31:
        raise ValueError(f"x must have fewer than 2**31 pixels, got {x.shape[2]} x {x.shape[3]}")
    offsets = check_offsets(offsets)
    if offsets.shape[0] != x.shape[1]:
        raise ValueError(
            f"offsets must be [C, 2] = [{x.shape[1]}, 2], one (dy, dx) per channel of x, "
            f"got {list(offsets.shape)}"
        )
    for name, factor in (("gain", gain), ("bias", bias)):
        if factor is None:
            continue
        check_tensor(name, factor, "[C] or None")
        if factor.shape != (x.shape[1],):
            raise ValueError(f"{name} must be [C] = [{x.shape[1]}], got {list(factor.shape)}")
    check_same_device("x", x, offsets=offsets, gain=gain, bias=bias)
    device = x.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        x = x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(device))
    if transforms_active():  # the op does not know them, and would drop tangents without a word
        return impulse_conv_reference(x, offsets, gain, bias)
    return torch.ops.convinit.impulse_conv(x, offsets, gain, bias)


def impulse_conv_reference(
    x: Tensor, offsets: Tensor, gain: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """`impulse_conv` in plain PyTorch: the image between as many zeros, then an index into it."""
    height, width = x.shape[2:]
    padded = F.pad(x, (width, width, height, height))
    # [C, H, 1] and [C, 1, W]; an offset beyond the image sees zeros only
    dy, dx = offsets[:, 0].clamp(-height, height), offsets[:, 1].clamp(-width, width)
    i = height + torch.arange(height, device=x.device)[:, None] + dy[:, None, None]
    j = width + torch.arange(width, device=x.device) + dx[:, None, None]
    out = padded[:, torch.arange(x.shape[1], device=x.device)[:, None, None], i, j]
    dtype = torch.promote_types(x.dtype, torch.float32)
    if gain is not None:
        out = gain.to(dtype)[:, None, None] * out
    if bias is not None:
        out = out + bias.to(dtype)[:, None, None]
    out = out.to(x.dtype)
    if transforms_active():  # vmap knows no memory format
        return out
    memory_format = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
    return out.contiguous(memory_format=memory_format)


def _is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    x, offsets, gain, bias = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, offsets, gain, bias)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, offsets, gain, bias = ctx.saved_tensors
    dx = dgain = dbias = None
    dtype = torch.promote_types(grad.dtype, torch.float32)  # of the sums
    if ctx.needs_input_grad[0]:
        dx = torch.ops.convinit.impulse_conv(grad, -offsets, gain, None)
    if ctx.needs_input_grad[2]:
        seen = torch.ops.convinit.impulse_conv(x, offsets, None, None)
        dgain = (grad.to(dtype) * seen).sum((0, 2, 3)).to(gain.dtype)
    if ctx.needs_input_grad[3]:
        dbias = grad.sum((0, 2, 3), dtype=dtype).to(bias.dtype)
    return dx, None, dgain, dbias


# Devices without a compiled kernel.
torch.library.register_kernel("convinit::impulse_conv", None)(impulse_conv_reference)
torch.library.register_autograd("convinit::impulse_conv", _backward, setup_context=_save)


@torch.library.register_fake("convinit::impulse_conv")
def _(x: Tensor, offsets: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
    if x.is_contiguous() or _is_channels_last(x):
        return torch.empty_like(x)
    return x.new_empty(x.shape)
