"""positional_attention against the eager formula, SDPA and its back ends, torch.compile, FlexAttention.

    python -m pytest benchmarks/bench_positional_attention.py -s --benchmark-json positional_attention.json

On a GPU the paper's shape and its neighbours, in bfloat16 and float16; q, k and v are views of one packed
product. On a CPU smaller batches, in bfloat16 and float32. Every competitor's output and gradients are
checked against float64 before anything is timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from convinit._timing import compiled
from convinit.ops.backends import HAS_TRITON
from convinit.ops.positional_attention import (
    packed_attention,
    positional_attention,
    positional_attention_reference,
)

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
        (32, 8, 256, 32),
        (32, 8, 256, 64),
        (32, 3, 196, 64),
        (8, 6, 576, 64),
        (4, 6, 1024, 64),
    ]
)
DTYPES = [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow) if CUDA else torch.float32]
RIVALS = ["eager", "compiled"] if CUDA else ["eager"]  # compilers take a quarter of a minute a shape: last
ALPHA = 0.4
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def flex(q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    q, k = torch.add(q_pos, q, alpha=ALPHA), torch.add(k_pos, k, alpha=ALPHA)
    return flex_attention(q, k, v).transpose(1, 2).flatten(2)


def flash_attn(q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    q, k = torch.add(q_pos, q, alpha=ALPHA), torch.add(k_pos, k, alpha=ALPHA)
    return flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).flatten(2)


def xformers(q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    q, k = torch.add(q_pos, q, alpha=ALPHA), torch.add(k_pos, k, alpha=ALPHA)
    return memory_efficient_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).flatten(2)


def packed(qkv: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    """What our layers call: the gradient of the packed product is written in place."""
    heads = qkv.shape[3]
    return packed_attention(qkv.flatten(2), heads, q_pos, k_pos, alpha=ALPHA, backend="triton")


def separately(f: Callable[..., Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A function of q, k, v [B, heads, N, r] as one of their packed product [B, N, 3, heads, r]."""
    return lambda qkv, q_pos, k_pos: f(*qkv.permute(2, 0, 3, 1, 4), q_pos, k_pos)


def competitors(rivals: str) -> dict[str, Callable[..., Tensor]]:
    """{name: attention of qkv, q_pos, k_pos}."""
    eager = functools.partial(positional_attention_reference, alpha=ALPHA)
    sdpa = functools.partial(positional_attention, alpha=ALPHA, backend="sdpa")
    found: dict[str, Callable[..., Tensor]] = {"eager": eager, "sdpa": sdpa}
    found["convinit"] = functools.partial(positional_attention, alpha=ALPHA)
    if CUDA and HAS_TRITON:
        found["convinit, triton"] = functools.partial(positional_attention, alpha=ALPHA, backend="triton")
    if rivals == "compiled":
        found["compiled eager"] = functools.partial(compiled(positional_attention_reference), alpha=ALPHA)
        ours = compiled(positional_attention)
        found["compiled sdpa"] = functools.partial(ours, alpha=ALPHA, backend="sdpa")
        found["flex"] = compiled(flex)
    elif CUDA:
        for name, backend in BACKENDS.items():
            found[f"sdpa {name}"] = functools.partial(with_backend, backend, sdpa)
        found |= {"flash-attn": flash_attn, "xformers": xformers}
    whole = {name: separately(f) for name, f in found.items()}
    if CUDA and HAS_TRITON:
        whole["convinit, triton, packed"] = packed
    return whole


def with_backend(backend: SDPBackend, f: functools.partial[Tensor], *inputs: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return f(*inputs)


def bytes_moved(shape: tuple[int, ...], dtype: torch.dtype, backward: bool) -> int:
    """q, k, v in and out; with the backward, these and dout in again, and dq, dk, dv out."""
    batch, heads, tokens, rank = shape
    return (4 + (8 if backward else 0)) * batch * heads * tokens * rank * dtype.itemsize


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rivals", RIVALS)
def bench_positional_attention(compare, rivals, shape, dtype, direction):
    batch, heads, tokens, rank = shape
    backward = direction != "forward"
    device = "cuda" if CUDA else "cpu"
    g = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(batch, tokens, 3, heads, rank, device=device, generator=g).to(dtype)
    pos = torch.randn(2, heads, tokens, rank, device=device, generator=g).to(dtype)
    dout = torch.randn(batch, tokens, heads * rank, device=device, generator=g).to(dtype)

    def run(f, qkv=qkv, pos=pos, dout=dout):
        qkv, pos = (x.detach().requires_grad_(backward) for x in (qkv, pos))
        out = f(qkv, *pos)
        return (out, *torch.autograd.grad(out, (qkv, pos), dout)) if backward else (out,)

    # float64 on a few images; the position terms' gradients then need those images alone.
    few = slice(0, 4)
    eager = separately(functools.partial(positional_attention_reference, alpha=ALPHA))
    exact = run(eager, qkv[few].double(), pos.double(), dout[few].double())

    def errors(f) -> list[float]:
        results = run(f, qkv[few], pos, dout[few])
        return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(results, exact, strict=True)]

    limits = [2 * error + torch.finfo(dtype).eps for error in errors(eager)]
    functions = competitors(rivals)

    def run_or_refuse(name: str) -> tuple[Tensor, ...]:
        try:
            return run(functions[name])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # SDPA back ends and FlexAttention refuse shapes each in their own way
            if name.startswith("convinit"):
                raise
            raise NotImplementedError(str(error)) from None

    def check(name: str, results: tuple[Tensor, ...]) -> dict[str, float]:
        assert all(not x.isnan().any() for x in results), name
        torch.testing.assert_close(results[0][few].double(), exact[0], rtol=5e-2, atol=5e-2)
        found = errors(functions[name])
        assert all(error <= limit for error, limit in zip(found, limits, strict=True)), (name, found, limits)
        return {"error": float(f"{found[0]:.2g}")}

    compare(
        "positional_attention",
        f"{list(shape)}, {direction}",
        {name: functools.partial(run_or_refuse, name) for name in functions},
        baseline="eager",
        check=check,
        dtype=dtype,
        bytes_moved=bytes_moved(shape, dtype, backward),
        flops=(14 if backward else 4) * batch * heads * tokens**2 * rank,  # 2 products forward, 5 backward
    )
