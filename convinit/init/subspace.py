"""A subspace V of the residual stream that belongs to the position embedding P alone.

    x = P + content,   P V Vᵀ = P,   content V = 0

Trained transformers end there by themselves (arXiv 2310.04861). As an initial state it means: a norm in front
of an attention shows the positions undisturbed up to one factor a token, and queries and keys that live in V
feel no content at all. A norm also removes the mean of a token, so V is orthogonal to the all-ones vector.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Directions of P count above this share of the strongest, and above what its dtype rounds.
_SMALLEST_DIRECTION = 1e-3
_ORTHOGONAL = 1e-5  # a writer whose part in V is smaller, as a share of its norm, is left as it is


def row_space(P: Tensor, dtype: torch.dtype) -> Tensor:
    """V [D, k] float64, orthonormal: the numerical row space of P [N, D] behind a norm that removes means.

    dtype: that P is stored in. Rounding alone makes directions of up to a third of its eps.
    """
    centred = P.double() - P.double().mean(dim=1, keepdim=True)
    _, S, Vh = torch.linalg.svd(centred, full_matrices=False)
    smallest = max(_SMALLEST_DIRECTION, torch.finfo(dtype).eps / 2)
    return Vh[S > smallest * S[0]].mT


def outside(weight: Tensor, V: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What lies outside of V [D, k] of a weight [D, ...] or bias [D] that writes to the tokens.

    W - V Vᵀ W

    Args:
        weight: W.
        V: float64, orthonormal columns.
        dtype: that W is stored in.

    Returns:
        As W, or None if W is orthogonal to V to rounding: it then keeps its bits.
    """
    matrix = weight.double().reshape(len(V), -1)
    inside = V.mT @ matrix
    if inside.norm() <= max(_ORTHOGONAL, torch.finfo(dtype).eps / 2) * matrix.norm():
        return None
    return torch.addmm(matrix, V, inside, alpha=-1).view(weight.shape).to(weight)
