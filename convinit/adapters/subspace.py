"""The position embedding P of models that add one to their tokens, and its subspace: see `init.subspace`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from convinit.adapters.layout import LinearWeights, Slot
from convinit.init.subspace import outside

# rms of P / rms of the content, where P is made here. See docs/init_vit for the sweep.
POSITION_TO_CONTENT = 1.0
# rms that mimetic values give the content after a layer or two, however small the patch embedding makes it.
# A ViT of Hugging Face ends 60 steps on 300 digits with a training loss of 2.1 where P is measured by its
# patch embedding alone, and of 0.6, 0.5 and 0.8 with 0.2, 0.3 and 0.5 here.
MIMETIC_CONTENT = 0.3
# Directions of P: enough for a peak of 0.7 on 37 × 37 tokens with r = 64. More than 2r do harm, for queries
# and keys have rank r; the content needs the others.
_MOST_DIRECTIONS = 64
MOST_OF_WIDTH = 0.75  # of D, that a P that is kept may take
_EQUAL_ROWS = 1e-5  # spread of the norms of P's rows, as a share of their mean, that no noise has


def smooth_position(
    grid_size: tuple[int, int], dim: int, head_dim: int, generator: torch.Generator
) -> Tensor:
    """P [N, D] of rms 1: the lowest cosines of the grid, rows of equal norm, turned into D at random.

    P = √D · normalised rows of B Qᵀ;  B [N, k] the k lowest non-constant 2-D cosines, Q [D, k] orthonormal
    and orthogonal to the all-ones vector

    Args:
        grid_size: (H, W), N = H·W.
        dim, head_dim: D and r; k = min(64, 2r, N / 2, D / 2).
        generator: CPU generator of the rotation Q.
    """
    height, width = grid_size
    tokens = height * width
    rank = min(_MOST_DIRECTIONS, 2 * head_dim, max(tokens // 2, min(tokens - 1, 8)), dim // 2)
    rows, columns = _cosines(height), _cosines(width)
    lowest = sorted(
        (i * i / height**2 + j * j / width**2, i, j) for i in range(height) for j in range(width)
    )[1 : rank + 1]
    basis = torch.stack([torch.outer(rows[i], columns[j]).flatten() for _, i, j in lowest], dim=1)
    noise = torch.randn(dim, len(lowest), generator=generator, dtype=torch.float64, device="cpu")
    ones = torch.ones(dim, 1, dtype=torch.float64, device="cpu")
    turn = torch.linalg.qr(torch.cat([ones, noise], dim=1)).Q[:, 1:]
    return (math.sqrt(dim) * basis / basis.norm(dim=1, keepdim=True) @ turn.mT).float()


def _cosines(n: int) -> Tensor:
    """[n, n]: row i is the i-th cosine over n places, of mean square 1."""
    places = (torch.arange(n, dtype=torch.float64, device="cpu") + 0.5) / n
    cosines = torch.cos(math.pi * torch.arange(n, dtype=torch.float64, device="cpu")[:, None] * places)
    cosines[1:] *= math.sqrt(2)
    return cosines


def looks_drawn(P: Tensor, grid_size: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether P [N, D] is as libraries draw it: the same row everywhere, or rows without relation.

    Neighbours correlate in everything that is made for a grid or was trained on one; on a few tokens too
    little to tell, but there all rows of what is made, here or as sin-cos, have one norm.
    """
    P = P.double()
    norms = P.norm(dim=1)
    P = P - P.mean(dim=0)
    energy = P.square().mean()
    if energy == 0:
        return True
    if norms.max() - norms.min() < max(_EQUAL_ROWS, torch.finfo(dtype).eps / 4) * norms.mean():
        return False
    grid = P.unflatten(0, grid_size)
    pairs = [(grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1])]
    products = torch.cat([(a * b).mean(dim=-1).flatten() for a, b in pairs])
    spread = 1 / math.sqrt(max(products.numel(), 1) * P.shape[1])  # of the mean, for rows without relation
    bias = 1 / len(P)  # of removing the mean row
    return bool((products.mean() / energy).abs() < 5 * spread + bias)


def separate_(slot: Slot, V: Tensor, *, rows: bool = False) -> None:
    """:func:`outside` of a weight [D, ...] or bias [D], or with `rows` of tokens [n, D]; written in place."""
    values = slot.read()
    new = outside(values.mT if rows else values, V, slot.tensor.dtype)
    if new is not None:
        slot.write_(new.mT if rows else new)


def separate_writer_(writer: LinearWeights, V: Tensor) -> None:
    """The weight and the bias of a map whose output is added to the residual stream."""
    separate_(writer.weight, V)
    if writer.bias is not None:
        separate_(writer.bias, V)
