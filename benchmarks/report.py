"""One page of Markdown with tables and pictures from result files, and the table of docs/benchmarks.md.

python benchmarks/report.py results/*.json --out report     # report/README.md and report/*.png
python benchmarks/report.py --docs                          # the table of docs/benchmarks.md
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import docs_table
import pandas as pd
import plots
from results import KEY, load
from scaling import exponents, sweeps

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
NOTES = """\
Ratios are the other competitor's time over this one's, taken round by round: **above 1 is faster than the
other, below 1 slower**. Times are medians, in brackets 20 to 80 % of the rounds. "%" is the share of the
roofline: the least time that the bytes or the operations need at the ceilings above, over the time taken;
none where the data fit into the last cache. Timers: *clock* is the host's; *graph* the GPU's own time for
the replay of a CUDA graph, *events* that of a plain call, both with a cold L2 cache; *host* beside them is
the time a call takes when the host launches it.
"""


def significant(value: float | None) -> str:
    if value is None or pd.isna(value):
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def between(row: pd.Series, name: str, low: str, high: str) -> str:
    if name not in row or pd.isna(row[name]):
        return ""
    return f"{significant(row[name])} ({significant(row[low])} to {significant(row[high])})"


def milliseconds(row: pd.Series) -> str:
    """The median in the unit that suits it, and the quantiles."""
    spread = [docs_table.time(row[name]) for name in ("q20_ms", "q80_ms")]
    return f"{docs_table.time(row['median_ms'])} ({' to '.join(spread)})"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; numbers, which is all but the first column, are set to the right."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in [header, *rows]]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    rule = "|" + "|".join(["---", *["---:"] * (len(header) - 1)]) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def machine_table(paths: list[Path]) -> str:
    """A column a machine and a run; results of one run in several files share it."""
    columns: dict[str, dict[str, str]] = {}
    for path in paths:
        output = json.loads(path.read_text())
        run = output["run"]
        facts = {key: str(value) for key, value in output["machine_info"].items()}
        facts |= {"date": run["date"][:10], "revision": run["revision"]}
        for device, found in run["ceilings"].items():
            rates = [f"{name} {significant(rate)} GB/s" for name, rate in found["gb_per_s"].items()]
            rates += [f"{name} {significant(rate)} TFLOP/s" for name, rate in found["tflop_per_s"].items()]
            facts[f"ceilings, {device}"] = ", ".join(rates)
        same = json.dumps([output["machine_info"], run["date"][:10], run["revision"]])
        column = columns.setdefault(same, {"files": "", "commands": ""})
        column["files"] += f"{'<br>' if column['files'] else ''}{path.name}"
        column["commands"] += f"{'<br>' if column['commands'] else ''}`{run['command']}`"
        for key, value in facts.items():
            column.setdefault(key, value)
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    names = [*names[2:], *names[:2]]  # files and commands last
    return table(
        ["", *["run"] * len(columns)], [[n, *(c.get(n, "") for c in columns.values())] for n in names]
    )


def problem_columns(rows: pd.DataFrame) -> list[str]:
    """The optional columns that this op has something in."""
    wanted = ["gb_per_s", "tflop_per_s", "roofline_percent", "images_per_s", "peak_mb", "host_ms"]
    return [name for name in wanted if name in rows and rows[name].notna().any()]


TITLES = {
    "gb_per_s": "GB/s", "tflop_per_s": "TFLOP/s", "roofline_percent": "%", "images_per_s": "images/s",
    "peak_mb": "peak MB", "host_ms": "host ms",
}  # fmt: skip


def facts_text(row: pd.Series) -> str:
    found = dict(row["facts"]) if isinstance(row["facts"], dict) else {}
    if "extrapolated_by" in row and not pd.isna(row["extrapolated_by"]):
        found["extrapolated by"] = significant(row["extrapolated_by"])
    return ", ".join(f"{key} {value}" for key, value in found.items())


def op_table(rows: pd.DataFrame) -> str:
    optional = problem_columns(rows)
    header = ["problem", "competitor", "time", "ratio to baseline", "ratio to the best other", "rounds",
              *(TITLES[name] for name in optional), "timer", "facts"]  # fmt: skip
    lines = []
    for (problem, dtype, device), group in rows.groupby(["problem", "dtype", "device"], sort=False):
        title = f"{problem}, {dtype}, {device}"
        for _, row in group.iterrows():
            name = row["competitor"] + (" (baseline)" if row["competitor"] == row["baseline"] else "")
            lines.append([
                title, f"**{name}**" if is_ours(row["competitor"]) else name,
                milliseconds(row), between(row, "ratio", "ratio_q20", "ratio_q80"),
                between(row, "vs_best", "vs_best_q20", "vs_best_q80"), significant(row["rounds"]),
                *(significant(row[name]) for name in optional), row["timer"], facts_text(row),
            ])  # fmt: skip
            title = ""
    return table(header, lines)


def is_ours(competitor: str) -> bool:
    """convinit's own competitors are called "convinit", or that and a word more."""
    return competitor.startswith("convinit")


def extrapolated(rows: pd.DataFrame) -> set[str]:
    """The competitors of which only a part was run, and its time multiplied."""
    return set(rows.loc[rows["extrapolated_by"].notna(), "competitor"])


def wins_and_losses(rows: pd.DataFrame) -> str:
    """convinit's fastest way of each problem against the best competitor that is not convinit's."""
    found = []
    for (problem, dtype, device), group in rows.groupby(["problem", "dtype", "device"], sort=False):
        ours, others = (group[group["competitor"].map(is_ours) == mine] for mine in (True, False))
        if ours.empty or others.empty:
            continue
        our, other = (part.loc[part["median_ms"].idxmin()] for part in (ours, others))
        ratio = other["median_ms"] / our["median_ms"]
        low, high = other["q20_ms"] / our["q80_ms"], other["q80_ms"] / our["q20_ms"]
        if our["best_other"] == other["competitor"]:  # then the rounds were compared
            ratio, low, high = our["vs_best"], our["vs_best_q20"], our["vs_best_q80"]
        word = "faster" if low > 1 else "slower" if high < 1 else "even"
        spread = f"{significant(ratio)} ({significant(low)} to {significant(high)})"
        names = [
            row["competitor"] + (" (extrapolated)" if row["competitor"] in extrapolated(group) else "")
            for row in (our, other)
        ]
        found.append((ratio, [f"{problem}, {dtype}, {device}", *names, spread, word]))
    if not found:
        return ""
    found.sort(key=lambda entry: -entry[0])
    header = ["problem", "ours", "best other", "ratio", "convinit is"]
    words = [line[-1] for _, line in found]
    counts = ", ".join(f"{words.count(word)} {word}" for word in ("faster", "even", "slower"))
    return (
        f"Against the best other competitor: {counts} (even: 1 lies within 20 to 80 % of the rounds).\n\n"
        + table(header, [line for _, line in found])
    )


def untimed_table(rows: pd.DataFrame) -> str:
    lines = [
        [f"{row.op}: {row.problem}, {row.dtype}, {row.device}", row.competitor, row.status, row.reason]
        for row in rows.itertuples()
    ]
    return table(["problem", "competitor", "status", "reason"], lines)


def scaling_table(found: dict[tuple[str, ...], pd.DataFrame]) -> str:
    lines = []
    for (op, series, variable, dtype, device), sweep in found.items():
        for name, fit in exponents(sweep).items():
            total = sweep.loc[sweep["competitor"] == name, "value"].nunique()
            title = ", ".join(filter(None, [op, series, f"against {variable}", dtype, device]))
            if name in extrapolated(sweep):
                name += " (extrapolated)"
            if fit is None:
                lines.append([title, name, "fewer than 3 points", ""])
                continue
            span = f"{variable} = {fit['from']:g} to {fit['to']:g}, {fit['points']} of {total} points"
            lines.append([title, name, f"{fit['exponent']:.2f} ± {fit['error']:.2f}", span])
    return table(["sweep", "competitor", "exponent", "fitted over"], lines)


def file_name(*parts: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "-", "-".join(filter(None, parts))).strip("-") + ".png"


def write(paths: list[Path], out: Path) -> Path:
    """Writes the page and its pictures into `out`; the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    frame = load(paths)
    # The same problem in several files: the last one given counts, whole, so that only rows of one run meet.
    problem = [*(name for name in KEY if name != "competitor"), "series", "value"]
    last = frame.groupby(problem, dropna=False)["file"].transform("max")
    frame = frame[frame["file"] == last].drop_duplicates([*KEY, "series", "value"], keep="last")
    timed = frame[frame["status"] == "ok"]
    page = ["# Benchmark results", "## Machine", machine_table(paths), NOTES]
    for op, rows in timed.groupby("op", sort=False):
        page.append(f"## {op}")
        single = rows[rows["sweep"] == ""]
        if not single.empty:
            page.append(wins_and_losses(single))
            bars = single[single["ratio"].notna() & (single["competitor"] != single["baseline"])]
            if not bars.empty:
                name = file_name("ratios", op)
                plots.ratio_bars(op, bars, extrapolated(rows)).savefig(out / name, dpi=130)
                page.append(f"![Ratios of {op}]({name})")
            page.append(op_table(single))
        swept = rows[rows["sweep"] != ""]
        if not swept.empty:
            for key, sweep in sweeps(swept).items():
                name = file_name("scaling", *key)
                plots.scaling_lines(key, sweep).savefig(out / name, dpi=130)
                page.append(f"![{op} against {key[2]}]({name})")
            page.append(scaling_table(sweeps(swept)))
            page.append(op_table(swept))
    untimed = frame[frame["status"] != "ok"]
    if not untimed.empty:
        page += ["## Not timed", untimed_table(untimed)]
    path = out / "README.md"
    path.write_text("\n\n".join(part.strip() for part in page if part) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "results", nargs="*", type=Path, metavar="RESULTS.json", help="files of --benchmark-json"
    )
    parser.add_argument("--out", type=Path, help="folder for the page and its pictures")
    parser.add_argument(
        "--docs",
        action="store_true",
        help="write the table of docs/benchmarks.md from benchmarks/results/cpu-epyc-2core",
    )
    options = parser.parse_args()
    if not options.docs and not (options.results and options.out):
        parser.error("give result files and --out DIR, or --docs")
    try:
        if options.docs:
            text = PAGE.read_text()
            PAGE.write_text(docs_table.replaced(text, docs_table.committed()))
            print(f"wrote {PAGE}")
        if options.results:
            print(f"wrote {write(options.results, options.out)}")
    except (OSError, ValueError) as error:
        sys.exit(f"report.py: {error}")


if __name__ == "__main__":
    main()
