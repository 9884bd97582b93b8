"""The fused ops as torch sees them: schema, autograd, fake kernels, compilation. No Triton.

On a CPU they run compiled kernels, which have no float64; there the formula stands in for them.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from convinit.kernels.tensor_views import image_gradient
from convinit.nn.attention import ConvInitAttention
from convinit.ops import backends, map_op, native, positional_op
from convinit.ops.positional_attention import (
    packed_attention,
    positional_attention,
    positional_attention_reference,
)
from convinit.ops.shared_attention import shared_attention, shared_attention_reference


def packed(batch=2, heads=2, tokens=5, rank=4, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, tokens, 3, heads, rank, generator=g, dtype=torch.float64).to(dtype)
    pos = torch.randn(2, heads, tokens, rank, generator=g, dtype=torch.float64).to(dtype)
    return qkv.requires_grad_(), pos.requires_grad_()


def mixed(q, k, v, q_pos, k_pos, alpha):
    q, k = (alpha * x if pos is None else alpha * x + pos for x, pos in ((q, q_pos), (k, k_pos)))
    return q, k, v


def forward(q, k, v, q_pos, k_pos, scale, alpha):
    q, k, v = mixed(q, k, v, q_pos, k_pos, alpha)
    logits = scale * q @ k.mT  # [B, heads, N, N]
    lse = logits.logsumexp(-1)
    out = ((logits - lse.unsqueeze(-1)).exp() @ v).transpose(1, 2).flatten(2)
    return out.contiguous(), (lse / math.log(2)).float().contiguous()


def backward(dout, inputs, scale, alpha, needs, image_gradients=None):
    q, k, v = mixed(*inputs, alpha)
    dout = dout.unflatten(-1, (q.shape[1], -1)).transpose(1, 2)  # [B, heads, N, r]
    weights = (scale * q @ k.mT).softmax(-1)  # [B, heads, N, N]
    dweights = dout @ v.mT
    dlogits = scale * weights * (dweights - (weights * dweights).sum(-1, keepdim=True))
    dq, dk, dv = dlogits @ k, dlogits.mT @ q, weights.mT @ dout
    images = image_gradients or [image_gradient(x) for x in inputs[:3]]
    made = (*images, *(None if x is None else torch.empty_like(x) for x in inputs[3:]))
    full = (alpha * dq, alpha * dk, dv, dq.sum(0), dk.sum(0))
    filled = zip(made, full, needs, strict=True)
    return tuple(x.copy_(gradient) if need and x is not None else None for x, gradient, need in filled)


def apply_map(attention, v):
    return (attention @ v).transpose(1, 2).flatten(2).contiguous()


def map_gradient(dout, v):
    return torch.einsum("bnhr,bhmr->hnm", dout.unflatten(-1, (v.shape[1], -1)), v).contiguous()


@pytest.fixture(autouse=True)
def formula_in_float64(monkeypatch):
    def either(formula, kernel):
        return lambda x, *others: (formula if x.dtype == torch.float64 else kernel)(x, *others)

    for formula in (forward, backward, apply_map, map_gradient):
        name = formula.__name__
        monkeypatch.setattr(native, name, either(formula, getattr(native, name)))


def test_gradcheck():
    def f(qkv, pos):
        return positional_op._positional(*qkv.permute(2, 0, 3, 1, 4), *pos, 0.5, 0.3)[0]

    assert torch.autograd.gradcheck(f, packed())
    attention, values = torch.rand(2, 4, 4).double(), torch.randn(3, 2, 4, 3).double()
    inputs = (attention.requires_grad_(), values.requires_grad_())
    assert torch.autograd.gradcheck(map_op.apply_map, inputs)
    assert torch.autograd.gradgradcheck(map_op.apply_map, inputs)


@pytest.mark.parametrize("q_pos", [True, False])
def test_value_and_gradients_match_the_reference(q_pos):
    def run(f):
        qkv, pos = packed()
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = f(q, k, v, pos[0] if q_pos else None, pos[1])
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        return out, qkv.grad, pos.grad

    ours = run(lambda *inputs: positional_op.fused_positional_attention(*inputs, 0.3, 0.2))
    reference = run(lambda *inputs: positional_attention_reference(*inputs, scale=0.3, alpha=0.2))
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_packed_product_gives_the_same_bits(needs):
    def run(f):
        qkv, pos = (x.detach().requires_grad_(need) for x, need in zip(packed(), needs, strict=True))
        out = f(qkv, pos)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        return out, qkv.grad, pos.grad

    whole = run(lambda qkv, pos: positional_op.fused_packed_attention(qkv.flatten(2), 2, *pos, 0.3, 0.2))
    parts = run(
        lambda qkv, pos: positional_op.fused_positional_attention(*qkv.permute(2, 0, 3, 1, 4), *pos, 0.3, 0.2)
    )
    for a, b in zip(whole, parts, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_packed_opcheck_and_gradcheck():
    qkv, pos = packed()
    flat = qkv.detach().flatten(2).requires_grad_()
    for arguments in (
        (flat, 2, *pos.detach(), 0.5, 0.3),
        (flat.detach(), 2, None, pos[1].detach().requires_grad_(), 0.5, 0.3),
        (flat[:0], 2, None, None, 0.5, 1.0),
    ):
        torch.library.opcheck(positional_op._packed.op, arguments)
    assert torch.autograd.gradcheck(
        lambda x, pos: positional_op._packed(x, 2, *pos, 0.5, 0.3)[0], (flat, pos)
    )
    compiled = torch.compile(positional_op.fused_packed_attention, fullgraph=True, backend="aot_eager")
    out = compiled(flat, 2, *pos, 0.5, 0.3)
    torch.testing.assert_close(out, positional_op.fused_packed_attention(flat, 2, *pos, 0.5, 0.3))
    out.sum().backward()
    with pytest.raises(ValueError, match=r"qkv must be \[B, N, 3·num_heads·r\] with num_heads = 4"):
        packed_attention(flat[..., :-1], 4)
    for backend in ("sdpa", "eager", "auto"):
        torch.testing.assert_close(
            packed_attention(flat, 2, *pos, alpha=0.3, backend=backend),
            positional_attention_reference(*qkv.permute(2, 0, 3, 1, 4), *pos, alpha=0.3),
        )


def test_opcheck():
    qkv, pos = packed(dtype=torch.float32)
    q, k, v = (x.detach().requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4))
    q_pos, k_pos = pos.detach()
    frozen = k.detach()
    for arguments in (
        (q, k, v, q_pos.requires_grad_(), k_pos, 0.5, 0.3),
        (q, frozen, v, None, k_pos.double().requires_grad_(), 0.5, 0.3),
        (q[:0], k[:0], v[:0], None, None, 0.5, 1.0),
    ):
        torch.library.opcheck(positional_op._positional.op, arguments)
    torch.library.opcheck(map_op._apply_map.op, (torch.rand(2, 5, 5, requires_grad=True), v))
    torch.library.opcheck(map_op._apply_map.op, (torch.rand(2, 5, 5).mT, v[:, :, :, ::2]))


def test_eager_calls_and_ops_give_the_same_bits():
    """An eager call takes another way through autograd; what records a graph finds the op."""
    flat, pos = (x.detach().float() for x in packed(tokens=16, rank=16))
    flat = flat.flatten(2)
    dout = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1))

    def run(f):
        leaves = [x.clone().requires_grad_() for x in (flat, pos)]
        out = f(leaves[0], 2, *leaves[1], 0.3, 0.2)[0]
        return out, *torch.autograd.grad(out, leaves, dout)

    for eager, op in zip(run(positional_op._packed), run(positional_op._packed.op), strict=True):
        assert torch.equal(eager, op)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append(str(op))
            return op(*args, **(kwargs or {}))

    with Watch():
        run(positional_op._packed)
    assert {"convinit.packed_attention.default", "convinit.packed_attention_backward.default"} <= {*seen}
    with FakeTensorMode() as mode:
        fake = positional_op._packed(mode.from_tensor(flat), 2, None, None, 0.3, 1.0)[0]
    assert isinstance(fake, FakeTensor) and fake.shape == (2, 16, 32)


def test_only_requested_gradients_are_computed(monkeypatch):
    asked = []
    backward = positional_op._positional_backward

    def spy(*arguments):
        asked.append(arguments[-1])
        return backward(*arguments)

    monkeypatch.setattr(positional_op, "_positional_backward", spy)
    qkv, pos = packed()
    q, k, v = qkv.detach().permute(2, 0, 3, 1, 4)
    out = positional_op.fused_positional_attention(q, k, v, None, pos[1], 1.0, 1.0)
    out.sum().backward()
    assert asked == [[False, False, False, False, True]]


def test_compiles_into_one_graph():
    def f(qkv, pos):
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = positional_op.fused_positional_attention(q, k, v, *pos, 0.5, 0.3)
        return out + map_op.apply_map((pos[0] @ pos[1].mT).softmax(-1), v)

    def run(f):
        qkv, pos = packed()
        out = f(qkv, pos)
        out.square().sum().backward()
        return out, qkv.grad, pos.grad

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled), run(f), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast():
    qkv, pos = packed(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = positional_op.fused_positional_attention(*qkv.permute(2, 0, 3, 1, 4), *pos, 0.5, 0.3)
        shared = map_op.apply_map(torch.rand(2, 5, 5), qkv[:, :, 2].transpose(1, 2))
    assert out.dtype == shared.dtype == torch.bfloat16
    (out.sum() + shared.sum()).backward()
    assert qkv.grad.dtype == pos.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", ["sdpa", "eager", "auto"])
def test_backends_agree(backend):
    qkv, pos = (x.detach() for x in packed())
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(
        positional_attention(q, k, v, *pos, alpha=0.3, backend=backend),
        positional_attention_reference(q, k, v, *pos, alpha=0.3),
    )
    torch.testing.assert_close(
        shared_attention(*pos, v, backend=backend), shared_attention_reference(*pos, v)
    )


def test_explicit_triton_never_falls_back(monkeypatch):
    qkv, pos = (x.detach() for x in packed(dtype=torch.float32))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    monkeypatch.setattr(backends, "HAS_TRITON", True)
    with pytest.raises(ValueError, match="needs tensors on a CUDA device, got cpu"):
        positional_attention(q, k, v, backend="triton")
    with pytest.raises(ValueError, match="needs tensors on a CUDA device, got cpu"):
        ConvInitAttention(8, 2, (2, 2), method="random", backend="triton")(torch.randn(1, 4, 8))
    monkeypatch.setattr(backends, "HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="Triton, which is not installed"):
        shared_attention(*pos, v, backend="triton")
    for f in (
        lambda backend: positional_attention(q, k, v, backend=backend),
        lambda backend: shared_attention(*pos, v, backend=backend),
    ):
        with pytest.raises(ValueError, match="backend must be one of auto, triton, native, sdpa, eager"):
            f("flash")
    with pytest.raises(ValueError, match="backend must be one of"):
        ConvInitAttention(8, 2, (2, 2), method="random", backend="flash")


def test_triton_is_imported_by_nothing_but_its_kernels():
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, convinit, convinit.models.simple_vit\n"
        "from convinit.ops.positional_op import fused_positional_attention as f\n"
        "q = torch.randn(1, 1, 4, 4); print(f(q, q, q, None, None, 1.0, 1.0).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
