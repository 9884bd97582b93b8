"""Pictures of attention and of training, as matplotlib figures (extra `train`).

Every function takes plain tensors and returns a `matplotlib.figure.Figure` that belongs to nobody: no window,
no pyplot state, so it works on any machine. Save it with `figure.savefig("maps.png", dpi=150)`.
Colours stay apart for colour-blind readers and in grey.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from convinit.offsets import check_grid_size, check_int, impulse_targets
from convinit.ops.impulse_matrix import impulse_matrix

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["attention_filter", "attention_filters", "attention_maps", "fit_filters", "learning_curves"]

_MAP = "cividis"  # made for colour-blind readers: its lightness rises evenly
_TARGET = "#e8590c"
# Okabe and Ito's palette, without its yellow, which is lost on white; with a dash for each colour.
_LINES = (
    ("#000000", (0, (1, 1))),
    ("#56b4e9", (0, (4, 1.5))),
    ("#e69f00", "solid"),
    ("#0072b2", "solid"),
    ("#d55e00", (0, (4, 1.5))),
    ("#cc79a7", (0, (1, 1))),
    ("#009e73", (0, (4, 1, 1, 1))),
)


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
    layers, heads = _check_heads(offsets, maps)
    height, width = check_grid_size(grid_size)
    filters = maps
    if maps.shape[-1] == height * width:
        filters = attention_filter(maps, grid_size, radius=radius)
    figure, grid = _panels(layers, heads, cell=(0.95, 0.95), top=0.72, wspace=0.08, hspace=0.08)
    for layer in range(layers):
        for head in range(heads):
            axes = figure.add_subplot(grid[layer, head])
            image = _filter(axes, filters[layer, head], tuple(offsets[layer, head].tolist()), number=True)
            if layer == 0:
                axes.set_title(f"head {head + 1}", fontsize=9, pad=3)
            if head == 0:
                axes.set_ylabel(f"layer {layer + 1}", fontsize=9)
    _colorbar(figure, image, "attention")
    if title:
        _title(figure, title)
    return figure


def learning_curves(
    curves: Mapping[str, Tensor],
    *,
    ylabel: str = "test accuracy, %",
    goal: float | None = None,
    title: str | None = None,
) -> Figure:
    """Mean curve of every setting over its seeds, in a band from the lowest seed to the highest.

    Args:
        curves: for each label values [seeds, epochs]; the first epoch is 1.
        ylabel: what the values are.
        goal: a value to mark by a line.
        title: a line above the figure.

    Raises:
        ValueError: there are no curves, or one has another shape.
    """
    if not curves:
        raise ValueError("curves must hold at least one setting, got none")
    for label, values in curves.items():
        if values.dim() != 2 or 0 in values.shape:
            raise ValueError(f"curves[{label!r}] must be [seeds, epochs], got {list(values.shape)}")
    figure = _figure(8.6, 4.4)
    from matplotlib.ticker import MaxNLocator

    axes = figure.add_axes((0.075, 0.125, 0.54, 0.785))
    ends = []
    for index, (label, values) in enumerate(curves.items()):
        color, dash = _LINES[index % len(_LINES)]
        epochs = range(1, values.shape[1] + 1)
        values = values.double().cpu()
        mean, low, high = values.mean(dim=0).numpy(), values.amin(dim=0).numpy(), values.amax(dim=0).numpy()
        axes.fill_between(epochs, low, high, color=color, alpha=0.13, lw=0)
        axes.plot(epochs, mean, color=color, linestyle=dash, lw=2, marker="o" if len(mean) == 1 else None)
        ends.append((float(mean[-1]), label, color, dash))
    longest = max(values.shape[1] for values in curves.values())
    axes.set_xlim(1, max(longest, 2))
    lowest = min(float(values.min()) for values in curves.values())
    highest = max(float(values.max()) for values in curves.values())
    margin = 0.04 * max(highest - lowest, 1e-3)
    axes.set_ylim(lowest - margin, highest + margin)
    if goal is not None:
        axes.axhline(goal, color="0.55", lw=0.8, zorder=0)
    axes.set_xlabel("epoch")
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _label_ends(axes, ends)
    if title:
        _title(figure, title)
    return figure


def _label_ends(axes: Any, ends: Sequence[tuple[float, str, str, Any]]) -> None:
    """The name of each curve (value, label, color, dash) beside its end, moved apart where ends are close."""
    bottom, top = axes.get_ylim()
    gap = 0.068  # of the height of the axes: a line of text
    ends = sorted(ends, key=lambda end: end[0])
    heights = [(value - bottom) / (top - bottom) for value, *_ in ends]
    labels = list(heights)
    for i in range(1, len(labels)):
        labels[i] = max(labels[i], labels[i - 1] + gap)
    labels[-1] = min(labels[-1], 1.0)
    for i in range(len(labels) - 2, -1, -1):
        labels[i] = min(labels[i], labels[i + 1] - gap)
    across = axes.transAxes
    for (value, name, color, dash), end, label in zip(ends, heights, labels, strict=True):
        line = {"color": color, "linestyle": dash, "lw": 1.8, "clip_on": False}
        axes.plot([1.0, 1.03, 1.09], [end, label, label], transform=across, **line)
        axes.text(1.1, label, f"{name}  {value:.1f}", transform=across, va="center", fontsize=9.5)


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
                    name = f"head {head + 1}"
                    axes.text(
                        0.5, 1.4, name, transform=axes.transAxes, ha="center", fontsize=11, weight="bold"
                    )
                if head == 0 and stage == 0:
                    axes.set_ylabel(f"layer {layer + 1}", fontsize=11, weight="bold", labelpad=6)
    _colorbar(figure, image, bar)
    if title:
        _title(figure, title)
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


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "figures need matplotlib, which is not installed; get it with: pip install 'convinit[train]'"
        ) from error
    return Figure(figsize=(width, height), facecolor="white")


def _panels(
    rows: int, columns: int, *, cell: tuple[float, float], top: float, **spacing: float
) -> tuple[Figure, Any]:
    """A figure and its grid; sizes in inches, with room for row names, titles and a colour bar."""
    left, right, bottom = 0.6, 0.95, 0.12
    width, height = left + columns * cell[0] + right, top + rows * cell[1] + bottom
    figure = _figure(width, height)
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


def _title(figure: Figure, title: str) -> None:
    """At the left edge, in a size that fits."""
    width, height = figure.get_size_inches()
    size = min(12.0, 72 * (width - 0.3) / (0.55 * len(title)))
    figure.text(0.15 / width, 1 - 0.12 / height, title, fontsize=size, va="top")


def _square(axes: Any, values: Tensor) -> Any:
    from matplotlib.colors import PowerNorm

    # The square root of the attention: a uniform map of 1/64 must not look like nothing.
    image = axes.imshow(
        values.detach().double().cpu().numpy(), cmap=_MAP, norm=PowerNorm(0.5, 0, 1), interpolation="nearest"
    )
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    return image


def _filter(axes: Any, values: Tensor, offset: tuple[int, ...], *, number: bool) -> Any:
    from matplotlib.patches import Circle

    image = _square(axes, values)
    radius = values.shape[-1] // 2
    axes.axhline(radius, color="white", lw=0.4, alpha=0.5)
    axes.axvline(radius, color="white", lw=0.4, alpha=0.5)
    dy, dx = offset
    if max(abs(dy), abs(dx)) <= radius:
        axes.add_patch(Circle((radius + dx, radius + dy), 0.72, fill=False, color=_TARGET, lw=1.4))
        if number:
            axes.text(
                0.97, 0.02, f"{float(values[radius + dy, radius + dx]):.2f}", transform=axes.transAxes,
                ha="right", va="bottom", fontsize=7.5, color="white",
            )  # fmt: skip
    return image


def _colorbar(figure: Figure, image: Any, label: str) -> None:
    width, height = figure.get_size_inches()
    tall = min(2.4, 0.75 * height)
    axes = figure.add_axes((1 - 0.78 / width, 0.15 / height, 0.13 / width, tall / height))
    bar = figure.colorbar(image, cax=axes, ticks=[0, 0.05, 0.2, 0.5, 1])
    bar.set_label(label, fontsize=9, labelpad=2)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
