"""Loads the compiled ops; `build_info` says what was built and what is in use."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).resolve().parent
_BUILD_COMMAND = "pip install --no-build-isolation -e ."


def _find(stem: str) -> Path | None:
    """The shared object beside this file; an editable install puts it there as well."""
    found = sorted(_PACKAGE.glob(f"{stem}.*so"))
    return found[0] if found else None


def _load() -> bool:
    """Registers torch.ops.convinit; returns whether the CUDA ops are among them."""
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < (2, 10):
        raise ImportError(
            f"convinit needs torch 2.10 or newer, found {torch.__version__}. "
            "Upgrade it: pip install --upgrade torch"
        )
    library = _find("_C")
    if library is None:
        raise ImportError(
            f"convinit's compiled ops are missing: there is no _C.abi3.so in {_PACKAGE}. "
            "In a source checkout (which hides an installed convinit from a Python started there), "
            f"build them with: {_BUILD_COMMAND}"
        )
    cuda_library = _find("_C_cuda") if torch.version.cuda else None
    for path in filter(None, (library, cuda_library)):
        try:
            torch.ops.load_library(path)
        except OSError as error:
            raise ImportError(
                f"convinit's compiled ops in {path} cannot be loaded under torch {torch.__version__}: "
                f"{error}. "
                f"Reinstall convinit, or in a source checkout build it again: {_BUILD_COMMAND}"
            ) from error
    return cuda_library is not None


_HAS_CUDA_OPS = _load()


def op_device(device: torch.device) -> torch.device:
    """Where the compiled ops run for tensors on `device`: there, if it is CUDA and they are built for it."""
    return device if device.type == "cuda" and _HAS_CUDA_OPS else torch.device("cpu")


def build_info() -> dict[str, Any]:
    """What this convinit was built with and what it runs on, for bug reports and benchmark records.

    Returns:
        A dict with the keys
        convinit, torch: versions;
        torch_compiled: the torch whose headers the ops were compiled with;
        stable_abi: the oldest torch that they run under;
        compiler, cxx_standard: what compiled them;
        cpu_ops, cuda_ops: which compiled ops are loaded;
        cpu_capability: the instruction set that torch uses on this CPU ("AVX2", "AVX512", "NEON", ...);
        cpu_count, num_threads: CPUs of the machine, and threads that ops use;
        gpu: name of the current CUDA device, or None;
        python, platform: the interpreter's version and the operating system.
    """
    from convinit import __version__

    text = bytes(torch.ops.convinit.build_config().tolist()).decode()
    config = dict(line.split("=", 1) for line in text.splitlines())
    return {
        "convinit": __version__,
        "torch": torch.__version__,
        "torch_compiled": config["torch_compiled"],
        "stable_abi": config["stable_abi"],
        "compiler": config["compiler"],
        "cxx_standard": f"C++{config['cxx_standard'][2:4]}",  # 202002L: C++20
        "cpu_ops": True,
        "cuda_ops": _HAS_CUDA_OPS,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_count": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
