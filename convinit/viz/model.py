"""A whole model at a glance, from the report of `init_vit_`: every head's filter or map, then and now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from convinit.adapters.measure import head_maps
from convinit.viz.heads import attention_filter
from convinit.viz.squares import squares

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from convinit.adapters import InitReport

_CELLS = 64  # rows and columns of a drawn map: more would be smaller than a dot of the picture


def model_filters(
    report: InitReport,
    before: Sequence[Tensor] | None = None,
    *,
    model: nn.Module | None = None,
    images: Any = None,
    radius: int | None = None,
    title: str | None = None,
) -> Figure:
    """The average attention around a query of every head: which convolution it is, if any.

    report = convinit.init_vit_(model)
    before = viz.head_maps(report)
    ...  # training
    viz.model_filters(report, before).savefig("filters.png", dpi=150)

    Args:
        report: of :func:`convinit.init_vit_`; it sees the weights that the model has now.
        before: maps at the start, as :func:`head_maps` gave them then; at the left. None: only now.
        model, images: as in :func:`head_maps`; None: the maps of the positions alone.
        radius: see :func:`attention_filter`. None means one token farther than the farthest impulse, or 3.
        title: a line above the figure.

    Returns:
        A figure with one row a layer and one square a head, numbered as in the report. The head's impulse is
        circled; where there is room, a number says how much attention it holds.

    Raises:
        ValueError: `before` is of another model; as :func:`head_maps`.
    """
    offsets = [record.offsets for record in report.records]
    grids = report.grid_sizes
    if radius is None:
        farthest = max((int(each.abs().max()) for each in offsets if each is not None), default=2)
        radius = min(farthest + 1, min(min(grid) for grid in grids) - 1)

    def filters(maps: Sequence[Tensor]) -> list[Tensor]:
        return [attention_filter(each, grid, radius=radius) for each, grid in zip(maps, grids, strict=True)]

    return squares(
        _stages(report, before, model, images, filters),
        [record.layer for record in report.records],
        offsets,
        title=title,
    )


def model_maps(
    report: InitReport,
    before: Sequence[Tensor] | None = None,
    *,
    model: nn.Module | None = None,
    images: Any = None,
    title: str | None = None,
) -> Figure:
    """The N×N attention map of every head; queries are rows, keys columns.

    A map of more than 64 tokens is drawn smaller: a cell is the largest attention in a block of k×k, so that
    lines one token wide remain.

    Args:
        report, before, model, images, title: as in :func:`model_filters`.

    Returns:
        A figure with one row a layer and one square a head.
    """
    layers = [record.layer for record in report.records]
    return squares(_stages(report, before, model, images, smaller), layers, title=title)


def smaller(maps: Sequence[Tensor]) -> list[Tensor]:
    """Maps [heads, N, N] with at most 64 rows and columns, by the maximum of blocks."""
    return [
        F.max_pool2d(each, -(-each.shape[-1] // _CELLS), ceil_mode=True) if each.shape[-1] > _CELLS else each
        for each in maps
    ]


def _stages(
    report: InitReport,
    before: Sequence[Tensor] | None,
    model: nn.Module | None,
    images: Any,
    picture: Callable[[Sequence[Tensor]], list[Tensor]],
) -> dict[str, list[Tensor]]:
    now = head_maps(report, model, images)
    if before is None:
        return {"now": picture(now)}
    if [each.shape for each in before] != [each.shape for each in now]:
        raise ValueError(
            "before must be what head_maps(report) gave at the start: "
            f"{[list(each.shape) for each in now[:2]]}…, got {[list(each.shape) for each in before[:2]]}…"
        )
    return {"at the start": picture(before), "now": picture(now)}
