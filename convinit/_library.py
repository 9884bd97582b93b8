"""Loads the compiled ops; `build_info` says what was built and what is in use."""

from __future__ import annotations

import os
import platform
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from convinit._version import __version__

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
    """Where the compiled ops run for tensors on `device`: there, if it is CUDA and they serve it."""
    if device.type != "cuda" or not _HAS_CUDA_OPS:
        return torch.device("cpu")
    problem = _cuda_problem(_cuda_config(), torch.cuda.get_device_capability(device))
    if problem:
        warnings.warn(f"convinit computes on the CPU instead of {device}: {problem}", stacklevel=2)
        return torch.device("cpu")
    return device


def _cuda_problem(config: dict[str, str], capability: tuple[int, int]) -> str | None:
    """Why the CUDA ops do not run with this driver or on a GPU of this capability; None if they do."""
    compiled, driver = config["cuda_compiled"], config["cuda_driver"]
    if int(driver.split(".")[0]) < int(compiled.split(".")[0]):
        return (
            f"its CUDA ops were built with CUDA {compiled}, and the NVIDIA driver knows CUDA {driver} at "
            "most. Update the driver, or build convinit from source with the older CUDA"
        )
    # Machine code runs on later GPUs of its generation, PTX on all later ones.
    same_generation = any(
        a[0] == capability[0] and a <= capability for a in _capabilities(config["cuda_architectures"])
    )
    if same_generation or any(a <= capability for a in _capabilities(config["cuda_ptx"])):
        return None
    return (
        f"its CUDA ops were built for {_names(config)}, and this GPU is sm_{capability[0]}{capability[1]}. "
        "Build convinit from source with TORCH_CUDA_ARCH_LIST set"
    )


def _capabilities(numbers: str) -> list[tuple[int, int]]:
    """Compute capabilities of "900,1000": (9, 0), (10, 0)."""
    return [divmod(int(number) // 10, 10) for number in numbers.split(",") if number]


def _names(config: dict[str, str]) -> str:
    return ", ".join(f"sm_{major}{minor}" for major, minor in _capabilities(config["cuda_architectures"]))


def _cuda_config() -> dict[str, str]:
    return _read(torch.ops.convinit.cuda_config())


def _read(text: torch.Tensor) -> dict[str, str]:
    """The "key=value" lines that an op returns as bytes."""
    return dict(line.split("=", 1) for line in bytes(text.tolist()).decode().splitlines())


def build_info() -> dict[str, Any]:
    """The build of this convinit and the machine it runs on, for bug reports and benchmark records.

    Returns:
        A dict with the keys
        convinit, torch: versions;
        torch_compiled: the torch whose headers the ops were compiled with;
        stable_abi: the oldest torch that they run under;
        compiler, cxx_standard: what compiled them;
        cpu_ops, cuda_ops: which compiled ops are loaded;
        cuda_compiled: the CUDA version that compiled the CUDA ops, or None;
        cuda_architectures: the GPUs that they have machine code for ("sm_80, sm_90, ..."), or None;
        cuda_driver: the newest CUDA version that the NVIDIA driver knows, or None;
        cpu_capability: the instruction set that torch uses on this CPU ("AVX2", "AVX512", "NEON", ...);
        cpu_count, num_threads: CPUs of the machine, and threads that ops use;
        gpu: name of the current CUDA device with its architecture, or None;
        gpu_problem: why the CUDA ops do not run on it, or None;
        tuned: when and on which GPU the attention that "auto" takes was measured, by `convinit tune` or
            "(shipped)", or None;
        python, platform: the interpreter's version and the operating system.
    """
    from convinit.kernels import tuned

    config = _read(torch.ops.convinit.build_config())
    cuda = _cuda_config() if _HAS_CUDA_OPS else None
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    return {
        "convinit": __version__,
        "torch": torch.__version__,
        "torch_compiled": config["torch_compiled"],
        "stable_abi": config["stable_abi"],
        "compiler": config["compiler"],
        "cxx_standard": f"C++{config['cxx_standard'][2:4]}",  # 202002L: C++20
        "cpu_ops": True,
        "cuda_ops": _HAS_CUDA_OPS,
        "cuda_compiled": cuda and cuda["cuda_compiled"],
        "cuda_architectures": cuda and _names(cuda),
        "cuda_driver": cuda["cuda_driver"] if cuda and cuda["cuda_driver"] != "0.0" else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_count": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "gpu": capability and f"{torch.cuda.get_device_name()} (sm_{capability[0]}{capability[1]})",
        "gpu_problem": _cuda_problem(cuda, capability) if cuda and capability else None,
        "tuned": (str(tuned.of(torch.cuda.current_device())) or None) if capability else None,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
