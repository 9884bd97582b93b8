"""Grids of small heat maps: a row for each layer, a column for each head, stages of training side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from convinit.viz import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SIDE = 0.9  # of a square, in the distance of two
# Inches between squares: at most, and from where on there is room for the centre and for a number.
_LARGEST, _ROOMY, _NUMBER = 0.95, 0.5, 0.7
_WIDTH, _HEIGHT = 8.0, 7.0  # inches for all squares of a large model: text stays readable at half the size


def squares(
    stages: Mapping[str, Sequence[Tensor]],
    layers: Sequence[int],
    offsets: Sequence[Tensor | None] | None = None,
    *,
    title: str | None = None,
) -> Figure:
    """Draws the heads of each stage.

    Args:
        stages: name of a stage -> [heads, rows, columns] of each layer.
        layers: the numbers of the layers.
        offsets: [heads, 2] of each layer whose squares are filters with an impulse to circle; None for a
            layer without. None as a whole: the squares are no filters.
        title: a line above the figure.
    """
    heads = max(len(values) for values in next(iter(stages.values())))
    left, right, between, bottom = 0.62, 0.98, 0.3, 0.15
    top = 0.3 + 0.34 * bool(title) + 0.24 * (len(stages) > 1)
    pitch = min(_LARGEST, _WIDTH / (heads * len(stages)), max(_HEIGHT / len(layers), 0.3))
    wide, tall = (heads - 1 + _SIDE) * pitch, (len(layers) - 1 + _SIDE) * pitch
    end = left + len(stages) * (wide + between) - between
    width, height = max(end + right, 4.0 if title else 0), max(top + tall + bottom, 1.9)
    figure = style.new_figure(width, height)
    for stage, (name, maps) in enumerate(stages.items()):
        start = left + stage * (wide + between)
        axes = figure.add_axes(
            (start / width, 1 - (top + tall) / height, wide / width, tall / height), label=name
        )
        for row, of_layer in enumerate(maps):
            for head, values in enumerate(of_layer):
                extent = (head, head + _SIDE, row + _SIDE, row)
                drawn = style.image(axes, values, extent=extent, aspect="auto")
                if offsets is not None:
                    own = offsets[row]
                    offset = None if own is None else own[head].tolist()
                    _mark_centre_and_impulse(axes, (head, row), values, offset, pitch)
        style.bare(axes)
        axes.set_xlim(0, heads - 1 + _SIDE)
        axes.set_ylim(len(layers) - 1 + _SIDE, 0)
        axes.tick_params(length=0, pad=3, labelsize=9, labeltop=True, labelbottom=False)
        numbered = range(0, heads, math.ceil(0.24 / pitch))  # two digits need 0.24 inches
        axes.set_xticks([head + _SIDE / 2 for head in numbered], [str(head) for head in numbered])
        if stage == 0:
            axes.set_yticks([row + _SIDE / 2 for row in range(len(layers))], [str(layer) for layer in layers])
            axes.set_ylabel("layer", fontsize=9)
            figure.text((left - 0.08) / width, 1 - (top - 0.075) / height, "head", fontsize=9, ha="right")
        if len(stages) > 1:
            axes.set_title(name, fontsize=10, pad=18)
    style.colorbar(figure, drawn, "attention", x=end + 0.16)
    style.add_title(figure, title)
    return figure


def _mark_centre_and_impulse(
    axes: Any, corner: tuple[int, int], filter: Tensor, offset: Sequence[int] | None, pitch: float
) -> None:
    """On a filter drawn from `corner`: lines through the query, a circle around the impulse, its value."""
    from matplotlib.patches import Circle

    x, y = corner
    radius, cell = filter.shape[-1] // 2, _SIDE / filter.shape[-1]
    middle, roomy = _SIDE / 2, pitch > _ROOMY
    if roomy:
        axes.hlines(y + middle, x, x + _SIDE, color="white", lw=0.4, alpha=0.5)
        axes.vlines(x + middle, y, y + _SIDE, color="white", lw=0.4, alpha=0.5)
    if offset is None or max(map(abs, offset)) > radius:
        return
    dy, dx = offset
    at = (x + middle + dx * cell, y + middle + dy * cell)
    axes.add_patch(Circle(at, 0.78 * cell, fill=False, color=style.TARGET, lw=1.4 if roomy else 0.7))
    if pitch > _NUMBER:  # in the lower corner where the impulse is not
        edge, side = (x + 0.03, "left") if dx > 0 else (x + _SIDE - 0.03, "right")
        number = f"{float(filter[radius + dy, radius + dx]):.2f}"
        axes.text(edge, y + _SIDE - 0.02, number, ha=side, va="bottom", fontsize=7.5, color="white")
