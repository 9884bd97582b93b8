"""Steps of the papers' Q/K fit: loss, gradient and Adam update of query and key weights, in place."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BETAS, EPS = (0.9, 0.999), 1e-8  # PyTorch's defaults, which the papers keep


def adam_steps_(
    tokens: Tensor,
    directions: Tensor,
    targets: Tensor,
    wq: Tensor,
    wk: Tensor,
    moments: Tensor,
    *,
    scale: float,
    heads: int,
    lr: float,
    first_step: int,
    steps: int,
) -> Tensor:
    """Makes Adam steps on the mse of attention maps, in place.

    With P = tokens @ directions.T, A = softmax(scale · (P W_q)(P W_k)ᵀ), M[b, n, m] = (targets[b, n] == m), a
    step is one of `torch.optim.Adam([wq, wk], lr)` on

        (A − M).square().mean(dim=(1, 2)).sum() / heads

    The gradient is made by hand.

    Args:
        tokens: X [N, ρ], floating, as all that follow: the tokens in a basis of the row space of P.
        directions: V [D, ρ], orthonormal columns: the basis.
        targets: [B, N] int64: the column that row n is to look at, or −1 for none.
        wq, wk: [B, D, r]; updated.
        moments: [2, 2, B, D, r]: Adam's first and second moments of wq and wk; updated. Zeros at the first
            step.
        scale: softmax temperature.
        heads: the number of heads over which the loss is a mean.
        lr: learning rate.
        first_step: steps already made with these moments.
        steps: steps to make.

    Returns:
        [B]: each head's mse before the last of these steps; zeros where there was none.

    Raises:
        ValueError: a target lies outside [−1, N).

    Source: loss, optimiser and constants are those of arXiv 2401.12511 and 2404.01139; the basis is ours and
    changes rounding alone.
    """
    X, V, n = tokens, directions, tokens.shape[0]
    if ((targets < -1) | (targets >= n)).any():
        raise ValueError(f"targets must lie in [-1, {n}), the number of tokens")
    inside, column = (targets >= 0)[:, :, None].to(X), targets.clamp(min=0)[:, :, None]
    loss = X.new_zeros(len(targets))
    for step in range(first_step + 1, first_step + steps + 1):
        q, k = X @ (V.T @ wq), X @ (V.T @ wk)  # [B, N, r]
        attention = torch.softmax(scale * (q @ k.mT), dim=-1)
        difference = attention.scatter_add(2, column, -inside)  # attention − M
        if step == first_step + steps:
            loss = difference.square().mean(dim=(1, 2))
        difference -= (attention * difference).sum(dim=-1, keepdim=True)
        grad_logits = difference.mul_(attention).mul_(2 * scale / (heads * n**2))
        gradients = V @ (X.T @ (grad_logits @ k)), V @ (X.T @ (grad_logits.mT @ q))
        for w, gradient, m, v in zip((wq, wk), gradients, *moments, strict=True):
            m.lerp_(gradient, 1 - BETAS[0])
            v.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            spread = v.sqrt().div_(math.sqrt(1 - BETAS[1] ** step)).add_(EPS)
            w.addcdiv_(m, spread, value=-lr / (1 - BETAS[0] ** step))
    return loss
