"""The machine a run was done on, and how fast its memory and its matrix products are at best."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import convinit
from convinit._timing import between_events

ROOT = Path(__file__).parent.parent
COMPETITORS = ("triton", "torchvision", "timm", "transformers", "vit-pytorch")  # whose versions matter
REPEATS = 10


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"{cpu_model()}, {os.cpu_count()} cores"


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        lines = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return lines[0].strip() if lines else None


def machine() -> dict[str, Any]:
    """What must be equal for two runs to be comparable; the date and such are in `run`."""
    found: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "convinit": convinit.__version__,
        **{package: version(package) for package in COMPETITORS},
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties()
        found |= {
            "gpu": properties.name,
            "gpu_memory_gb": round(properties.total_memory / 1e9, 1),
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "driver": driver(),
            "cuda": torch.version.cuda,
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        }
    return {key: value for key, value in found.items() if value is not None}


def revision() -> str:
    """The commit measured; "+" marks uncommitted changes to what is installed.

    CONVINIT_REVISION says it where the sources came without git.
    """
    if "CONVINIT_REVISION" in os.environ:
        return os.environ["CONVINIT_REVISION"]
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", "convinit", "csrc", "kernels"], capture_output=True
        )
    except OSError:
        return "unknown"
    return commit.stdout.strip() + ("+" if changed.stdout else "") if commit.returncode == 0 else "unknown"


def run(arguments: list[str], ceilings: dict[str, Any]) -> dict[str, Any]:
    """When, what and how this run was; of absolute paths only the last part is kept."""
    shown = [re.sub(r"(^|=)/\S*/", r"\1", argument) for argument in arguments]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "revision": revision(),
        "command": f"python -m pytest {shlex.join(shown)}",
        "ceilings": ceilings,
    }


# Ceilings


def fastest(fn: Callable[[], Any], device: str) -> float:
    """The least seconds of one call: a ceiling is what the machine reaches when nothing is in the way."""
    fn()
    if device == "cuda":
        return min(between_events(fn, 0) for _ in range(REPEATS))
    found = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        fn()
        found.append(time.perf_counter() - start)
    return min(found)


def last_cache_bytes(device: str) -> int:
    if device == "cuda":
        return getattr(torch.cuda.get_device_properties(), "L2_cache_size", 2**26)
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    found = [text for text in (path.read_text().strip() for path in sizes) if text[-1:] in units]
    return max((int(text[:-1]) * units[text[-1]] for text in found), default=2**25)


def bandwidth(device: str) -> dict[str, float]:
    """GB/s of fill, copy and triad on memory that has been touched, each array four times the last cache."""
    size = min(max(4 * last_cache_bytes(device), 2**26), 2**29)
    a, b, c = (torch.ones(size // 4, device=device) for _ in range(3))
    return {
        "fill": a.nbytes / fastest(lambda: a.fill_(2.0), device) / 1e9,
        "copy": 2 * a.nbytes / fastest(lambda: a.copy_(b), device) / 1e9,
        "triad": 3 * a.nbytes / fastest(lambda: torch.add(b, c, alpha=3.0, out=a), device) / 1e9,
    }


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """TFLOP/s of a square matrix product, by the fastest library that PyTorch has for it."""
    n = 1024 if device == "cpu" else 4096 if dtype == torch.float64 else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty(n, n, dtype=dtype, device=device)
    seconds = fastest(lambda: torch.matmul(a, b, out=out), device)
    if device == "cpu" and dtype != torch.float64:  # convolutions are another library's
        image, kernels = a.view(1, 1, n, n).permute(0, 3, 1, 2), b[:, :, None, None]
        seconds = min(seconds, fastest(lambda: torch.conv2d(image, kernels), device))
    return 2 * n**3 / seconds / 1e12


def ceiling(
    found: dict[str, Any], device: str, dtype: torch.dtype, bytes_moved: float | None, flops: float | None
) -> dict[str, float]:
    """{"gb_per_s", "tflop_per_s"} as far as they limit; measured once a session, with the threads set now.

    Memory's speed limits nothing that stays in the last cache.

    Args:
        found: what the session has measured, {device: {"gb_per_s": {..}, "tflop_per_s": {dtype: ..}}}.
    """
    threads = torch.get_num_threads()
    here = found.setdefault(
        "cuda" if device == "cuda" else f"cpu, {threads} threads", {"gb_per_s": {}, "tflop_per_s": {}}
    )
    result = {}
    name = str(dtype).removeprefix("torch.")
    try:
        if bytes_moved is not None and bytes_moved > last_cache_bytes(device):
            here["gb_per_s"] = here["gb_per_s"] or bandwidth(device)
            result["gb_per_s"] = max(here["gb_per_s"].values())
        if flops is not None and (dtype.is_floating_point or dtype.is_complex):
            if name not in here["tflop_per_s"]:
                here["tflop_per_s"][name] = matrix_rate(device, dtype)
            result["tflop_per_s"] = here["tflop_per_s"][name]
    except torch.OutOfMemoryError:
        pass  # a problem that fills the GPU goes without a roofline
    return result
