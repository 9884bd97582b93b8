"""impulse_conv against PyTorch's depthwise convolution with the same filters, in both memory formats.

    python -m pytest benchmarks/bench_impulse_conv.py -s --benchmark-json impulse_conv.json

The gradient is that of x alone, as with frozen filters. The whole ConvMixer is in bench_models.py.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from convinit import impulse_conv, sample_offsets
from convinit.ops.impulse_conv import impulse_conv_reference

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SHAPES = [(32, 512, 16, 16), (8, 256, 32, 32)]  # [B, C, H, W]; the first is ConvMixer's


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def there(benchmark):
    """Where there is a GPU it belongs to the GPU's part of a suite."""
    return pytest.mark.gpu(benchmark) if CUDA else benchmark


@there
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_impulse_conv(compare, shape, dtype, direction):
    channels, backward = shape[1], direction != "forward"
    g = torch.Generator().manual_seed(0)
    offsets = sample_offsets(channels, 5, generator=g)
    gain, bias = torch.randn(2, channels, generator=g).to(dtype)
    weight = torch.zeros(channels, 1, 5, 5, dtype=dtype)
    weight[range(channels), 0, offsets[:, 0] + 2, offsets[:, 1] + 2] = gain
    x, dout = torch.randn(2, *shape, generator=g).to(dtype).to(DEVICE)
    offsets, gain, bias, weight = (y.to(DEVICE) for y in (offsets, gain, bias, weight))

    def run(f, x, dout):
        x = x.detach().requires_grad_(backward)
        out = f(x)
        return (out, *torch.autograd.grad(out, x, dout)) if backward else (out,)

    def shift(x: Tensor) -> Tensor:
        return impulse_conv(x, offsets, gain, bias)

    def conv(x: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, padding="same", groups=channels)

    expected = run(lambda x: impulse_conv_reference(x, offsets, gain, bias), x, dout)

    def check(name: str, results: tuple[Tensor, ...]) -> None:
        for actual, exact in zip(results, expected, strict=True):
            limit = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(actual.contiguous(), exact, rtol=limit, atol=limit)

    compare(
        "impulse_conv",
        f"{list(shape)}, {direction}, {DEVICE}",
        {
            "conv2d": functools.partial(run, conv, x, dout),
            "conv2d, channels_last": functools.partial(run, conv, last(x), last(dout)),
            "convinit": functools.partial(run, shift, x, dout),
            "convinit, channels_last": functools.partial(run, shift, last(x), last(dout)),
        },
        baseline="conv2d, channels_last",
        check=check,
        dtype=dtype,
        bytes_moved=2 * (1 + backward) * x.nbytes,  # x in, the result out; dout in, dx out
    )
