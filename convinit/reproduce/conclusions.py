"""What a table shows, in sentences made from its numbers.

Tables whose cells choose their learning rates on validation images get the difference over the same seeds,
with its interval. In other tables marks say how the means stand (`Report.standing`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from convinit.reproduce.mean_sd import over_seeds
from convinit.reproduce.report import MARKS, Report


def conclusions(report: Report) -> list[str]:
    """How our row stands to each of the others, and to the controls together."""
    table = report.grid.table
    if len(report.grid.seeds) == 1:
        return ["With a single seed no difference can be called clear: run more (--seeds)."]
    images = {
        "digits": "these very images",
        "fashion-mnist": "other training images of this set and of the digits",
    }.get(report.grid.data, "8×8 digits")
    if "validation" in table.readings:
        images = "such images of this set"
    chosen = f"The defaults of impulses (peak, α, window) were chosen on {images}"
    rivals = {row.label: row.against or table.ours for row in table.rows if row.label != table.ours}
    if table.rates:
        found = [_paired(report, ours, rival, reading) for reading in table.readings if reading in _PAIRED
                 for rival, ours in rivals.items()]  # fmt: skip
        found += [
            "The intervals are Student's over the seeds, whose training images differ; where they hold 0, no "
            "difference is shown.",
            f"{chosen}. Nothing is shown about other data, larger models or longer training.",
        ]
        return [each for each in found if each]
    found = [_marks(report)]
    for ours in dict.fromkeys(rivals.values()):
        controls = [row.label for row in table.rows if row.control and rivals.get(row.label) == ours]
        if controls:
            found += [
                _against_controls(report, ours, controls, x) for x in table.readings if report.judged(x)
            ]
    found.append(f"{chosen}; no row was tuned here. Nothing is shown about other data or longer training.")
    return [each for each in found if each]


_PAIRED = ("accuracy", "validation", "shifted-2")


def _marks(report: Report) -> str:
    """The marks of the tables, explained."""
    table = report.grid.table
    others: dict[str, list[str]] = {}
    for row in table.rows:
        if row.against and row.label != row.against:
            others.setdefault(row.against, []).append(row.label)
    judged = "; ".join([f"judged against {table.ours}"] + [f"{', '.join(rows)} against {ours}"
                                                            for ours, rows in others.items()])  # fmt: skip
    unmarked = ", ".join(report.title(x).removesuffix(", %") for x in table.readings if not report.judged(x))
    return (
        f"Rows are {judged}: {MARKS['above']} clearly above it, {MARKS['alike']} not clearly apart, "
        f"{MARKS['unjudged']} too few runs to judge, no mark clearly below. “Clearly” means more than "
        "two standard errors of the difference: a hint rather than a proof at so few seeds."
        + (f" Not judged and without marks: {unmarked}." if unmarked else "")
    )


def _against_controls(report: Report, ours: str, controls: Sequence[str], reading: str) -> str:
    """Whether the convolution itself is seen to help: only where our row beats every control."""
    columns, seen, judged = report.grid.table.columns, [], 0
    for column in columns:
        standings = [report.standing((row, column.label), reading) for row in controls
                     if (row, column.label) in report.grid.configs]  # fmt: skip
        if not standings or "unjudged" in standings or None in standings:
            continue
        judged += 1
        if all(each == "below" for each in standings):
            seen.append(column.label)
    if not judged:
        return ""
    name = f"{_name(report, reading)}: {ours} is"
    if not seen:
        return f"{name} nowhere clearly above every control: no gain is shown to come from its structure."
    return f"{name} clearly above every control" + (f" for {', '.join(seen)}." if len(columns) > 1 else ".")


def _paired(report: Report, ours: str, rival: str, reading: str) -> str:
    """The difference to another row over the same seeds, with its interval by Student's t."""
    parts = []
    for column in report.grid.table.columns:
        differences = report.paired((ours, column.label), (rival, column.label), reading)
        if len(differences) >= 2:
            mean = over_seeds(differences)
            half = T_975[min(mean.n, len(T_975)) - 1] * (mean.sd or 0.0) / math.sqrt(mean.n)
            name = f"{column.label}: " if len(report.grid.table.columns) > 1 else ""
            parts.append(f"{name}{mean.mean:+.1f} ({mean.mean - half:+.1f} to {mean.mean + half:+.1f})")
    if not parts:
        return ""
    difference = f"{_name(report, reading)}, {ours} − {rival}"
    return f"{difference}, paired by seed, with its 95 % interval: {'; '.join(parts)}."


# The 97.5 % quantile of Student's t for 1, 2, ... runs; of 16 and more, 2.131 is on the safe side.
T_975 = (
    math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131,
)  # fmt: skip


def _name(report: Report, reading: str) -> str:
    title = report.title(reading)
    return (title[:1].upper() + title[1:]).removesuffix(", %")
