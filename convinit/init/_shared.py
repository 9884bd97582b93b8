"""Draws and checks that several initialisers share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from convinit.offsets import check_generator


def rand(shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
    check_generator(generator)
    return torch.rand(tuple(shape), generator=generator, device="cpu", dtype=torch.float32)


def uniform(shape: Sequence[int], bound: float, generator: torch.Generator | None) -> Tensor:
    return rand(shape, generator).mul_(2).sub_(1).mul_(bound)


def mimetic_svd(
    shape: tuple[int, ...],
    noise: float,
    identity: float,
    distribution: str,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dim = shape[-1]
    if distribution == "normal":
        check_generator(generator)
        z = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32).div_(math.sqrt(dim))
    elif distribution == "uniform":
        z = uniform(shape, math.sqrt(1 / dim), generator)
    else:
        raise ValueError(f'distribution must be "normal" or "uniform", got {distribution!r}')
    matrix = noise * z.double() + identity * torch.eye(dim, dtype=torch.float64, device="cpu")
    return torch.linalg.svd(matrix)


def check_floating(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")


def first_of_each(kind: Tensor, kinds: int) -> list[int]:
    """For each kind the first head that is of it; kind [heads], as `torch.unique` numbers them."""
    return [int((kind == k).nonzero()[0]) for k in range(kinds)]
