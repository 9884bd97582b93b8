"""The suite in benchmarks/: figures, turns, what is not timed, files through pytest-benchmark, reports."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
import unittest.mock
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
sys.path.append(str(BENCHMARKS))  # its files import each other by plain names
for package in ("pytest_benchmark", "pandas", "matplotlib"):
    pytest.importorskip(package)

import compare  # noqa: E402
import docs_table  # noqa: E402
import machine  # noqa: E402
import report  # noqa: E402
import results  # noqa: E402
import run as suites  # noqa: E402
import scaling  # noqa: E402

from convinit import _timing as timing  # noqa: E402
from convinit._timing import Absent, Outcome, WrongResultError  # noqa: E402


def right(name: str, result: object) -> dict[str, object]:
    assert result == 1, name
    return {"seen": name}


def try_all(competitors: dict[str, object], check: object = right) -> dict[str, Outcome]:
    return {name: timing.try_out(name, competitor, check) for name, competitor in competitors.items()}


def raises(error: BaseException) -> object:
    def fn() -> None:
        raise error

    return fn


def test_every_competitor_comes_first_equally_often():
    orders = list(timing.turns(["a", "b", "c"], 12))
    for place in range(3):
        assert sorted(order[place] for order in orders) == sorted("abc" * 4)
    followers = {pair for order in orders for pair in zip(order, order[1:], strict=False)}
    assert len(followers) == 6  # each after each other


def test_rounds_are_interleaved():
    calls = []

    def sampler(name):
        def sample():
            calls.append(name)
            return (1.0, 2.0)

        return sample

    outcomes = {name: Outcome() for name in "ab"}
    timing.interleave({name: sampler(name) for name in "ab"}, outcomes, 4)
    assert calls == ["a", "b", "b", "a", "b", "a", "a", "b"]
    assert outcomes["a"].seconds == [1.0] * 4 and outcomes["b"].host_seconds == [2.0] * 4


@pytest.mark.parametrize(
    ("competitor", "status", "reason"),
    [
        (Absent("needs an sm_90"), "absent", "needs an sm_90"),
        (raises(ImportError("No module named 'xformers'")), "absent", "No module named 'xformers'"),
        (raises(NotImplementedError("head_dim 512\nmore")), "absent", "head_dim 512"),
        (raises(torch.OutOfMemoryError("CUDA out of memory")), "out of memory", "CUDA out of memory"),
        (raises(MemoryError()), "out of memory", "MemoryError"),
        (raises(RuntimeError("DefaultCPUAllocator: can't allocate memory")), "out of memory", "DefaultCPU"),
        (raises(RuntimeError("no kernel image")), "failed", "no kernel image"),
        (lambda: 2, "wrong", "me"),
    ],
)
def test_what_cannot_be_timed_is_an_outcome(competitor, status, reason):
    outcome = timing.try_out("me", competitor, right)
    assert outcome.status == status and outcome.reason.startswith(reason)


def test_reasons_name_no_directories():
    error = ImportError("cannot import name 'a' from 'b' (/home/me/lib/b/__init__.py), see https://b.org/c/d")
    found = timing.try_out("me", raises(error), right).reason
    assert found == "cannot import name 'a' from 'b' (__init__.py), see https://b.org/c/d"


def test_compiled_competitors_are_timed_with_their_own_shapes():
    """A check on fewer images must not leave a graph of symbolic sizes to the calls that are timed."""
    sizes = []

    def backend(module, inputs):
        def run(*arguments):
            sizes.append([type(x) for x in inputs])
            return module(*arguments)

        return run

    with unittest.mock.patch.object(torch, "compile", functools.partial(torch.compile, backend=backend)):
        fn = timing.compiled(lambda x: x * 2)
    fn(torch.ones(512, 3)), fn(torch.ones(4, 3)), fn(torch.ones(512, 3))
    assert len(sizes) == 3 and all(kinds == [torch.Tensor] for kinds in sizes), sizes


def test_wrong_results_keep_their_error():
    def check(name, result):
        raise WrongResultError("not close", error=0.5)

    outcome = timing.try_out("me", lambda: 1, check)
    assert (outcome.status, outcome.facts) == ("wrong", {"error": 0.5})


def test_one_that_breaks_off_does_not_stop_the_others():
    calls = []

    def tires():
        calls.append(1)
        if len(calls) > 6:
            raise MemoryError("full")
        return 1

    competitors = {"good": lambda: 1, "tires": tires, "absent": Absent("none")}
    outcomes = try_all(competitors)
    timing.measure(
        {k: v for k, v in competitors.items() if k != "absent"}, outcomes, seconds=0, min_rounds=0, rounds=7
    )
    assert [outcomes[name].status for name in competitors] == ["ok", "out of memory", "absent"]
    assert len(outcomes["good"].seconds) == 7 and outcomes["tires"].seconds == []


class Gpu:
    """Stands in for what timing.py asks of CUDA: a call takes 10 µs there, a flush 50."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capturable: bool) -> None:
        self.flushed: list[int] = []
        monkeypatch.setattr(timing, "between_events", self.between_events)
        monkeypatch.setattr(timing, "captured", lambda fn, pool: fn if capturable else None)
        monkeypatch.setattr(timing, "clock", lambda fn, number, on_gpu: 3.3e-4)
        monkeypatch.setattr(timing, "peak_bytes", lambda fn: 7)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))

    def between_events(self, fn, flushes_before, flushes_within=0):
        fn()
        self.flushed.append(flushes_before)
        return 10e-6 + 50e-6 * flushes_within


@pytest.mark.parametrize(("capturable", "timer", "flushes"), [(True, "graph", 1), (False, "events", 6)])
def test_gpu_times(monkeypatch, capturable, timer, flushes):
    """What cannot be captured waits behind flushes that take as long as the host needs to launch it."""
    gpu = Gpu(monkeypatch, capturable)
    outcomes = {"a": Outcome(device="cuda"), "b": Outcome(device="cuda")}
    timing.measure(dict.fromkeys("ab", lambda: None), outcomes, seconds=0, min_rounds=4)
    assert outcomes["a"].seconds == pytest.approx([1e-5] * 4) and outcomes["a"].host_seconds == [3.3e-4] * 4
    assert outcomes["b"].timer == timer and outcomes["b"].peak_bytes == 7 and gpu.flushed[-1] == flushes


def test_cpu_and_gpu_together_are_timed_by_the_clock(monkeypatch):
    Gpu(monkeypatch, True)
    outcomes = {"a": Outcome(device="cuda"), "b": Outcome(device="cpu")}
    timing.measure(dict.fromkeys("ab", lambda: None), outcomes, seconds=0, min_rounds=4)
    assert [outcome.timer for outcome in outcomes.values()] == ["clock", "clock"]
    assert outcomes["a"].seconds == [3.3e-4] * 4 and outcomes["a"].host_seconds == []


def test_figures():
    outcomes = {
        "base": Outcome(seconds=[0.010, 0.020, 0.040, 0.020, 0.020]),
        "ours": Outcome(
            seconds=[0.005, 0.010, 0.020, 0.010, 0.010], peak_bytes=2_000_000, host_seconds=[0.1] * 5
        ),
        "part": Outcome(seconds=[0.001] * 5),
        "gone": Outcome(status="wrong"),
    }
    found = results.figures(
        "ours", outcomes, baseline="base", factors={"part": 4.0}, bytes_moved=1e8, flops=1e9,
        ceiling={"gb_per_s": 20.0, "tflop_per_s": 0.4},
    )  # fmt: skip
    assert found["median_ms"] == pytest.approx(10) and found["rounds"] == 5
    # The machine was four times as slow in one round than in another; the ratio does not see it.
    assert (found["ratio"], found["ratio_q20"], found["ratio_q80"]) == pytest.approx((2, 2, 2))
    assert found["best_other"] == "part" and found["vs_best"] == pytest.approx(0.4)
    assert found["gb_per_s"] == pytest.approx(10) and found["tflop_per_s"] == pytest.approx(0.1)
    assert found["roofline_percent"] == pytest.approx(50)  # memory's 5 ms, not the products' 2.5 ms
    assert (found["peak_mb"], found["host_ms"]) == pytest.approx((2, 100))
    quarter = results.figures("part", outcomes, baseline="gone", factors={"part": 4.0})
    assert (
        quarter["median_ms"] == pytest.approx(4)
        and quarter["extrapolated_by"] == 4
        and "ratio" not in quarter
    )


def test_spread_is_numpys():
    values = np.random.default_rng(0).exponential(size=31)
    assert results.spread(values) == tuple(np.quantile(values, [0.5, 0.2, 0.8]))


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.585, 3.0])
def test_exponents_of_exact_power_laws(exponent):
    values = np.array([64, 4096, 128, 1024, 256, 2048, 512])
    fit = scaling.fit_exponent(values, 3e-4 * values.astype(float) ** exponent)
    assert fit["exponent"] == pytest.approx(exponent, abs=1e-9) and fit["error"] < 1e-9
    assert (fit["from"], fit["to"], fit["points"]) == pytest.approx((512, 4096, 4))


def test_exponents_leave_out_the_cost_of_a_call():
    values = np.array([4.0, 8, 1024, 2048, 4096])
    fit = scaling.fit_exponent(values, 1e-6 * values**2 + 1e-3)
    assert fit["exponent"] == pytest.approx(2, abs=0.01) and fit["points"] == 3
    assert scaling.fit_exponent(values[:2], values[:2]) is None


def test_ceilings_are_measured_once_and_only_where_they_limit():
    found: dict[str, object] = {}
    size = machine.last_cache_bytes("cpu")
    assert machine.ceiling(found, "cpu", torch.float32, size // 2, None) == {}
    first = machine.ceiling(found, "cpu", torch.float32, None, 1.0)
    assert first["tflop_per_s"] > 0 and first == machine.ceiling(found, "cpu", torch.float32, size // 2, 5.0)
    assert machine.ceiling(found, "cpu", torch.bool, None, 1.0) == {}


def test_commands_name_no_directories():
    found = machine.run(
        ["benchmarks/bench_a.py", "--benchmark-json=/home/me/out/a.json", "/home/me/x.json"], {}
    )
    assert found["command"] == "python -m pytest benchmarks/bench_a.py --benchmark-json=a.json x.json"


# Through pytest

TINY = """
import pytest
import torch
from convinit._timing import Absent

def check(name, result):
    assert result.sum() == 64, f"{name} is off by {abs(result.sum() - 64):.0f}"
    return {"sum": 64}

@pytest.mark.parametrize("n", [2, 4, 8])
def bench_tiny(compare, n):
    compare(
        "tiny", f"n={n}",
        {
            "base": lambda: torch.ones(64),
            "convinit": lambda: torch.ones(8, 8),
            "wrong": lambda: torch.ones(65),
            "gone": Absent("not installed"),
        },
        baseline="base", check=check, bytes_moved=256, flops=64, sweep={"n": n},
        extrapolate={"convinit": 10},
    )

def bench_other(compare):
    compare("other", "p", {"convinit": lambda: torch.ones(64), "eager": lambda: torch.ones(64).clone()},
            baseline="eager", check=check)
"""


def pytest_run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "conftest.py").write_text((BENCHMARKS / "conftest.py").read_text())
    (folder / "bench_tiny.py").write_text(TINY)
    (folder / "pytest.ini").write_text("[pytest]\npython_files = bench_*.py\npython_functions = bench_*\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(BENCHMARKS)])}
    environment.pop("PYTEST_XDIST_WORKER", None)  # under which pytest-benchmark would not time
    return subprocess.run(
        [sys.executable, *"-m pytest -q -s -p no:cacheprovider --benchmark-max-time=0.02".split(), *options],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.fixture(scope="module")
def result_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    done = pytest_run(folder, "--benchmark-json=tiny.json")
    assert done.returncode == 1 and "3 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "tiny, n=8, wrong: wrong: wrong is off by 1" in done.stdout
    assert "bench_tiny[n=4, float32, cpu, n-convinit]" in done.stdout  # pytest-benchmark's own table
    return folder / "tiny.json"


def test_json_of_pytest_benchmark(result_file):
    found = json.loads(result_file.read_text())
    rows = {(row["params"]["problem"], row["params"]["competitor"]): row for row in found["benchmarks"]}
    assert set(rows) == {("n=2", "base"), ("n=2", "convinit"), ("n=4", "base"), ("n=4", "convinit"),
                         ("n=8", "base"), ("n=8", "convinit"), ("p", "convinit"), ("p", "eager")}  # fmt: skip
    row = rows["n=4", "convinit"]
    facts = row["extra_info"]
    assert row["group"] == "tiny: n=4, float32" and row["params"]["device"] == "cpu"
    assert facts["status"] == "ok" and facts["timer"] == "clock" and facts["sweep"] == {"n": 4}
    assert facts["extrapolated_by"] == 10 and facts["facts"] == {"sum": 64}
    assert facts["q20_ms"] <= facts["median_ms"] <= facts["q80_ms"] and facts["rounds"] >= 5
    assert row["stats"]["median"] == pytest.approx(facts["median_ms"] / 1e3, rel=1e-3)
    assert "data" not in row["stats"] and len(json.dumps(row)) < 1500
    assert [(row["params"]["competitor"], row["extra_info"]["status"]) for row in found["not_timed"][:2]] == [
        ("wrong", "wrong"), ("gone", "absent"),
    ]  # fmt: skip
    assert found["machine_info"]["torch"] == torch.__version__ and found["machine_info"]["cpu"]
    assert found["run"]["ceilings"] and "/" not in found["run"]["command"].replace("n/a", "")


def test_options_of_pytest_benchmark(result_file):
    options = [f"--benchmark-compare={result_file}", "--benchmark-group-by=param:competitor", "-k", "other"]
    done = pytest_run(result_file.parent, *options)
    assert done.returncode == 0 and "not used at all" not in done.stderr, done.stdout + done.stderr
    assert "NOW" in done.stdout and "competitor=eager" in done.stdout


def test_report(result_file, tmp_path):
    page = report.write([result_file], tmp_path / "out").read_text()
    assert "## tiny" in page and "**convinit**" in page and "extrapolated by 10" in page
    assert "| tiny: n=2, float32, cpu | gone | absent | not installed |" in page
    assert "| tiny: n=2, float32, cpu | wrong | wrong | wrong is off by 1 |" in page
    assert "n = 2 to 8, 3 of 3 points" in page
    assert "Against the best other competitor: " in page and str(tmp_path) not in page
    for name in ("ratios-other.png", "scaling-tiny-n-float32-cpu.png"):
        assert f"]({name})" in page and (tmp_path / "out" / name).stat().st_size > 5000


def edited(source: Path, target: Path, edit) -> Path:
    found = json.loads(source.read_text())
    edit(found)
    target.write_text(json.dumps(found))
    return target


def test_report_of_results_without_ratios(result_file, tmp_path):
    def nothing(found):
        found["benchmarks"], found["not_timed"] = [], []

    def no_baselines(found):
        rows = found["benchmarks"]
        found["benchmarks"] = [row for row in rows if row["params"]["competitor"] == "convinit"]
        for row in found["benchmarks"]:
            for name in [
                name for name in row["extra_info"] if name.startswith(("ratio", "vs_best", "best_"))
            ]:
                del row["extra_info"][name]

    for edit in (nothing, no_baselines):
        path = edited(result_file, tmp_path / "odd.json", edit)
        page = report.write([path], tmp_path / "out").read_text()
        assert "## Machine" in page and "ratios-" not in page


def test_report_never_mixes_the_rows_of_two_runs(result_file, tmp_path):
    def renamed(found):
        found["machine_info"]["cpu"] = "Another"
        for row in found["benchmarks"]:
            if row["params"]["competitor"] == "eager":
                row["params"]["competitor"] = "elsewhere"

    old = edited(result_file, tmp_path / "old.json", renamed)
    page = report.write([old, result_file], tmp_path / "out").read_text()
    assert "elsewhere" not in page and "eager" in page and "Another" in page
    assert "convinit (extrapolated)" in page  # its exponent and its wins are of multiplied times


def scaled(source: Path, target: Path, factor: float, competitor: str = "convinit") -> Path:
    """The same results with one competitor's times multiplied."""
    found = json.loads(source.read_text())
    for row in found["benchmarks"]:
        facts = row["extra_info"]
        facts["q20_ms"], facts["q80_ms"] = 0.99 * facts["median_ms"], 1.01 * facts["median_ms"]
        facts["ratio_q20"], facts["ratio_q80"] = 0.99 * facts["ratio"], 1.01 * facts["ratio"]
        if row["params"]["competitor"] == competitor:
            for name in ("median_ms", "q20_ms", "q80_ms"):
                facts[name] *= factor
            for name in ("ratio", "ratio_q20", "ratio_q80"):
                facts[name] /= factor
    target.write_text(json.dumps(found))
    return target


def compare_files(*arguments: object, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, arguments)])
    code = compare.main()
    return code, capsys.readouterr().out


@pytest.mark.parametrize("by", ["time", "ratio"])
@pytest.mark.parametrize(
    ("factor", "code", "text"),
    [(1.0, 0, "14 without"), (1.05, 0, "14 without"), (1.5, 1, "slower (4)"), (0.5, 0, "faster (4)")],
)
def test_compare(result_file, tmp_path, capsys, monkeypatch, by, factor, code, text):
    old = scaled(result_file, tmp_path / "old.json", 1.0)
    new = scaled(result_file, tmp_path / "new.json", factor)
    found = compare_files("--by", by, old, new, capsys=capsys, monkeypatch=monkeypatch)
    assert found[0] == code and text in found[1] and "differ" not in found[1], found


def test_compare_wants_both_spread_and_factor():
    row = {"status": "ok", "median_ms": 10.0, "q20_ms": 9.0, "q80_ms": 12.0}
    assert compare.verdict(row, {**row, "median_ms": 11.5, "q20_ms": 11.0, "q80_ms": 13.0}, 1.1)[0] == "same"
    assert compare.verdict(row, {**row, "median_ms": 13.0, "q20_ms": 12.5, "q80_ms": 14.0}, 1.5)[0] == "same"
    assert (
        compare.verdict(row, {**row, "median_ms": 13.0, "q20_ms": 12.5, "q80_ms": 14.0}, 1.1)[0] == "slower"
    )


def test_compare_names_other_machines_and_what_broke(result_file, tmp_path, capsys, monkeypatch):
    found = json.loads(result_file.read_text())
    found["machine_info"]["cpu"] = "Another"
    lost = found["benchmarks"].pop()
    lost["extra_info"] |= {"status": "wrong", "reason": "off by 3"}
    found["not_timed"].append(lost)
    new = tmp_path / "new.json"
    new.write_text(json.dumps(found))
    code, text = compare_files(result_file, new, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 1 and "differ" in text and "-> Another" in text and "wrong: off by 3" in text
    assert compare_files(tmp_path / "none.json", new, capsys=capsys, monkeypatch=monkeypatch)[0] == 2


def test_the_table_says_what_the_results_say(result_file):
    text = f"a\n{docs_table.START}\nold\n{docs_table.END}\nb\n"
    line = docs_table.Line("A vector", "other", "p", "eager")
    found = docs_table.replaced(text, [result_file], [line])
    frame = results.load([result_file])
    row = frame[(frame["op"] == "other") & (frame["competitor"] == "convinit")].iloc[0]
    assert f"| A vector | {docs_table.time(row['median_ms'])} | eager: " in found and "old" not in found
    assert f"{row['ratio']:.3g} ({row['ratio_q20']:.3g} to {row['ratio_q80']:.3g}) |" in found
    assert docs_table.replaced(found, [result_file], [line]) == found
    with pytest.raises(ValueError, match="no timed row of 'wrong'"):
        docs_table.replaced(text, [result_file], [line._replace(theirs="wrong")])
    with pytest.raises(ValueError, match="must hold"):
        docs_table.replaced("no marks", [], [])


def test_the_page_is_what_the_committed_results_say():
    text = report.PAGE.read_text()
    assert docs_table.replaced(text, docs_table.committed()) == text, "run python benchmarks/report.py --docs"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_suite_says_what_it_lacks(tmp_path):
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        suites.run("gpu", tmp_path, None, [])


def test_a_file_out_of_time_is_interrupted_once(tmp_path, capsys):
    child = (
        # A child of a job in the background ignores SIGINT, unless it says otherwise.
        "import time, pathlib, signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "print('started', flush=True)\n"
        "try: time.sleep(60)\n"
        "except KeyboardInterrupt: pathlib.Path('kept').write_text('rows'); raise SystemExit(2)"
    )
    arguments = [sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r})\n{child}"]
    assert suites.follow(arguments, tmp_path / "log", False, time.monotonic() + 1) == 2
    assert (tmp_path / "kept").read_text() == "rows"
    shown = capsys.readouterr().out
    assert "started" in shown and "time is up" in shown


def test_a_file_that_cannot_be_imported_has_failed(tmp_path, monkeypatch):
    """pytest's exit code is then that of an interrupt."""
    (tmp_path / "bench_broken.py").write_text("import no_such_module")
    monkeypatch.setattr(suites, "HERE", tmp_path)
    monkeypatch.setattr(suites, "ROOT", tmp_path)
    for minutes in (None, 5):
        found, summary, good = suites.run("quick", tmp_path, minutes, [])
        assert found == [] and not good and "FAILED (2)" in summary[0], summary


def test_time_is_up_in_the_background_too(tmp_path):
    """A script's background jobs are started with SIGINT ignored."""
    (tmp_path / "bench_slow.py").write_text(
        "import time\nimport pytest\n@pytest.mark.quick\ndef bench_slow():\n    time.sleep(60)\n"
    )
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\npython_files = bench_*.py\npython_functions = bench_*\nmarkers =\n    quick\n    gpu\n"
    )
    code = (
        "import sys, pathlib, signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"sys.path.insert(0, {str(BENCHMARKS)!r}); import run\n"
        f"run.HERE = run.ROOT = pathlib.Path({str(tmp_path)!r})\n"
        f"sys.argv = ['run.py', '--out', {str(tmp_path)!r}, '--minutes', '0.05']; run.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=25)
    assert "cut short" in done.stdout, done.stdout + done.stderr


def test_cheap_benchmarks_check_out():
    """All files are collected. With --benchmark-disable results are checked, and nothing is timed."""
    options = "-m pytest -q -s -p no:cacheprovider --benchmark-disable benchmarks -m".split()
    cheap = "bench_impulse_matrix or bench_shared_attention"
    done = subprocess.run(
        [sys.executable, *options, "quick and not gpu", "-k", cheap],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count(" checked\n") >= 8 and " ms " not in done.stdout
