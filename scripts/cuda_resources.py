"""Registers, spills and shared memory of every CUDA kernel on every architecture, as ptxas reports them.

    python scripts/cuda_resources.py > csrc/RESOURCES.md

Builds the library as a release does, in a temporary folder. Needs nvcc, but no GPU.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Usage(NamedTuple):
    kernel: str
    architecture: str  # sm_90
    registers: int  # a thread
    shared: int  # bytes a block, those asked for at launch not counted
    stack: int  # bytes a thread: saved by calls of functions that are not inlined, arrays, spills
    spill_stores: int  # bytes a thread, functions that it calls included
    spill_loads: int


def build_log() -> str:
    """What the build prints, ptxas's report among it."""
    environment = {**os.environ, "CONVINIT_CUDA": "1", "NVCC_APPEND_FLAGS": "-Xptxas=-v"}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--build-lib", folder, "--build-temp", folder],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    if done.returncode:
        sys.exit(f"the build failed:\n{done.stdout[-3000:]}")
    return done.stdout


def parse(log: str) -> list[Usage]:
    """One entry per kernel and architecture, from ptxas's report."""
    found = []
    for part in log.split("Compiling entry function ")[1:]:
        name, architecture = re.findall(r"'([^']+)'", part)[:2]
        # The kernel's own properties come first, then those of functions that it calls.
        frames = re.findall(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        )
        used = re.search(r"Used (\d+) registers", part)
        if not frames or used is None:
            raise ValueError(f"no resources reported for {name}: {part[:300]!r}")
        shared = re.search(r"(\d+) bytes smem", part[used.start() :].splitlines()[0])
        found.append(
            Usage(
                name,
                architecture,
                int(used[1]),
                int(shared[1]) if shared else 0,
                max(int(frame[0]) for frame in frames),
                sum(int(frame[1]) for frame in frames),
                sum(int(frame[2]) for frame in frames),
            )
        )
    return sorted(found, key=lambda usage: (usage.kernel, int(usage.architecture.removeprefix("sm_"))))


def demangle(name: str) -> str:
    """`convinit::f<int>(Args)` as `f<int>`."""
    text = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    return re.sub(r"\(.*\)$", "", text).removeprefix("void ").replace("convinit::", "")


def main() -> None:
    rows = parse(build_log())
    if not rows:
        sys.exit("the build reported no kernels")
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.findall(r"release [\d.]+, V([\d.]+)", version)[0]
    print("# What the CUDA kernels use\n")
    print(
        f"Made by `python scripts/cuda_resources.py > csrc/RESOURCES.md` with nvcc {release}. Shared memory"
    )
    print("asked for at launch comes on top; the stack holds what calls save, and spills must be 0.\n")
    print(
        "| kernel | GPU | registers | shared memory (bytes) | stack (bytes) | spills stored, loaded (bytes) |"
    )
    print("|---|---|---|---|---|---|")
    for row in rows:
        use = f"{row.registers} | {row.shared:,} | {row.stack} | {row.spill_stores}, {row.spill_loads}"
        print(f"| `{demangle(row.kernel)}` | {row.architecture} | {use} |")


if __name__ == "__main__":
    main()
