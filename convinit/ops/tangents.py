"""Ops without a formula for forward-mode AD."""

from __future__ import annotations

from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["refuse_tangents"]


def refuse_tangents(op: str, instead: str, *inputs: Tensor | None) -> None:
    """Raise NotImplementedError if an input has a tangent, which torch.library would drop without a word."""
    if forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise NotImplementedError(f"{op} has no forward AD (jvp); use {instead}, which has it")
