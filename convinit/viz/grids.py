"""Experiments as pictures: a figure for each row and column of a grid, over several seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from convinit.viz import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Panels = Mapping[str, Mapping[str, Tensor]]

_WIDTH, _LEFT, _RIGHT, _BETWEEN = 8.6, 0.62, 0.15, 0.62  # inches


def grid_lines(
    panels: Panels,
    x: Sequence[float],
    *,
    xlabel: str,
    log_x: bool = False,
    title: str | None = None,
) -> Figure:
    """Mean of every row over a swept number, in a band from the lowest seed to the highest.

    Args:
        panels: what is measured → label of the row → values [columns, seeds], NaN where there is none.
        x: the swept number at each column.
        xlabel: what it is.
        log_x: a logarithmic axis.
        title: a line above the figure.

    Raises:
        ValueError: there is nothing to draw, or a shape does not fit.
    """
    rows = _check(panels, len(x))
    keys = -(-len(rows) // 3)  # lines of the legend
    top, tall, bottom = 0.2 + 0.34 * bool(title), 3.0, 0.62 + 0.22 * keys
    figure, axes = _panels(panels, top, tall, bottom)
    for each, (name, values) in zip(axes, panels.items(), strict=True):
        for i, (label, numbers) in enumerate(values.items()):
            color, dash = style.LINES[i % len(style.LINES)]
            marker = "os^"[i // len(style.LINES) % 3]  # where there are more rows than colours
            mean, low, high = _spread(numbers)
            each.fill_between(x, low, high, color=color, alpha=0.12, lw=0)
            each.plot(x, mean, color=color, linestyle=dash, lw=2, marker=marker, ms=4, label=label)
        if log_x:
            each.set_xscale("log")
            each.minorticks_off()
        each.set_xticks(list(x), [f"{number:g}" for number in x])
        each.set_xlabel(xlabel)
        each.set_ylabel(name)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="lower center", ncols=3, frameon=False, fontsize=9.5, handlelength=2.6,
        bbox_to_anchor=(0.5, 0.0),
    )  # fmt: skip
    style.add_title(figure, title)
    return figure


def grid_dots(panels: Panels, columns: Sequence[str], *, title: str | None = None) -> Figure:
    """A line for every row, on it a dot for each column: the mean, with a bar from the lowest to the highest.

    Args:
        panels: what is measured → label of the row → values [columns, seeds], NaN where there is none.
        columns: their labels.
        title: a line above the figure.

    Raises:
        ValueError: there is nothing to draw, or a shape does not fit.
    """
    rows = _check(panels, len(columns))
    names = max(1.0, 0.072 * max(map(len, rows)))  # inches that the labels of the rows need
    top, tall, bottom = 0.2 + 0.34 * bool(title), 0.32 + 0.36 * len(rows), 0.82
    figure, axes = _panels(panels, top, tall, bottom, left=0.2 + names, between=0.2)
    for index, (each, (name, values)) in enumerate(zip(axes, panels.items(), strict=True)):
        for column, label in enumerate(columns):
            color, _ = style.LINES[(3, 2, 6, 5, 1, 4, 0, 7)[column % len(style.LINES)]]
            offset = 0.16 * (column - (len(columns) - 1) / 2)
            for row, numbers in enumerate(values.values()):
                mean, low, high = (float(number[column]) for number in _spread(numbers))
                each.plot([low, high], [row + offset] * 2, color=color, lw=1.6, solid_capstyle="butt")
                each.plot(mean, row + offset, "o", color=color, ms=5.5, label=label if row == 0 else None)
        each.set_ylim(len(rows) - 0.5, -0.5)
        each.set_yticks(range(len(rows)), list(rows) if index == 0 else [""] * len(rows))
        each.tick_params(axis="y", length=0)
        each.set_xlabel(name)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="lower center", ncols=len(columns), frameon=False, fontsize=9.5,
        bbox_to_anchor=(0.5, 0.0),
    )  # fmt: skip
    style.add_title(figure, title)
    return figure


def _check(panels: Panels, columns: int) -> list[str]:
    """The labels of the rows."""
    if not panels or not all(panels.values()) or not columns:
        raise ValueError("panels must hold at least one row, and columns one column")
    rows = list(next(iter(panels.values())))
    for name, values in panels.items():
        if list(values) != rows:
            raise ValueError(f"all panels must have the same rows, got {rows} and {list(values)}")
        for label, numbers in values.items():
            if numbers.dim() != 2 or len(numbers) != columns:
                raise ValueError(
                    f"panels[{name!r}][{label!r}] must be [{columns}, seeds], got {list(numbers.shape)}"
                )
    return rows


def _spread(numbers: Tensor) -> tuple[Any, Any, Any]:
    """Mean, lowest and highest over the seeds that there are, [columns] each."""
    numbers = numbers.double().cpu()
    low = numbers.nan_to_num(float("inf")).amin(dim=1)
    high = numbers.nan_to_num(float("-inf")).amax(dim=1)
    none = numbers.isnan().all(dim=1)
    return (
        numbers.nanmean(dim=1).numpy(),
        low.masked_fill(none, float("nan")).numpy(),
        high.masked_fill(none, float("nan")).numpy(),
    )


def _panels(
    panels: Panels, top: float, tall: float, bottom: float, left: float = _LEFT, between: float = _BETWEEN
) -> tuple[Figure, list[Any]]:
    """A figure with as many axes side by side; sizes in inches."""
    height = top + tall + bottom
    figure = style.new_figure(_WIDTH, height)
    wide = (_WIDTH - left - _RIGHT - (len(panels) - 1) * between) / len(panels)
    axes = []
    for i in range(len(panels)):
        x = left + i * (wide + between)
        each = figure.add_axes((x / _WIDTH, bottom / height, wide / _WIDTH, tall / height))
        each.grid(color="0.92")
        each.set_axisbelow(True)
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(labelsize=9)
        axes.append(each)
    return figure, axes
