from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

import convinit
from convinit.ops.impulse_conv import impulse_conv, impulse_conv_reference

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
formats = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)
EXTREMES = [[0, 0], [1, -2], [-1, 0], [0, 2], [9, -11], [2**62, -(2**62)], [-(2**63), 2**63 - 1]]
SHAPES = [(2, 5, 4, 6), (1, 4, 1, 7), (3, 9, 8, 1), (2, 3, 1, 1), (1, 1, 5, 5), (2, 70, 8, 8)]


def problem(shape, dtype=torch.float32, *, reach=2, seed=0):
    """x, offsets (some of any size where the reach is None), gain and bias."""
    g = torch.Generator().manual_seed(seed)
    channels = shape[1]
    if reach is None:
        offsets = torch.tensor(EXTREMES).repeat(-(-channels // len(EXTREMES)), 1)[:channels]
    else:
        offsets = torch.randint(-reach, reach + 1, (channels, 2), generator=g)
    x = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
    gain, bias = torch.randn(2, channels, generator=g, dtype=torch.float64).to(dtype)
    return x, offsets, gain, bias


def tolerances(dtype):
    return {"rtol": 2 * torch.finfo(dtype).eps, "atol": 2 * torch.finfo(dtype).eps}


@devices
@formats
@dtypes
@pytest.mark.parametrize("reach", [0, 1, 3, None])
def test_equals_reference(dtype, memory_format, reach, device):
    for shape in SHAPES:
        x, offsets, gain, bias = (y.to(device) for y in problem(shape, dtype, reach=reach))
        x = x.contiguous(memory_format=memory_format)
        for factors in ((None, None), (gain, None), (None, bias), (gain, bias)):
            expected = impulse_conv_reference(x, offsets, *factors)
            actual = impulse_conv(x, offsets, *factors)
            assert (actual.dtype, actual.device) == (x.dtype, x.device)
            assert actual.is_contiguous(memory_format=memory_format)
            torch.testing.assert_close(actual, expected, **tolerances(dtype))
            if factors == (None, None):
                assert torch.equal(actual, expected)


@devices
@formats
def test_is_the_depthwise_convolution(memory_format, device):
    """Sizes beyond a thread's share, against what it stands for."""
    x, offsets, gain, bias = problem((4, 150, 19, 17), torch.float64, reach=2)
    weight = torch.zeros(150, 1, 5, 5, dtype=torch.float64)
    weight[range(150), 0, offsets[:, 0] + 2, offsets[:, 1] + 2] = gain
    expected = F.conv2d(x, weight, bias, padding="same", groups=150)
    x = x.to(device).contiguous(memory_format=memory_format)
    actual = impulse_conv(x, *(y.to(device) for y in (offsets, gain, bias)))
    torch.testing.assert_close(actual.cpu(), expected)


@devices
def test_strided_expanded_and_empty(device):
    x, offsets, gain, bias = (y.to(device) for y in problem((4, 6, 5, 7)))
    views = [
        x.transpose(2, 3),
        x.transpose(0, 1)[:, :4],
        x[:, :, ::2, 1:],
        x[1:, 2:],
        x[:1].expand(3, -1, -1, -1),
        x[:, :1].expand(-1, 6, -1, -1),
        x.contiguous(memory_format=torch.channels_last)[1:3],
        x.contiguous(memory_format=torch.channels_last)[:, 1:],
        x[:0],
        x[:, :, :0],
        x[:, :0],
    ]
    for view in views:
        channels = view.shape[1]
        arguments = (offsets[:channels], gain[:channels], bias[:channels])
        expected = impulse_conv_reference(view.contiguous(), *arguments)
        torch.testing.assert_close(impulse_conv(view, *arguments), expected)
    two = torch.stack([offsets[:, 1], offsets[:, 0]], dim=1).flip(1).T.contiguous().T
    assert not two.is_contiguous()
    expected = impulse_conv_reference(x, offsets, gain, bias)
    torch.testing.assert_close(impulse_conv(x, two.int(), gain, bias), expected)


@devices
def test_values_that_are_not_finite_stay_where_they_are(device):
    x = torch.zeros(1, 1, 3, 3, device=device)
    x[0, 0, 1, 1], x[0, 0, 0, 0] = torch.nan, torch.inf
    for dtype in DTYPES:
        out = impulse_conv(x.to(dtype), torch.tensor([[0, 1]], device=device), torch.ones(1, device=device))
        assert out[0, 0].isnan().nonzero().tolist() == [[1, 0]]
        assert out[0, 0].isinf().sum() == 0
        out = impulse_conv(x.to(dtype), torch.tensor([[-1, 0]], device=device), -torch.ones(1, device=device))
        assert out[0, 0, 1, 0] == -torch.inf and out[0, 0, 2, 1].isnan() and out.isfinite().sum() == 7


@devices
def test_rounds_to_nearest_even(device):
    """Every bfloat16 and float16, times a number that takes them past both ends."""
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        x = x.to(device).view(1, 1, 256, 256)
        for factor in (1.0, 0.37, 3e-3, 70.0):
            gain = torch.tensor([factor], device=device)
            actual = impulse_conv(x, torch.zeros(1, 2, dtype=torch.int64, device=device), gain)
            expected = (x.float() * gain).to(dtype)
            assert torch.equal(actual.nan_to_num(7), expected.nan_to_num(7))
            assert torch.equal(actual.isnan(), expected.isnan())


@formats
def test_gradients(memory_format):
    x, offsets, gain, bias = problem((2, 5, 3, 4), torch.float64, reach=2)
    x = x.contiguous(memory_format=memory_format)
    inputs = [y.requires_grad_() for y in (x, gain, bias)]
    assert torch.autograd.gradcheck(lambda x, g, b: impulse_conv(x, offsets, g, b), inputs)
    assert torch.autograd.gradgradcheck(lambda x, g, b: impulse_conv(x, offsets, g, b), inputs)
    assert torch.autograd.gradcheck(lambda x: impulse_conv(x, torch.tensor(EXTREMES[:5])), [x])


def test_forward_mode_derivatives():
    """Of the op, and of a layer of frozen impulse filters in its input and in its weight."""
    x, offsets, gain, bias = problem((2, 5, 3, 4), torch.float64)
    tangents = [torch.randn_like(y) for y in (x, gain, bias)]
    layer = convinit.nn.SpatialConv(5, 3, method="impulse", trainable=False, dtype=torch.float64)
    weight, dw = layer.weight.detach(), torch.randn_like(layer.weight)
    with forward_ad.dual_level():
        dx, dg, db = (forward_ad.make_dual(y, t) for y, t in zip((x, gain, bias), tangents, strict=True))
        found = forward_ad.unpack_dual(impulse_conv(dx, offsets, dg, db)).tangent
        through = forward_ad.unpack_dual(layer(dx)).tangent
        dual = {"weight": forward_ad.make_dual(weight, dw)}
        of_weight = forward_ad.unpack_dual(torch.func.functional_call(layer, dual, (x,))).tangent
    expected = impulse_conv_reference(tangents[0], offsets, gain, tangents[2])
    torch.testing.assert_close(found, expected + impulse_conv_reference(x, offsets, tangents[1]))
    torch.testing.assert_close(through, F.conv2d(tangents[0], weight, padding="same", groups=5))
    torch.testing.assert_close(of_weight, F.conv2d(x, dw, padding="same", groups=5))


def test_only_the_gradients_asked_for():
    x, offsets, gain, bias = problem((2, 5, 3, 4))
    saved = []
    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        out = impulse_conv(x, offsets, gain, bias)
    assert x.shape not in saved
    out.sum().backward()
    assert x.grad is not None and gain.grad is None and bias.grad is None
    bias.requires_grad_()
    impulse_conv(x.detach(), offsets, gain, bias).sum().backward()
    torch.testing.assert_close(bias.grad, torch.full((5,), 24.0))


def test_gradients_of_gain_and_bias_have_their_dtypes():
    x, offsets, gain, bias = problem((2, 5, 3, 4), torch.bfloat16)
    gain, bias = gain.float().requires_grad_(), bias.float().requires_grad_()
    out = impulse_conv(x.requires_grad_(), offsets, gain, bias)
    out.sum().backward()
    assert (out.dtype, x.grad.dtype, gain.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


@devices
def test_opcheck(device):
    op = torch.ops.convinit.impulse_conv.default
    for shape in ((2, 5, 3, 4), (2, 5, 1, 1), (1, 1, 3, 3), (0, 5, 3, 4)):
        x, offsets, gain, bias = (y.to(device) for y in problem(shape))
        last = x.contiguous(memory_format=torch.channels_last)
        for y in (x, last, x.transpose(2, 3), x.clone().requires_grad_()):
            torch.library.opcheck(op, (y, offsets, gain, bias))
        gain.requires_grad_(), bias.requires_grad_()
        torch.library.opcheck(op, (x, offsets, gain, bias))
        torch.library.opcheck(op, (last, offsets, None, None))


@devices
def test_compiles_without_graph_breaks(device):
    compiled = torch.compile(impulse_conv, fullgraph=True, backend="aot_eager")
    arguments = [y.to(device) for y in problem((2, 5, 3, 4))]
    for y in (arguments[0], arguments[0].contiguous(memory_format=torch.channels_last)):
        y = y.clone().requires_grad_()
        out = compiled(y, *arguments[1:])
        torch.testing.assert_close(out, impulse_conv(y, *arguments[1:]))
        (grad,) = torch.autograd.grad(out.sum(), y)
        torch.testing.assert_close(grad, torch.autograd.grad(impulse_conv(y, *arguments[1:]).sum(), y)[0])


@devices
def test_autocast_is_that_of_conv2d(device):
    x, offsets, gain, bias = (y.to(device) for y in problem((2, 5, 3, 4)))
    with torch.autocast(device, dtype=torch.bfloat16):
        assert F.conv2d(x, torch.ones(5, 1, 1, 1, device=device), groups=5).dtype == torch.bfloat16
        assert impulse_conv(x, offsets, gain, bias).dtype == torch.bfloat16
        assert impulse_conv(x.double(), offsets).dtype == torch.float64


def test_meta_device():
    x, offsets, gain, bias = (y.to("meta") for y in problem((2, 5, 3, 4)))
    assert impulse_conv(x, offsets, gain, bias).shape == (2, 5, 3, 4)


@pytest.mark.gpu
def test_cuda_graph_reads_what_lies_there_then():
    x, offsets, gain, bias = (y.cuda() for y in problem((2, 6, 5, 7)))
    impulse_conv(x, offsets, gain, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = impulse_conv(x, offsets, gain, bias)
    offsets.neg_()
    gain.mul_(2)
    graph.replay()
    torch.testing.assert_close(out, impulse_conv_reference(x, offsets, gain, bias))


X = torch.zeros(2, 3, 4, 5)
OFFSETS = torch.zeros(3, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], OFFSETS), TypeError, "x must be a floating-point tensor"),
        ((X.int(), OFFSETS), TypeError, "x must be a floating.*float64.*got torch.int32"),
        ((X[0], OFFSETS), ValueError, r"x must be \[B, C, H, W\], got \[3, 4, 5\]"),
        ((X, OFFSETS.float()), TypeError, "offsets must be an integer tensor"),
        ((X, OFFSETS[:2]), ValueError, r"offsets must be \[C, 2\] = \[3, 2\].*got \[2, 2\]"),
        ((X, OFFSETS, torch.ones(2)), ValueError, r"gain must be \[C\] = \[3\], got \[2\]"),
        ((X, OFFSETS, 2.0), TypeError, "gain must be a floating-point tensor.*got 2.0 of type float"),
        ((X, OFFSETS, None, torch.ones(3, 1)), ValueError, r"bias must be \[C\] = \[3\], got \[3, 1\]"),
        ((X, OFFSETS, None, torch.ones(3).int()), TypeError, "bias must be.*got torch.int32"),
        ((X, OFFSETS.to("meta")), ValueError, "offsets must be on the device of x, cpu, got meta"),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        convinit.impulse_conv(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        (X[0], OFFSETS, None, None),
        (X, OFFSETS[:2], None, None),
        (X, OFFSETS.int(), None, None),
        (X, OFFSETS, torch.ones(2), None),
        (X, OFFSETS, None, torch.ones(4)),
        (X.to(torch.complex64), OFFSETS, None, None),
        (torch.zeros(1, 1, 1, 1).expand(1, 3, 2**16, 2**16), OFFSETS, None, None),
    ],
)
@devices
def test_the_bare_op_refuses_what_would_corrupt_memory(arguments, device):
    if arguments[0].numel() < 2**30:
        arguments = [y if y is None else y.to(device) for y in arguments]
    with pytest.raises(RuntimeError, match="convinit: "):
        torch.ops.convinit.impulse_conv(*arguments)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_transforms_of_torch_func(memory_format, generator):
    x = torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=memory_format)
    gain = torch.randn(3, generator=generator)

    def f(x, gain):
        return impulse_conv(x, OFFSETS, gain).sin().sum()

    inputs = [x.clone().requires_grad_(), gain.clone().requires_grad_()]
    dx, dgain = torch.autograd.grad(f(*inputs), inputs)
    torch.testing.assert_close(torch.func.grad(f)(x, gain), dx)
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(jacobian(f, 1)(x, gain), dgain)
    each = torch.func.vmap(torch.func.grad(lambda x: f(x[None], gain)))(x)
    torch.testing.assert_close(each, dx)
    hessian = torch.func.hessian(f, 1)(x, gain)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(lambda g: f(x, g), gain))
