"""Timing for the benchmarks: competitors take turns, round by round, and results become rows of a CSV file.

    python -m pytest benchmarks/bench_impulse_matrix.py -s --rows rows.csv

Machines drift while they are measured. Taking turns lets the drift fall on all competitors alike, which
one-after-the-other harnesses cannot do.
"""

from __future__ import annotations

import csv
import datetime
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import convinit

COLUMNS = (
    "op problem competitor dtype median_ms q20_ms q80_ms rounds ratio extra "
    "machine threads torch convinit date revision command"
).split()
MIN_SAMPLE_S = 1e-3  # shorter calls are repeated within a sample
MAX_ROUNDS = 200


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", metavar="FILE.csv", help="write one row per competitor to this file")
    parser.addoption("--seconds", type=float, default=10.0, help="time to spend on each comparison")
    parser.addoption("--min-rounds", type=int, default=5, help="rounds at least, whatever time they take")


def machine() -> str:
    """The GPU's name, or the CPU's model and number of cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores"


def revision() -> str:
    """The commit measured; "+" marks uncommitted changes to what is installed.

    CONVINIT_REVISION says it where the sources came without git.
    """
    if "CONVINIT_REVISION" in os.environ:
        return os.environ["CONVINIT_REVISION"]
    git = ["git", "-C", str(Path(__file__).parent.parent)]
    commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    if commit.returncode:
        return "unknown"
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", "convinit", "csrc", "kernels"], capture_output=True
    )
    return commit.stdout.strip() + ("+" if changed.stdout else "")


def sample(fn: Callable[[], Any], number: int) -> float:
    """Seconds per call, over `number` calls."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(number):
        fn()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / number


@pytest.fixture(scope="session")
def rows(pytestconfig: pytest.Config) -> Iterator[list[dict[str, Any]]]:
    """The rows of this run, written at its end: those of comparisons that passed, whatever others did."""
    collected: list[dict[str, Any]] = []
    yield collected
    path = pytestconfig.getoption("--rows")
    if path and collected:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(collected)


@pytest.fixture
def compare(rows: list[dict[str, Any]], pytestconfig: pytest.Config) -> Callable[..., dict[str, float]]:
    """compare(op, problem, competitors, baseline=...): median milliseconds of each competitor.

    Args:
        op, problem: names for the rows.
        competitors: {name: function without arguments}. Each is called once, and its result checked, before
            anything is timed.
        baseline: the competitor whose time, divided by a competitor's own, is its `ratio`.
        check: called with (name, result); raises if the result is wrong. May return facts about the result,
            for the competitor's row.
        dtype: what the competitors compute in.
        bytes_written: size of the result, from which each row's "gb_per_s" follows.
        extra: more facts about the problem, for the row's JSON column.
        extrapolate: {name: factor} for competitors of which only a part is run; their times are multiplied,
            and the rows say so.
    """

    def compare(
        op: str,
        problem: str,
        competitors: dict[str, Callable[[], Any]],
        *,
        baseline: str,
        check: Callable[[str, Any], dict[str, Any] | None],
        dtype: torch.dtype = torch.float32,
        bytes_written: int | None = None,
        extra: dict[str, Any] | None = None,
        extrapolate: dict[str, float] | None = None,
    ) -> dict[str, float]:
        if baseline not in competitors:
            raise ValueError(f"baseline must be one of {', '.join(competitors)}, got {baseline!r}")
        extrapolate = extrapolate or {}
        found = {name: check(name, fn()) or {} for name, fn in competitors.items()}
        first = {name: sample(fn, 1) for name, fn in competitors.items()}
        number = {name: max(1, round(MIN_SAMPLE_S / seconds)) for name, seconds in first.items()}
        round_s = sum(first[name] * number[name] for name in competitors)
        fewest = pytestconfig.getoption("--min-rounds")
        rounds = int(min(max(pytestconfig.getoption("--seconds") / round_s, fewest), MAX_ROUNDS))
        times: dict[str, list[float]] = {name: [] for name in competitors}
        for _ in range(rounds):
            for name, fn in competitors.items():
                times[name].append(1e3 * sample(fn, number[name]) * extrapolate.get(name, 1))

        medians = {name: float(np.median(values)) for name, values in times.items()}
        print(f"\n{op}: {problem}, {str(dtype).removeprefix('torch.')}, {rounds} rounds")
        for name, values in times.items():
            median, q20, q80 = medians[name], *np.quantile(values, [0.2, 0.8])
            ratio = medians[baseline] / median
            facts = {**(extra or {}), **found[name]}
            if name in extrapolate:
                facts["extrapolated_by"] = extrapolate[name]
            if bytes_written is not None:
                facts["gb_per_s"] = round(bytes_written / median / 1e6, 2)
            line = f"  {name:<24} {median:10.4f} ms  ({q20:.4f} to {q80:.4f})  {ratio:9.3f}x {baseline}"
            print(line, *(f"{key}={value}" for key, value in facts.items()))
            rows.append(
                {
                    "op": op,
                    "problem": problem,
                    "competitor": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "median_ms": f"{median:.6g}",
                    "q20_ms": f"{q20:.6g}",
                    "q80_ms": f"{q80:.6g}",
                    "rounds": rounds,
                    "ratio": f"{ratio:.4g}",
                    "extra": json.dumps(facts),
                    "machine": machine(),
                    "threads": torch.get_num_threads(),
                    "torch": torch.__version__,
                    "convinit": convinit.__version__,
                    "date": datetime.date.today().isoformat(),
                    "revision": revision(),
                    "command": " ".join(["python -m pytest", *map(str, pytestconfig.invocation_params.args)]),
                }
            )
        return medians

    return compare
