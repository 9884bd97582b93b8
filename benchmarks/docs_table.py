"""Selects the rows in the table of docs/benchmarks.md. `report.py --docs` writes the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from results import load

START = "<!-- benchmarks: written by benchmarks/report.py --docs -->"
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


BASELINE_FIT = "6 layers x 8 heads, 16x16, D=512, r=64, f=5, scale 0.1, weight_norm 8.77"
LEARNED_FIT = "12 layers x 3 heads, learned 14x14, D=192, r=64, f=3, scale 1/8, weight_norm 7"
BOTH = "forward+backward"
LINES: list[Line] = [
    Line("fit of 6 layers of 8 heads, the paper's case", "qk_fit", BASELINE_FIT, "papers' adam"),
    Line("the same", "qk_fit", BASELINE_FIT, "adam, well ordered"),
    Line("fit to a learned embedding, 12 layers of 3 heads", "qk_fit", LEARNED_FIT, "papers' svd"),
    Line("impulse matrices, 8 heads, 16 × 16", "impulse_matrix", "8 heads, 16x16", "papers' loops"),
    Line("the same", "impulse_matrix", "8 heads, 16x16", "torch.zeros"),
    Line("impulse matrices, 8 heads, 64 × 64: 537 MB", "impulse_matrix", "8 heads, 64x64", "torch.zeros"),
    Line("positional attention [32, 8, 256, 64], both directions", "positional_attention",
         f"[32, 8, 256, 64], {BOTH}", "eager"),
    Line("the same", "positional_attention", f"[32, 8, 256, 64], {BOTH}", "sdpa"),
    Line("the same in bfloat16", "positional_attention", f"[32, 8, 256, 64], {BOTH}", "eager",
         dtype="bfloat16"),
    Line("[8, 6, 576, 64] in bfloat16", "positional_attention", f"[8, 6, 576, 64], {BOTH}", "eager",
         dtype="bfloat16"),
    Line("shared attention [32, 8, 256, 64], both directions", "shared_attention",
         f"[32, 8, 256, 64], {BOTH}", "eager"),
    Line("the same", "shared_attention", f"[32, 8, 256, 64], {BOTH}", "tall product"),
    Line("the same in bfloat16 (convinit takes the tall product)", "shared_attention",
         f"[32, 8, 256, 64], {BOTH}", "eager", dtype="bfloat16"),
    Line("impulse convolution [32, 512, 16, 16], both directions", "impulse_conv",
         f"[32, 512, 16, 16], {BOTH}, cpu", "conv2d, channels_last"),
    Line("linear layer 512 → 512 of 4,096 tokens, both directions", "linear", f"[4096, 512, 512], {BOTH}",
         "F.linear"),
    Line("linear layer 512 → 10 of 64 images", "linear", f"[64, 512, 10], {BOTH}", "F.linear"),
    Line("Model I, training step of 16 images", "models", "Model I, training, batch 16", "papers' eager"),
    Line("the same", "models", "Model I, training, batch 16", "papers' eager, our Linear"),
    Line("the same under bfloat16 autocast", "models", "Model I, training, batch 16", "papers' eager",
         dtype="bfloat16"),
    Line("`convinit train`, Model I: 2 steps of 16 images, read and augmented", "train",
         "Model I at the papers' size, batch 16", "papers' eager, plain loop"),
    Line("`convinit train`, the demo's ViT: 8 steps of 64 digits", "train",
         "digits, the demo's ViT, batch 64", "papers' eager, plain loop"),
    Line("Model II, training step of 16 images", "models", "Model II, training, batch 16", "papers' eager"),
    Line("the same", "models", "Model II, training, batch 16", "papers' eager, our Linear"),
    Line("Model III, training step of 16 images", "models", "Model III, training, batch 16", "papers' eager"),
]  # fmt: skip


def committed() -> list[Path]:
    """The result files of the one machine that the table is about."""
    return sorted((Path(__file__).parent / "results" / "cpu-epyc-2core").glob("*.json"))


def time(milliseconds: float) -> str:
    for unit, size in (("s", 1e3), ("ms", 1.0), ("µs", 1e-3)):
        if milliseconds >= size or unit == "µs":
            value = milliseconds / size
            return f"{value:,.0f} {unit}" if value >= 1000 else f"{value:.3g} {unit}"
    raise AssertionError


def times(ratio: float) -> str:
    """Three digits, without an exponent."""
    rounded = float(f"{ratio:.3g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:g}"


def find(frame: pd.DataFrame, line: Line, competitor: str) -> pd.Series:
    wanted = {"op": line.op, "problem": line.problem, "dtype": line.dtype, "device": line.device}
    rows = frame[frame["competitor"] == competitor]
    for column, value in wanted.items():
        rows = rows[rows[column] == value]
    if rows.empty or rows.iloc[-1]["status"] != "ok":
        raise ValueError(f"no timed row of {competitor!r} for the line {line} in the committed results")
    return rows.iloc[-1]


def rendered(paths: list[Path], lines: list[Line]) -> str:
    """The table, and below it the machines; ratios with the spread over the rounds."""
    if not lines:
        return ""
    frame = load(paths)
    frame = frame[frame["sweep"] == ""]
    used: dict[str, list[str]] = {}  # the revisions of each machine and day
    text = ["| | convinit | the other | times as fast |", "|---|---:|---:|---:|"]
    for line in lines:
        our, their = find(frame, line, line.ours), find(frame, line, line.theirs)
        if our["file"] != their["file"]:
            raise ValueError(f"the two rows of the line {line} must be of one run")
        ratio = their["median_ms"] / our["median_ms"]
        spread = ""
        for name, low, high in [
            ("ratio", "ratio_q20", "ratio_q80"),
            ("vs_best", "vs_best_q20", "vs_best_q80"),
        ]:
            other = our["baseline"] if name == "ratio" else our["best_other"]
            if other == line.theirs and not pd.isna(our[name]):
                ratio, spread = our[name], f" ({times(our[low])} to {times(our[high])})"
                break
        mark = "" if pd.isna(their.get("extrapolated_by")) else "about "
        text.append(
            f"| {line.label} | {time(our['median_ms'])} | {line.theirs}: {mark}{time(their['median_ms'])} | "
            f"{mark}{times(ratio)}{spread} |"
        )
        output = json.loads(paths[our["file"]].read_text())
        info, run = output["machine_info"], output["run"]
        name = info["gpu"] if line.device == "cuda" else f"{info['cpu']}, {info['threads']} threads"
        used.setdefault(f"{name}, torch {info['torch']}, {run['date'][:10]}", []).append(run["revision"])
    return "\n".join(
        [
            *text,
            "",
            "Medians; in brackets 20 to 80 % of the rounds. "
            + "; ".join(
                f"{where}, revision {', '.join(dict.fromkeys(found))}" for where, found in used.items()
            )
            + ".",
        ]
    )


def replaced(page: str, paths: list[Path], lines: list[Line] | None = None) -> str:
    """The page's text with the table between the two marks written anew."""
    if page.count(START) != 1 or page.count(END) != 1 or page.index(START) > page.index(END):
        raise ValueError(f"docs/benchmarks.md must hold {START!r} and after it {END!r}, once each")
    table = rendered(paths, LINES if lines is None else lines)
    before, after = page.partition(START)[0], page.partition(END)[2]
    return f"{before}{START}\n{table}{chr(10) if table else ''}{END}{after}"
