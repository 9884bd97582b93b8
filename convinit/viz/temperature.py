"""Maps of random queries and keys at several softmax temperatures: Figure 5 of arXiv 2401.12511."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from convinit._checks import check_grid_size, check_number
from convinit.init import random_qk_
from convinit.viz import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def temperature_maps(
    scales: Sequence[float] = (1.0, 1e2, 1e4),
    grid_size: Sequence[int] = (16, 16),
    rank: int = 64,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Figure]:
    """softmax(σ Q Kᵀ) of one random Q and K at several σ: the larger σ, the closer to a binary map.

    Under each map stand the mean of its rows' largest entries, 1 in a binary map, and the share of columns
    that hold the largest entry of some row, 100 % in a permutation matrix and 63 % where rows choose freely.

    Args:
        scales: the temperatures σ.
        grid_size: (H, W); N = H · W tokens.
        rank: r; Q and K [N, r] are U(±√(1/N)), the random weights of Model III.
        generator: CPU generator of Q and K; None means torch's own.

    Returns:
        The maps [scales, N, N], and the figure.

    Source: arXiv 2401.12511, Figure 5, whose caption names the three σ and the 16 × 16 grid; how the paper
    draws Q and K is not known.
    """
    height, width = check_grid_size(grid_size)
    scales = [check_number("scales", scale) for scale in scales]
    q, k = random_qk_(*torch.empty(2, 1, height * width, rank), generator=generator)
    maps = torch.stack([(scale * q[0] @ k[0].mT).softmax(dim=-1) for scale in scales])

    side, gap, top, bottom = 2.56, 0.25, 0.4, 0.55  # inches
    wide, tall = len(scales) * (side + gap) + gap, top + side + bottom
    figure = style.new_figure(wide, tall)
    for i, (scale, values) in enumerate(zip(scales, maps, strict=True)):
        left = gap + i * (side + gap)
        axes = figure.add_axes((left / wide, bottom / tall, side / wide, side / tall))
        style.image(axes, values / values.max())
        style.bare(axes)
        axes.set(xticks=[], yticks=[], title=f"σ = {scale:,g}")
        largest, column = values.max(dim=1)
        share = len(column.unique()) / len(column)
        axes.set_xlabel(f"largest of a row {largest.mean():.2g}\ncolumns chosen {share:.0%}", fontsize=9)
    return maps, figure
