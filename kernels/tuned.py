"""Choices that `convinit tune` measured on this GPU: the back end of an attention, and launch configurations.

A file a GPU and software, $CONVINIT_CACHE_DIR (or ~/.cache/convinit)/tuned/<GPU>-<hash of `machine`>.json:

    machine    GPU, torch, Triton, CUDA and the kernels' source; read only where all are the same
    date       of the last measurement
    disabled   {op: why its kernels are not to be trusted here}
    choices    [{op, dtype, N, r, positions, training, least, choice, ...}]: from B·heads = least on
    configs    [{kernel, dtype, N, r, config}]: config is a `Config` as a list, or null: without this kernel

Where there is none, `sm_<capability>.json` beside this module is read: choices of the same form for GPUs of
that capability; its machine is not compared. The first attention on a GPU reads the file, once.
CONVINIT_TUNED=0 switches both off: PyTorch's choice, and the configurations of `configs.TABLE`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convinit._files import cache_folder, write_whole
from convinit.kernels import configs
from convinit.kernels.configs import Config

OPS = ("positional_attention", "shared_attention")
CHOICES = ("triton", "torch", "cudnn", "flash", "efficient")  # "torch": what PyTorch does by itself
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TILES, WARPS, STAGES = (16, 32, 64, 128, 256), (4, 8, 16), (1, 2, 3, 4)
COMMAND = "convinit tune"


class Problem(NamedTuple):
    """What a choice is made for, beside B·heads."""

    op: str
    dtype: torch.dtype
    tokens: int
    rank: int
    positions: bool  # whether queries or keys have a position term
    training: bool  # whether a gradient is recorded


class Launch(NamedTuple):
    """What a configuration is for."""

    kernel: str
    dtype: torch.dtype
    tokens: int
    rank: int


@dataclass
class Tuned:
    """The content of a file."""

    date: str = ""
    gpu: str = ""
    disabled: dict[str, str] = field(default_factory=dict)
    choices: dict[Problem, tuple[str, int]] = field(default_factory=dict)  # and the least B·heads
    configs: dict[Launch, Config | None] = field(default_factory=dict)

    def __str__(self) -> str:
        count = len(self.choices)
        return (
            ""
            if count == 0
            else f"{self.date} for {self.gpu} ({count} {'entry' if count == 1 else 'entries'})"
        )


_loaded: dict[int, Tuned] = {}  # by the device's index


# --- what runs with every attention -------------------------------------------------------------------------


def choice(
    device: int, op: str, dtype: torch.dtype, tokens: int, rank: int, positions: bool, training: bool
) -> tuple[str, int]:
    """One of CHOICES for a problem, and the B·heads from which on it holds."""
    return of(device).choices.get(Problem(op, dtype, tokens, rank, positions, training), ("torch", 0))


# torch.compile asks once and keeps the answer. This is `torch.compiler.assume_constant_result`, which would
# import the compiler with the package.
choice._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose(kernel: str, x: Tensor, chosen: Mapping[str, Config] | None = None) -> Config:
    """The configuration for tensors like x [B, heads, N, r]: of `chosen`, as tuned, or the table's."""
    config = find(kernel, x, chosen)
    if config is None:
        raise ValueError(f"no launch configuration of {kernel} for {list(x.shape)} and {x.dtype}")
    return config


def find(kernel: str, x: Tensor, chosen: Mapping[str, Config] | None = None) -> Config | None:
    """The same, or None where the kernel does not serve the problem."""
    if chosen is not None:
        return chosen.get(kernel)
    tokens, rank = x.shape[2:]
    if x.device.type == "cuda":
        tuned = of(x.device.index).configs
        launch = Launch(kernel, x.dtype, tokens, rank)
        if launch in tuned:
            return tuned[launch]
    return configs.lookup(kernel, configs.generation(x.device), x.element_size(), tokens, rank)


def of(device: int) -> Tuned:
    """What is known of a GPU; read at the first call. Nothing that fails in here may stop an attention."""
    found = _loaded.get(device)
    if found is None:
        found = _load(device)
        if any(name == "triton" for name, _ in found.choices.values()):
            if torch.cuda.is_current_stream_capturing():
                return Tuned()  # for now: no kernel can be compiled while a CUDA graph is captured
            if not _triton_starts(device):
                found = Tuned()
        _loaded[device] = found
    return found


def _triton_starts(device: int) -> bool:
    """Whether Triton runs a kernel: it needs a C compiler, and a folder that it may write."""
    try:
        from convinit.kernels.tiles import nothing_kernel

        with torch.cuda.device(device):
            nothing_kernel[(1,)](num_warps=1)
    except Exception as error:
        reason = str(error).strip().splitlines()[:1]
        warnings.warn(
            f"Triton does not start ({type(error).__name__}: {''.join(reason)}), so attention on this GPU is "
            "PyTorch's; CONVINIT_TUNED=0 says that this is meant",
            stacklevel=2,
        )
        return False
    return True


# --- files --------------------------------------------------------------------------------------------------


def folder() -> Path:
    return cache_folder() / "tuned"


@functools.cache
def machine(device: int) -> dict[str, Any]:
    """All that measurements depend on."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = None
    properties = torch.cuda.get_device_properties(device)
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return {
        "gpu": properties.name,
        "processors": properties.multi_processor_count,  # a share of a GPU (MIG) has fewer
        "capability": f"{properties.major}.{properties.minor}",
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda,
        "kernels": hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest(),
    }


def path_of(machine: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()
    return folder() / f"{_slug(machine['gpu'])}-{digest[:12]}.json"


def read(path: Path) -> dict[str, Any]:
    """A file's content; ValueError where it is not one that `convinit tune` writes."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        parse(content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
    return content


def write(content: Mapping[str, Any]) -> Path:
    path = path_of(content["machine"])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=1) + "\n")
    return path


def parse(content: Mapping[str, Any]) -> Tuned:
    """ValueError (or what a missing key raises) unless every number is one that a kernel can be given."""
    disabled = {_one_of(OPS, op): str(reason) for op, reason in content["disabled"].items()}
    tuned = Tuned(str(content["date"]), str(content["machine"]["gpu"]), disabled)
    for row in content["choices"]:
        problem = Problem(
            _one_of(OPS, row["op"]), *_size(row), _flag(row["positions"]), _flag(row["training"])
        )
        name = _one_of(CHOICES, row["choice"])
        if name == "triton" and problem.op in disabled:
            raise ValueError(f"{problem.op} is disabled and chosen")
        tuned.choices[problem] = (name, _whole(row["least"]))
    for row in content["configs"]:
        kernel, values = _one_of(configs.KERNELS, row["kernel"]), row["config"]
        if values is None and kernel != "apply":
            raise ValueError(f"{kernel} without a configuration")
        tuned.configs[Launch(kernel, *_size(row))] = values and _config(kernel, values, row["N"])
    return tuned


def _load(device: int) -> Tuned:
    if os.environ.get("CONVINIT_TUNED") == "0" or torch.version.hip is not None:
        return Tuned()
    try:
        here = machine(device)
        path, problem = path_of(here), ""
        if path.exists():
            content = read(path)
            if content["machine"] == here:
                return parse(content)
            problem = f"{path} is for another machine"
        elif any(path.parent.glob(f"{_slug(here['gpu'])}-????????????.json")):
            problem = f"convinit was tuned for {here['gpu']}, but with other versions: what was measured"
    except (OSError, RuntimeError, ValueError) as error:  # no home, none that may be read, a damaged file
        here, problem = machine(device), str(error)
    if problem:
        warnings.warn(f"{problem} is ignored; measure again with: {COMMAND}", stacklevel=2)
    shipped = Path(__file__).parent / f"sm_{here['capability'].replace('.', '')}.json"
    if not (shipped.exists() and here["triton"]):
        return Tuned()
    known = parse(read(shipped))
    return replace(known, gpu=f"{known.gpu} (shipped)")


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _one_of(allowed: tuple[Any, ...], value: Any) -> Any:
    if type(value) not in (int, str) or value not in allowed:
        raise ValueError(f"expected one of {', '.join(map(str, allowed))}, got {value!r}")
    return value


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 < value < 2**31:
        raise ValueError(f"expected a positive integer, got {value!r}")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, got {value!r}")
    return value


def _size(row: Mapping[str, Any]) -> tuple[torch.dtype, int, int]:
    return DTYPES[_one_of(tuple(DTYPES), row["dtype"])], _whole(row["N"]), _whole(row["r"])


def _config(kernel: str, values: list[Any], tokens: int) -> Config:
    BM, BN, warps, stages, programs = values
    config = Config(
        _one_of(TILES, BM),
        _one_of(TILES, BN),
        _one_of(WARPS, warps),
        _one_of(STAGES, stages),
        _whole(programs),
    )
    if kernel in ("backward", "apply") and config.BN < tokens:
        raise ValueError(f"{kernel} takes all {tokens} keys at once, got a tile of {config.BN}")
    return config
