"""The linear layers of our models against F.linear: forward, and with its three gradients.

    python -m pytest benchmarks/bench_linear.py -s --benchmark-json linear.json

Only on CPUs that it treats in a way of its own. The shapes are those of Model I, of the demo's ViT, and such
as lie at the edge of what it takes; what it leaves to F.linear is even.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from convinit.nn._linear import linear
from convinit.ops.cpu_products import MKL_USES_HALF_VECTORS

pytestmark = pytest.mark.skipif(
    not MKL_USES_HALF_VECTORS, reason="MKL multiplies at this CPU's full rate: linear is F.linear"
)
SHAPES = [  # rows, in, out
    (4096, 512, 1536),
    (4096, 512, 512),
    (4096, 64, 192),
    (4096, 64, 64),
    (4096, 12, 512),
    (4096, 512, 16),
    (256, 512, 1024),
    (64, 512, 512),
    (64, 512, 10),
]


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_linear(compare, shape, direction):
    rows, inputs, outputs = shape
    backward = direction != "forward"
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, inputs, generator=g), torch.randn(outputs, inputs, generator=g)
    bias, dout = torch.randn(outputs, generator=g), torch.randn(rows, outputs, generator=g)

    def run(f, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        tensors = [t.to(dtype).detach().requires_grad_(backward) for t in (x, weight, bias)]
        out = f(*tensors)
        return (out, *torch.autograd.grad(out, tensors, dout.to(dtype))) if backward else (out,)

    exact = run(F.linear, torch.float64)

    def errors(results: tuple[Tensor, ...]) -> list[float]:
        return [((a - b).norm() / b.norm()).item() for a, b in zip(results, exact, strict=True)]

    limits = [4 * error + torch.finfo(torch.float32).eps for error in errors(run(F.linear))]

    def check(name: str, results: tuple[Tensor, ...]) -> dict[str, float]:
        found = errors(results)
        assert all(error <= limit for error, limit in zip(found, limits, strict=True)), (name, found, limits)
        return {"error": float(f"{max(found):.2g}")}

    compare(
        "linear",
        f"{list(shape)}, {direction}",
        {"F.linear": functools.partial(run, F.linear), "convinit": functools.partial(run, linear)},
        baseline="F.linear",
        check=check,
        dtype=torch.float32,
        flops=(3 if backward else 1) * 2 * rows * inputs * outputs,
    )
