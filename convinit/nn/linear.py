"""`nn.Linear` by the faster of the matrix products that PyTorch has for it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convinit.ops.products import HALVED_MKL, full_precision

__all__ = ["Linear", "linear"]

_WORTHWHILE = 2**22  # multiplications; below it a convolution's overhead, 30 µs, outweighs what it saves


class Linear(nn.Linear):
    """``nn.Linear`` that multiplies by :func:`linear`.

    Arguments, parameters, state_dict and hooks are those of ``nn.Linear``.
    """

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` that goes through oneDNN where MKL would multiply at half the CPU's rate.

    x Wᵀ + b

    On a Zen 5 PyTorch's float32 products, by MKL, use half of the CPU's vectors, and its convolutions, by
    oneDNN, all of them. The same product written as a 1×1 convolution of a channels_last image measured 1.4
    to 2.5 times as fast there, forward and backward, from 2²³ multiplications on. Everything else is
    ``F.linear``: other CPUs, devices and dtypes, autocast, small products, exported graphs, the transforms
    of torch.func, and programs that allow PyTorch products of less than float32's precision.

    Args:
        x: [..., in], any floating dtype.
        weight: W [out, in].
        bias: b [out] or None.

    Returns:
        [..., out].
    """
    if not _prefers_convolution(x, weight):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    image = rows.view(1, 1, *rows.shape).permute(0, 3, 1, 2)  # [1, in, 1, rows], channels_last
    out = F.conv2d(image, weight[:, :, None, None], bias)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


def _prefers_convolution(x: Tensor, weight: Tensor) -> bool:
    return (
        HALVED_MKL
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.dim() > 0
        and x.shape[-1] == weight.shape[1]  # else F.linear says what is wrong
        and not torch.is_autocast_enabled("cpu")
        and not (torch.compiler.is_exporting() or torch.jit.is_tracing())
        and x.numel() * weight.shape[0] >= _WORTHWHILE  # not asked in exports, whose batch may be any
        and not torch._C._are_functorch_transforms_active()
        and full_precision()
    )
