"""What a table shows, in sentences made from its figures.

Two means differ "clearly" if they are apart by more than twice the standard error of the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from convinit._over_seeds import clearly

if TYPE_CHECKING:
    from convinit.reproduce.report import Report


def conclusions(report: Report) -> list[str]:
    """How our row stands to each of the others, and to the controls together."""
    table = report.grid.table
    if len(report.grid.seeds) == 1:
        return ["With a single seed no difference can be called clear: run more (--seeds)."]
    compared = [each for each in table.readings if "peak" not in each]
    rivals = [row.label for row in table.rows if row.label != table.ours]
    found = [_against(report, rival, reading) for reading in compared for rival in rivals]
    controls = [label for label in rivals if label.startswith("control")]
    if controls:
        found += [_against_controls(report, controls, reading) for reading in compared]
    found.append(
        "“Clearly” means more than two standard errors of the difference: a hint rather than a proof at so "
        "few seeds. Nothing was tuned for any row, and nothing is shown about other data or longer training."
    )
    return [each for each in found if each]


def _against(report: Report, rival: str, reading: str) -> str:
    """In which columns our row is above or below another."""
    table = report.grid.table
    verdicts: dict[str, list[str]] = {"clearly above": [], "clearly below": [], "not clearly apart": []}
    for column in table.columns:
        mine, theirs = (report.figure((row, column.label), reading) for row in (table.ours, rival))
        if mine is None or theirs is None:
            continue
        verdict = "not clearly apart"
        if clearly(mine, theirs):
            verdict = "clearly above"
        elif clearly(theirs, mine):
            verdict = "clearly below"
        name = f"{column.label} " if len(table.columns) > 1 else ""
        verdicts[verdict].append(f"{name}({mine.mean - theirs.mean:+.1f})")
    at = " at " if len(table.columns) > 1 else " "
    parts = [f"{verdict}{at}{', '.join(where)}" for verdict, where in verdicts.items() if where]
    return f"{_name(report, reading)}: {table.ours} against {rival}: {'; '.join(parts)}." if parts else ""


def _against_controls(report: Report, controls: Sequence[str], reading: str) -> str:
    """Whether the convolution itself is seen to help: only where our row beats every control."""
    table, seen, judged = report.grid.table, [], 0
    for column in table.columns:
        mine = report.figure((table.ours, column.label), reading)
        theirs = [report.figure((row, column.label), reading) for row in controls]
        if mine is None or None in theirs:
            continue
        judged += 1
        if all(clearly(mine, each) for each in theirs if each is not None):
            seen.append(column.label)
    if not judged:
        return ""
    name = f"{_name(report, reading)}: {table.ours} is"
    if not seen:
        return f"{name} nowhere clearly above every control: not shown to come from the convolution."
    return f"{name} clearly above every control" + (
        f" at {', '.join(seen)}." if len(table.columns) > 1 else "."
    )


def _name(report: Report, reading: str) -> str:
    title = report.title(reading)
    return (title[:1].upper() + title[1:]).removesuffix(", %")
