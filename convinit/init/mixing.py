"""Mixing matrices [C, N, N]: each output pixel takes one input pixel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from convinit._checks import check_generator, check_grid_size, check_kernel_size, check_real, check_tensor
from convinit.init._shared import rand, rounded
from convinit.init.filters import GAIN  # the second moment of a row is that of a filter
from convinit.offsets import sample_offsets
from convinit.ops.impulse_matrix import impulse_matrix


@torch.no_grad()
def impulse_mixing_(
    weight: Tensor,
    grid_size: Sequence[int],
    kernel_size: int,
    *,
    gain: float = GAIN,
    padding_mode: str = "zeros",
    generator: torch.Generator | None = None,
) -> Tensor:
    """gain · the impulse matrix of a random offset: an impulse filter written as a matrix.

    Args:
        weight: [C, N, N], written in place.
        grid_size: (H, W) with H·W = N.
        kernel_size: offsets are drawn from the f×f window; at most 2·min(H, W) − 1.
        gain: value of the impulse.
        padding_mode: see :func:`convinit.impulse_matrix`.
        generator: CPU generator.
    """
    num_tokens = _check_mixing(weight)
    height, width = check_grid_size(grid_size)
    if height * width != num_tokens:
        raise ValueError(
            f"grid_size must have H·W = {num_tokens} tokens, N of weight, got {height} x {width}"
        )
    check_kernel_size(kernel_size, (height, width))
    gain = check_real("gain", gain)
    offsets = sample_offsets(weight.shape[0], kernel_size, generator=generator)
    matrix = impulse_matrix(
        offsets, (height, width), padding_mode=padding_mode, dtype=torch.float32, device="cpu"
    )
    return weight.copy_(rounded("weight", weight, matrix.mul_(gain)))


@torch.no_grad()
def permutation_mixing_(
    weight: Tensor, *, gain: float = GAIN, generator: torch.Generator | None = None
) -> Tensor:
    """Every output pixel takes gain · a random input pixel, drawn with replacement (the papers' "rand*").

    Args:
        weight: [C, N, N], written in place.
        gain: value of the one entry of a row.
        generator: CPU generator.
    """
    num_tokens = _check_mixing(weight)
    check_generator(generator)
    columns = torch.randint(num_tokens, weight.shape[:2], generator=generator, device="cpu")
    return _one_hot_rows_(weight, columns, gain)


@torch.no_grad()
def full_permutation_mixing_(
    weight: Tensor, *, gain: float = GAIN, generator: torch.Generator | None = None
) -> Tensor:
    """gain · a random permutation matrix: every input pixel goes to exactly one output pixel.

    Args:
        weight: [C, N, N], written in place.
        gain: value of the one entry of a row and column.
        generator: CPU generator.
    """
    _check_mixing(weight)
    columns = rand(weight.shape[:2], generator).argsort(dim=1)
    return _one_hot_rows_(weight, columns, gain)


def _one_hot_rows_(weight: Tensor, columns: Tensor, value: float) -> Tensor:
    value = check_real("gain", value)
    rounded("weight", weight, torch.tensor(value, dtype=torch.float64, device="cpu"))
    return weight.zero_().scatter_(2, columns.unsqueeze(2).to(weight.device), value)


def _check_mixing(weight: Tensor) -> int:
    check_tensor("weight", weight, "[C, N, N]", dims=3)
    if weight.shape[1] != weight.shape[2] or weight.shape[1] < 1:
        raise ValueError(f"weight must be mixing matrices [C, N, N], got {list(weight.shape)}")
    return weight.shape[1]
