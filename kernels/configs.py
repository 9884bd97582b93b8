"""Launch configurations: tile sizes, warps and pipeline depth by GPU generation, dtype, r and N.

Chosen by cross-compilation alone: with Triton 3.8 and 3.9 each entry compiles without register spills and
within the generation's shared memory, with every option on (`python -m convinit.kernels.report` shows the
figures; with Triton 3.7 twelve of 248 spill some bytes). None has been timed; benchmarks/tune_attention.py
times alternatives on the GPU at hand and writes a file of faster entries, which the environment variable
CONVINIT_KERNEL_CONFIGS puts to use.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

MAX_RANK = 128
MAX_TOKENS = 1 << 15  # query · N + key must fit 32 bits, as a counter of random numbers
KERNELS = ("forward", "forward_dropout", "backward", "backward_dropout", "apply", "map_gradient")
GENERATIONS = (80, 90, 100, 120)
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}  # bytes a program may use


class Config(NamedTuple):
    """Tiles (of queries and keys, or of the map's rows and columns), warps, depth of the pipeline."""

    BM: int
    BN: int
    num_warps: int
    num_stages: int


class Key(NamedTuple):
    """An entry serves r and N up to its own."""

    kernel: str
    itemsize: int  # of q, k, v: 2 or 4 bytes
    rank: int
    tokens: int | None  # None: any


TABLE = {
    Key("forward", 2, 32, 64): Config(64, 64, 4, 2),
    Key("forward", 2, 32, 128): Config(64, 128, 4, 2),
    Key("forward", 2, 32, 256): Config(64, 256, 4, 1),
    Key("forward", 2, 32, None): Config(128, 64, 8, 3),
    Key("forward", 2, 64, 64): Config(64, 64, 4, 2),
    Key("forward", 2, 64, 128): Config(64, 128, 4, 2),
    Key("forward", 2, 64, 256): Config(64, 256, 4, 1),
    Key("forward", 2, 64, None): Config(128, 64, 8, 3),
    Key("forward", 2, 128, 64): Config(64, 64, 4, 2),
    Key("forward", 2, 128, 128): Config(64, 128, 4, 1),
    Key("forward", 2, 128, None): Config(128, 64, 8, 3),
    Key("forward", 4, 32, None): Config(64, 32, 4, 1),
    Key("forward", 4, 64, None): Config(64, 32, 8, 1),
    Key("forward", 4, 128, None): Config(64, 32, 8, 1),
    Key("forward_dropout", 2, 32, None): Config(64, 64, 8, 1),
    Key("forward_dropout", 2, 64, None): Config(64, 64, 8, 1),
    Key("forward_dropout", 2, 128, None): Config(64, 64, 8, 1),
    Key("forward_dropout", 4, 32, None): Config(32, 32, 4, 1),
    Key("forward_dropout", 4, 64, None): Config(32, 32, 4, 1),
    Key("forward_dropout", 4, 128, None): Config(32, 32, 4, 1),
    Key("backward", 2, 32, 64): Config(64, 64, 4, 1),
    Key("backward", 2, 32, 128): Config(64, 128, 8, 1),
    Key("backward", 2, 32, 256): Config(32, 256, 8, 1),
    Key("backward", 2, 32, None): Config(64, 128, 8, 1),
    Key("backward", 2, 64, 64): Config(64, 64, 8, 1),
    Key("backward", 2, 64, 128): Config(64, 128, 8, 1),
    Key("backward", 2, 64, None): Config(64, 128, 8, 1),
    Key("backward", 2, 128, 64): Config(16, 64, 8, 1),
    Key("backward", 2, 128, None): Config(16, 64, 8, 1),
    Key("backward", 4, 32, None): Config(32, 32, 8, 1),
    Key("backward", 4, 64, None): Config(16, 16, 8, 1),
    Key("backward", 4, 128, None): Config(16, 32, 8, 1),
    Key("backward_dropout", 2, 32, None): Config(64, 64, 8, 1),
    Key("backward_dropout", 2, 64, None): Config(64, 64, 8, 1),
    Key("backward_dropout", 2, 128, None): Config(16, 64, 8, 1),
    Key("backward_dropout", 4, 32, None): Config(32, 32, 8, 1),
    Key("backward_dropout", 4, 64, None): Config(16, 16, 4, 1),
    Key("backward_dropout", 4, 128, None): Config(16, 32, 8, 1),
    Key("apply", 2, 32, 64): Config(64, 64, 4, 2),
    Key("apply", 2, 32, 128): Config(128, 128, 8, 2),
    Key("apply", 2, 32, 256): Config(128, 256, 8, 2),
    Key("apply", 2, 32, None): Config(128, 64, 8, 3),
    Key("apply", 2, 64, 64): Config(64, 64, 4, 2),
    Key("apply", 2, 64, 128): Config(128, 128, 8, 2),
    Key("apply", 2, 64, 256): Config(128, 256, 8, 2),
    Key("apply", 2, 64, None): Config(128, 64, 8, 3),
    Key("apply", 2, 128, 64): Config(64, 64, 4, 2),
    Key("apply", 2, 128, 128): Config(128, 128, 8, 2),
    Key("apply", 2, 128, 256): Config(128, 256, 8, 2),
    Key("apply", 2, 128, None): Config(128, 64, 8, 3),
    Key("apply", 4, 32, None): Config(64, 32, 8, 1),
    Key("apply", 4, 64, None): Config(64, 32, 8, 1),
    Key("apply", 4, 128, None): Config(64, 32, 8, 1),
    Key("map_gradient", 2, 32, 64): Config(64, 64, 4, 3),
    Key("map_gradient", 2, 32, None): Config(128, 128, 8, 3),
    Key("map_gradient", 2, 64, 64): Config(64, 64, 4, 3),
    Key("map_gradient", 2, 64, None): Config(128, 128, 8, 3),
    Key("map_gradient", 2, 128, 64): Config(64, 64, 4, 3),
    Key("map_gradient", 2, 128, None): Config(128, 128, 8, 3),
    Key("map_gradient", 4, 32, None): Config(32, 32, 4, 1),
    Key("map_gradient", 4, 64, None): Config(32, 32, 4, 1),
    Key("map_gradient", 4, 128, None): Config(32, 32, 4, 1),
}

# Where a generation has other limits: {(generation, key): configuration}.
OVERRIDES = {
    (120, Key("forward", 2, 32, 256)): Config(128, 64, 8, 3),
    (80, Key("forward", 2, 64, 256)): Config(64, 256, 8, 1),
    (120, Key("forward", 2, 64, 256)): Config(32, 256, 8, 1),
    (100, Key("forward", 2, 128, 128)): Config(64, 128, 4, 2),
    (120, Key("forward", 2, 128, 128)): Config(64, 128, 8, 1),
    (80, Key("forward", 2, 128, None)): Config(128, 64, 8, 1),
    (120, Key("forward", 2, 128, None)): Config(128, 64, 8, 1),
    (80, Key("forward", 4, 32, None)): Config(64, 64, 8, 1),
    (120, Key("forward", 4, 32, None)): Config(64, 64, 8, 1),
    (120, Key("forward", 4, 64, None)): Config(32, 32, 4, 1),
    (100, Key("forward_dropout", 4, 32, None)): Config(32, 32, 8, 1),
    (80, Key("backward", 2, 32, 64)): Config(32, 64, 4, 1),
    (120, Key("backward", 2, 32, 64)): Config(32, 64, 4, 1),
    (80, Key("backward", 2, 32, 128)): Config(32, 128, 8, 1),
    (120, Key("backward", 2, 32, 128)): Config(32, 128, 8, 1),
    (80, Key("backward", 2, 32, 256)): Config(32, 128, 8, 1),
    (80, Key("backward", 2, 32, None)): Config(32, 128, 8, 1),
    (120, Key("backward", 2, 32, None)): Config(32, 128, 8, 1),
    (80, Key("backward", 2, 64, 64)): Config(32, 64, 8, 1),
    (120, Key("backward", 2, 64, 64)): Config(32, 64, 8, 1),
    (80, Key("backward", 2, 64, 128)): Config(16, 128, 8, 1),
    (120, Key("backward", 2, 64, 128)): Config(16, 128, 8, 1),
    (80, Key("backward", 2, 64, None)): Config(32, 64, 8, 1),
    (120, Key("backward", 2, 64, None)): Config(32, 64, 8, 1),
    (90, Key("backward", 2, 128, 64)): Config(32, 32, 8, 1),
    (100, Key("backward", 2, 128, 64)): Config(64, 64, 8, 1),
    (90, Key("backward", 2, 128, None)): Config(32, 32, 8, 1),
    (100, Key("backward", 2, 128, None)): Config(32, 64, 8, 1),
    (120, Key("backward", 4, 32, None)): Config(16, 64, 8, 1),
    (80, Key("backward", 4, 64, None)): Config(32, 32, 4, 1),
    (100, Key("backward", 4, 64, None)): Config(16, 64, 8, 1),
    (120, Key("backward", 4, 64, None)): Config(16, 64, 8, 1),
    (90, Key("backward", 4, 128, None)): Config(16, 16, 8, 1),
    (80, Key("backward_dropout", 2, 32, None)): Config(32, 64, 8, 1),
    (120, Key("backward_dropout", 2, 32, None)): Config(32, 32, 4, 1),
    (80, Key("backward_dropout", 2, 64, None)): Config(32, 64, 8, 1),
    (90, Key("backward_dropout", 2, 64, None)): Config(32, 32, 8, 1),
    (100, Key("backward_dropout", 2, 64, None)): Config(64, 32, 8, 1),
    (120, Key("backward_dropout", 2, 64, None)): Config(32, 64, 8, 1),
    (80, Key("backward_dropout", 2, 128, None)): Config(32, 32, 8, 1),
    (90, Key("backward_dropout", 2, 128, None)): Config(16, 32, 8, 1),
    (90, Key("backward_dropout", 4, 32, None)): Config(16, 64, 8, 1),
    (100, Key("backward_dropout", 4, 32, None)): Config(16, 16, 8, 1),
    (120, Key("backward_dropout", 4, 32, None)): Config(16, 16, 4, 1),
    (80, Key("backward_dropout", 4, 64, None)): Config(16, 16, 8, 1),
    (120, Key("backward_dropout", 4, 64, None)): Config(16, 32, 8, 1),
    (100, Key("apply", 2, 64, 64)): Config(64, 64, 4, 1),
    (120, Key("apply", 2, 64, 256)): Config(128, 256, 8, 1),
    (120, Key("apply", 2, 64, None)): Config(128, 64, 8, 2),
    (120, Key("apply", 2, 128, 256)): Config(64, 256, 4, 2),
    (100, Key("map_gradient", 2, 128, None)): Config(128, 128, 8, 1),
    (120, Key("map_gradient", 2, 128, None)): Config(128, 128, 8, 2),
    (120, Key("map_gradient", 4, 32, None)): Config(32, 16, 4, 1),
    (80, Key("map_gradient", 4, 64, None)): Config(32, 16, 4, 1),
}

# Where the kernels measured faster than PyTorch's: {generation: ((op, itemsize, r up to, N up to), ...)}.
# backend="auto" goes by it. Empty until measurements are committed under benchmarks/results.
MEASURED_FASTER: dict[int, tuple[tuple[str, int, int, int], ...]] = {}


def choose(kernel: str, x: Tensor) -> Config:
    """The configuration for tensors like x [B, heads, N, r]."""
    return lookup(kernel, generation(x.device), x.element_size(), x.shape[2], x.shape[3])


@functools.cache
def lookup(kernel: str, generation: int, itemsize: int, tokens: int, rank: int) -> Config:
    return entry(kernel, generation, itemsize, tokens, rank)[1]


def entry(kernel: str, generation: int, itemsize: int, tokens: int, rank: int) -> tuple[Key, Config]:
    """The entry of the table that serves a problem, and its configuration on a generation of GPUs."""
    for key, common in TABLE.items():  # small r before large r, small N before large N
        fits = rank <= key.rank and (key.tokens is None or tokens <= key.tokens)
        if fits and (key.kernel, key.itemsize) == (kernel, itemsize):
            place = (generation, key)
            return key, read_tuned().get(place) or OVERRIDES.get(place) or common
    raise ValueError(f"no launch configuration of {kernel} for r = {rank} and {itemsize}-byte elements")


@functools.cache
def generation(device: torch.device) -> int:
    """The generation in the table whose configurations fit a GPU."""
    if device.type != "cuda":
        return 90  # Triton's interpreter, which has no limits
    major, minor = torch.cuda.get_device_capability(device)
    if major == 8 and minor != 0:
        return 120  # 8.6 and 8.9 have the shared memory of 12.0
    if major < 8:
        raise ValueError(f"the kernels need a GPU of compute capability 8.0 or newer, got {major}.{minor}")
    return max(g for g in GENERATIONS if g <= 10 * major)


def measured_faster(op: str, x: Tensor) -> bool:
    """Whether committed measurements have the kernels of op ahead of PyTorch's for x [B, heads, N, r]."""
    tokens, rank = x.shape[2:]
    return any(
        (op, x.element_size()) == row[:2]
        and rank <= row[2]
        and tokens <= row[3]
        and key == generation(x.device)
        for key, rows in MEASURED_FASTER.items()
        for row in rows
    )


@functools.cache
def read_tuned() -> dict[tuple[int, Key], Config]:
    path = os.environ.get("CONVINIT_KERNEL_CONFIGS")
    if not path:
        return {}
    return {
        (row["generation"], Key(*row["key"])): Config(*row["config"])
        for row in json.loads(Path(path).read_text())
    }
