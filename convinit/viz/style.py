"""The style of all pictures: colours, figures in inches, titles, the scale of attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from convinit._optional import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAP = "cividis"  # made for colour-blind readers: its lightness rises evenly
TARGET = "#e8590c"
# Okabe and Ito's palette, with grey for its yellow, which is lost on white; with a dash for each colour.
LINES = (
    ("#000000", (0, (1, 1))),
    ("#56b4e9", (0, (4, 1.5))),
    ("#e69f00", "solid"),
    ("#0072b2", "solid"),
    ("#d55e00", (0, (4, 1.5))),
    ("#cc79a7", (0, (1, 1))),
    ("#009e73", (0, (4, 1, 1, 1))),
    ("#8c8c8c", "solid"),
)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure; sizes in inches."""
    module = require("matplotlib.figure", "a figure", "'convinit[demo]'")
    return module.Figure(figsize=(width, height), facecolor="white")


def add_title(figure: Figure, title: str | None) -> None:
    """At the left edge, in a size that fits."""
    if not title:
        return
    width, height = figure.get_size_inches()
    size = min(12.0, 72 * (width - 0.3) / (0.55 * len(title)))
    figure.text(0.15 / width, 1 - 0.12 / height, title, fontsize=size, va="top")


def image(axes: Any, values: Tensor, **options: Any) -> Any:
    """Attention [rows, columns] as colours from 0 to 1; options are imshow's."""
    from matplotlib.colors import PowerNorm

    # The square root of the attention: a uniform map of 1/64 must not look like nothing.
    return axes.imshow(
        values.detach().double().cpu().numpy(), cmap=MAP, norm=PowerNorm(0.5, 0, 1), interpolation="nearest",
        **options,
    )  # fmt: skip


def pixels(figure: Figure, dpi: float = 100) -> np.ndarray:
    """The drawn figure, [height, width, 3] uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3]


def bare(axes: Any) -> None:
    """No ticks, no frame."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def colorbar(figure: Figure, drawn: Any, label: str, x: float | None = None) -> None:
    """The scale of attention, at the bottom, `x` inches from the left; None: at the right edge."""
    width, height = figure.get_size_inches()
    tall = min(2.4, 0.75 * height)
    left = width - 0.82 if x is None else x
    axes = figure.add_axes((left / width, 0.15 / height, 0.13 / width, tall / height))
    bar = figure.colorbar(drawn, cax=axes, ticks=[0, 0.05, 0.2, 0.5, 1])
    bar.set_label(label, fontsize=9, labelpad=4)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
