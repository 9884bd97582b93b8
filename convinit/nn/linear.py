"""`nn.Linear` by the faster of the matrix products that PyTorch has for it."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Linear"]

_WORTHWHILE = 2**22  # multiplications; below it a convolution's overhead of 30 µs outweighs what it saves


class Linear(nn.Linear):
    """``nn.Linear`` that goes through oneDNN where MKL would multiply at half the CPU's rate.

    x Wᵀ + b, for x [..., in] and W [out, in], in the same precision; parameters, state_dict and hooks are
    those of ``nn.Linear``.

    PyTorch multiplies float32 matrices by MKL, which uses vectors of 256 bits on CPUs that are not Intel's,
    and convolves by oneDNN, which uses all 512 of a Zen 5: there the same product, written as a 1×1
    convolution of a channels_last image, measured 1.4 to 2.5 times as fast from 2²³ multiplications on, forward
    and backward. Everything else is ``F.linear``: other CPUs, devices and dtypes, autocast, small products,
    graphs that are exported, the transforms of torch.func, and products for which PyTorch was allowed less
    than full precision.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not _prefers_convolution(input, self.weight):
            return super().forward(input)
        rows = input.reshape(-1, self.in_features)
        image = rows.view(1, 1, *rows.shape).permute(0, 3, 1, 2)  # [1, in, 1, rows], channels_last
        out = F.conv2d(image, self.weight[:, :, None, None], self.bias)
        return out.permute(0, 2, 3, 1).reshape(*input.shape[:-1], self.out_features)


def _has_halved_mkl() -> bool:
    """Whether this is a CPU with vectors of 512 bits of which MKL uses 256: AMD's from family 26, Zen 5, on.

    Zen 4 has the instructions as well, but executes them in two halves.
    """
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    family = re.search(r"vendor_id\s*: AuthenticAMD\ncpu family\s*: (\d+)", text)
    return (
        family is not None
        and int(family[1]) >= 26
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
    )


_HALVED_MKL = _has_halved_mkl()  # asked once, for torch.compile does not trace through the questions


def _prefers_convolution(x: Tensor, weight: Tensor) -> bool:
    return (
        _HALVED_MKL
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.shape[-1] == weight.shape[1]  # else F.linear says what is wrong
        and x.numel() * weight.shape[0] >= _WORTHWHILE
        and not torch.is_autocast_enabled("cpu")
        and not (torch.compiler.is_exporting() or torch.jit.is_tracing())
        and not torch._C._are_functorch_transforms_active()
        and _full_precision()
    )


@torch.compiler.assume_constant_result
def _full_precision() -> bool:
    """Whether products are asked for in float32 itself, and by the libraries that PyTorch chooses."""
    onednn = torch.backends.mkldnn
    precisions = (onednn.matmul.fp32_precision, onednn.conv.fp32_precision)
    return bool(onednn.enabled) and all(precision in ("none", "ieee") for precision in precisions)
