"""The report's pictures: ratios as bars, sweeps as lines."""

from __future__ import annotations

import textwrap
from collections.abc import Collection

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from scaling import exponents

from convinit.viz.style import LINES, TARGET, add_title, new_figure

OURS = TARGET
MARKERS = "osD^vPX"


def colours(names: list[str]) -> dict[str, tuple[str, object]]:
    """{competitor: (colour, dash)}: ours in the house's orange, the others from its palette."""
    palette = [
        ("0.35", "solid"),
        *(line for line in LINES if line[0] not in ("#000000", "#e69f00", "#d55e00")),
    ]
    others = [name for name in names if not name.startswith("convinit")]
    found = {name: palette[i % len(palette)] for i, name in enumerate(others)}
    dashes = ("solid", (0, (4, 1.5)), (0, (1, 1)))
    ours = [name for name in names if name.startswith("convinit")]
    return found | {name: (OURS, dashes[i % 3]) for i, name in enumerate(ours)}


def plain(value: float, _: object = None) -> str:
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:g}"


def ratio(value: float) -> str:
    return f"{value:,.0f}×" if value >= 1000 else f"{value:.3g}×"


def ratio_bars(op: str, rows: pd.DataFrame, extrapolated: Collection[str] = ()) -> Figure:
    """Every competitor's ratio to its problem's baseline, with its spread; right of 1 is faster.

    Args:
        rows: those with a ratio, without the baselines.
        extrapolated: baselines of which only a part was run.
    """
    groups = list(rows.groupby(["problem", "dtype", "device"], sort=False))
    bar, least_tall, margin = 0.2, 0.6, 1.05  # inches
    tall = sum(max(bar * len(group) + 0.2, least_tall) for _, group in groups)
    figure = new_figure(10, tall + margin)
    axes = figure.add_axes((0.36, 0.55 / (tall + margin), 0.55, tall / (tall + margin)))
    styles = colours(list(dict.fromkeys(rows["competitor"])))
    y, least = 0.0, min(1.0, rows["ratio_q20"].min())
    for (problem, dtype, device), group in groups:
        gap = max(0.2, least_tall - bar * len(group))
        y += gap / 2
        top = y
        for row in group.itertuples():
            colour, _ = styles[row.competitor]
            axes.barh(y + bar / 2, row.ratio - 1, height=0.85 * bar, left=1, color=colour, alpha=0.9)
            ends = [[max(row.ratio - row.ratio_q20, 0)], [max(row.ratio_q80 - row.ratio, 0)]]
            axes.errorbar(row.ratio, y + bar / 2, xerr=ends, color="0.25", linewidth=0.9, capsize=1.5)
            axes.annotate(
                f"{row.competitor}  {ratio(row.ratio)}", (max(row.ratio_q80, 1), y + bar / 2), (5, 0),
                textcoords="offset points", va="center", fontsize=7.5,
            )  # fmt: skip
            y += bar
        baseline = group["baseline"].iloc[0]
        against = f"against {baseline}" + (", extrapolated" if baseline in extrapolated else "")
        text = textwrap.fill(f"{problem}, {dtype}, {device}", 50)
        axes.text(-0.01, (top + y) / 2, f"{text}\n{against}", transform=axes.get_yaxis_transform(),
                  ha="right", va="center", fontsize=7.5)  # fmt: skip
        y += gap / 2
        axes.axhline(y, color="0.9", linewidth=0.8, zorder=0)
    axes.set_ylim(y, 0)
    axes.set_xscale("log")
    most = max(1.0, rows["ratio_q80"].max())
    axes.set_xlim(least / 1.15, most * (most / least) ** 0.3 * 1.3)  # room for the labels
    axes.xaxis.set_major_formatter(FuncFormatter(plain))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(1, color="0.3", linewidth=0.9)
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel(
        "times as fast as the baseline (log scale); median and 20 to 80 % of the rounds", fontsize=8
    )
    axes.tick_params(labelsize=8)
    add_title(figure, op)
    return figure


def scaling_lines(key: tuple[str, ...], sweep: pd.DataFrame) -> Figure:
    """Time against the variable, both as logarithms; a thin line is the fitted power law over its range."""
    op, series, variable, dtype, device = key
    figure = new_figure(6.4, 4.4)
    axes = figure.add_axes((0.12, 0.13, 0.56, 0.74))
    fits = exponents(sweep)
    styles = colours(list(fits))
    for (name, rows), marker in zip(
        sweep.groupby("competitor", sort=False), MARKERS * len(fits), strict=False
    ):
        rows = rows.sort_values("value")
        colour, dash = styles[name]
        fit = fits[name]
        label = name if fit is None else f"{name}: {variable}^{fit['exponent']:.2f}"
        axes.plot(rows["value"], rows["median_ms"], color=colour, linestyle=dash, marker=marker,
                  markersize=4.5, linewidth=1.6, label=textwrap.fill(label, 24))  # fmt: skip
        axes.fill_between(
            rows["value"], rows["q20_ms"], rows["q80_ms"], color=colour, alpha=0.15, linewidth=0
        )
        if fit is not None:
            x = np.array([fit["from"], fit["to"]])
            axes.plot(x, np.exp(fit["offset"]) * x ** fit["exponent"], color="0.35", linewidth=0.7)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted(sweep["value"].unique()))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(plain))
        axis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, which="major", color="0.92", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel(variable, fontsize=9)
    axes.set_ylabel("ms (median, 20 to 80 %)", fontsize=9)
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, fontsize=8)
    add_title(figure, ", ".join(filter(None, [op, series, f"against {variable}", dtype, device])))
    return figure
