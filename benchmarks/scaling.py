"""Exponents of the sweeps: how a competitor's time grows with one variable."""

from __future__ import annotations

import numpy as np
import pandas as pd


def fit_exponent(values: np.ndarray, times: np.ndarray) -> dict[str, float] | None:
    """Least squares of log(time) = exponent · log(value) + c, over the upper half of the values.

    Small sizes measure the cost of a call, not its growth. The upper half is those values from the
    geometric middle of the range on, and three at least; None if there are fewer than three.

    Args:
        values, times: [n], positive.

    Returns:
        exponent and its standard error, the least and largest value fitted, the number of points.
    """
    order = np.argsort(values)
    x, y = np.log(np.asarray(values, float)[order]), np.log(np.asarray(times, float)[order])
    if len(np.unique(x)) < 3:
        return None
    first = min(int(np.searchsorted(x, (x[0] + x[-1]) / 2)), len(x) - 3)
    x, y = x[first:], y[first:]
    spread = ((x - x.mean()) ** 2).sum()
    if spread == 0:
        return None
    slope = ((x - x.mean()) * (y - y.mean())).sum() / spread
    residual = y - y.mean() - slope * (x - x.mean())
    error = np.sqrt((residual**2).sum() / (len(x) - 2) / spread)
    return {
        "exponent": float(slope), "error": float(error), "points": len(x),
        "from": float(np.exp(x[0])), "to": float(np.exp(x[-1])), "offset": float(y.mean() - slope * x.mean()),
    }  # fmt: skip


def sweeps(frame: pd.DataFrame) -> dict[tuple[str, ...], pd.DataFrame]:
    """{(op, series, variable, dtype, device): its timed rows}; each with two values at least."""
    swept = frame[(frame["sweep"] != "") & (frame["status"] == "ok")]
    groups = swept.groupby(["op", "series", "sweep", "dtype", "device"], sort=False)
    return {key: group for key, group in groups if group["value"].nunique() > 1}


def exponents(sweep: pd.DataFrame) -> dict[str, dict[str, float] | None]:
    """{competitor: its fit}."""
    return {
        name: fit_exponent(rows["value"].to_numpy(), rows["median_ms"].to_numpy())
        for name, rows in sweep.groupby("competitor", sort=False)
    }
