"""Launch configurations: tile sizes, warps and pipeline depth by GPU generation, dtype, r and N.

Entries of generation 90 in 16 bits go by times on an H200 and an H100 (benchmarks/results), their neighbours
by analogy. Those of the other generations, and float32, are what compiles for them within their shared memory
and without local memory in the hot loop; `python -m convinit.kernels.resources` shows the figures. `convinit
tune` times others on the GPU at hand.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

MAX_RANK = 128
MAX_TOKENS = 1 << 15
KERNELS = ("forward", "backward", "backward_queries", "backward_keys", "apply", "map_gradient")
GENERATIONS = (80, 90, 100, 120)
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}  # bytes a program may use


class Config(NamedTuple):
    """Tiles (of queries and keys, or of the map's rows and columns), warps, depth of the pipeline.

    programs: of them that fit a multiprocessor at once; what decides over a share of the images for each.
    """

    BM: int
    BN: int
    num_warps: int
    num_stages: int
    programs: int = 1


class Key(NamedTuple):
    """An entry serves r and N up to its own."""

    kernel: str
    itemsize: int  # of q, k, v: 2 or 4 bytes
    rank: int
    tokens: int | None  # None: any


@functools.cache
def key_blocks(tokens: int, BN: int, itemsize: int) -> tuple[int, ...]:
    """Sizes of the blocks in which the forward kernel holds all keys: BN, and one or two smaller ones.

    (): there are more than 2 · BN keys, or more than BN in float32; the kernel reads them tile by tile.
    """
    if tokens <= BN:
        return (BN,)
    rest = tokens - BN
    if rest > BN or itemsize > 2:
        return ()
    one = power_of_two(rest)
    if one == 16:
        return (BN, one)
    two = (one // 2, power_of_two(rest - one // 2))
    # Two where one would pad more, or would be BN: a smaller S leaves registers for more programs.
    return (BN, *two) if sum(two) < one or one == BN else (BN, one)


def power_of_two(n: int) -> int:
    """The next one, and at least 16: tensor cores take no less."""
    return max(16, 1 << (n - 1).bit_length())


TABLE = {
    Key("forward", 2, 32, 64): Config(64, 64, 4, 2, 7),
    Key("forward", 2, 32, 80): Config(64, 64, 4, 1, 7),
    Key("forward", 2, 32, 128): Config(64, 128, 4, 1, 4),
    Key("forward", 2, 32, 208): Config(64, 128, 4, 1, 4),
    Key("forward", 2, 32, 256): Config(64, 128, 4, 2, 4),
    Key("forward", 2, 32, None): Config(64, 64, 4, 3),
    Key("forward", 2, 64, 64): Config(64, 64, 4, 2, 4),
    Key("forward", 2, 64, 80): Config(64, 64, 4, 1, 4),
    Key("forward", 2, 64, 128): Config(64, 128, 4, 1, 3),
    Key("forward", 2, 64, 208): Config(64, 128, 4, 1, 3),
    Key("forward", 2, 64, 256): Config(64, 256, 4, 3, 2),
    Key("forward", 2, 64, None): Config(64, 64, 4, 3),
    Key("forward", 2, 128, 128): Config(64, 128, 4, 2, 2),
    Key("forward", 2, 128, None): Config(128, 64, 8, 3),
    Key("forward", 4, 32, None): Config(64, 32, 4, 2),
    Key("forward", 4, 64, None): Config(64, 32, 4, 2),
    Key("forward", 4, 128, None): Config(64, 32, 8, 2),
    Key("backward", 2, 32, 64): Config(32, 64, 4, 3),
    Key("backward", 2, 32, 128): Config(32, 128, 4, 3),
    Key("backward", 2, 32, 256): Config(64, 256, 8, 3),
    Key("backward", 2, 64, 64): Config(32, 64, 4, 3),
    Key("backward", 2, 64, 128): Config(32, 128, 4, 3),
    Key("backward", 2, 64, 256): Config(32, 256, 8, 4),
    Key("backward", 2, 128, 128): Config(32, 128, 8, 3),
    Key("backward_queries", 2, 32, None): Config(128, 32, 4, 3),
    Key("backward_queries", 2, 64, None): Config(64, 32, 4, 3),
    Key("backward_queries", 2, 128, None): Config(64, 32, 4, 2),
    Key("backward_queries", 4, 32, None): Config(64, 32, 4, 1),
    Key("backward_queries", 4, 64, None): Config(64, 32, 8, 1),
    Key("backward_queries", 4, 128, None): Config(32, 32, 8, 1),
    Key("backward_keys", 2, 32, None): Config(64, 64, 4, 3),
    Key("backward_keys", 2, 64, None): Config(64, 64, 4, 3),
    Key("backward_keys", 2, 128, None): Config(32, 64, 4, 3),
    Key("backward_keys", 4, 32, None): Config(32, 64, 4, 1),
    Key("backward_keys", 4, 64, None): Config(32, 64, 8, 1),
    Key("backward_keys", 4, 128, None): Config(16, 32, 8, 1),
    Key("apply", 2, 32, 64): Config(64, 64, 4, 3, 6),
    Key("apply", 2, 32, 128): Config(128, 128, 4, 3, 2),
    Key("apply", 2, 32, 256): Config(64, 256, 4, 3, 2),
    Key("apply", 2, 64, 64): Config(64, 64, 4, 3, 5),
    Key("apply", 2, 64, 128): Config(128, 128, 4, 3, 2),
    Key("apply", 2, 64, 256): Config(128, 256, 8, 3),
    Key("apply", 2, 128, 128): Config(128, 128, 8, 3),
    Key("map_gradient", 2, 32, 64): Config(64, 64, 4, 3, 4),
    Key("map_gradient", 2, 32, 128): Config(128, 64, 4, 3, 2),
    Key("map_gradient", 2, 32, None): Config(128, 256, 8, 3),
    Key("map_gradient", 2, 64, 64): Config(64, 64, 4, 3, 4),
    Key("map_gradient", 2, 64, 128): Config(128, 64, 4, 3, 2),
    Key("map_gradient", 2, 64, None): Config(128, 256, 8, 3),
    Key("map_gradient", 2, 128, 128): Config(128, 64, 4, 3),
    Key("map_gradient", 2, 128, None): Config(128, 128, 8, 3),
    Key("map_gradient", 4, 32, None): Config(64, 64, 4, 2),
    Key("map_gradient", 4, 64, None): Config(64, 64, 8, 2),
    Key("map_gradient", 4, 128, None): Config(64, 64, 8, 1),
}

# Where a generation has other limits: {(generation, key): configuration}; None: it goes without this kernel.
OVERRIDES: dict[tuple[int, Key], Config | None] = {
    (80, Key("forward", 2, 32, 64)): Config(128, 32, 4, 3, 3),
    (100, Key("forward", 2, 32, 64)): Config(64, 64, 4, 2, 4),
    (120, Key("forward", 2, 32, 64)): Config(128, 32, 4, 3, 3),
    (80, Key("forward", 2, 32, 128)): Config(128, 64, 4, 3, 2),
    (100, Key("forward", 2, 32, 128)): Config(64, 128, 4, 1, 2),
    (120, Key("forward", 2, 32, 128)): Config(128, 64, 4, 3, 2),
    (100, Key("forward", 2, 32, 256)): Config(64, 256, 4, 2),
    (120, Key("forward", 2, 32, 256)): Config(64, 32, 4, 2),
    (100, Key("forward", 2, 32, None)): Config(128, 64, 8, 3),
    (120, Key("forward", 2, 64, 64)): Config(64, 64, 4, 2, 2),
    (100, Key("forward", 2, 64, 128)): Config(64, 128, 4, 1, 2),
    (120, Key("forward", 2, 64, 128)): Config(64, 128, 4, 1, 2),
    (80, Key("forward", 2, 64, 256)): Config(128, 64, 8, 2),
    (100, Key("forward", 2, 64, 256)): Config(64, 256, 4, 3),
    (120, Key("forward", 2, 64, 256)): Config(128, 64, 8, 2),
    (120, Key("forward", 2, 128, 128)): Config(64, 128, 4, 1),
    (80, Key("forward", 2, 128, None)): Config(64, 32, 4, 2),
    (120, Key("forward", 2, 128, None)): Config(64, 32, 4, 2),
    (80, Key("forward", 4, 64, None)): Config(64, 32, 4, 1),
    (120, Key("forward", 4, 64, None)): Config(64, 32, 4, 1),
    (80, Key("forward", 4, 128, None)): Config(32, 64, 8, 1),
    (100, Key("forward", 4, 128, None)): Config(64, 32, 8, 1),
    (120, Key("forward", 4, 128, None)): Config(32, 64, 8, 1),
    (80, Key("backward", 2, 32, 256)): Config(16, 256, 4, 2),
    (120, Key("backward", 2, 32, 256)): Config(16, 256, 8, 2),
    (80, Key("backward", 2, 64, 128)): Config(16, 128, 4, 2),
    (120, Key("backward", 2, 64, 128)): Config(16, 128, 8, 2),
    (80, Key("backward", 2, 64, 256)): Config(16, 256, 8, 2),
    (120, Key("backward", 2, 64, 256)): None,
    (80, Key("backward", 2, 128, 128)): None,
    (120, Key("backward", 2, 128, 128)): None,
    (120, Key("backward_queries", 2, 128, None)): Config(64, 32, 4, 1),
    (80, Key("backward_queries", 4, 64, None)): Config(32, 32, 4, 1),
    (120, Key("backward_queries", 4, 64, None)): Config(32, 32, 4, 1),
    (80, Key("backward_queries", 4, 128, None)): Config(16, 32, 8, 1),
    (100, Key("backward_queries", 4, 128, None)): Config(16, 16, 4, 1),
    (120, Key("backward_queries", 4, 128, None)): Config(16, 32, 8, 1),
    (80, Key("backward_keys", 2, 64, None)): Config(32, 64, 4, 2),
    (120, Key("backward_keys", 2, 64, None)): Config(32, 64, 4, 2),
    (80, Key("backward_keys", 2, 128, None)): Config(64, 64, 8, 2),
    (120, Key("backward_keys", 2, 128, None)): Config(32, 64, 4, 1),
    (80, Key("backward_keys", 4, 64, None)): Config(64, 32, 8, 1),
    (120, Key("backward_keys", 4, 64, None)): Config(64, 32, 8, 1),
    (100, Key("backward_keys", 4, 128, None)): Config(16, 16, 4, 1),
    (120, Key("apply", 2, 32, 64)): Config(64, 64, 4, 3, 5),
    (120, Key("apply", 2, 32, 128)): Config(128, 128, 4, 3),
    (120, Key("apply", 2, 32, 256)): Config(64, 256, 4, 3),
    (80, Key("apply", 2, 64, 64)): Config(64, 64, 4, 3, 4),
    (120, Key("apply", 2, 64, 64)): Config(64, 64, 4, 3, 3),
    (120, Key("apply", 2, 64, 128)): Config(128, 128, 4, 3),
    (120, Key("apply", 2, 64, 256)): Config(128, 256, 8, 1),
    (120, Key("apply", 2, 128, 128)): Config(128, 128, 8, 2),
    (120, Key("map_gradient", 2, 64, 64)): Config(64, 64, 4, 3, 3),
    (80, Key("map_gradient", 2, 128, 128)): Config(128, 128, 8, 2),
    (120, Key("map_gradient", 2, 128, 128)): Config(128, 128, 8, 2),
    (120, Key("map_gradient", 2, 128, None)): Config(128, 128, 8, 2),
    (80, Key("map_gradient", 4, 64, None)): Config(64, 32, 4, 1, 2),
    (120, Key("map_gradient", 4, 64, None)): Config(64, 32, 4, 1, 2),
    (80, Key("map_gradient", 4, 128, None)): Config(32, 64, 8, 1),
    (120, Key("map_gradient", 4, 128, None)): Config(32, 64, 8, 1),
}


@functools.cache
def lookup(kernel: str, generation: int, itemsize: int, tokens: int, rank: int) -> Config | None:
    """The table's configuration of a kernel, or None where it does not serve the problem."""
    for key, common in TABLE.items():  # small r before large r, small N before large N
        fits = rank <= key.rank and (key.tokens is None or tokens <= key.tokens)
        if fits and (key.kernel, key.itemsize) == (kernel, itemsize):
            return OVERRIDES.get((generation, key), common)
    return None


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
