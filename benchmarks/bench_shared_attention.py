"""shared_attention against the eager formula, SDPA, torch.compile and the tall product.

    python -m pytest benchmarks/bench_shared_attention.py -s --benchmark-json shared_attention.json

On a GPU the paper's shape and its neighbours, in bfloat16 and float16; v is a view of [B, N, heads·r].
On a CPU smaller batches in float32 and bfloat16. Every competitor's output and gradients are checked
against float64 first.
"""

from __future__ import annotations

import functools

import pytest
import torch
from timing import compiled
from torch import Tensor

from convinit.ops.fused import HAS_TRITON
from convinit.ops.shared_attention import shared_attention, shared_attention_reference

CUDA = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu] if CUDA else []
SHAPES = (  # [B, heads, N, r]
    [
        (512, 8, 256, 64),  # the paper
        *(
            pytest.param(shape, marks=pytest.mark.slow)  # a quarter of an hour, most of it in compilers
            for shape in [
                (256, 3, 196, 64),
                (256, 3, 197, 64),
                (256, 6, 196, 64),
                (256, 12, 197, 64),
                (1024, 4, 64, 32),
                (128, 6, 576, 64),
            ]
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


def head_by_head(q_map: Tensor, k_map: Tensor, v: Tensor) -> Tensor:
    """A batched product a head with a stride of 0 for the map: PyTorch's way without copies of v."""
    attention = (q_map.shape[-1] ** -0.5 * q_map @ k_map.mT).softmax(-1)
    batch = v.shape[0]
    outs = [torch.bmm(attention[h].expand(batch, -1, -1), v[:, h]) for h in range(v.shape[1])]
    return torch.cat(outs, -1)


def tall_product(q_map: Tensor, k_map: Tensor, v: Tensor) -> Tensor:
    """The images' values side by side, one product a head: two copies, and the fewest products."""
    attention = (q_map.shape[-1] ** -0.5 * q_map @ k_map.mT).softmax(-1)
    batch, heads, tokens, rank = v.shape
    columns = v.permute(1, 2, 0, 3).reshape(heads, tokens, batch * rank)
    out = torch.bmm(attention, columns).view(heads, tokens, batch, rank)
    return out.permute(2, 1, 0, 3).reshape(batch, tokens, heads * rank)


def competitors() -> dict[str, functools.partial[Tensor]]:
    """{name: attention of q_map, k_map, v}."""
    found = {
        "eager": functools.partial(shared_attention_reference),
        "sdpa": functools.partial(shared_attention, backend="sdpa"),
        "convinit": functools.partial(shared_attention, backend="auto"),
        "head by head": functools.partial(head_by_head),
        "tall product": functools.partial(tall_product),
    }
    if CUDA:
        found["compiled eager"] = functools.partial(compiled(shared_attention_reference))
        found["convinit, compiled"] = functools.partial(compiled(shared_attention), backend="auto")
        if HAS_TRITON:
            found["convinit, triton"] = functools.partial(shared_attention, backend="triton")
    return found


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16 if CUDA else torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_shared_attention(compare, shape, dtype, direction):
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
    functions = competitors()

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
