"""Times launch configurations of the positional forward on the GPU at hand, beside PyTorch's attention.

    python benchmarks/forward_configurations.py rows.jsonl

One line a shape and version: [B, heads, N, r], the configuration (BM, BN, warps, stages, programs) with the
blocks of keys it makes, or "SDPA", which mixes content and position in eager PyTorch first; GPU milliseconds
(median, least and most of the rounds, versions taking turns, replays of a CUDA graph); and the relative error
against float64, which no version may have more than twice as large as SDPA's. bfloat16, both position terms.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from convinit.kernels import configs, launch
from convinit.kernels.configs import Config

ROUNDS, CALLS, FEW = 10, 5, 4
SCALE, ALPHA = 0.125, 0.4

SHAPES: dict[tuple[int, int, int, int], list[Config]] = {
    (1024, 6, 65, 64): [Config(64, 64, 4, 1, 4), Config(64, 64, 4, 2, 4)],
    (512, 6, 100, 64): [Config(64, 64, 4, 1, 3), Config(64, 64, 4, 2, 3)],
    (512, 6, 144, 64): [Config(64, 128, 4, 1, 3), Config(64, 128, 4, 2, 3)],
    (256, 3, 196, 64): [Config(64, 128, 4, 1, 3), Config(64, 128, 4, 2, 2)],
    (256, 12, 197, 64): [Config(64, 128, 4, 1, 3), Config(64, 128, 4, 2, 2)],
    (256, 6, 225, 64): [Config(64, 128, 4, 1, 2), Config(64, 128, 4, 2, 2), Config(64, 256, 4, 2, 2)],
    (512, 8, 256, 64): [Config(64, 128, 4, 1, 3), Config(64, 128, 4, 2, 2)],
    (256, 12, 257, 64): [Config(64, 256, 4, 1, 2), Config(64, 256, 4, 2, 2)],
    (1024, 4, 65, 32): [Config(64, 64, 4, 1, 7), Config(64, 64, 4, 2, 6)],
    (256, 12, 197, 32): [Config(64, 128, 4, 1, 4), Config(64, 128, 4, 2, 3)],
    (256, 16, 256, 32): [Config(64, 128, 4, 1, 4), Config(64, 128, 4, 2, 4)],
    (256, 6, 197, 128): [Config(64, 128, 4, 1), Config(128, 128, 8, 1), Config(128, 128, 8, 2)],
}


def draw(shape: tuple[int, int, int, int]) -> tuple[Tensor, ...]:
    """q, k, v [B, heads, N, r], views of a packed product, and q_pos, k_pos [heads, N, r]."""
    batch, heads, tokens, rank = shape
    generator = torch.Generator("cuda").manual_seed(0)
    options = {"device": "cuda", "dtype": torch.bfloat16, "generator": generator}
    packed = torch.randn(batch, tokens, 3, heads, rank, **options)
    positions = torch.randn(2, heads, tokens, rank, **options)
    return (*packed.permute(2, 0, 3, 1, 4).unbind(), *positions.unbind())


def sdpa(q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    q, k = ALPHA * q + q_pos, ALPHA * k + k_pos
    return F.scaled_dot_product_attention(q, k, v, scale=SCALE).transpose(1, 2).flatten(2)


def versions(shape: tuple[int, int, int, int]) -> dict[str, Callable[..., Tensor]]:
    batch, heads, tokens, rank = shape
    table = configs.lookup("forward", configs.generation(torch.device("cuda")), 2, tokens, rank)
    assert table is not None

    def ours(config: Config) -> Callable[..., Tensor]:
        return lambda *inputs: launch.positional_forward(*inputs, SCALE, ALPHA, {"forward": config})[0]

    named = {
        f"{tuple(c)} {configs.key_blocks(tokens, c.BN, 2)}": ours(c) for c in SHAPES[shape] if c != table
    }
    return {
        f"table: {tuple(table)} {configs.key_blocks(tokens, table.BN, 2)}": ours(table),
        **named,
        "SDPA": sdpa,
    }


def compile_all(shape: tuple[int, int, int, int]) -> None:
    inputs = [each[:1] if each.dim() == 4 else each for each in draw((2, *shape[1:]))]
    for run in versions(shape).values():
        run(*inputs)


def errors(shape: tuple[int, int, int, int], inputs: tuple[Tensor, ...]) -> dict[str, float]:
    few = [each[:FEW] if each.dim() == 4 else each for each in inputs]
    q, k, v, q_pos, k_pos = (each.double() for each in few)
    map_ = (SCALE * (ALPHA * q + q_pos) @ (ALPHA * k + k_pos).mT).softmax(-1)
    exact = (map_ @ v).transpose(1, 2).flatten(2)
    found = {}
    for name, run in versions(shape).items():
        out = run(*inputs)
        assert out.isfinite().all(), (shape, name)
        found[name] = ((out[:FEW] - exact).norm() / exact.norm()).item()
    return found


def graph_of(run: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> torch.cuda.CUDAGraph:
    run(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            run(*inputs)
    return graph


def milliseconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / CALLS


@torch.no_grad()
def main(path: Path) -> None:
    with ProcessPoolExecutor(12, mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_all, SHAPES))
    with path.open("w") as file:
        for shape in SHAPES:
            inputs = draw(shape)
            error = errors(shape, inputs)
            assert all(each <= 2 * error["SDPA"] for each in error.values()), (shape, error)
            graphs = {name: graph_of(run, inputs) for name, run in versions(shape).items()}
            rounds = [{name: milliseconds(graph) for name, graph in graphs.items()} for _ in range(ROUNDS)]
            for name in graphs:
                times = [each[name] for each in rounds]
                row = {
                    "shape": shape, "version": name, "ms": round(statistics.median(times), 4),
                    "least": round(min(times), 4), "most": round(max(times), 4),
                    "error": float(f"{error[name]:.2g}"),
                }  # fmt: skip
                print(json.dumps(row), file=file, flush=True)
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
