"""What a table shows, in sentences made from its figures.

Two means differ "clearly" if they are apart by more than twice the standard error of the difference. They are
compared where both have as many runs, two at least. Tables whose cells choose their learning rates on
validation images get the difference over the same seeds instead, with its interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from convinit._over_seeds import Figure, clearly, over_seeds
from convinit.reproduce.report import Report


def conclusions(report: Report) -> list[str]:
    """How our row stands to each of the others, and to the controls together."""
    table = report.grid.table
    if len(report.grid.seeds) == 1:
        return ["With a single seed no difference can be called clear: run more (--seeds)."]
    pairs = [(row, row.against or table.ours) for row in table.rows if row.label != table.ours]
    images = {
        "digits": "these very images",
        "fashion-mnist": "other training images of this set and of the digits",
    }.get(report.grid.data, "8×8 digits")
    chosen = f"The defaults of impulses (peak, α, window) were chosen on {images}"
    if table.rates:
        found = [_paired(report, ours, rival.label, reading) for reading in ("accuracy", "shifted-2")
                 for rival, ours in pairs]  # fmt: skip
        found += [
            "The intervals are Student's over the seeds, whose training images differ; where they hold 0, no "
            "difference is shown.",
            f"{chosen}. Nothing is shown about other data, larger models or longer training.",
        ]
        return [each for each in found if each]
    compared = [each for each in table.readings if "peak" not in each]
    found = [_against(report, ours, rival.label, reading) for reading in compared for rival, ours in pairs]
    for ours in dict.fromkeys(ours for _, ours in pairs):
        controls = [row.label for row, against in pairs if row.control and against == ours]
        if controls:
            found += [_against_controls(report, ours, controls, reading) for reading in compared]
    found += [
        "“Clearly” means more than two standard errors of the difference: a hint rather than a proof at so "
        "few seeds.",
        f"{chosen}; no row was tuned here. Nothing is shown about other data or longer training.",
    ]
    return [each for each in found if each]


def _against(report: Report, ours: str, rival: str, reading: str) -> str:
    """In which columns our row is above or below another."""
    columns = report.grid.table.columns
    names = ("clearly above", "clearly below", "not clearly apart", "not judged, for want of runs,")
    verdicts: dict[str, list[str]] = {name: [] for name in names}
    for column in columns:
        cells = (ours, column.label), (rival, column.label)
        if any(cell not in report.grid.configs for cell in cells):
            continue
        mine, theirs = (report.figure(cell, reading) for cell in cells)
        name = f"{column.label} " if len(columns) > 1 else ""
        if mine is None or theirs is None or not _comparable(mine, theirs):
            verdicts["not judged, for want of runs,"].append(name.rstrip() or "here")
            continue
        verdict = "not clearly apart"
        if clearly(mine, theirs):
            verdict = "clearly above"
        elif clearly(theirs, mine):
            verdict = "clearly below"
        verdicts[verdict].append(f"{name}({mine.mean - theirs.mean:+.1f})")
    which = " for " if len(columns) > 1 else " "
    parts = [f"{verdict}{which}{', '.join(where)}" for verdict, where in verdicts.items() if where]
    return f"{_name(report, reading)}, {ours} against {rival}: {'; '.join(parts)}." if parts else ""


def _against_controls(report: Report, ours: str, controls: Sequence[str], reading: str) -> str:
    """Whether the convolution itself is seen to help: only where our row beats every control."""
    columns, seen, judged = report.grid.table.columns, [], 0
    for column in columns:
        mine = report.figure((ours, column.label), reading)
        theirs = [report.figure((row, column.label), reading) for row in controls]
        known = [each for each in theirs if each is not None]
        if mine is None or len(known) < len(controls) or not all(_comparable(mine, x) for x in known):
            continue
        judged += 1
        if all(clearly(mine, each) for each in known):
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
            figure = over_seeds(differences)
            half = T_975[min(figure.n, len(T_975)) - 1] * (figure.sd or 0.0) / math.sqrt(figure.n)
            name = f"{column.label}: " if len(report.grid.table.columns) > 1 else ""
            parts.append(f"{name}{figure.mean:+.1f} ({figure.mean - half:+.1f} to {figure.mean + half:+.1f})")
    if not parts:
        return ""
    difference = f"{_name(report, reading)}, {ours} − {rival}"
    return f"{difference}, paired by seed, with its 95 % interval: {'; '.join(parts)}."


# The 97.5 % quantile of Student's t for 1, 2, ... runs; of 16 and more, 2.131 is on the safe side.
T_975 = (
    math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131,
)  # fmt: skip


def _comparable(mine: Figure, theirs: Figure) -> bool:
    return mine.n == theirs.n >= 2


def _name(report: Report, reading: str) -> str:
    title = report.title(reading)
    return (title[:1].upper() + title[1:]).removesuffix(", %")
