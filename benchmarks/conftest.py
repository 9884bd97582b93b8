"""The `compare` fixture and its place in pytest-benchmark.

    python -m pytest benchmarks/bench_impulse_matrix.py -s --benchmark-json impulse_matrix.json

convinit/_timing.py takes the times, results.py makes rows of them, machine.py describes the machine.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import machine
import pytest
import results
import torch

from convinit._timing import Absent, Outcome, measure, settle_allocator, try_out, without_gc

FAILURES = pytest.StashKey[list[str]]()
CEILINGS = pytest.StashKey[dict[str, Any]]()
FAILED = ("wrong", "failed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--threads", type=int, help="CPU threads for everything timed; PyTorch's choice unless given"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[CEILINGS] = {}
    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))
    settle_allocator()


def pytest_report_header() -> list[str]:
    lines = [f"benchmarks on {machine.device_name('cpu')}, {torch.get_num_threads()} threads"]
    if torch.cuda.is_available():
        lines.append(f"benchmarks on {machine.device_name('cuda')}")
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.5:
        lines.append(
            f"other work is running on this machine (load {os.getloadavg()[0]:.1f}): times will be spread"
        )
    return lines


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """A benchmark with a wrong competitor fails at its end, when the others have been measured."""
    result = yield
    failures = pyfuncitem.stash.get(FAILURES, [])
    if failures:
        pytest.fail("\n".join(failures), pytrace=False)
    return result


# pytest-benchmark's hooks. Machine and commit are described our way: briefly, and without directories.


def pytest_benchmark_generate_machine_info() -> dict[str, Any]:
    return machine.machine()


def pytest_benchmark_generate_commit_info() -> dict[str, Any]:
    return {"id": machine.revision()}


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    arguments = [str(argument) for argument in config.invocation_params.args]
    results.compact(output_json, benchmarks, machine.run(arguments, config.stash[CEILINGS]))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--benchmark-json")
    path = Path(getattr(path, "name", path or ""))  # older pytest-benchmark gives an open file
    if path.is_file():
        results.write_lines(path)


@pytest.fixture(scope="session")
def ceilings(pytestconfig: pytest.Config) -> Callable[..., dict[str, float]]:
    """ceilings(device, dtype, bytes_moved, flops): GB/s and TFLOP/s of this machine, where they limit."""
    return functools.partial(machine.ceiling, pytestconfig.stash[CEILINGS])


@pytest.fixture
def compare(
    request: pytest.FixtureRequest, benchmark: Any, ceilings: Callable[..., dict[str, float]]
) -> Iterator[Callable[..., dict[str, float]]]:
    """compare(op, problem, competitors, baseline=..., check=...): median milliseconds of each competitor.

    With --benchmark-disable every competitor is called and checked, and nothing is timed.

    Args:
        op, problem: names for the rows.
        competitors: {name: function without arguments, or Absent(reason)}. Each is called once, and its
            result checked, before anything is timed. NotImplementedError and ImportError mean absent, too.
            What is wrong, absent or out of memory gets a row that says so; what is wrong or breaks fails the
            benchmark in the end.
        baseline: the competitor whose time, divided by a competitor's own, is its `ratio`.
        check: called with (name, result); raises if the result is wrong (WrongResultError carries the error's
            size). May return facts about the result, for the competitor's row.
        dtype: what the competitors compute in.
        device: "cpu" or "cuda", or {name: device}; found from each competitor's first call unless given.
        bytes_moved, flops: what has to be read and written, and computed, at least: for rates and roofline.
        images: in a call, for images a second.
        extra: more facts about the problem.
        extrapolate: {name: factor} for competitors of which only a part is run; their times are multiplied,
            and the rows say so.
        sweep: {variable: value} of one problem in a series that differ in this alone; "series" names the
            series where an op has several with the same variable.
        rounds: this many, for competitors that are slow; --benchmark-max-time (for each competitor) and
            --benchmark-min-rounds say how many otherwise.
        capture: False keeps a GPU's competitors out of CUDA graphs.
    """
    session = request.config.pluginmanager.get_plugin("pytest-benchmark")
    node = request.node
    node.stash[FAILURES] = []
    if "torch._dynamo" in sys.modules:
        # What others compiled counts towards the limit beyond which a function silently runs eagerly.
        torch.compiler.reset()

    def compare(
        op: str,
        problem: str,
        competitors: dict[str, Callable[[], Any] | Absent],
        *,
        baseline: str,
        check: Callable[[str, Any], dict[str, Any] | None],
        dtype: torch.dtype = torch.float32,
        device: str | dict[str, str] | None = None,
        bytes_moved: float | None = None,
        flops: float | None = None,
        images: int | None = None,
        extra: dict[str, Any] | None = None,
        extrapolate: dict[str, float] | None = None,
        sweep: dict[str, Any] | None = None,
        rounds: int | None = None,
        capture: bool = True,
    ) -> dict[str, float]:
        if baseline not in competitors:
            raise ValueError(f"baseline must be one of {', '.join(competitors)}, got {baseline!r}")
        sweep = dict(sweep or {})
        series = sweep.pop("series", "")
        if len(sweep) > 1:
            raise ValueError(f"sweep must name one variable, got {', '.join(sweep)}")
        outcomes = {name: try_out(name, competitor, check) for name, competitor in competitors.items()}
        found = [outcome.device for outcome in outcomes.values() if outcome.device]
        for name, outcome in outcomes.items():
            given = device.get(name) if isinstance(device, dict) else device
            outcome.device = given or outcome.device or (found[0] if found else "cpu")
        if not session.disabled:
            with without_gc(session.options["disable_gc"]):
                measure(
                    {name: fn for name, fn in competitors.items() if not isinstance(fn, Absent)},
                    outcomes,
                    seconds=float(session.options["max_time"]) * len(competitors),
                    min_rounds=session.options["min_rounds"],
                    rounds=rounds,
                    capture=capture,
                )
        precision = str(dtype).removeprefix("torch.")
        print(f"\n{op}: {problem}, {precision}")
        medians = {}
        for name, outcome in outcomes.items():
            facts = {"status": outcome.status, "sweep": sweep, "series": series, "baseline": baseline}
            if outcome.reason:
                facts["reason"] = outcome.reason
            if outcome.seconds:
                limits = ceilings(outcome.device, dtype, bytes_moved, flops)
                facts |= {"timer": outcome.timer, "threads": torch.get_num_threads()}
                facts |= results.figures(
                    name, outcomes, baseline=baseline, factors=extrapolate or {}, bytes_moved=bytes_moved,
                    flops=flops, images=images, ceiling=limits,
                )  # fmt: skip
                medians[name] = facts["median_ms"]
            facts["facts"] = {**(extra or {}), **outcome.facts}
            print(results.line(name, facts))
            if outcome.status in FAILED:
                node.stash[FAILURES].append(f"{op}, {problem}, {name}: {outcome.status}: {outcome.reason}")
            if not session.disabled:
                add_row(name, outcome, facts, op, problem, precision)
        return medians

    def add_row(
        name: str, outcome: Outcome, facts: dict[str, Any], op: str, problem: str, precision: str
    ) -> None:
        keys = ("op", "problem", "competitor", "dtype", "device")
        params = dict(zip(keys, (op, problem, name, precision, outcome.device), strict=True))
        case = ", ".join([problem, precision, outcome.device, *facts["sweep"]])
        entry = {
            "name": f"{node.originalname}[{case}-{name}]",
            "fullname": f"{node.nodeid.partition('[')[0]}[{op}: {case}-{name}]",
            "group": f"{op}: {problem}, {precision}",
            "params": params,
            "extra_info": results.rounded(facts),
        }
        factor = facts.get("extrapolated_by", 1.0)
        results.hand_over(session, entry, [factor * seconds for seconds in outcome.seconds])

    yield compare
    benchmark.skipped = True  # its own timer has not been used, and that is no mistake
