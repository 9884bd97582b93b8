"""Depthwise filters [C, 1, f, f].

All but softmax have a mean second moment Σ w² of 1/3 over the f² cells, that of the random filter, or gain².
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from convinit._checks import check_generator, check_int, check_number, check_tensor
from convinit.init._shared import rand, rounded, uniform

GAIN = math.sqrt(1 / 3)  # the root of the random filter's second moment; arXiv 2404.01139 has √(1/f)


@torch.no_grad()
def random_filter_(weight: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """U(±1/f), the default of a depthwise ``nn.Conv2d``.

    Args:
        weight: [C, 1, f, f], written in place.
        generator: CPU generator.
    """
    size = _check_filter(weight)
    return weight.copy_(uniform(weight.shape, 1 / size, generator))


@torch.no_grad()
def impulse_filter_(
    weight: Tensor, *, gain: float = GAIN, generator: torch.Generator | None = None
) -> Tensor:
    """`gain` at one random cell of every filter, 0 elsewhere.

    Args:
        weight: [C, 1, f, f], written in place.
        gain: > 0; √(1/3) is that of arXiv 2401.12511, √(1/f) that of arXiv 2404.01139.
        generator: CPU generator.
    """
    return box_filter_(weight, 1, gain=gain, generator=generator)


@torch.no_grad()
def box_filter_(
    weight: Tensor, num_cells: int, *, gain: float = GAIN, generator: torch.Generator | None = None
) -> Tensor:
    """gain / √m at m different random cells of every filter, 0 elsewhere.

    Args:
        weight: [C, 1, f, f], written in place.
        num_cells: m, 1 (an impulse, the papers' "box1") to f² (all cells: "box25" where f = 5).
        gain: see :func:`impulse_filter_`.
        generator: CPU generator.
    """
    size = _check_filter(weight)
    num_cells = check_int("num_cells", num_cells, maximum=size * size)  # the cells of a filter
    order = rand((weight.shape[0], size * size), generator).argsort(dim=1)
    filters = torch.zeros(weight.shape[0], size * size, device="cpu")
    filters.scatter_(1, order[:, :num_cells], check_number("gain", gain) / math.sqrt(num_cells))
    return weight.copy_(rounded("weight", weight, filters.view(weight.shape)))


@torch.no_grad()
def gaussian_filter_(
    weight: Tensor,
    variance: float = 1.0,
    *,
    gain: float = GAIN,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A Gaussian around one random cell of every filter, cut off at the filter's edge.

    w ∝ exp(−(Δy² + Δx²) / (2 variance)), all filters divided by one number so that the mean of Σ w² is gain².

    Args:
        weight: [C, 1, f, f], written in place.
        variance: in cells², > 0.
        gain: see :func:`impulse_filter_`.
        generator: CPU generator.
    """
    size = _check_filter(weight)
    variance, gain = check_number("variance", variance), check_number("gain", gain)
    if weight.shape[0] == 0:
        return weight
    check_generator(generator)
    centre = torch.randint(size, (2, weight.shape[0], 1), generator=generator, device="cpu")
    cells = torch.arange(size, device="cpu", dtype=torch.float64)  # beside any variance
    y, x = ((cells - centre) ** 2 / (-2 * variance)).exp()
    filters = y.unsqueeze(2) * x.unsqueeze(1)
    filters *= gain / filters.square().sum(dim=(1, 2)).mean().sqrt()
    return weight.copy_(rounded("weight", weight, filters.unsqueeze(1)))


@torch.no_grad()
def softmax_filter_(weight: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """The softmax over the f² cells of U(±1/f): positive, near-uniform filters of sum 1.

    As in the papers, the filter is not rescaled: Σ w² ≈ 1/f². To train the numbers under the softmax
    instead of the filter, use :class:`convinit.nn.SpatialConv`.

    Args:
        weight: [C, 1, f, f], written in place.
        generator: CPU generator.
    """
    size = _check_filter(weight)
    logits = uniform(weight.shape, 1 / size, generator)
    return weight.copy_(logits.flatten(1).softmax(dim=1).view(weight.shape))


def _check_filter(weight: Tensor) -> int:
    check_tensor("weight", weight, "[C, 1, f, f]", dims=4)
    if weight.shape[1] != 1 or weight.shape[2] != weight.shape[3] or weight.shape[2] < 1:
        raise ValueError(f"weight must be depthwise filters [C, 1, f, f], got {list(weight.shape)}")
    return weight.shape[2]
