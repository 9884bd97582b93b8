"""Two runs of the suite: what got slower or faster beyond the noise.

    python benchmarks/compare.py OLD.json NEW.json
    python benchmarks/compare.py --by ratio OLD.json NEW.json     # for runs of different machines or load

Rows are joined by op, problem, competitor, dtype, device and sweep. A row is *slower* if its median grew by
more than --factor, and the two ranges from the 20 % to the 80 % quantile of the rounds do not overlap;
*faster* likewise the other way round. Both must hold: the ranges say what noise there was within each run,
the factor allows for what changes between two runs of one machine (clocks, placement in memory, other
work).

--by ratio compares the ratios to the baseline instead of times, in which the machine's drift cancels; a
smaller ratio counts as slower. It does not see a change that the baseline shares.

The exit code is 1 if a row got slower, or was timed and is now wrong, failed or out of memory; 2 for files
that cannot be read; else 0.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pandas as pd
from results import KEY, load

FACTOR = 1.1
WORSE = ("wrong", "failed", "out of memory")


def verdict(old: pd.Series, new: pd.Series, factor: float, by: str = "time") -> tuple[str, float | None]:
    """faster, slower, same, or the word for a status that changed; and new time / old time."""
    if old["status"] != "ok" or new["status"] != "ok":
        if old["status"] == new["status"]:
            return "same", None
        lost = old["status"] == "ok" and new["status"] in WORSE
        return "broken" if lost else f"{old['status']} -> {new['status']}", None
    if by == "ratio":  # old / new, so that above 1 is slower as for times
        names = "ratio", "ratio_q20", "ratio_q80"
        before, after = ([row[name] for name in names] for row in (new, old))
        if pd.isna(before[0]) or pd.isna(after[0]):
            return "same", None
    else:
        names = "median_ms", "q20_ms", "q80_ms"
        before, after = ([row[name] for name in names] for row in (old, new))
    change = after[0] / before[0]
    if change > factor and after[1] > before[2]:
        return "slower", change
    if change < 1 / factor and after[2] < before[1]:
        return "faster", change
    return "same", change


def differences(old: dict[str, object], new: dict[str, object]) -> list[str]:
    """What the machines differ in."""
    return [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]


def compare(old: pd.DataFrame, new: pd.DataFrame, factor: float, by: str) -> dict[str, list[str]]:
    """{verdict: lines for the eye}; rows of one run only are "new" and "gone"."""
    key = [*KEY, "series", "value"]
    before, after = ({tuple(map(str, row[key])): row for _, row in frame.iterrows()} for frame in (old, new))
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys([*before, *after]):
        row = after.get(name, before.get(name))
        text = f"{row['op']}: {row['problem']}, {row['dtype']}, {row['device']}: {row['competitor']}"
        if name not in before or name not in after:
            found.setdefault("new" if name in after else "gone", []).append(text)
            continue
        word, change = verdict(before[name], after[name], factor, by)
        if change is not None:
            figures = "ratio" if by == "ratio" else "median_ms"
            unit = "" if by == "ratio" else " ms"
            text += f"  {before[name][figures]:.4g} -> {after[name][figures]:.4g}{unit} (time x {change:.3f})"
        elif word == "broken":
            text += f"  {after[name]['status']}: {after[name]['reason']}"
        found.setdefault(word, []).append(text)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, metavar="OLD.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")
    parser.add_argument(
        "--factor", type=float, default=FACTOR, help=f"changes below it are noise (default {FACTOR})"
    )
    parser.add_argument("--by", choices=["time", "ratio"], default="time")
    options = parser.parse_args()
    if options.factor < 1:
        parser.error(f"--factor must be 1 or more, got {options.factor}")
    try:
        machines = [json.loads(path.read_text())["machine_info"] for path in (options.old, options.new)]
        found = compare(load([options.old]), load([options.new]), options.factor, options.by)
    except (OSError, ValueError, KeyError) as error:
        print(f"compare.py: cannot read the results: {error}", file=sys.stderr)
        return 2
    changed = differences(*machines)
    if changed:
        print("The machines or their software differ:", *(f"  {line}" for line in changed), sep="\n")
        if options.by == "time":
            print(
                "  Times of different machines say nothing about the code; --by ratio compares within each."
            )
    for word in sorted(found, key=lambda word: (word != "broken", word != "slower", word != "faster", word)):
        if word != "same":
            print(f"\n{word} ({len(found[word])}):", *(f"  {line}" for line in found[word]), sep="\n")
    print(f"\n{len(found.get('same', []))} without a change beyond noise (factor {options.factor})")
    return 1 if found.get("slower") or found.get("broken") else 0


if __name__ == "__main__":
    sys.exit(main())
