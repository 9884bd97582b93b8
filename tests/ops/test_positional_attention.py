from __future__ import annotations

import pytest
import torch

from convinit.ops.positional_attention import positional_attention, positional_attention_reference

SHAPES = [(2, 3, 12, 8), (1, 1, 7, 5), (0, 2, 4, 3), (3, 2, 1, 4)]  # [B, heads, N, r]


def packed(shape, dtype=torch.float64, seed=0, requires_grad=False):
    """q, k, v as strided views of one packed product, and the two position terms."""
    batch, heads, tokens, rank = shape
    g = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, tokens, 3, heads, rank, generator=g, dtype=torch.float64).to(dtype)
    pos = torch.randn(2, heads, tokens, rank, generator=g, dtype=torch.float64).to(dtype)
    qkv.requires_grad_(requires_grad)
    pos.requires_grad_(requires_grad)
    return qkv, pos


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("terms", ["both", "query", "none"])
def test_value_and_gradients_match_the_reference(shape, terms):
    def run(f):
        qkv, pos = packed(shape, requires_grad=True)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q_pos, k_pos = {"both": pos, "query": (pos[0], None), "none": (None, None)}[terms]
        out = f(q, k, v, q_pos, k_pos, scale=0.3, alpha=0.2)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        return out, qkv.grad, torch.zeros_like(pos) if pos.grad is None else pos.grad

    for ours, reference in zip(run(positional_attention), run(positional_attention_reference), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-11, atol=1e-12)


def test_reference_is_attention_of_the_mixed_input():
    """softmax of (α x + (1−α) P) W_q ((α x + (1−α) P) W_k)ᵀ, token by token."""
    (q, k, v), (q_pos, k_pos) = torch.randn(3, 1, 1, 4, 3).double(), torch.randn(2, 1, 4, 3).double()
    out = positional_attention_reference(q, k, v, q_pos, k_pos, scale=0.7, alpha=0.4)
    for n in range(4):
        logits = [
            0.7 * torch.dot(0.4 * q[0, 0, n] + q_pos[0, n], 0.4 * k[0, 0, m] + k_pos[0, m]) for m in range(4)
        ]
        weights = torch.stack(logits).exp()
        torch.testing.assert_close(out[0, n], weights @ v[0, 0] / weights.sum())


def test_gradcheck():
    qkv, pos = packed((2, 2, 5, 3), requires_grad=True)

    def f(qkv, pos):
        return positional_attention(*qkv.permute(2, 0, 3, 1, 4), *pos, alpha=0.3)

    assert torch.autograd.gradcheck(f, (qkv, pos))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_that_of_eager(dtype):
    qkv, pos = packed((2, 4, 64, 32), dtype)
    exact = positional_attention_reference(*qkv.double().permute(2, 0, 3, 1, 4), *pos.double(), alpha=0.5)
    eager = positional_attention_reference(*qkv.permute(2, 0, 3, 1, 4), *pos, alpha=0.5)
    ours = positional_attention(*qkv.permute(2, 0, 3, 1, 4), *pos, alpha=0.5)
    assert ours.dtype == dtype
    assert (ours.double() - exact).abs().max() <= 2 * (eager.double() - exact).abs().max()


def test_position_terms_take_the_dtype_of_the_content():
    qkv, pos = packed((2, 2, 6, 4), torch.bfloat16)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(
        positional_attention(q, k, v, *pos.float()), positional_attention(q, k, v, *pos), rtol=0, atol=0
    )


def test_scale_is_honoured_and_defaults_to_the_rank():
    qkv, pos = packed((1, 2, 6, 4))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    default = positional_attention(q, k, v, *pos)
    torch.testing.assert_close(default, positional_attention(q, k, v, *pos, scale=0.5))
    assert not torch.allclose(default, positional_attention(q, k, v, *pos, scale=0.1))


def test_dropout_keeps_the_mean_and_follows_the_seed():
    qkv, pos = packed((1, 1, 16, 4))
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    v = torch.ones(1, 1, 16, 4, dtype=torch.float64)
    torch.manual_seed(0)
    draws = torch.stack([positional_attention(q, k, v, *pos, dropout_p=0.5) for _ in range(400)])
    assert draws.std() > 0.1
    assert abs(draws.mean() - 1) < 0.05


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 4, 3)}, ValueError, r"q must be \[B, heads, N, r\]"),
        ({"k": torch.zeros(2, 2, 5, 3)}, ValueError, "k must have the shape of q"),
        ({"v": torch.zeros(2, 2, 4, 3).double()}, TypeError, "v must have the dtype of q"),
        ({"q_pos": torch.zeros(2, 2, 4, 3)}, ValueError, "q_pos must be .* the same for every image"),
        ({"k_pos": torch.zeros(2, 4, 3, dtype=torch.int64)}, TypeError, "k_pos must be a floating"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p must be"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {name: torch.zeros(2, 2, 4, 3) for name in "qkv"} | change
    with pytest.raises(error, match=message):
        positional_attention(**arguments)
