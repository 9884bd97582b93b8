"""Numbers over seeds: mean, standard deviation, and when two means differ."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class MeanSd:
    """A mean over seeds.

    Attributes:
        mean: of the values.
        sd: sample standard deviation; None for a single value.
        n: number of values.
    """

    mean: float
    sd: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + (f" ± {self.sd:.1f}" if self.sd is not None else "")


def over_seeds(values: Sequence[float]) -> MeanSd:
    """The mean of values, at least one."""
    sd = statistics.stdev(values) if len(values) > 1 else None
    return MeanSd(statistics.fmean(values), sd, len(values))


def clearly(higher: MeanSd, lower: MeanSd) -> bool | None:
    """Whether one mean is above another by more than two standard errors; None where seeds are too few."""
    if higher.sd is None or lower.sd is None:
        return None
    error = math.sqrt(higher.sd**2 / higher.n + lower.sd**2 / lower.n)
    return higher.mean - lower.mean > 2 * error
