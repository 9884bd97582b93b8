"""The transforms of torch.func and forward-mode AD, which torch.library ops do not know."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["refuse_transforms", "transforms_active"]


def transforms_active() -> bool:
    """Whether a transform of torch.func or a level of forward-mode AD is at work, in this thread."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def refuse_transforms(op: str, instead: str, *inputs: Tensor | None) -> None:
    """NotImplementedError under torch.func, and where an input has a tangent, which ops would drop."""
    if torch._C._are_functorch_transforms_active() or (
        forward_ad._current_level >= 0
        and any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs)
    ):
        raise NotImplementedError(
            f"{op} has no torch.func transforms and no forward AD (jvp); use {instead}, which has them"
        )
