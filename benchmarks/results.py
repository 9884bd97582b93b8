"""What is kept of a measurement: figures from samples, pytest-benchmark's rows and JSON, and a table."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from convinit._timing import Outcome

KEY = [
    "op",
    "problem",
    "competitor",
    "dtype",
    "device",
    "sweep",
]  # says which row of one run is which of another
STATS = (
    "min max mean stddev rounds median iqr outliers ops iterations".split()
)  # what pytest-benchmark's tables show


def spread(values: Any) -> tuple[float, float, float]:
    """Median, 20 % and 80 % quantile."""
    median, low, high = np.quantile(np.asarray(values, dtype=float), [0.5, 0.2, 0.8])
    return float(median), float(low), float(high)


def rounded(value: Any, digits: int = 5) -> Any:
    """Floats to `digits` significant digits, in lists and dictionaries too: more would be noise in a diff."""
    if isinstance(value, dict):
        return {key: rounded(entry, digits) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(entry, digits) for entry in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def figures(
    name: str,
    outcomes: dict[str, Outcome],
    *,
    baseline: str,
    factors: dict[str, float],
    bytes_moved: float | None = None,
    flops: float | None = None,
    images: int | None = None,
    ceiling: dict[str, float] | None = None,
) -> dict[str, Any]:
    """The measured facts of one competitor.

    Ratios are other competitor's time / own time, round by round, so that drift cancels: above 1 is faster.

    Args:
        outcomes: of all competitors, with samples of the same rounds.
        factors: by which the samples of some are multiplied.
        images: in a call.
        ceiling: {"gb_per_s", "tflop_per_s"} that the machine reaches, for the share of the roofline.
    """
    times = {
        other: np.asarray(outcome.seconds) * factors.get(other, 1.0)
        for other, outcome in outcomes.items()
        if outcome.status == "ok" and outcome.seconds
    }
    own = times[name]
    median, low, high = spread(own)
    row: dict[str, Any] = {
        "median_ms": 1e3 * median,
        "q20_ms": 1e3 * low,
        "q80_ms": 1e3 * high,
        "rounds": len(own),
    }
    if baseline in times:
        row["ratio"], row["ratio_q20"], row["ratio_q80"] = spread(times[baseline] / own)
    others = {other: np.median(values) for other, values in times.items() if other != name}
    if others:
        row["best_other"] = min(others, key=lambda other: others[other])
        against = spread(times[row["best_other"]] / own)
        row["vs_best"], row["vs_best_q20"], row["vs_best_q80"] = against
    if bytes_moved is not None:
        row["gb_per_s"] = bytes_moved / median / 1e9
    if flops is not None:
        row["tflop_per_s"] = flops / median / 1e12
    if images is not None:
        row["images_per_s"] = images / median
    least = 0.0
    if ceiling and bytes_moved is not None and "gb_per_s" in ceiling:
        least = max(least, bytes_moved / ceiling["gb_per_s"] / 1e9)
    if ceiling and flops is not None and "tflop_per_s" in ceiling:
        least = max(least, flops / ceiling["tflop_per_s"] / 1e12)
    if least:
        row["roofline_percent"] = 100 * least / median
    outcome = outcomes[name]
    if outcome.host_seconds:
        row["host_ms"], row["host_q20_ms"], row["host_q80_ms"] = spread(
            1e3 * factors.get(name, 1.0) * np.asarray(outcome.host_seconds)
        )
    if outcome.peak_bytes is not None:
        row["peak_mb"] = outcome.peak_bytes / 1e6
    if name in factors:
        row["extrapolated_by"] = factors[name]
    return row


def line(name: str, facts: dict[str, Any]) -> str:
    """A row for the eye."""
    if facts["status"] != "ok":
        return f"  {name:<28} {facts['status']}: {facts['reason']}"
    if "median_ms" not in facts:
        return f"  {name:<28} checked"
    text = f"  {name:<28} {facts['median_ms']:10.4f} ms  ({facts['q20_ms']:.4f} to {facts['q80_ms']:.4f})"
    if "ratio" in facts:
        low, high = facts["ratio_q20"], facts["ratio_q80"]
        text += f"  {facts['ratio']:8.3g}x {facts['baseline']} ({low:.3g} to {high:.3g})"
    shown = {
        "gb_per_s": "GB/s",
        "tflop_per_s": "TFLOP/s",
        "roofline_percent": "% of roofline",
        "images_per_s": "images/s",
        "peak_mb": "MB",
    }
    rates = [f"{facts[key]:.3g} {unit}" for key, unit in shown.items() if key in facts]
    rates += [] if facts["timer"] == "clock" else [facts["timer"]]
    return "  ".join([text, *rates, *(f"{key}={value}" for key, value in facts["facts"].items())])


# pytest-benchmark


def hand_over(session: Any, benchmark: dict[str, Any], seconds: list[float]) -> None:
    """Adds a benchmark to pytest-benchmark's session, as its own fixture does: tables and files then have it.

    Args:
        benchmark: name, fullname, group, params and extra_info.
        seconds: the samples; none for a competitor that was not timed, which is kept off the tables.
    """
    from pytest_benchmark.stats import Metadata

    fixture = SimpleNamespace(**benchmark, param=None, cprofile_stats=None, has_error=not seconds)
    metadata = Metadata(fixture, iterations=1, options={})
    for sample in seconds:
        metadata.update(sample)
    session.benchmarks.append(metadata)


def compact(output: dict[str, Any], benchmarks: list[Any], run: dict[str, Any]) -> None:
    """Makes pytest-benchmark's JSON small enough to commit: figures, no samples; the untimed beside them."""
    for row in output["benchmarks"]:
        row["stats"] = {key: row["stats"][key] for key in STATS}
        for key in ("options", "param"):
            row.pop(key, None)
    untimed = [metadata.as_dict(stats=False) for metadata in benchmarks if metadata.has_error]
    output["not_timed"] = [
        {key: row[key] for key in ("group", "fullname", "params", "extra_info")} for row in untimed
    ]
    output["run"] = run


def write_lines(path: Path) -> None:
    """Writes a result file anew with one line a benchmark: a diff then shows what changed."""
    output = json.loads(path.read_text())
    parts = []
    for key, value in output.items():
        if key in ("benchmarks", "not_timed"):
            lines = ",\n".join(f"  {json.dumps(rounded(row))}" for row in value)
            text = f"[\n{lines}\n ]" if value else "[]"
        else:
            text = json.dumps(rounded(value))
        parts.append(f" {json.dumps(key)}: {text}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def load(paths: list[Path]) -> pd.DataFrame:
    """A row a competitor: KEY, status, reason and the figures; `file` is the number of the result file."""
    import pandas as pd

    rows = []
    for number, path in enumerate(paths):
        output = json.loads(path.read_text())
        if "run" not in output:
            raise ValueError(
                f'{path} must be a result file of this suite (--benchmark-json), and has no "run" block'
            )
        for benchmark in output["benchmarks"] + output["not_timed"]:
            row = {**benchmark["params"], **benchmark["extra_info"], "file": number}
            row["sweep"], row["value"] = next(iter(row.pop("sweep").items()), ("", None))
            rows.append(row)
    frame = pd.DataFrame(rows)
    figures = [f"{name}{end}" for name in ("ratio", "vs_best") for end in ("", "_q20", "_q80")]
    facts = ["series", "value", "file", "status", "reason", "median_ms", "best_other", "extrapolated_by"]
    for column in [*KEY, *facts, *figures]:
        if column not in frame:
            frame[column] = None
    return frame
