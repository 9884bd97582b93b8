"""What setup.py decides to build; that it builds shows in every other test."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

import pytest
import setuptools
import torch

SETUP = Path(__file__).resolve().parent.parent / "setup.py"
if not SETUP.exists():
    pytest.skip("needs a source checkout", allow_module_level=True)


@pytest.fixture
def want_cuda(monkeypatch, tmp_path):
    """`want_cuda` of setup.py on a machine with these GPUs, whose nvcc knows 8.0 to 10.0."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setenv("CONVINIT_CUDA", "0")
    build = runpy.run_path(str(SETUP))
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\nprintf 'compute_80\\ncompute_90\\ncompute_100\\n'\n")
    nvcc.chmod(0o755)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)

    def decide(choice: str, gpus: list[tuple[int, int]], cuda: str | None = "13.0") -> bool:
        monkeypatch.setenv("CONVINIT_CUDA", choice)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: gpus[i])
        return build["want_cuda"](tmp_path, ["csrc/some.cu"])

    yield decide
    os.environ.pop("TORCH_CUDA_ARCH_LIST", None)


def test_cuda_is_built_for_the_gpus_that_are_here(want_cuda):
    assert want_cuda("", [(9, 0), (8, 0), (9, 0)])
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "8.0;9.0"


def test_without_a_gpu_the_cpu_ops_are_built_alone(want_cuda, capsys):
    assert not want_cuda("", [])
    assert "the CPU ops alone: torch sees no GPU here; CONVINIT_CUDA=1" in capsys.readouterr().err
    assert not want_cuda("", [(9, 0)], cuda=None)
    assert "this torch is a CPU build" in capsys.readouterr().err
    assert not want_cuda("0", [(9, 0)])
    assert "TORCH_CUDA_ARCH_LIST" not in os.environ


def test_an_nvcc_that_does_not_know_the_gpu_is_named(want_cuda, capsys):
    assert not want_cuda("", [(9, 0), (12, 0)])
    assert "cannot compile for 12.0; take another one" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="CONVINIT_CUDA=1 asks for the CUDA ops, but nvcc in .* for 12.0;"):
        want_cuda("1", [])


def test_other_gpus_may_be_named(want_cuda, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0 10.0+PTX")
    assert want_cuda("", []) and want_cuda("1", [])
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "9.0 10.0+PTX"


def test_a_wrong_choice_is_named(want_cuda):
    with pytest.raises(SystemExit, match="CONVINIT_CUDA must be 0, 1 or unset, got 'yes'"):
        want_cuda("yes", [])
