"""Attention maps of heads, given as tensors, and the convolution filters that they come closest to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from convinit._checks import check_grid_size, check_int
from convinit.offsets import impulse_targets
from convinit.ops.impulse_matrix import impulse_matrix
from convinit.viz import style
from convinit.viz.squares import squares

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def attention_filter(maps: Tensor, grid_size: Sequence[int], *, radius: int | None = None) -> Tensor:
    """The average attention around a query: the convolution filter that a map comes closest to.

    filter[..., radius + dy, radius + dx] = mean over tokens (i, j) of maps[..., (i, j), (i + dy, j + dx)]

    The mean is over the tokens whose (i + dy, j + dx) is on the grid. The filter of an impulse matrix is 1 at
    its offset and 0 elsewhere.

    Args:
        maps: [..., N, N], attention of each token (row) on every token.
        grid_size: (H, W) with H·W = N.
        radius: the window reaches this many tokens from its centre; below H and W. None means 3, or less
            on a smaller grid.

    Returns:
        [..., 2·radius + 1, 2·radius + 1].

    Raises:
        TypeError, ValueError: the shapes do not agree, or the radius leaves the grid.
    """
    height, width = check_grid_size(grid_size)
    tokens = height * width
    if not isinstance(maps, Tensor) or not maps.is_floating_point():
        raise TypeError(f"maps must be a floating-point tensor, got {getattr(maps, 'dtype', type(maps))}")
    if maps.dim() < 2 or maps.shape[-2:] != (tokens, tokens):
        raise ValueError(
            f"maps must be [..., {tokens}, {tokens}] for a grid of {height} x {width}, got {list(maps.shape)}"
        )
    reach = min(height, width) - 1
    radius = min(3, reach) if radius is None else check_int("radius", radius, minimum=0)
    if radius > reach:
        raise ValueError(f"radius must be at most {reach} on a grid of {height} x {width}, got {radius}")
    side = torch.arange(-radius, radius + 1, device=maps.device)
    targets = impulse_targets(torch.cartesian_prod(side, side), (height, width))  # [K, N]
    inside = targets >= 0
    # Token n in place of a missing target: an index must be valid, its value is masked.
    tokens_of = torch.arange(tokens, device=maps.device)
    picked = maps[..., tokens_of, torch.where(inside, targets, tokens_of)]  # [..., K, N]
    mean = (picked * inside).sum(dim=-1) / inside.sum(dim=-1)
    return mean.unflatten(-1, (2 * radius + 1, 2 * radius + 1))


def attention_filters(
    offsets: Tensor,
    before: Tensor,
    after: Tensor,
    grid_size: Sequence[int],
    *,
    radius: int | None = None,
    title: str | None = None,
) -> Figure:
    """Every head's target, attention at the start and attention after training, as small filters.

    Args:
        offsets: [layers, heads, 2], the (dy, dx) of each head's impulse.
        before, after: [layers, heads, N, N].
        grid_size: (H, W).
        radius: see :func:`attention_filter`.
        title: a line above the figure.

    Returns:
        A figure with one row a layer and three squares a head: target, start, trained. The circled cell is
        the impulse; the number is the attention that it holds.
    """
    maps = (_targets(offsets, grid_size, before), before, after)
    stages = [attention_filter(stage, grid_size, radius=radius) for stage in maps]

    def draw(axes: Any, stage: int, layer: int, head: int) -> Any:
        offset = tuple(offsets[layer, head].tolist())
        return _filter(axes, stages[stage][layer, head], offset, number=stage > 0)

    return _triples(offsets, draw, "attention", title)


def attention_maps(
    offsets: Tensor, before: Tensor, after: Tensor, grid_size: Sequence[int], *, title: str | None = None
) -> Figure:
    """The whole N×N map of every head: impulse target, at the start, after training.

    Args:
        offsets, before, after, grid_size, title: as in :func:`attention_filters`.

    Returns:
        A figure with one row a layer and three squares a head; queries are rows, keys columns.
    """
    stages = (_targets(offsets, grid_size, before), before, after)
    _check_heads(offsets, after)

    def draw(axes: Any, stage: int, layer: int, head: int) -> Any:
        return _square(axes, stages[stage][layer, head])

    return _triples(offsets, draw, "attention", title)


def fit_filters(
    offsets: Tensor,
    maps: Tensor,
    grid_size: Sequence[int],
    *,
    radius: int | None = None,
    title: str | None = None,
) -> Figure:
    """The filter of every fitted head, its impulse circled.

    Args:
        offsets: [layers, heads, 2].
        maps: [layers, heads, N, N], or their filters [layers, heads, 2·radius + 1, 2·radius + 1] made by
            :func:`attention_filter`, for which N×N numbers a head are too many to hold.
        grid_size: (H, W).
        radius: see :func:`attention_filter`; of no use with filters.
        title: a line above the figure.

    Returns:
        A figure with one row a layer and one square a head.
    """
    layers, _ = _check_heads(offsets, maps)
    height, width = check_grid_size(grid_size)
    filters = maps
    if maps.shape[-1] == height * width:
        filters = attention_filter(maps, grid_size, radius=radius)
    return squares({"fitted": list(filters)}, range(layers), list(offsets), title=title)


def _targets(offsets: Tensor, grid_size: Sequence[int], like: Tensor) -> Tensor:
    """The impulse matrices [layers, heads, N, N]."""
    heads = _check_heads(offsets, like)
    return impulse_matrix(offsets.flatten(0, 1), grid_size, dtype=like.dtype).unflatten(0, heads)


def _triples(
    offsets: Tensor, draw: Callable[[Any, int, int, int], Any], bar: str, title: str | None
) -> Figure:
    """Three squares a head, one row a layer; `draw(axes, stage, layer, head)` fills one."""
    layers, heads = offsets.shape[:2]
    figure, outer = _panels(layers, heads, cell=(2.45, 0.86), top=0.85, wspace=0.1, hspace=0.12)
    for layer in range(layers):
        for head in range(heads):
            squares = outer[layer, head].subgridspec(1, 3, wspace=0.06)
            for stage, name in enumerate(("target", "start", "trained")):
                axes = figure.add_subplot(squares[stage])
                image = draw(axes, stage, layer, head)
                if layer == 0:
                    axes.set_title(name, fontsize=9, pad=3)
                if layer == 0 and stage == 1:
                    name = f"head {head}"
                    axes.text(
                        0.5, 1.4, name, transform=axes.transAxes, ha="center", fontsize=11, weight="bold"
                    )
                if head == 0 and stage == 0:
                    axes.set_ylabel(f"layer {layer}", fontsize=11, weight="bold", labelpad=6)
    style.colorbar(figure, image, bar)
    style.add_title(figure, title)
    return figure


def _check_heads(offsets: Tensor, *maps: Tensor) -> tuple[int, int]:
    if offsets.dim() != 3 or offsets.shape[2] != 2 or 0 in offsets.shape:
        raise ValueError(f"offsets must be [layers, heads, 2], got {list(offsets.shape)}")
    layers, heads = offsets.shape[:2]
    for tensor in maps:
        if tensor.dim() != 4 or tensor.shape[:2] != (layers, heads):
            raise ValueError(
                f"maps must be [{layers}, {heads}, N, N], layers and heads as in offsets, "
                f"got {list(tensor.shape)}"
            )
    return layers, heads


def _panels(
    rows: int, columns: int, *, cell: tuple[float, float], top: float, **spacing: float
) -> tuple[Figure, Any]:
    """A figure and its grid; sizes in inches, with room for row names, titles and a colour bar."""
    left, right, bottom = 0.6, 0.95, 0.12
    width, height = left + columns * cell[0] + right, top + rows * cell[1] + bottom
    figure = style.new_figure(width, height)
    grid = figure.add_gridspec(
        rows,
        columns,
        left=left / width,
        right=1 - right / width,
        top=1 - top / height,
        bottom=bottom / height,
        **spacing,
    )
    return figure, grid


def _square(axes: Any, values: Tensor) -> Any:
    drawn = style.image(axes, values)
    style.bare(axes)
    return drawn


def _filter(axes: Any, values: Tensor, offset: tuple[int, ...], *, number: bool) -> Any:
    from matplotlib.patches import Circle

    image = _square(axes, values)
    radius = values.shape[-1] // 2
    axes.axhline(radius, color="white", lw=0.4, alpha=0.5)
    axes.axvline(radius, color="white", lw=0.4, alpha=0.5)
    dy, dx = offset
    if max(abs(dy), abs(dx)) <= radius:
        axes.add_patch(Circle((radius + dx, radius + dy), 0.72, fill=False, color=style.TARGET, lw=1.4))
        if number:
            axes.text(
                0.97, 0.02, f"{float(values[radius + dy, radius + dx]):.2f}", transform=axes.transAxes,
                ha="right", va="bottom", fontsize=7.5, color="white",
            )  # fmt: skip
    return image
