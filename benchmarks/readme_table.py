"""README's table: which rows of the committed results stand there. report.py --readme writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from results import load

START = "<!-- benchmarks: written by benchmarks/report.py --readme -->"
END = "<!-- benchmarks: end -->"


class Line(NamedTuple):
    """A line of the table: `ours` against `theirs` on one problem."""

    label: str
    op: str
    problem: str
    theirs: str
    ours: str = "convinit"
    dtype: str = "float32"
    device: str = "cpu"


LINES: list[Line] = []


def time(milliseconds: float) -> str:
    for unit, size in (("s", 1e3), ("ms", 1.0), ("µs", 1e-3)):
        if milliseconds >= size or unit == "µs":
            value = milliseconds / size
            return f"{value:,.0f} {unit}" if value >= 1000 else f"{value:.3g} {unit}"
    raise AssertionError


def find(frame: pd.DataFrame, line: Line, competitor: str) -> pd.Series:
    wanted = {"op": line.op, "problem": line.problem, "dtype": line.dtype, "device": line.device}
    rows = frame[frame["competitor"] == competitor]
    for column, value in wanted.items():
        rows = rows[rows[column] == value]
    if rows.empty or rows.iloc[-1]["status"] != "ok":
        raise ValueError(f"no timed row of {competitor!r} for README's line {line} in the committed results")
    return rows.iloc[-1]


def rendered(paths: list[Path], lines: list[Line]) -> str:
    """The table, and below it the machines; ratios with the spread over the rounds."""
    if not lines:
        return ""
    frame = load(paths)
    frame = frame[frame["sweep"] == ""]
    used: dict[int, str] = {}
    text = ["| | convinit | the other | times as fast |", "|---|---:|---:|---:|"]
    for line in lines:
        our, their = find(frame, line, line.ours), find(frame, line, line.theirs)
        if our["file"] != their["file"]:
            raise ValueError(f"the two rows of README's line {line} must be of one run")
        ratio = their["median_ms"] / our["median_ms"]
        spread = ""
        for name, low, high in [
            ("ratio", "ratio_q20", "ratio_q80"),
            ("vs_best", "vs_best_q20", "vs_best_q80"),
        ]:
            other = our["baseline"] if name == "ratio" else our["best_other"]
            if other == line.theirs and not pd.isna(our[name]):
                ratio, spread = our[name], f" ({our[low]:.3g} to {our[high]:.3g})"
                break
        mark = "" if pd.isna(their.get("extrapolated_by")) else "about "
        text.append(
            f"| {line.label} | {time(our['median_ms'])} | {line.theirs}: {mark}{time(their['median_ms'])} | "
            f"{mark}{ratio:.3g}{spread} |"
        )
        output = json.loads(paths[our["file"]].read_text())
        info, run = output["machine_info"], output["run"]
        name = info["gpu"] if line.device == "cuda" else f"{info['cpu']}, {info['threads']} threads"
        used[our["file"]] = f"{name}, torch {info['torch']}, {run['date'][:10]}, revision {run['revision']}"
    return "\n".join(
        [
            *text,
            "",
            "Medians; in brackets 20 to 80 % of the rounds. " + "; ".join(dict.fromkeys(used.values())) + ".",
        ]
    )


def replaced(readme: str, paths: list[Path], lines: list[Line] | None = None) -> str:
    """README's text with the table between the two marks written anew."""
    if readme.count(START) != 1 or readme.count(END) != 1 or readme.index(START) > readme.index(END):
        raise ValueError(f"README.md must hold {START!r} and after it {END!r}, once each")
    table = rendered(paths, LINES if lines is None else lines)
    before, after = readme.partition(START)[0], readme.partition(END)[2]
    return f"{before}{START}\n{table}{chr(10) if table else ''}{END}{after}"
