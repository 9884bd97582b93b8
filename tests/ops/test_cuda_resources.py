"""No CUDA kernel spills registers, on any architecture of the wheel."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import cuda_resources  # noqa: E402

SOURCES = [path.read_text() for path in [*(ROOT / "csrc").glob("*.cu"), *(ROOT / "csrc").glob("*.cuh")]]
KERNEL = r"__global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\("
KERNELS = {name for text in SOURCES for name in re.findall(KERNEL, text)}
ARCHITECTURES = {"sm_80", "sm_90", "sm_100", "sm_120"}


def test_committed_table_has_every_kernel_and_no_spills():
    table = (ROOT / "csrc" / "RESOURCES.md").read_text()
    rows = re.findall(r"^\| `(\w+).*?` \| (sm_\d+) \|.*\| (\d+, \d+) \|$", table, re.MULTILINE)
    assert {name for name, _, _ in rows} == KERNELS
    assert {architecture for _, architecture, _ in rows} == ARCHITECTURES
    assert {spills for _, _, spills in rows} == {"0, 0"}


def test_spills_of_called_functions_count():
    log = """
ptxas info    : Compiling entry function '_Z1fv' for 'sm_90'
ptxas info    : Function properties for _Z1fv
    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes cumulative stack size, 1024 bytes smem
ptxas info    : Function properties for _Z1gv
    24 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
"""
    assert cuda_resources.parse(log) == [("_Z1fv", "sm_90", 40, 1024, 24, 8, 12)]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_no_kernel_spills():
    rows = cuda_resources.parse(cuda_resources.build_log())
    assert {row.architecture for row in rows} == ARCHITECTURES
    assert {re.match(r"\w+", cuda_resources.demangle(row.kernel))[0] for row in rows} == KERNELS
    for row in rows:
        assert (row.spill_stores, row.spill_loads) == (0, 0), row
