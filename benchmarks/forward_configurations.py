"""Times launch configurations of the positional forward on the GPU at hand, beside PyTorch's attention.

    python benchmarks/forward_configurations.py rows.jsonl

`convinit tune` tries the neighbours of the committed configuration; here are others, whose keys lie in other
blocks. bfloat16, both position terms, the packed product of a layer; SDPA mixes content and position first.
One line a shape and version: the configuration (BM, BN, warps, stages, programs) and its blocks of keys,
milliseconds on the GPU (median, least and most of the rounds, versions taking turns), and the relative error
against float64, which may be twice SDPA's.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convinit._timing import WrongResultError, measure, try_out
from convinit.kernels.configs import Config, key_blocks
from convinit.ops import tune, verify
from convinit.ops.verify import Case, Shape

CASE = Case("positional_attention", positions=True)
SECONDS, MIN_ROUNDS = 1.0, 10

# The first of each held all keys in one block, or read them tile by tile, before there were several blocks.
CONFIGURATIONS: dict[Shape, tuple[Config, ...]] = {
    (1024, 6, 65, 64): (Config(64, 128, 4, 1, 3), Config(64, 64, 4, 1, 4), Config(64, 64, 4, 2, 4)),
    (512, 6, 100, 64): (Config(64, 128, 4, 1, 3), Config(64, 64, 4, 1, 3), Config(64, 64, 4, 2, 3)),
    (512, 6, 144, 64): (Config(64, 256, 4, 3, 2), Config(64, 128, 4, 1, 3), Config(64, 128, 4, 2, 3)),
    (256, 3, 196, 64): (Config(64, 256, 4, 3, 2), Config(64, 128, 4, 1, 3), Config(64, 128, 4, 2, 2)),
    (256, 12, 197, 64): (Config(64, 256, 4, 3, 2), Config(64, 128, 4, 1, 3), Config(64, 128, 4, 2, 2)),
    (256, 6, 225, 64): (Config(64, 256, 4, 3, 2), Config(64, 128, 4, 1, 2), Config(64, 128, 4, 2, 2)),
    (512, 8, 256, 64): (Config(64, 256, 4, 3, 2), Config(64, 128, 4, 1, 3), Config(64, 128, 4, 2, 2)),
    (256, 12, 257, 64): (Config(64, 64, 4, 3), Config(64, 256, 4, 1, 2), Config(64, 256, 4, 2, 2)),
    (1024, 4, 65, 32): (Config(64, 128, 4, 1, 4), Config(64, 64, 4, 1, 7), Config(64, 64, 4, 2, 6)),
    (256, 12, 197, 32): (Config(64, 256, 4, 2, 2), Config(64, 128, 4, 1, 4), Config(64, 128, 4, 2, 3)),
    (256, 16, 256, 32): (Config(64, 256, 4, 2, 2), Config(64, 128, 4, 1, 4), Config(64, 128, 4, 2, 4)),
    (256, 6, 197, 128): (Config(128, 64, 8, 3), Config(128, 128, 8, 1), Config(128, 128, 8, 2)),
}


def rows(shape: Shape, dtype: torch.dtype = torch.bfloat16) -> Iterator[dict[str, Any]]:
    heads, tokens = shape[1:3]
    leaves, dout = verify.draw(CASE, shape, dtype)
    few = [leaves[0][: verify.IMAGES].double(), *(leaf.double() for leaf in leaves[1:])]
    (exact,) = verify.results(CASE, heads, few, dout, "eager", training=False)
    forward = tune.launches(CASE, shape, dtype)["forward"]
    calls = {"SDPA": functools.partial(verify.results, CASE, heads, leaves, dout, "sdpa", training=False)}
    for config in CONFIGURATIONS[shape]:
        name = f"{tuple(config)}, keys {key_blocks(tokens, config.BN, dtype.itemsize)}"
        calls[name] = functools.partial(forward, {"forward": config})
    errors: dict[str, float] = {}

    def check(name: str, results: list[Tensor]) -> dict[str, float]:
        error = ((results[0][: verify.IMAGES] - exact).norm() / exact.norm()).item()
        errors[name] = error
        if not (error <= 2 * errors["SDPA"] and results[0].isfinite().all()):
            raise WrongResultError("further from float64 than twice SDPA", error=error)
        return {"error": float(f"{error:.2g}")}

    outcomes = {name: try_out(name, call, check) for name, call in calls.items()}
    measure(calls, outcomes, seconds=SECONDS, min_rounds=MIN_ROUNDS)
    for name, outcome in outcomes.items():
        row = {"shape": shape, "version": name, "status": outcome.status, **outcome.facts}
        if outcome.seconds:
            ms = [1e3 * each for each in outcome.seconds]
            figures = {"ms": statistics.median(ms), "least": min(ms), "most": max(ms)}
            row |= {key: round(value, 4) for key, value in figures.items()} | {"timer": outcome.timer}
        yield row | ({"reason": outcome.reason} if outcome.reason else {})


def main(path: Path) -> None:
    with path.open("w") as file:
        for shape in CONFIGURATIONS:
            for row in rows(shape):
                print(json.dumps(row), file=file, flush=True)
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
