"""Value and output weights: mimetic."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from convinit._checks import check_tensor
from convinit.init._shared import mimetic_svd, rounded, uniform


@torch.no_grad()
def mimetic_vo_(
    wv: Tensor,
    wo: Tensor,
    *,
    noise: float = 0.4,
    identity: float = -0.4,
    distribution: str = "normal",
    transposed: bool = True,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Mimetic initialisation of values and output layer: wv @ wo ≈ noise · Z + identity · I.

    noise · Z + identity · I = U S Vᵀ,   wv = U √S,   wo = √S Vᵀ;   Z [D, D], over all heads together.

    With heads·r < D the product is the best one of that rank. With heads·r > D the columns of wv beyond D
    are U(±√(1/D)) and the rows of wo that meet them are 0: the product is exact, and they can still learn.

    Args:
        wv: [D, heads·r], v = x @ wv; of an ``nn.Linear``: ``linear.weight.mT``. Written in place.
        wo: [heads·r, D], y = out @ wo. Written in place.
        noise, identity, distribution, generator: see :func:`mimetic_qk_`.
        transposed: False writes U √S and √S Vᵀ into the weights of the ``nn.Linear`` themselves, without the
            transposition: wv = (U √S)ᵀ and wo = (√S Vᵀ)ᵀ, for heads·r = D alone. The published mimetic
            baselines of arXiv 2404.01139 and 2505.19985 do that; the diagonal of wv @ wo then has the same
            mean, −0.4, but a standard deviation of 0.24 at D = 192 instead of 0.03.

    Returns:
        (wv, wo).

    Raises:
        ValueError: the shapes do not agree, or transposed=False with heads·r other than D.

    Source: arXiv 2305.09828.
    """
    check_tensor("wv", wv, "[D, heads·r]", dims=2)
    check_tensor("wo", wo, "[heads·r, D]", dims=2)
    if wv.shape != wo.shape[::-1]:
        raise ValueError(
            f"wv and wo must be [D, heads·r] and [heads·r, D], got {list(wv.shape)} and {list(wo.shape)}"
        )
    dim, inner = wv.shape
    if not transposed and inner != dim:
        raise ValueError(f"transposed must be True unless heads·r = D, got heads·r = {inner} and D = {dim}")
    u, s, vh = mimetic_svd((dim, dim), noise, identity, distribution, generator, truncated=inner < dim)
    rank = min(dim, inner)
    root = s[:rank].sqrt()
    factors = u[:, :rank] * root, root.unsqueeze(1) * vh[:rank]
    if not transposed:
        factors = factors[0].mT, factors[1].mT
    new_wv, new_wo = rounded("wv", wv, factors[0]), rounded("wo", wo, factors[1])
    wv[:, :rank], wo[:rank] = new_wv, new_wo
    if inner > dim:
        wv[:, dim:] = uniform((dim, inner - dim), math.sqrt(1 / dim), generator).to(wv)
        wo[dim:] = 0
    return wv, wo
