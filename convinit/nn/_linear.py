"""`nn.Linear` by the faster of the matrix products that PyTorch has for it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convinit.ops.cpu_products import MKL_USES_HALF_VECTORS, float32_is_exact
from convinit.ops.transforms import exporting

__all__ = ["Linear", "linear"]


class Linear(nn.Linear):
    """``nn.Linear`` that multiplies by :func:`linear`.

    Arguments, parameters, state_dict and hooks are those of ``nn.Linear``. Tools that look for that very
    type, as ``torch.ao.quantization`` does, do not see it: ``layer.__class__ = nn.Linear`` makes it one.
    """

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` that goes through oneDNN where MKL would multiply at half the CPU's rate.

    x Wᵀ + b

    On a Zen 5 PyTorch's float32 products, by MKL, use half of the CPU's vectors, and its convolutions, by
    oneDNN, all of them: with more than one thread, for with one they are MKL's as well. The same product
    written as a 1×1 convolution of a channels_last image measured 1.1 to 2.1 times as fast there, forward and
    backward (`benchmarks/bench_linear.py`), but for small and narrow products. Everything else is
    ``F.linear``: those, other CPUs, devices and dtypes, subclasses of tensors, autocast, exported graphs, the
    transforms of torch.func, and programs that allow PyTorch products of less than float32's precision.

    Args:
        x: [..., in], any floating dtype.
        weight: W [out, in].
        bias: b [out] or None.

    Returns:
        [..., out].
    """
    if (
        isinstance(x, Tensor) and x.device != weight.device
    ):  # PyTorch multiplies with a weight on the meta device as if it had values
        raise ValueError(f"x must be on the device of the weight, {weight.device}, got {x.device}")
    if not _prefers_convolution(x, weight):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    image = rows.view(1, 1, *rows.shape).permute(0, 3, 1, 2)  # [1, in, 1, rows], channels_last
    out = F.conv2d(image, weight[:, :, None, None])
    out = out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])
    # Added here, the bias's gradient is a sum by PyTorch. A convolution's own loses digits with many rows.
    return out if bias is None else out + bias


def _prefers_convolution(x: Tensor, weight: Tensor) -> bool:
    return (
        MKL_USES_HALF_VECTORS
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not x.is_nested
        and x.dim() > 0
        and x.shape[-1] == weight.shape[1]  # else F.linear says what is wrong
        and not torch.is_autocast_enabled("cpu")
        and not exporting()
        and not torch._C._are_functorch_transforms_active()
        # Not asked in exports, whose batch may be any.
        and _worthwhile(x.numel() // max(x.shape[-1], 1), *weight.shape)
        and float32_is_exact()
        # torch.compile cannot trace the last question.
        and (torch.compiler.is_compiling() or torch.get_num_threads() > 1)
    )


def _worthwhile(rows: int, outputs: int, inputs: int) -> bool:
    """Whether a product is neither so small nor so narrow that a convolution costs more than it saves."""
    return rows >= 64 and outputs >= 8 and inputs * outputs >= 512 and rows * inputs * outputs >= 2**24
