"""Launch configurations: tile sizes, warps and pipeline depth by GPU generation, dtype, r and N.

Chosen by cross-compilation alone: each entry compiles without register spills and within the generation's
shared memory, with every option on (`python -m convinit.kernels.report` shows the figures). None has been
timed; benchmarks/tune_attention.py times alternatives on the GPU at hand and writes a file of faster entries,
which the environment variable CONVINIT_KERNEL_CONFIGS puts to use.
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
KERNELS = ("forward", "backward", "apply", "map_gradient")
GENERATIONS = (80, 90, 100, 120)
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}  # bytes a program may use


class Config(NamedTuple):
    """Tile of rows, tile of columns (queries and keys, or rows and columns of the map), warps, pipeline depth."""

    BM: int
    BN: int
    num_warps: int
    num_stages: int


class Key(NamedTuple):
    kernel: str
    itemsize: int  # of q, k, v: 2 or 4 bytes
    rank: int  # r up to this: 32, 64 or 128
    tokens: int | None  # N up to this; None is any N
A = None
TABLE = {}
for _k in KERNELS:
    for _s in (2, 4):
        for _r in (32, 64, 128):
            for _t in (64, 128, 256, None) if _s == 2 else (None,):
                if _k == "backward" and _t and _t * _r > 8192: continue
                if _k == "forward" and _t and _t * _r > 16384: continue
                if _k == "map_gradient" and _t: continue
                TABLE[Key(_k, _s, _r, _t)] = Config(64 if _k != "backward" else 32, _t or 64, 4, 1) if _s == 2 else Config(32, 32, 4, 1)
OVERRIDES: dict[tuple[int, Key], Config] = {}


def choose(kernel: str, x: Tensor) -> Config:
    """The configuration for tensors like x [B, heads, N, r]."""
    return lookup(kernel, generation(x.device), x.element_size(), x.shape[2], x.shape[3])


@functools.cache
def lookup(kernel: str, generation: int, itemsize: int, tokens: int, rank: int) -> Config:
    tuned = read_tuned()
    for key in sorted(TABLE, key=lambda key: (key.rank, key.tokens or MAX_TOKENS)):
        if key[:2] == (kernel, itemsize) and rank <= key.rank and (key.tokens is None or tokens <= key.tokens):
            place = (generation, key)
            return tuned.get(place) or OVERRIDES.get(place) or TABLE[key]
    raise ValueError(f"no launch configuration for {kernel} with r = {rank} and {itemsize}-byte elements")


@functools.cache
def generation(device: torch.device) -> int:
    """The row of the table for a GPU: its own generation, or the last one before with that much shared memory."""
    if device.type != "cuda":
        return 90  # Triton's interpreter, which has no limits
    major, minor = torch.cuda.get_device_capability(device)
    if major == 8 and minor != 0:
        return 120  # 8.6 and 8.9 have the shared memory of 12.0
    return max((g for g in GENERATIONS if g <= 10 * major), default=GENERATIONS[0])


@functools.cache
def read_tuned() -> dict[tuple[int, Key], Config]:
    path = os.environ.get("CONVINIT_KERNEL_CONFIGS")
    if not path:
        return {}
    return {
        (row["generation"], Key(*row["key"])): Config(*row["config"])
        for row in json.loads(Path(path).read_text())
    }
