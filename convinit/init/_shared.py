"""Draws and checks that several initialisers share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from convinit._checks import check_choice, check_generator, check_real


def rand(shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
    check_generator(generator)
    return torch.rand(tuple(shape), generator=generator, device="cpu", dtype=torch.float32)


def uniform(shape: Sequence[int], bound: float, generator: torch.Generator | None) -> Tensor:
    return rand(shape, generator).mul_(2).sub_(1).mul_(bound)


def random_of_same_norm(values: Tensor, generator: torch.Generator | None, dim: int | None = None) -> Tensor:
    """Normal draws whose norms along `dim`, or altogether, are those of `values`."""
    check_generator(generator)
    random = torch.randn(values.shape, generator=generator, device="cpu", dtype=torch.float32).to(values)
    norms = (torch.linalg.vector_norm(each, dim=dim, keepdim=True) for each in (values, random))
    return random * torch.div(*norms)


def mimetic_svd(
    shape: tuple[int, ...],
    noise: float,
    identity: float,
    distribution: str,
    generator: torch.Generator | None,
    *,
    truncated: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of noise · Z + identity · I. Where it is to be truncated, a cut between close singular values
    wants them in float64."""
    dim = shape[-1]
    noise, identity = check_real("noise", noise), check_real("identity", identity)
    check_choice("distribution", distribution, ("normal", "uniform"))
    if distribution == "normal":
        check_generator(generator)
        z = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32).div_(math.sqrt(dim))
    else:
        z = uniform(shape, math.sqrt(1 / dim), generator)
    z = z.double() if truncated else z
    matrix = z.mul_(noise)
    matrix.diagonal(dim1=-2, dim2=-1).add_(identity)
    gram = matrix.mT @ matrix
    if not gram.isfinite().all():
        raise ValueError(f"noise and identity must be smaller, got {noise} and {identity}")
    return _svd_by_eigh(matrix, gram)


def _svd_by_eigh(matrix: Tensor, gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """An SVD of square matrices A [..., D, D] from the eigenvectors V of gram = AᵀA, several times as fast.

    A = (A V / s) · s · Vᵀ holds to rounding whatever s is; but squaring costs half the digits, so small
    singular values are rough, in float32 from a thousandth of the largest. The largest entry of each row
    of Vᵀ is positive.
    """
    squares, v = torch.linalg.eigh(gram)
    squares, v = squares.flip(-1), v.flip(-1)
    limits = torch.finfo(squares.dtype)
    floor = (limits.eps * squares[..., :1]).clamp(min=limits.tiny)
    s = torch.maximum(squares, floor).sqrt()
    v = v * torch.take_along_dim(v, v.abs().argmax(dim=-2, keepdim=True), dim=-2).sign()
    return matrix @ v / s.unsqueeze(-2), s, v.mT


def rounded(name: str, tensor: Tensor, values: Tensor) -> Tensor:
    """`values` as `tensor`, called `name`, will hold them; ValueError if its dtype does not."""
    new = values.to(tensor)
    if not (new.is_meta or (new.isfinite().all() and new.any() == values.any().to(new.device))):
        raise ValueError(
            f"{name} must be of a dtype that holds the values to be written, which leave the range of "
            f"{tensor.dtype}: take a wider one, or values closer to 1"
        )
    return new


def first_of_each(kind: Tensor, kinds: int) -> list[int]:
    """For each kind the first head that is of it; kind [heads], as `torch.unique` numbers them."""
    return [int((kind == k).nonzero()[0]) for k in range(kinds)]
