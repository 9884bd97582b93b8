"""Times launch configurations on this GPU and writes those that beat the committed ones.

    python benchmarks/tune_attention.py tuned.json
    CONVINIT_KERNEL_CONFIGS=tuned.json python train.py

Takes about half an hour, most of it in the compiler. The candidates are the committed configuration and its
neighbours: tiles halved and doubled, 4 or 8 warps, pipelined or not. One that does not compile, or needs more
shared memory than there is, is left out; one whose result differs from the committed configuration's is an
error.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
from torch import Tensor

from convinit.kernels import configs, launch
from convinit.kernels.configs import Config

SHAPES = [  # [B, heads, N, r]; each tunes the table's entry that serves it, the first of those that share one
    (512, 8, 256, 64),
    (256, 6, 197, 64),
    (1024, 4, 64, 32),
    (512, 8, 128, 64),
    (128, 6, 576, 64),
]
CLEARLY = 0.97  # of the committed configuration's time: less is noise


def neighbours(config: Config) -> Iterator[Config]:
    yield config
    tiles = itertools.product(*([size // 2, size, size * 2] for size in config[:2]))
    for (BM, BN), warps, stages in itertools.product(tiles, (4, 8), (1, 2)):
        candidate = Config(BM, BN, warps, stages)
        if candidate != config and min(BM, BN) >= 16:
            yield candidate


def calls(shape: tuple[int, ...]) -> dict[str, Callable[[Config], tuple[Tensor, ...]]]:
    """{kernel: a launch of it, given a configuration}."""
    batch, heads, tokens, rank = shape
    q, k, v = torch.randn(batch, tokens, 3, heads, rank, device="cuda").bfloat16().permute(2, 0, 3, 1, 4)
    q_pos, k_pos = torch.randn(2, heads, tokens, rank, device="cuda").bfloat16()
    dout = torch.randn(batch, tokens, heads * rank, device="cuda").bfloat16()
    attention = torch.rand(heads, tokens, tokens, device="cuda").softmax(-1).bfloat16()
    common = (rank**-0.5, 0.4, 0.0)
    out, lse = launch.positional_forward(q, k, v, q_pos, k_pos, None, *common)
    return {
        "forward": lambda c: launch.positional_forward(q, k, v, q_pos, k_pos, None, *common, c),
        "backward": lambda c: launch.positional_backward(
            dout, q, k, v, q_pos, k_pos, out, lse, None, *common, (True,) * 5, c
        ),
        "apply": lambda c: (launch.apply_map(attention, v, c),),
        "map_gradient": lambda c: (launch.map_gradient(dout, v, c),),
    }


def tune(kernel: str, call: Callable[[Config], tuple[Tensor, ...]], committed: Config) -> Config:
    """The fastest candidate, or the committed one if none is clearly faster."""
    expected = call(committed)
    times: dict[Config, float] = {}
    for config in neighbours(committed):
        try:
            results = call(config)
        except triton.TritonError:
            continue
        for a, b in zip(results, expected, strict=True):
            assert (a - b).norm() <= 0.02 * b.norm(), f"{kernel} is wrong with {config}"
        times[config] = triton.testing.do_bench(lambda config=config: call(config), return_mode="median")
    best = min(times, key=times.__getitem__)
    print(f"  {kernel:<13} {times[committed]:.4f} ms {committed} -> {times[best]:.4f} ms {best}", flush=True)
    return best if times[best] < CLEARLY * times[committed] else committed


def main() -> None:
    parser = argparse.ArgumentParser(description="Tune the attention kernels on this GPU.")
    parser.add_argument("file", type=Path, help="written: a JSON list of faster entries")
    file = parser.parse_args().file
    torch.manual_seed(0)
    generation = configs.generation(torch.device("cuda", torch.cuda.current_device()))
    rows, tuned = [], set()
    for shape in SHAPES:
        print(list(shape))
        for kernel, call in calls(shape).items():
            key, committed = configs.entry(kernel, generation, 2, *shape[2:])
            if key in tuned:
                continue
            tuned.add(key)
            best = tune(kernel, call, committed)
            if best != committed:
                rows.append({"generation": generation, "key": key, "config": best})
            file.write_text(
                json.dumps(rows, indent=1) + "\n"
            )  # after each: a run cut short keeps what it found
    print(f"{len(rows)} entries in {file}; put them to use with CONVINIT_KERNEL_CONFIGS={file}")


if __name__ == "__main__":
    main()
