"""The transforms of torch.func and forward-mode AD, which torch.library ops do not know."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["exporting", "refuse_transforms", "transforms_active"]


def transforms_active() -> bool:
    """Whether a transform of torch.func or a level of forward-mode AD is at work, in this thread."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def exporting() -> bool:
    """Whether a graph is recorded that others are to read.

    The flag behind `torch.compiler.is_exporting`, which is True in every graph of Dynamo before torch 2.12.
    """
    return torch.compiler._is_exporting_flag or torch.jit.is_tracing()


def refuse_transforms(op: str, instead: str, *inputs: Tensor | None) -> None:
    """NotImplementedError under torch.func, and where an input has a tangent, which ops would drop."""
    if torch._C._are_functorch_transforms_active() or (
        forward_ad._current_level >= 0
        and any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs)
    ):
        raise NotImplementedError(
            f"{op} has no torch.func transforms and no forward AD (jvp); use {instead}, which has them"
        )
