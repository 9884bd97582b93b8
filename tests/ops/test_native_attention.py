"""The CPU kernels of positional attention, against float64 and the eager formula."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from convinit.kernels.tensor_views import split_heads, split_packed
from convinit.nn.attention import ConvInitAttention
from convinit.ops import map_op, native, positional_op
from convinit.ops.positional_attention import (
    packed_attention,
    positional_attention,
    positional_attention_reference,
)
from convinit.ops.shared_attention import shared_attention

OPTIONS = {"scale": 0.3, "alpha": 0.4}


def make(batch, heads, tokens, rank, dtype=torch.float32, pos_dtype=None):
    """qkv [B, N, 3·heads·r], pos [2, heads, N, r] and dout [B, N, heads·r]."""
    g = torch.Generator().manual_seed(0)
    shapes = ((batch, tokens, 3 * heads * rank), (2, heads, tokens, rank), (batch, tokens, heads * rank))
    dtypes = (dtype, pos_dtype or dtype, dtype)
    return [torch.randn(shape, generator=g).to(x) for shape, x in zip(shapes, dtypes, strict=True)]


def run(f, qkv, pos, dout, heads):
    """out and the gradients of qkv and pos."""
    qkv, pos = (x.detach().requires_grad_() for x in (qkv, pos))
    out = f(*split_packed(qkv, heads), *pos, **OPTIONS)
    return (out, *torch.autograd.grad(out, (qkv, pos), dout))


def on_cpu(*args, **options):
    return positional_attention(*args, backend="native", **options)


def check(qkv, pos, dout, heads):
    """Errors next to float64 are those of the eager formula, up to rounding."""
    exact = run(positional_attention_reference, *(x.double() for x in (qkv, pos, dout)), heads)
    eager = run(positional_attention_reference, qkv, pos, dout, heads)
    ours = run(on_cpu, qkv, pos, dout, heads)
    for a, b, c in zip(ours, eager, exact, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        size = c.norm()
        assert (a - c).norm() <= 1.5 * (b - c).norm() + 4 * torch.finfo(torch.float32).eps * size


@pytest.mark.parametrize("tokens", [1, 17, 64, 65, 196, 197, 256, 257, 576])
@pytest.mark.parametrize("rank", [5, 32, 64])
def test_every_grid(tokens, rank):
    check(*make(2, 2, tokens, rank), heads=2)


@pytest.mark.parametrize("rank", [1, 16, 17, 48, 80, 128, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_rank(rank, dtype):
    check(*make(3, 2, 50, rank, dtype), heads=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 17, 49, 64, 65, 196, 197, 256, 257, 576])
def test_half_precision(tokens, dtype):
    check(*make(3, 3, tokens, 32, dtype), heads=3)


@pytest.mark.parametrize("batch", [1, 5, 70])
def test_sums_over_every_batch(batch):
    check(*make(batch, 1, 20, 8), heads=1)
    check(*make(batch, 3, 20, 8, torch.bfloat16), heads=3)


@pytest.mark.parametrize("pos_dtype", [torch.float64, torch.float32, torch.float16])
def test_position_terms_have_a_dtype_of_their_own(pos_dtype):
    qkv, pos, dout = make(2, 2, 20, 8, torch.bfloat16, pos_dtype)
    ours = run(on_cpu, qkv, pos, dout, 2)
    exact = run(positional_attention_reference, *(x.double() for x in (qkv, pos, dout)), 2)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-2, atol=1e-2)
    assert [x.dtype for x in ours] == [torch.bfloat16, torch.bfloat16, pos_dtype]


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_older_instruction_sets(capability):
    """Where the CPU has newer ones, only a process of its own takes these."""
    code = (
        "import sys; sys.path.insert(0, 'tests/ops')\n"
        "import torch; from test_native_attention import check, make, round_trip\n"
        "for shape in ((2, 2, 1, 5), (2, 3, 65, 64), (3, 2, 196, 20), (1, 1, 24, 100)):\n"
        "    for dtype in (torch.float32, torch.bfloat16, torch.float16):\n"
        "        check(*make(*shape, dtype), heads=shape[1])\n"
        "round_trip(torch.float16); round_trip(torch.bfloat16, exact=True)"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def round_trip(dtype, exact=False):
    """Every number comes back; where not exact, those that are too small may come back as 0."""
    keep = (lambda x: x) if exact or dtype == torch.float16 else flushed
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    other = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))]
    zeros = torch.zeros(1, 1, 1, len(every), dtype=dtype)
    # One token: its weight is 1, so that values come back as they are.
    out = positional_attention(zeros, zeros, every.expand_as(zeros), backend="native")
    assert_same_bits(out.flatten(), every, keep(every))
    # Two tokens of the same logits: means of two numbers, rounded.
    zeros = torch.zeros(1, 1, 2, len(every), dtype=dtype)
    out = positional_attention(zeros, zeros, torch.stack((every, other)).expand_as(zeros), backend="native")
    mean = ((every.float() + other.float()) / 2).to(dtype)
    of_kept = (keep(keep(every).float() + keep(other).float()) / 2).to(dtype)
    for row in out[0]:
        assert_same_bits(row, mean, of_kept)


def flushed(x):
    """CPUs that multiply bfloat16 numbers take what is smaller than their smallest normal number for 0."""
    return x.masked_fill(x.abs() < torch.finfo(torch.bfloat16).tiny, 0)


def assert_same_bits(out, exact, without_small):
    same = (out == exact) | (out == without_small) | (out.isnan() & exact.isnan())
    assert same.all(), (out[~same], exact[~same])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_that_of_torch(dtype):
    round_trip(dtype)


def test_any_strides():
    (qkv, pos, dout), heads = make(3, 2, 21, 6), 2
    q, k, v = split_packed(qkv, heads)
    layouts = {
        "dense": lambda x: x.contiguous(),
        "every second element": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
        "transposed": lambda x: x.mT.contiguous().mT,
        "one image for all": lambda x: x[..., :1, :, :, :].expand(x.shape) if x.dim() == 4 else x,
        "one row for all": lambda x: x[..., :1, :].expand(x.shape),
    }
    for name, layout in layouts.items():
        inputs = [layout(x) for x in (q, k, v, *pos)]
        torch.testing.assert_close(
            on_cpu(*inputs, **OPTIONS),
            positional_attention_reference(*inputs, **OPTIONS),
            msg=lambda text, name=name: f"{name}: {text}",
        )
    expanded = run(on_cpu, qkv, pos, torch.ones(()).expand(dout.shape), heads)
    dense = run(on_cpu, qkv, pos, torch.ones(dout.shape), heads)
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))


def test_expanded_inputs_get_the_sum_of_their_gradients():
    q, k, v = (torch.randn(1, 2, 9, 4, requires_grad=True) for _ in range(3))
    for f in (on_cpu, positional_attention_reference):
        f(*(x.expand(5, 2, 9, 4) for x in (q, k, v))).square().sum().backward()
        gradients = [x.grad for x in (q, k, v)]
        q.grad = k.grad = v.grad = None
        if f is on_cpu:
            ours = gradients
    for a, b in zip(ours, gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(0, 2, 5, 4), (2, 2, 0, 4), (0, 1, 1, 1)])
def test_nothing_to_do(shape):
    out, dqkv, dpos = run(on_cpu, *make(*shape), heads=shape[1])
    assert out.shape == (shape[0], shape[2], shape[1] * shape[3])
    assert dqkv.shape == (shape[0], shape[2], 3 * shape[1] * shape[3])
    assert torch.equal(dpos, torch.zeros(2, *shape[1:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [30.0, 100.0])
def test_sharp_logits(size, dtype):
    """Up to ±1e4: one weight a row is nearly 1, and the others underflow."""
    qkv, pos, dout = make(2, 2, 70, 16, dtype)
    qkv[..., :64] *= size  # queries and keys
    exact = run(positional_attention_reference, *(x.double() for x in (qkv, pos, dout)), 2)
    eager = run(positional_attention_reference, qkv, pos, dout, 2)
    for a, b, c in zip(run(on_cpu, qkv, pos, dout, 2), eager, exact, strict=True):
        assert (a - c).norm() <= 3 * (b - c).norm() + 1e-5 * c.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["q", "k", "v", "q_pos", "k_pos", "dout"])
def test_what_is_not_finite_is_not_hidden(bad, where, dtype):
    (qkv, pos, dout), heads = make(2, 2, 19, 5, dtype), 2
    tensors = dict(zip("qkv", split_packed(qkv, heads), strict=True)) | {"q_pos": pos[0], "k_pos": pos[1]}
    tensors["dout"] = split_heads(dout, heads)
    tensors[where][..., 1, 7, 2] = bad
    ours = run(on_cpu, qkv, pos, dout, heads)
    # In float32, for oneDNN's products of bfloat16 on a CPU with AMX spread what is not finite to other rows.
    eager = run(positional_attention_reference, *(x.float() for x in (qkv, pos, dout)), heads)
    for a, b in zip(ours, eager, strict=True):
        if dtype == torch.bfloat16:
            assert torch.equal(a.isfinite(), b.isfinite())
        else:
            torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 2, 35, 5), (1, 2, 49, 48), (2, 1, 64, 17)])
def test_scratch_of_the_last_call_does_not_leak(shape, dtype):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        inputs, heads = make(*shape, dtype), shape[1]
        before = run(on_cpu, *inputs, heads)
        run(on_cpu, *(x.fill_(torch.nan) for x in make(1, 1, 300, 70, dtype)), 1)
        after = run(on_cpu, *inputs, heads)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(("batch", "heads"), [(7, 3), (1, 1), (1, 2)])
def test_threads_do_not_change_the_bits(batch, heads):
    inputs, threads = make(batch, heads, 150, 40), torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(run(on_cpu, *inputs, heads))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_each_gradient_alone_is_that_of_all():
    (qkv, pos, dout), heads = make(3, 2, 30, 8), 2
    inputs = [x.detach() for x in (*split_packed(qkv, heads), *pos)]

    def gradients(needed):
        leaves = [x.detach().requires_grad_(i in needed) for i, x in enumerate(inputs)]
        out = on_cpu(*leaves, **OPTIONS)
        return torch.autograd.grad(out, [leaves[i] for i in needed], dout)

    together = gradients(range(5))
    for i in range(5):
        assert torch.equal(gradients([i])[0], together[i])
    for pair in ((0, 2), (1, 3), (2, 4)):
        assert all(torch.equal(a, together[i]) for a, i in zip(gradients(pair), pair, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_product_gives_the_same_bits(dtype):
    qkv, pos, dout = make(3, 2, 30, 8, dtype)
    whole, position = qkv.clone().requires_grad_(), pos.clone().requires_grad_()
    out = packed_attention(whole, 2, *position, backend="native", **OPTIONS)
    results = (out, *torch.autograd.grad(out, (whole, position), dout))
    for a, b in zip(results, run(on_cpu, qkv, pos, dout, 2), strict=True):
        assert torch.equal(a, b)


def test_opcheck():
    qkv, pos, _ = make(2, 2, 6, 4)
    q, k, v = (x.detach() for x in split_packed(qkv, 2))
    for dtype in (torch.float32, torch.bfloat16):
        flat = qkv.to(dtype).requires_grad_()
        torch.library.opcheck(positional_op._packed.op, (flat, 2, *pos.requires_grad_().unbind(), 0.5, 0.3))
    torch.library.opcheck(positional_op._positional.op, (q.requires_grad_(), k, v, None, None, 0.5, 1.0))
    out, lse = q.new_empty(2, 6, 8), q.new_empty(2, 2, 6)
    arguments = (q.detach(), k, v, None, None, out, lse, 0.5, 1.0)
    torch.library.opcheck(torch.ops.convinit.positional_attention_cpu, arguments, test_utils="test_schema")


def test_log_sum_exp():
    """What the op hands to its backward is what the Triton kernels hand to theirs."""
    qkv, _, _ = make(2, 2, 20, 8)
    q, k, v = split_packed(qkv, 2)
    _, lse = positional_op._positional(q, k, v, None, None, 0.5, 1.0)
    torch.testing.assert_close(lse, (0.5 * q @ k.mT).logsumexp(-1) / torch.log(torch.tensor(2.0)))


def test_compiles_into_one_graph():
    def f(qkv, pos):
        return packed_attention(qkv, 2, *pos, backend="native", **OPTIONS)

    def results(f):
        qkv, pos = (x.requires_grad_() for x in make(2, 2, 20, 8)[:2])
        out = f(qkv, pos)
        return (out, *torch.autograd.grad(out.square().sum(), (qkv, pos)))

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for a, b in zip(results(compiled), results(f), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast():
    layer = ConvInitAttention(32, 2, (4, 4), method="random", backend="native")
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(torch.randn(2, 16, 32))
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())
    q = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="got torch.float64"):
        on_cpu(q, q, q)


@pytest.mark.parametrize("worthwhile", [0, 2**60])
def test_autocast_leaves_float64_alone_in_every_size(monkeypatch, worthwhile):
    monkeypatch.setattr(native, "_VECTORS", True)
    monkeypatch.setattr(native, "_WORTHWHILE", worthwhile)
    q = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert positional_attention(q, q, q).dtype == torch.float64
        assert shared_attention(q[0], q[0], q).dtype == torch.float64


def test_explicit_native_never_falls_back():
    q = torch.zeros(1, 1, 4, 4)
    with pytest.raises(TypeError, match="takes float32, bfloat16 or float16, got torch.float64"):
        on_cpu(q.double(), q.double(), q.double())
    with pytest.raises(ValueError, match="has no dropout, got dropout_p = 0.5"):
        on_cpu(q, q, q, dropout_p=0.5)
    with pytest.raises(ValueError, match="needs tensors on the CPU, got meta"):
        on_cpu(*[q.to("meta")] * 3)


def test_tangents_are_refused():
    """Nothing else would say that they are dropped."""
    q, qkv = torch.randn(1, 1, 4, 4), torch.randn(1, 4, 12)
    ad = torch.autograd.forward_ad
    with ad.dual_level():
        on_cpu(q, q, q)  # has none
        dual = ad.make_dual(q, torch.ones_like(q))
        for call in (
            lambda: on_cpu(dual, q, q),
            lambda: on_cpu(q, q, q, ad.make_dual(q[0], q[0])),
            lambda: packed_attention(ad.make_dual(qkv, qkv), 1, backend="native"),
            lambda: map_op.apply_map(q[0], dual),
        ):
            with pytest.raises(NotImplementedError, match="no forward AD"):
                call()
    with pytest.raises(NotImplementedError, match="no forward AD"):
        torch.func.jvp(lambda q: on_cpu(q, q, q), (q,), (q,))


def test_gradients_of_other_dimensions_are_refused():
    """A direct call must not write beyond them."""
    q = torch.zeros(1, 2, 8, 4)
    backward = torch.ops.convinit.positional_attention_backward_cpu
    for dq, dq_pos in ((q[0], None), (q[0, 0], None), (None, q), (None, q[0, 0])):
        with pytest.raises(RuntimeError, match="must have the shape of q"):
            backward(torch.zeros(1, 8, 8), q, q, q, q[0], None, dq, None, None, dq_pos, None, 1.0, 1.0)


@pytest.mark.parametrize("packed", [False, True])
def test_second_derivatives_are_those_of_the_formula(packed, generator):
    qkv = torch.randn(2, 5, 3 * 2 * 4, generator=generator)
    q_pos, k_pos = torch.randn(2, 2, 5, 4, generator=generator)

    def second(backend, **frozen):
        inputs = [x.clone().requires_grad_() for x in (qkv, q_pos, k_pos)]
        options = {"scale": 0.3, "alpha": 0.4, "backend": backend}
        if packed:
            out = packed_attention(inputs[0], 2, inputs[1], inputs[2], **options)
        else:
            q, k, v = split_packed(inputs[0], 2)
            out = positional_attention(q, k, v, inputs[1], inputs[2], **options)
        first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        return *first, *torch.autograd.grad(sum(x.square().sum() for x in first), inputs)

    for found, expected in zip(second("native"), second("eager"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tie", [lambda x: (x, x, x), lambda x: (x, 0.5 * x, x.sin())])
def test_gradients_with_a_graph_of_inputs_that_belong_together(tie):
    """One tensor given three times, and keys that are made of queries: nothing is counted twice."""
    x = torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def gradient(backend):
        out = positional_attention(*tie(x), backend=backend)
        return torch.autograd.grad(out.square().sum(), x, create_graph=True)[0]

    ours, eager = gradient("native"), gradient("eager")
    torch.testing.assert_close(ours, eager)
    twice = [torch.autograd.grad(g.square().sum(), x)[0] for g in (ours, eager)]
    torch.testing.assert_close(*twice)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_auto_takes_a_backend_with_second_derivatives(dtype):
    for size in (4, 128):  # on this side and beyond what is native
        q = torch.randn(1, 2, size, 32, dtype=dtype, requires_grad=True)
        (first,) = torch.autograd.grad(positional_attention(q, q, q).square().sum(), q, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), q)
        assert second.isfinite().all() and second.abs().max() > 0


def test_auto_is_native_where_nothing_stands_against_it(monkeypatch):
    taken = []
    forward = native.forward
    monkeypatch.setattr(native, "forward", lambda *args: taken.append(True) or forward(*args))
    monkeypatch.setattr(native, "_VECTORS", True)
    monkeypatch.setattr(native, "_AMX", False)
    monkeypatch.setattr(native, "_WORTHWHILE", 64)

    def takes(dtype=torch.float32, size=4, **options):
        taken.clear()
        positional_attention(*[torch.randn(1, 1, size, 4).to(dtype)] * 3, **options)
        return bool(taken)

    assert takes() and takes(torch.bfloat16) and takes(torch.float16)
    assert not takes(size=3)
    assert not takes(torch.float64) and not takes(dropout_p=0.1)
    assert not takes(backend="sdpa") and not takes(backend="eager")
    monkeypatch.setattr(native, "_AMX", True)
    assert takes() and not takes(torch.bfloat16) and not takes(torch.float16)
    monkeypatch.setattr(native, "_VECTORS", False)
    assert not takes() and takes(backend="native")


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*jit.*deprecated")
def test_auto_leaves_exports_and_transforms_to_torch(monkeypatch):
    monkeypatch.setattr(native, "_WORTHWHILE", 0)
    layer = ConvInitAttention(16, 2, (2, 2), method="random").eval()
    x = torch.randn(1, 4, 16)
    exported = torch.export.export(layer, (x,))
    assert not any("convinit" in str(node.target) for node in exported.graph.nodes)
    assert "packed_attention" not in str(torch.jit.trace(layer, (x,)).inlined_graph)
    q = torch.randn(1, 1, 4, 4, requires_grad=True)
    gradient = torch.func.grad(lambda q: positional_attention(q, q, q).square().sum())(q)
    positional_attention(q, q, q).square().sum().backward()
    torch.testing.assert_close(gradient, q.grad)
    with pytest.raises(NotImplementedError, match='torch.func transforms.*use backend="eager"'):
        torch.func.grad(lambda q: on_cpu(q, q, q).sum())(q)
    q, tangent = q.detach(), torch.randn_like(q)
    _, expected = torch.func.jvp(lambda q: positional_attention(q, q, q, backend="eager"), (q,), (tangent,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, tangent)
        out = positional_attention(dual, dual, dual)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(out).tangent, expected)
