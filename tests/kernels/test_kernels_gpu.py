"""The Triton kernels on a GPU, through the public functions: what the interpreter cannot show."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F

from convinit.kernels import tuned
from convinit.kernels.tuned import Problem
from convinit.models import SimpleViT
from convinit.nn.attention import ConvInitAttention
from convinit.ops import tune, verify
from convinit.ops.positional_attention import positional_attention, positional_attention_reference
from convinit.ops.shared_attention import shared_attention, shared_attention_reference
from convinit.train.data import load_digits_split

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def problem(batch, heads, tokens, rank, dtype=torch.bfloat16):
    torch.manual_seed(0)
    qkv = torch.randn(batch, tokens, 3, heads, rank, device="cuda").to(dtype).requires_grad_()
    pos = torch.randn(2, heads, tokens, rank, device="cuda").to(dtype).requires_grad_()
    dout = torch.randn(batch, tokens, heads * rank, device="cuda").to(dtype)
    return qkv, pos, dout


def positional(f, **options):
    return lambda qkv, pos: f(*qkv.permute(2, 0, 3, 1, 4), *pos, alpha=0.4, **options)


def shared(f, **options):
    return lambda qkv, pos: f(*pos, qkv[:, :, 2].transpose(1, 2), **options)


def differentiate(f, qkv, pos, dout, dtype):
    qkv, pos = (x.detach().to(dtype).requires_grad_() for x in (qkv, pos))
    out = f(qkv, pos)
    out.backward(dout.to(dtype))
    return out.detach(), qkv.grad, pos.grad


PAIRS = [
    (positional(positional_attention, backend="triton"), positional(positional_attention_reference)),
    (shared(shared_attention, backend="triton"), shared(shared_attention_reference)),
]


@pytest.mark.parametrize("pair", PAIRS, ids=["positional", "shared"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [16, 32, 48, 64, 80, 96, 128])
@pytest.mark.parametrize("tokens", [1, 17, 64, 65, 128, 196, 197, 256, 257, 576, 1024])
def test_value_and_gradients(pair, dtype, rank, tokens):
    fused, reference = pair
    qkv, pos, dout = problem(5, 3, tokens, rank, dtype)
    ours = differentiate(fused, qkv, pos, dout, dtype)
    eager = differentiate(reference, qkv, pos, dout, dtype)
    exact = differentiate(reference, qkv, pos, dout, torch.float64)
    for a, b, c in zip(ours, eager, exact, strict=True):
        # The floor: with one token the map is 1, and the gradients of queries and keys are what two sums of
        # products, equal but for rounding, leave.
        size = qkv.norm().double() if tokens == 1 else max(c.norm(), 1.0)
        limit = 2 * (b.double() - c).norm() + 4 * torch.finfo(dtype).eps * size
        assert a.dtype == dtype and (a.double() - c).norm() <= limit


@pytest.mark.parametrize("pair", PAIRS, ids=["positional", "shared"])
@pytest.mark.parametrize(
    ("tokens", "rank"),
    [(64, 32), (128, 32), (256, 32), (64, 64), (128, 64), (256, 64), (320, 64), (128, 128), (320, 128)],
)
def test_memory_of_committed_configurations(pair, tokens, rank):
    """More programs than a GPU takes at once: for compute-sanitizer, which sees what goes out of bounds.

    Triton 3.6 wrote beyond a program's shared memory for one pipeline depth; some launches only were killed.
    """
    fused, reference = pair
    qkv, pos, dout = problem(100, 8, tokens, rank)
    ours = differentiate(fused, qkv, pos, dout, torch.bfloat16)
    eager = differentiate(reference, qkv, pos, dout, torch.bfloat16)
    exact = differentiate(reference, qkv, pos, dout, torch.float32)
    for a, b, c in zip(ours, eager, exact, strict=True):
        assert (a.float() - c).norm() <= 2 * (b.float() - c).norm() + 4 * torch.finfo(torch.bfloat16).eps


def test_float32_follows_torchs_own_switch():
    qkv, pos, dout = problem(4, 2, 256, 64, torch.float32)
    exact = positional(positional_attention_reference)(qkv.double(), pos.double())

    def error():
        out = positional(positional_attention, backend="triton")(qkv, pos)
        return ((out.double() - exact).norm() / exact.norm()).item()

    allowed = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = False
        assert error() < 5e-6
        torch.backends.cuda.matmul.allow_tf32 = True
        assert 1e-5 < error() < 5e-3
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


@pytest.mark.parametrize("pair", PAIRS, ids=["positional", "shared"])
@pytest.mark.parametrize("tokens", [64, 256, 576])
def test_deterministic(pair, tokens):
    qkv, pos, dout = problem(300, 4, tokens, 32)
    first = differentiate(pair[0], qkv, pos, dout, torch.bfloat16)
    for _ in range(3):
        for a, b in zip(first, differentiate(pair[0], qkv, pos, dout, torch.bfloat16), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("pair", PAIRS, ids=["positional", "shared"])
def test_compiles_into_one_graph(pair):
    qkv, pos, dout = problem(4, 2, 64, 32)
    compiled = torch.compile(pair[0], fullgraph=True)
    exact = differentiate(pair[1], qkv, pos, dout, torch.float64)
    eager, found = (differentiate(f, qkv, pos, dout, torch.bfloat16) for f in (pair[1], compiled))
    for a, b, c in zip(found, eager, exact, strict=True):  # the map is made by other kernels than uncompiled
        assert (a.double() - c).norm() <= 2 * (b.double() - c).norm()


@pytest.mark.parametrize("pair", PAIRS, ids=["positional", "shared"])
def test_cuda_graph(pair):
    qkv, pos, dout = problem(4, 2, 64, 32)
    differentiate(pair[0], qkv, pos, dout, torch.bfloat16)  # compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = differentiate(pair[0], qkv, pos, dout, torch.bfloat16)
    with torch.no_grad():
        qkv.copy_(torch.randn_like(qkv))
    graph.replay()
    for a, b in zip(captured, differentiate(pair[0], qkv, pos, dout, torch.bfloat16), strict=True):
        assert torch.equal(a, b)


def test_autocast():
    qkv, pos, _ = problem(2, 2, 64, 32, torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        for f, _ in PAIRS:
            out = f(qkv, pos)
            assert out.dtype == torch.bfloat16
            out.sum().backward()
    assert qkv.grad.dtype == pos.grad.dtype == torch.float32


def test_more_than_two_to_the_31_elements():
    batch, heads, tokens, rank = 14000, 4, 256, 64  # q, k and v together: 2.75e9 elements
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of free device memory")
    qkv = torch.empty(batch, tokens, 3, heads, rank, device="cuda", dtype=torch.bfloat16)
    assert qkv.numel() > 2**31
    qkv[-2:] = torch.randn_like(qkv[-2:])
    qkv[:-2] = 0
    pos = torch.randn(2, heads, tokens, rank, device="cuda", dtype=torch.bfloat16)
    for f, reference in PAIRS:
        torch.testing.assert_close(f(qkv, pos)[-2:], reference(qkv[-2:], pos), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("variant", ["vanilla", "I", "II", "III"])
def test_module_trains_as_eager_does(variant):
    def run(backend):
        g = torch.Generator().manual_seed(0)
        layer = ConvInitAttention(
            64, 2, (8, 8), variant=variant, method="random", backend=backend, generator=g
        )
        layer.cuda()
        x = torch.randn(16, 64, 64, generator=torch.Generator().manual_seed(1)).cuda()
        layer(x).square().mean().backward()
        return {name: p.grad for name, p in layer.named_parameters()}

    eager = run("eager")
    for name, gradient in run("triton").items():
        torch.testing.assert_close(gradient, eager[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_two_hundred_steps_follow_eager_ones():
    """The paper's Model I as it is trained, in bfloat16: loss curves of our kernels and of the formula."""
    split = load_digits_split()
    images = F.interpolate(split.train_images, size=32).expand(-1, 3, -1, -1).sub(0.3).div(0.38).cuda()
    labels = split.train_labels.cuda()

    def losses(backend):
        g = torch.Generator().manual_seed(0)
        model = SimpleViT(32, 2, 10, dim=512, mlp_dim=512, values="mimetic", generator=g).cuda()
        for block in model.blocks:
            block.attn.backend = backend
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.01)
        order = torch.Generator().manual_seed(1)
        found = []
        for _ in range(200):
            batch = torch.randint(len(images), (128,), generator=order).cuda()
            with torch.autocast("cuda", torch.bfloat16):
                loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
        return torch.stack(found).view(10, 20).mean(dim=1).cpu()

    eager, ours, sdpa = losses("eager"), losses("triton"), losses("sdpa")
    for name, curve in (("eager", eager), ("triton", ours), ("sdpa", sdpa)):
        print(name, " ".join(f"{each:.4f}" for each in curve))
    assert eager[-1] < eager[0]
    # As far from the formula as another way of rounding is.
    assert (ours - eager).abs().max() <= 2 * (sdpa - eager).abs().max() + 0.002


def test_tune_a_tiny_shape_and_take_what_it_found(tmp_path, monkeypatch):
    monkeypatch.setenv("CONVINIT_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("CONVINIT_TUNED", raising=False)
    monkeypatch.setattr(tuned, "_loaded", {})
    shape = (4, 2, 64, 32)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "error", message="(?i).*please report"
        )  # nothing is wrong, all of it compiles
        rows = list(tune.tune([shape], minutes=0.1))
    assert len(rows) == 6 and all("triton" in row["ms"] for row in rows), rows
    device = torch.cuda.current_device()
    tuned._loaded.clear()
    choices = tuned.of(device).choices
    assert [choice for choice, _ in choices.values()] == [row["choice"] for row in rows]
    for case in verify.CASES:
        leaves, dout = verify.draw(case, shape, torch.bfloat16)
        eager = verify.results(case, 2, leaves, dout, "eager")
        for name in tuned.CHOICES if case.op == "positional_attention" else ("triton", "torch"):
            choices[Problem(case.op, torch.bfloat16, 64, 32, case.positions, True)] = (name, 0)
            verify.compare(verify.results(case, 2, leaves, dout, "auto"), eager, [0.05] * 4)
