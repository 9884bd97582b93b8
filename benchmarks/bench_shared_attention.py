"""shared_attention against the eager formula, SDPA, torch.compile and the tall product.

    python -m pytest benchmarks/bench_shared_attention.py -s --benchmark-json shared_attention.json

On a GPU the paper's shape and its neighbours, in bfloat16 and float16; v is a view of [B, N, heads·r].
On a CPU smaller batches in float32 and bfloat16. Every competitor's output and gradients are checked
against float64 first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from convinit._timing import compiled
from convinit.ops.backends import HAS_TRITON
from convinit.ops.shared_attention import shared_attention, shared_attention_reference

CUDA = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu] if CUDA else []
SHAPES = (  # [B, heads, N, r]
    [
        (512, 8, 256, 64),  # the paper
        (256, 3, 196, 64),  # ViT-Ti/16
        (1024, 4, 64, 32),
        (128, 6, 576, 64),
        *(
            pytest.param(shape, marks=pytest.mark.slow)
            for shape in [(256, 12, 197, 64), (256, 8, 256, 128), (32, 6, 1024, 64)]
        ),
    ]
    if CUDA
    else [
        pytest.param((8, 4, 64, 32), marks=pytest.mark.quick),
        (32, 8, 256, 64),
        (32, 3, 196, 64),
        (8, 6, 576, 64),
        (4, 6, 1024, 64),
    ]
)
DTYPES = [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow) if CUDA else torch.float32]
RIVALS = ["eager", "compiled"] if CUDA else ["eager"]  # compilers take a quarter of a minute a shape: last


class HeadByHead(torch.autograd.Function):
    """A batched product a head, with a stride of 0 for the map and written in place: without copies of v."""

    @staticmethod
    def apply_map(attention: Tensor, v: Tensor) -> Tensor:
        batch, heads, tokens, rank = v.shape
        out = v.new_empty(batch, tokens, heads, rank)
        for h in range(heads):
            torch.bmm(attention[h].expand(batch, -1, -1), v[:, h], out=out[:, :, h])
        return out.flatten(2)

    @staticmethod
    def forward(ctx: Any, attention: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(attention, v)
        return HeadByHead.apply_map(attention, v)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
        attention, v = ctx.saved_tensors
        heads = v.shape[1]
        douts = dout.unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, heads, N, r]
        rows, columns = (x.permute(1, 2, 0, 3).flatten(2) for x in (douts, v))  # [heads, N, B·r]
        dv = HeadByHead.apply_map(attention.mT, douts)
        return rows @ columns.mT, dv.unflatten(-1, (heads, -1)).transpose(1, 2)


def head_by_head(q_map: Tensor, k_map: Tensor, v: Tensor) -> Tensor:
    attention = (q_map.shape[-1] ** -0.5 * q_map @ k_map.mT).softmax(-1)
    return HeadByHead.apply(attention, v)


def tall_product(q_map: Tensor, k_map: Tensor, v: Tensor) -> Tensor:
    """The images' values side by side, one product a head: two copies, and the fewest products."""
    attention = (q_map.shape[-1] ** -0.5 * q_map @ k_map.mT).softmax(-1)
    batch, heads, tokens, rank = v.shape
    columns = v.permute(1, 2, 0, 3).reshape(heads, tokens, batch * rank)
    out = torch.bmm(attention, columns).view(heads, tokens, batch, rank)
    return out.permute(2, 1, 0, 3).reshape(batch, tokens, heads * rank)


def competitors(rivals: str) -> dict[str, Callable[..., Tensor]]:
    """{name: attention of q_map, k_map, v}."""
    found: dict[str, Callable[..., Tensor]] = {"eager": shared_attention_reference}
    found["convinit"] = functools.partial(shared_attention, backend="auto")
    if CUDA and HAS_TRITON:
        found["convinit, triton"] = functools.partial(shared_attention, backend="triton")
    if rivals == "compiled":
        found["compiled eager"] = compiled(shared_attention_reference)
        found["convinit, compiled"] = functools.partial(compiled(shared_attention), backend="auto")
        found["compiled tall product"] = compiled(tall_product)
    else:
        found["sdpa"] = functools.partial(shared_attention, backend="sdpa")
        found |= {"head by head": head_by_head, "tall product": tall_product}
    return found


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rivals", RIVALS)
def bench_shared_attention(compare, rivals, shape, dtype, direction):
    batch, heads, tokens, rank = shape
    backward = direction != "forward"
    device = "cuda" if CUDA else "cpu"
    g = torch.Generator(device).manual_seed(0)
    x = torch.randn(batch, tokens, heads * rank, device=device, generator=g).to(dtype)
    maps = torch.randn(2, heads, tokens, rank, device=device, generator=g).to(dtype)
    dout = torch.randn(batch, tokens, heads * rank, device=device, generator=g).to(dtype)

    def run(f, x=x, maps=maps, dout=dout):
        x, maps = (y.detach().requires_grad_(backward) for y in (x, maps))
        out = f(*maps, x.unflatten(-1, (heads, rank)).transpose(1, 2))
        return (out, *torch.autograd.grad(out, (x, maps), dout)) if backward else (out,)

    few = slice(0, 4)
    exact = run(shared_attention_reference, x[few].double(), maps.double(), dout[few].double())

    def errors(f) -> list[float]:
        results = run(f, x[few], maps, dout[few])
        return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(results, exact, strict=True)]

    limits = [2 * error + torch.finfo(dtype).eps for error in errors(shared_attention_reference)]
    functions = competitors(rivals)

    def check(name: str, results: tuple[Tensor, ...]) -> dict[str, float]:
        assert all(not y.isnan().any() for y in results), name
        torch.testing.assert_close(results[0][few].double(), exact[0], rtol=5e-2, atol=5e-2)
        found = errors(functions[name])
        assert all(error <= limit for error, limit in zip(found, limits, strict=True)), (name, found, limits)
        return {"error": float(f"{found[0]:.2g}")}

    # v in and out; with the backward, dout in twice, v in again and dv out.
    moved = (2 + (4 if backward else 0)) * x.numel() * dtype.itemsize
    products = 2 * heads * tokens**2 * rank * (batch + 1)  # one of an image's values, and the map's
    compare(
        "shared_attention",
        f"{list(shape)}, {direction}",
        {name: functools.partial(run, f) for name, f in functions.items()},
        baseline="eager",
        check=check,
        dtype=dtype,
        bytes_moved=moved,
        flops=(3 if backward else 1) * products,
    )
