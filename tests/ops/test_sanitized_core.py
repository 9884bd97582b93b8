"""csrc under the sanitizers of addresses, undefined behaviour and threads, driven by random calls.

A few hundred cases here; before a release  python tests/ops/test_sanitized_core.py --cases 10000
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).with_name("sanitized_core")
COMPILER = shutil.which("g++")
CAPABILITIES = ("avx512", "avx2", "default")  # the widest vectors that are tried, as in csrc/cpu.h


SANITIZERS = {  # their names for the compiler: the library to load before Python's own, and its options
    "address,undefined": ("libasan.so", {"ASAN_OPTIONS": "detect_leaks=0"}),  # Python's
    "thread": ("libtsan.so", {"TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1"}),
}


def build(sanitizers: str) -> Path:
    """The module, made anew (a minute) where its sources have changed."""
    pybind11 = pytest.importorskip("pybind11")
    if COMPILER is None or sys.platform != "linux":
        pytest.skip("needs Linux and g++ on PATH")
    sources = [*sorted((ROOT / "csrc").glob("*.cpp")), HERE / "module.cpp"]
    sources.remove(ROOT / "csrc" / "library.cpp")  # registers the ops with torch
    headers = [*(ROOT / "csrc").glob("*.h"), *HERE.rglob("*.h")]
    options = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    # Not optimised: the compiler takes twice as long, and the calls are short.
    flags = ["-std=c++20", "-O0", "-g1", "-fPIC", "-w", "-Wno-psabi", "-ffp-contract=fast", *options]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{HERE}", f"-I{ROOT / 'csrc'}"]
    for path in (
        Path(torch.__file__).parent / "include",
        pybind11.get_include(),
        sysconfig.get_path("include"),
    ):
        flags += ["-isystem", str(path)]
    text = b"".join(path.read_bytes() for path in sorted([*sources, *headers]))
    folder = ROOT / "build" / "sanitized" / hashlib.sha256(text + " ".join(flags).encode()).hexdigest()[:16]
    module = folder / "sanitized_core.so"
    if module.exists():
        return module
    folder.mkdir(parents=True, exist_ok=True)
    objects = [folder / f"{source.stem}.{os.getpid()}.o" for source in sources]

    def compile_one(source: Path, to: Path) -> None:
        subprocess.run([str(COMPILER), *flags, "-c", str(source), "-o", str(to)], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources, objects))
    new = folder / f"new.{os.getpid()}.so"
    link = ["-shared", *options, *map(str, objects), "-o", str(new)]
    subprocess.run([str(COMPILER), *link], check=True)
    for path in objects:
        path.unlink()
    new.rename(module)
    return module


def drive(sanitizers: str, cases: int, capability: str) -> subprocess.CompletedProcess:
    module = build(sanitizers)
    runtime, options = SANITIZERS[sanitizers]

    def library(name: str) -> str:
        command = [str(COMPILER), f"-print-file-name={name}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    environment = {
        **os.environ,
        **options,
        "LD_PRELOAD": f"{library(runtime)} {library('libstdc++.so')}",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "ATEN_CPU_CAPABILITY": capability,
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    command = [sys.executable, str(HERE / "drive.py"), str(module), "--cases", str(cases)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("sanitizers", SANITIZERS)
def test_random_calls(sanitizers, capability):
    pytest.importorskip("hypothesis")
    done = drive(sanitizers, 120, capability)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert done.stdout.endswith("cases\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="of all vector widths together")
    each = -(-parser.parse_args().cases // len(CAPABILITIES) // len(SANITIZERS))
    for sanitizers, capability in itertools.product(SANITIZERS, CAPABILITIES):
        done = drive(sanitizers, each, capability)
        print(f"{sanitizers}, {capability}: {done.stdout}{done.stderr}", flush=True)
        if done.returncode:
            sys.exit(1)
