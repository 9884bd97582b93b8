"""Training as curves: of accuracy, and of how far each head has gone from its impulse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from convinit.viz import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from convinit.records import DriftHistory


_DRIFT = {
    "peak": "attention on the target",
    "hit_rate": "tokens that hit the target",
    "distance": "attention moved since the start",
}


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
    figure = style.new_figure(8.6, 4.4)
    from matplotlib.ticker import MaxNLocator

    axes = figure.add_axes((0.075, 0.125, 0.54, 0.785))
    ends = []
    for index, (label, values) in enumerate(curves.items()):
        color, dash = style.LINES[index % len(style.LINES)]
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
    style.add_title(figure, title)
    return figure


def run_curves(records: Sequence[Mapping[str, Any]], *, title: str | None = None) -> Figure:
    """One run: its training loss, and its accuracy wherever it was measured, over the epochs.

    Args:
        records: of metrics.jsonl, as :func:`convinit.train.run_training` writes it.
        title: a line above the figure.
    """
    figure = style.new_figure(8.6, 3.4)
    left, right = figure.add_axes((0.075, 0.15, 0.39, 0.68)), figure.add_axes((0.575, 0.15, 0.39, 0.68))
    steps = [(each["epoch"], each["loss"]) for each in records if each.get("kind") == "train"]
    epochs = [each for each in records if each.get("kind") == "epoch"]
    left.plot(
        *zip(*steps, strict=True) if steps else ([], []), color=style.LINES[1][0], lw=0.8, label="steps"
    )
    means = [(each["epoch"] - 0.5, each["loss"]) for each in epochs]  # of a whole epoch, at its middle
    left.plot(
        *zip(*means, strict=True) if means else ([], []),
        color=style.LINES[3][0],
        marker=".",
        label="mean of an epoch",
    )
    names = {"val_top1": "validation", "top1": "test", "ema_top1": "test, moving average"}
    for (key, name), (color, dash) in zip(names.items(), style.LINES[2:], strict=False):
        points = [(each["epoch"], 100 * each[key]) for each in epochs if key in each]
        if points:
            right.plot(*zip(*points, strict=True), color=color, linestyle=dash, marker=".", label=name)
    for axes, ylabel in ((left, "training loss"), (right, "accuracy, %")):
        axes.set_xlabel("epoch")
        axes.set_ylabel(ylabel)
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False, fontsize=9)
    style.add_title(figure, title)
    return figure


def drift(history: DriftHistory, *, measure: str = "peak", title: str | None = None) -> Figure:
    """How far every head goes from its impulse in training: a panel a layer, a thin line a head.

    Args:
        history: of a :class:`convinit.DriftMonitor`.
        measure: "peak", the attention on the target; "hit_rate", the share of tokens whose largest attention
            is the target; "distance", the share of attention that is elsewhere than at the start.
        title: a line above the figure.

    Returns:
        A figure whose panels share their axes; the thick line is the mean over the heads of the layer, the
        numbers its first and last value.

    Raises:
        ValueError: the measure is unknown, or no head has it.
    """
    if measure not in _DRIFT:
        raise ValueError(f"measure must be one of {', '.join(_DRIFT)}, got {measure!r}")
    values = getattr(history, measure).double()  # [records, layers, heads]
    if values.isnan().all():
        raise ValueError(f"history has no {measure}: the heads have no targets; see measure='distance'")
    layers = values.shape[1]
    rows = -(-layers // (4 if layers <= 12 else 6))
    columns = -(-layers // rows)
    width, left, right, bottom, between = 8.6, 0.62, 0.2, 0.5, 0.14
    top, tall, gap = 0.3 + 0.34 * bool(title), 1.35 if rows > 1 else 1.9, 0.3
    height = top + rows * tall + (rows - 1) * gap + bottom
    figure = style.new_figure(width, height)
    from matplotlib.ticker import MaxNLocator

    wide = (width - left - right - (columns - 1) * between) / columns
    highest = 1.12 * float(values.nan_to_num(0.0).max())
    steps, mean = history.steps.numpy(), values.nanmean(dim=2).numpy()
    marker = "." if len(steps) == 1 else None
    for layer in range(layers):
        row, column = divmod(layer, columns)
        x, y = left + column * (wide + between), top + (row + 1) * tall + row * gap
        axes = figure.add_axes((x / width, 1 - y / height, wide / width, tall / height))
        heads = values[:, layer]
        axes.plot(steps, heads[:, ~heads[0].isnan()].numpy(), color=style.LINES[1][0], lw=0.8, marker=marker)
        axes.plot(steps, mean[:, layer], color=style.LINES[3][0], lw=2.2, marker=marker)
        number = f"{mean[0, layer]:.2f} → {mean[-1, layer]:.2f}" if mean[0, layer] == mean[0, layer] else "–"
        axes.set_title(f"layer {int(history.layers[layer])}", fontsize=9, loc="left", pad=4)
        axes.set_title(number, fontsize=9, loc="right", pad=4, color=style.LINES[3][0])
        axes.set_xlim(steps[0], max(steps[-1], steps[0] + 1))
        axes.set_ylim(0, highest or 1)
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8.5, labelleft=column == 0, labelbottom=layer + columns >= layers)
    figure.text(0.5, 0.1 / height, "training step", fontsize=9.5, ha="center", va="bottom")
    middle = 1 - (top + (height - top - bottom) / 2) / height
    figure.text(0.1 / width, middle, _DRIFT[measure], fontsize=9.5, rotation=90, va="center")
    style.add_title(figure, title)
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
