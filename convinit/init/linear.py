"""Linear layers and convolutions: PyTorch's default, drawn from a CPU generator."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from convinit._checks import check_tensor
from convinit.init._shared import uniform


@torch.no_grad()
def default_(
    weight: Tensor, bias: Tensor | None = None, *, generator: torch.Generator | None = None
) -> Tensor:
    """What ``nn.Linear`` and ``nn.Conv2d`` start from, U(±√(1/fan_in)), drawn from a CPU generator.

    Args:
        weight: [out, in, ...], written in place; fan_in is the product of all sizes but the first.
        bias: [out] or None, drawn from the same interval.
        generator: CPU generator.
    """
    check_tensor("weight", weight, "[out, in, ...]")
    if bias is not None:
        check_tensor("bias", bias, "[out]", dims=1)
    bound = math.sqrt(1 / max(math.prod(weight.shape[1:]), 1))
    weight.copy_(uniform(weight.shape, bound, generator))
    if bias is not None:
        bias.copy_(uniform(bias.shape, bound, generator))
    return weight
