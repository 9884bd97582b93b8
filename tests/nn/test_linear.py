"""The linear layers of our models, by either of its products, against `nn.Linear`."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convinit.models import SimpleViT
from convinit.nn import _linear as module
from convinit.nn._linear import Linear, linear


@pytest.fixture
def convolves(monkeypatch):
    """Takes the convolution on any CPU and in any size; a list that grows with every one."""
    monkeypatch.setattr(module, "MKL_USES_HALF_VECTORS", True)
    monkeypatch.setattr(module, "_worthwhile", lambda rows, outputs, inputs: rows > 0)
    taken, conv2d = [], F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *args: taken.append(True) or conv2d(*args))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield taken
    torch.set_num_threads(threads)


def pair(inputs, outputs, bias=True, dtype=None):
    """Ours and PyTorch's with the same parameters."""
    ours, theirs = Linear(inputs, outputs, bias, dtype=dtype), nn.Linear(inputs, outputs, bias, dtype=dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def results(layer, x, dout):
    x = x.detach().requires_grad_()
    out = layer(x)
    return (out, *torch.autograd.grad(out, (x, *layer.parameters()), dout))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (3, 5, 7), (2, 3, 5, 7), (1, 1, 7), (2, 20_000, 7)])
@pytest.mark.parametrize("outputs", [1, 12])
def test_values_and_gradients(convolves, shape, outputs, bias):
    ours, theirs = pair(7, outputs, bias)
    x, dout = torch.randn(shape), 1 + torch.randn(*shape[:-1], outputs)
    exact = results(copy.deepcopy(theirs).double(), x.double(), dout.double())
    for a, b, c in zip(results(ours, x, dout), results(theirs, x, dout), exact, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape) and a.is_contiguous() == b.is_contiguous()
        assert (a - c).norm() <= 2 * (b - c).norm() + 2 * torch.finfo(torch.float32).eps * c.norm()
    assert convolves


def test_one_input(convolves):
    ours, theirs = pair(1, 3)
    x = torch.randn(4, 6, 1)
    torch.testing.assert_close(ours(x), theirs(x))
    assert convolves


def test_strided_and_expanded_inputs(convolves):
    ours, theirs = pair(8, 5)
    x = torch.randn(4, 8, 6)
    for view in (x.mT, x.mT[:, ::2], x[:1].mT.expand(4, 6, 8), x.permute(2, 0, 1)):
        torch.testing.assert_close(ours(view), theirs(view))
    assert len(convolves) == 4


def test_second_derivatives_and_frozen_weights(convolves):
    ours, theirs = pair(4, 3)

    def second(layer):
        x = torch.linspace(-1, 1, 8).view(2, 4).requires_grad_()
        (first,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.sum(), (x, *layer.parameters()))

    for a, b in zip(second(ours), second(theirs), strict=True):
        torch.testing.assert_close(a, b)
    assert len(convolves) == 1
    ours.requires_grad_(False)
    x = torch.randn(2, 4, requires_grad=True)
    ours(x).sum().backward()
    assert x.grad is not None and ours.weight.grad is None


def test_everything_else_is_torch_s(convolves):
    layer = Linear(4, 3)
    x = torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer.double()(x.double()).dtype == torch.float64
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    layer.float()
    assert linear(torch.zeros(0, 4), layer.weight).shape == (0, 3)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        layer(torch.randn(2, 5))
    assert torch.func.vmap(layer)(torch.randn(5, 2, 4)).shape == (5, 2, 3)
    exported = torch.export.export(layer, (x,))
    assert not any("conv" in str(node.target) for node in exported.graph.nodes)
    assert torch.fx.symbolic_trace(layer)(x).shape == (2, 3)
    ragged = torch.nested.nested_tensor([x, x[:1]], layout=torch.jagged)
    assert layer(ragged).is_nested
    with torch.backends.mkldnn.flags(enabled=False):
        layer(x)
    assert not convolves


def test_one_thread_is_torch_s(convolves):
    torch.set_num_threads(1)  # the fixture restores it
    Linear(4, 3)(torch.randn(2, 4))
    assert not convolves


@pytest.mark.parametrize("change", [("MKL_USES_HALF_VECTORS", False), ("float32_is_exact", lambda: False)])
def test_other_cpus_and_precisions_are_torch_s(convolves, monkeypatch, change):
    monkeypatch.setattr(module, *change)
    Linear(4, 3)(torch.randn(2, 4))
    assert not convolves


def test_small_and_narrow_products_are_torch_s():
    worthwhile = module._worthwhile
    assert worthwhile(4096, 64, 64) and worthwhile(4096, 16, 512) and worthwhile(64, 512, 512)
    assert not worthwhile(4095, 64, 64) and not worthwhile(63, 2048, 2048) and not worthwhile(16384, 4, 512)
    assert not worthwhile(65536, 16, 16)


def test_lower_precision_is_left_to_torch():
    before = torch.backends.mkldnn.matmul.fp32_precision
    assert module.float32_is_exact()
    try:
        torch.set_float32_matmul_precision("medium")
        assert not module.float32_is_exact()
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.mkldnn.matmul.fp32_precision = before


def test_compiles_into_one_graph(convolves):
    layer, x = Linear(4, 3), torch.randn(2, 5, 4)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return aot_eager(graph, inputs)

    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    dout = torch.randn(2, 5, 3)
    for a, b in zip(results(compiled, x, dout), results(layer, x, dout), strict=True):
        torch.testing.assert_close(a, b)
    assert len(graphs) == 1 and "conv2d" in graphs[0]


def test_it_is_an_nn_linear():
    layer = pickle.loads(pickle.dumps(copy.deepcopy(Linear(4, 3))))
    assert isinstance(layer, nn.Linear) and set(layer.state_dict()) == {"weight", "bias"}
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(True))
    layer(torch.zeros(1, 4))
    assert calls


def test_the_models_use_it(convolves):
    model = SimpleViT(8, 2, 3, dim=16, depth=1, num_heads=2, head_dim=8, mlp_dim=16, method="random")
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert all(type(layer) is Linear for layer in layers)
    images = torch.randn(2, 3, 8, 8)
    ours = model(images)
    assert len(convolves) == len(layers) + 1  # and the position embedding's projection
    convolves.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MKL_USES_HALF_VECTORS", False)
        torch.testing.assert_close(model(images), ours)
    assert not convolves
