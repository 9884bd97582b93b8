"""The CPU kernels of shared attention, against float64 and PyTorch's product."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from convinit.kernels.tensor_views import split_heads
from convinit.ops import map_op, native
from convinit.ops import shared_attention as module
from convinit.ops.shared_attention import shared_attention, shared_attention_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(batch, heads, tokens, rank, dtype=torch.float32):
    """A map [heads, N, N], values [B, heads, N, r] as a strided view, and dout [B, N, heads·r]."""
    g = torch.Generator().manual_seed(0)
    attention = torch.randn(heads, tokens, tokens, generator=g).softmax(-1)
    values = torch.randn(batch, tokens, heads * rank, generator=g)
    dout = torch.randn(batch, tokens, heads * rank, generator=g)
    return attention.to(dtype), split_heads(values.to(dtype), heads), dout.to(dtype)


def product(attention, v):
    return (attention @ v).transpose(1, 2).flatten(2)


def run(f, attention, v, dout):
    """out and the gradients of the map and of v."""
    attention, v = (x.detach().requires_grad_() for x in (attention, v))
    out = f(attention, v)
    return (out, *torch.autograd.grad(out, (attention, v), dout))


def check(attention, v, dout):
    """Errors next to float64 are those of PyTorch's product, up to rounding."""
    exact = run(product, *(x.double() for x in (attention, v, dout)))
    eager = run(product, attention, v, dout)
    ours = run(map_op.apply_map, attention, v, dout)
    for a, b, c in zip(ours, eager, exact, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert (a - c).norm() <= 1.5 * (b - c).norm() + 4 * torch.finfo(torch.float32).eps * c.norm()


@pytest.mark.parametrize("tokens", [1, 17, 48, 49, 64, 65, 196, 197, 256, 257, 576])
@pytest.mark.parametrize("rank", [5, 64])
def test_every_grid(tokens, rank):
    check(*make(2, 2, tokens, rank))


@pytest.mark.parametrize("rank", [1, 16, 17, 32, 48, 80, 150])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_rank(rank, dtype):
    check(*make(3, 2, 50, rank, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 17, 49, 64, 65, 197, 257])
def test_half_precision(tokens, dtype):
    check(*make(3, 3, tokens, 32, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 5, 70])
def test_every_batch(batch, dtype):
    check(*make(batch, 1, 20, 8, dtype))
    check(*make(batch, 3, 33, 8, dtype))


@pytest.mark.parametrize("shape", [(0, 2, 5, 4), (2, 2, 0, 4), (2, 2, 5, 0)])
def test_nothing_to_do(shape):
    for a, b in zip(run(map_op.apply_map, *make(*shape)), run(product, *make(*shape)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_older_instruction_sets(capability):
    """Where the CPU has newer ones, only a process of its own takes these."""
    code = (
        "import sys; sys.path.insert(0, 'tests/ops')\n"
        "import torch; from test_native_shared_attention import DTYPES, check, make\n"
        "for shape in ((2, 2, 1, 5), (2, 3, 65, 64), (3, 2, 196, 20), (1, 1, 24, 100)):\n"
        "    for dtype in DTYPES:\n"
        "        check(*make(*shape, dtype))\n"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype):
    attention, v, dout = make(3, 2, 21, 6, dtype)
    layouts = {
        "dense": lambda x: x.contiguous(),
        "every second element": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
        "transposed": lambda x: x.mT.contiguous().mT,
        "one row for all": lambda x: x[..., :1, :].expand(x.shape),
        "one column for all": lambda x: x[..., :1].expand(x.shape),
    }
    for name, layout in layouts.items():
        strided = map_op.apply_map(layout(attention), layout(v))
        dense = map_op.apply_map(layout(attention).contiguous(), layout(v).contiguous())
        assert torch.equal(strided, dense), name
        ours = run(map_op.apply_map, attention, v, layout(dout))
        dense = run(map_op.apply_map, attention, v, layout(dout).contiguous())
        assert all(torch.equal(a, b) for a, b in zip(ours, dense, strict=True)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_what_is_not_finite_is_not_hidden(bad, where, dtype):
    inputs = make(2, 2, 19, 5, dtype)
    inputs[where][1, ..., 7, 2] = bad
    for a, b in zip(run(map_op.apply_map, *inputs), run(product, *inputs), strict=True):
        assert torch.equal(a.isfinite(), b.isfinite()) and torch.equal(a.isnan(), b.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 2, 35, 5), (1, 2, 49, 48), (9, 1, 64, 17)])
def test_scratch_of_the_last_call_does_not_leak(shape, dtype):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        inputs = make(*shape, dtype)
        before = run(map_op.apply_map, *inputs)
        run(map_op.apply_map, *(x.fill_(torch.nan) for x in make(2, 1, 300, 70, dtype)))
        after = run(map_op.apply_map, *inputs)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(("batch", "heads", "tokens"), [(7, 3, 250), (1, 1, 250), (40, 2, 97), (1, 1, 1201)])
def test_threads_do_not_change_the_bits(batch, heads, tokens):
    inputs, threads = make(batch, heads, tokens, 20), torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 5, 64):  # with 64 every row block is a task of its own
            torch.set_num_threads(number)
            results.append(run(map_op.apply_map, *inputs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_second_derivatives():
    def second(f):
        attention, v, dout = (x.requires_grad_() for x in make(2, 2, 9, 4))
        first = torch.autograd.grad(f(attention, v).pow(3).sum(), (attention, v), create_graph=True)
        loss = sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in first)
        return torch.autograd.grad(loss, (attention, v))

    for a, b in zip(second(map_op.apply_map), second(product), strict=True):
        torch.testing.assert_close(a, b)


def test_opcheck():
    for dtype in (torch.float32, torch.bfloat16):
        attention, v, dout = make(2, 2, 6, 4, dtype)
        torch.library.opcheck(map_op._apply_map.op, (attention.requires_grad_(), v.requires_grad_()))
        torch.library.opcheck(map_op._map_gradient.op, (dout, v.detach()))
        arguments = (attention.detach(), v.detach(), torch.empty(2, 6, 8, dtype=dtype))
        torch.library.opcheck(torch.ops.convinit.apply_map_cpu, arguments, test_utils="test_schema")
        arguments = (dout, v.detach(), torch.empty(2, 6, 6, dtype=dtype))
        torch.library.opcheck(torch.ops.convinit.map_gradient_cpu, arguments, test_utils="test_schema")


def test_direct_calls_with_other_dimensions_are_refused():
    """They must not read or write beyond their tensors."""
    attention, v, dout = make(2, 3, 6, 4)
    apply_map, map_gradient = torch.ops.convinit.apply_map_cpu, torch.ops.convinit.map_gradient_cpu
    for wrong in (attention[:1], attention[:, :5], attention[..., :5], attention[0]):
        with pytest.raises(RuntimeError, match=r"must have shape \[heads, N, N\]"):
            apply_map(wrong, v, torch.empty_like(dout))
        with pytest.raises(RuntimeError, match=r"must have shape \[heads, N, N\]"):
            map_gradient(dout, v, wrong.clone())
    for wrong in (dout[:1], dout[:, :5], dout[..., :11], dout[0]):
        with pytest.raises(RuntimeError, match=r"must have shape \[B, N, heads r\]"):
            apply_map(attention, v, wrong.clone())
        with pytest.raises(RuntimeError, match=r"must have shape \[B, N, heads r\]"):
            map_gradient(wrong, v, torch.empty_like(attention))
    with pytest.raises(RuntimeError, match=r"must have shape \[B, heads, N, r\]"):
        apply_map(attention, v[0], torch.empty_like(dout))
    with pytest.raises(RuntimeError, match="takes float32, bfloat16 or float16"):
        apply_map(attention.double(), v, torch.empty_like(dout))


def on_cpu(q_map, k_map, v, **options):
    return shared_attention(q_map, k_map, v, backend="native", **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_attention(dtype):
    g = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 3, 40, 7, generator=g)
    values = torch.randn(4, 3, 40, 16, generator=g).to(dtype)

    def results(f, maps, values):
        maps, values = (x.detach().requires_grad_() for x in (maps, values))
        out = f(*maps, values, scale=0.3)
        return (out, *torch.autograd.grad(out.float().square().sum(), (maps, values)))

    exact = results(shared_attention_reference, maps.double(), values.double())
    eager = results(shared_attention_reference, maps, values)
    for a, b, c in zip(results(on_cpu, maps, values), eager, exact, strict=True):
        assert a.dtype == b.dtype
        assert (a - c).norm() <= 1.5 * (b - c).norm() + 4 * torch.finfo(torch.float32).eps * c.norm()


def test_float16_maps_are_made_in_single_precision():
    """PyTorch's float16 product on a CPU is slower by far, and less exact."""
    g = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 2, 30, 8, generator=g).half()
    values = torch.randn(3, 2, 30, 8, generator=g).half()
    exact = shared_attention_reference(*maps.double(), values.double())
    ours, eager = on_cpu(*maps, values), shared_attention_reference(*maps, values)
    assert ours.dtype == torch.float16
    assert (ours - exact).norm() <= (eager - exact).norm()


def test_dropout_mask_is_shared_by_the_images():
    maps, values = torch.randn(2, 2, 30, 8), torch.randn(1, 2, 30, 8).expand(2, -1, -1, -1)
    out = on_cpu(*maps, values, dropout_p=0.5)
    assert torch.equal(out[0], out[1]) and not torch.allclose(out, on_cpu(*maps, values))


def test_explicit_native_never_falls_back():
    q = torch.zeros(1, 1, 4, 4)
    with pytest.raises(TypeError, match="takes float32, bfloat16 or float16, got torch.float64"):
        on_cpu(q[0].double(), q[0].double(), q.double())
    with pytest.raises(ValueError, match="needs tensors on the CPU, got meta"):
        on_cpu(*[q[0].to("meta")] * 2, q.to("meta"))


def test_auto_is_native_where_it_measured_faster(monkeypatch):
    taken = []
    apply_map = native.apply_map
    monkeypatch.setattr(native, "apply_map", lambda *args: taken.append(True) or apply_map(*args))
    monkeypatch.setattr(native, "_VECTORS", True)
    monkeypatch.setattr(native, "_AMX", False)
    monkeypatch.setattr(native, "_WORTHWHILE", 64)
    monkeypatch.setattr(native, "MKL_USES_HALF_VECTORS", True)

    def takes(dtype=torch.float32, size=4, **options):
        taken.clear()
        q, v = torch.randn(1, size, 4).to(dtype), torch.randn(2, 1, size, 4).to(dtype)
        shared_attention(q, q, v, **options)
        return bool(taken)

    assert takes() and takes(torch.float16) and takes(dropout_p=0.1)
    assert not takes(size=2) and not takes(torch.bfloat16) and not takes(torch.float64)
    assert not takes(backend="sdpa") and not takes(backend="eager")
    with monkeypatch.context() as patch:
        patch.setattr(native, "float32_is_exact", lambda: False)
        assert not takes() and takes(torch.float16)
    monkeypatch.setattr(native, "_AMX", True)
    assert takes() and not takes(torch.float16)
    monkeypatch.setattr(native, "MKL_USES_HALF_VECTORS", False)
    assert not takes() and takes(backend="native")


def test_inference_of_a_single_image_makes_no_map(monkeypatch):
    taken = []
    positional = module.positional_attention
    monkeypatch.setattr(
        module,
        "positional_attention",
        lambda *args, **options: taken.append(True) or positional(*args, **options),
    )
    maps, values = torch.randn(2, 2, 30, 8), torch.randn(1, 2, 30, 8)
    with torch.no_grad():
        out = shared_attention(*maps, values, scale=0.3)
    assert taken
    torch.testing.assert_close(out, shared_attention_reference(*maps, values, scale=0.3))
