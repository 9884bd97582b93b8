"""Runs a suite of benchmarks and writes its report: one command, no network.

    python benchmarks/run.py --suite quick --out out     # 2 minutes: does it work, and roughly how fast
    python benchmarks/run.py --suite cpu --out out       # everything on the CPU but what is marked slow
    python benchmarks/run.py --suite gpu --out out       # 8 minutes on the GPU
    python benchmarks/run.py --suite all --out out       # CPU and GPU with what is slow: an hour or more

OUT gets a result file (JSON) and a log for each benchmark file, and README.md with tables and pictures. Let
nothing else run meanwhile. Each file runs in a process of its own: one that fails or crashes does not stop
the others. Ctrl-C ends the suite, and all comparisons that had ended are kept and reported.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parent
NEEDED = ["pytest", "pytest_benchmark"]
REPORT = ["pandas", "matplotlib"]
NOT_RUN = 5  # pytest's exit code where a file has nothing of the suite


class Part(NamedTuple):
    """Benchmarks that run on one device: which (by pytest's markers), and how long for each competitor."""

    name: str
    markers: str
    seconds: float
    min_rounds: int
    gpu: bool = False


QUICK = Part("quick", "quick and not gpu", 0.5, 3)
CPU = Part("cpu", "not gpu and not slow", 2, 5)
GPU = Part("gpu", "gpu and not slow", 0.5, 5, gpu=True)
SUITES: dict[str, tuple[list[Part], float | None]] = {  # and minutes at most
    "quick": ([QUICK], 2),
    "cpu": ([CPU], None),
    "gpu": ([GPU], 8),
    "all": ([Part("cpu", "not gpu", 4, 5), Part("gpu", "gpu", 2, 5, gpu=True)], None),
}


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def command(part: Part, file: Path, result: Path) -> list[str]:
    return [
        sys.executable, "-m", "pytest", str(file.relative_to(ROOT)), "-s", "-q", "-p", "no:cacheprovider",
        "-m", part.markers, "--benchmark-quiet", f"--benchmark-json={result}",
        f"--benchmark-max-time={part.seconds}", f"--benchmark-min-rounds={part.min_rounds}",
    ]  # fmt: skip


def follow(arguments: list[str], log: Path, gpu: bool, deadline: float | None) -> int:
    """Runs pytest, its output in the log and on the screen, until the deadline. Returns the exit code."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if not gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # what can run on both takes the CPU then
    with log.open("w") as file:
        # In a session of its own, so that Ctrl-C reaches it once: a second would stop it writing results.
        process = subprocess.Popen(
            arguments,
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        interrupts, shown = 0, 0
        while process.returncode is None:
            try:  # all of it: wherever Ctrl-C comes, pytest must hear of it
                try:
                    process.wait(0.2)
                except subprocess.TimeoutExpired:
                    pass
                text = log.read_text(errors="replace")
                print(text[shown:], end="", flush=True)
                shown = len(text)
                if deadline is not None and time.monotonic() > deadline and process.returncode is None:
                    deadline = None
                    print("\ntime is up: what is measured so far is kept")
                    process.send_signal(signal.SIGINT)
                    try:
                        process.wait(30)
                    except subprocess.TimeoutExpired:
                        process.kill()
            except KeyboardInterrupt:
                interrupts += 1
                process.send_signal(signal.SIGINT if interrupts == 1 else signal.SIGKILL)
        print(log.read_text(errors="replace")[shown:], end="", flush=True)
    if interrupts:
        raise KeyboardInterrupt
    return process.returncode


def run(suite: str, out: Path, minutes: float | None, only: list[str]) -> tuple[list[Path], list[str], bool]:
    """The result files, the lines of the summary, whether all went well."""
    parts = SUITES[suite][0]
    if any(part.gpu for part in parts) and not has_gpu():
        if suite == "gpu":
            raise SystemExit(
                "run.py: --suite gpu needs a CUDA device, and PyTorch sees none.\n"
                "nvidia-smi tells if there is a GPU; python -c 'import torch; print(torch.version.cuda)'\n"
                "prints None where PyTorch is built without CUDA. --suite cpu needs neither."
            )
        print("no CUDA device: the GPU's part is left out")
        parts = [part for part in parts if not part.gpu]
    files = sorted(HERE.glob("bench_*.py"))
    if only:
        files = [file for file in files if any(word in file.stem for word in only)]
        if not files:
            raise SystemExit(f"run.py: no benchmark file is named like {', '.join(only)}")
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    results, summary, good = [], [], True
    try:
        for part in parts:
            for left, file in zip(range(len(files), 0, -1), files, strict=True):
                name = f"{file.stem.removeprefix('bench_')}-{part.name}"
                result, log, start = out / f"{name}.json", out / f"{name}.log", time.monotonic()
                result.unlink(missing_ok=True)
                if deadline is not None and start > deadline:
                    summary.append(f"{name:<32} not run: time was up")
                    continue
                # A fair share of the time that is left: a file that needs less leaves it to those after it.
                share = None if deadline is None else start + (deadline - start) / left
                print(f"\n=== {name}", flush=True)
                try:
                    code = follow(command(part, file, result), log, part.gpu, share)
                finally:
                    if result.exists():
                        results.append(result)
                if code == NOT_RUN:
                    log.unlink()
                    continue
                # pytest says 2 when it is interrupted, and when it cannot import a file.
                cut = code == 2 and share is not None and time.monotonic() > share
                word = "ok" if code == 0 else "cut short" if cut else f"FAILED ({code}), see {log.name}"
                summary.append(f"{name:<32} {word}, {time.monotonic() - start:.0f} s")
                good = good and (code == 0 or cut)
    except KeyboardInterrupt:
        summary.append("interrupted")
        good = False
    return results, summary, good


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=list(SUITES), default="quick")
    parser.add_argument("--out", type=Path, required=True, help="folder for results, logs and the report")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="only bench files with WORD in their name"
    )
    parser.add_argument(
        "--minutes", type=float, help="stop after this long (default: quick 2, gpu 8, others never)"
    )
    options = parser.parse_args()
    # In the background of a script SIGINT is ignored, by pytest as well, which is stopped by it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    lacking = [name for name in NEEDED + REPORT if importlib.util.find_spec(name) is None]
    if set(lacking) & set(NEEDED):
        print(f"run.py needs {', '.join(lacking)}: pip install 'convinit[test]'", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    minutes = SUITES[options.suite][1] if options.minutes is None else options.minutes
    results, summary, good = run(options.suite, options.out.resolve(), minutes, options.only)
    print("\n" + "\n".join(summary))
    if not results:
        print("nothing was measured")
        return 1
    if lacking:
        print(
            f"no report without {', '.join(lacking)}; later: python benchmarks/report.py OUT/*.json --out OUT"
        )
        return 0 if good else 1
    report = subprocess.run(
        [sys.executable, str(HERE / "report.py"), *map(str, results), "--out", str(options.out)]
    )
    return 0 if good and report.returncode == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
