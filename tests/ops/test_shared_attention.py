from __future__ import annotations

import pytest
import torch

from convinit.ops.shared_attention import shared_attention, shared_attention_reference


def inputs(batch=3, heads=2, tokens=6, map_rank=4, rank=5, dtype=torch.float64, requires_grad=False):
    g = torch.Generator().manual_seed(0)
    maps = torch.randn(2, heads, tokens, map_rank, generator=g, dtype=torch.float64).to(dtype)
    x = torch.randn(batch, tokens, heads * rank, generator=g, dtype=torch.float64).to(dtype)
    maps.requires_grad_(requires_grad)
    x.requires_grad_(requires_grad)
    return maps, x, x.view(batch, tokens, heads, rank).transpose(1, 2)  # values as a strided view


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize(("tokens", "map_rank", "rank"), [(6, 4, 5), (1, 1, 1), (9, 16, 2)])
def test_value_and_gradients_match_the_reference(batch, tokens, map_rank, rank):
    def run(f):
        maps, x, v = inputs(batch, 2, tokens, map_rank, rank, requires_grad=True)
        out = f(*maps, v, scale=0.3)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        return out, maps.grad, x.grad

    for ours, reference in zip(run(shared_attention), run(shared_attention_reference), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-11, atol=1e-12)


def test_reference_is_scaled_dot_product_attention_with_expanded_maps():
    maps, _, v = inputs(rank=4)
    q, k = maps.unsqueeze(1).expand(-1, len(v), -1, -1, -1)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2).flatten(2)
    torch.testing.assert_close(shared_attention_reference(*maps, v, scale=0.3), expected)


def test_gradcheck():
    maps, _, v = inputs(2, 2, 4, 3, 2, requires_grad=True)
    v = v.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda maps, v: shared_attention(*maps, v), (maps, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_that_of_eager(dtype):
    maps, _, v = inputs(4, 4, 64, 32, 16, dtype)
    exact = shared_attention_reference(*maps.double(), v.double())
    eager = shared_attention_reference(*maps, v)
    ours = shared_attention(*maps, v)
    assert ours.dtype == dtype
    assert (ours.double() - exact).abs().max() <= 2 * (eager.double() - exact).abs().max()


@pytest.mark.parametrize("map_rank", [4, 6])
def test_inference_of_a_single_image(map_rank):
    q_map, k_map = torch.randn(2, 3, 65, map_rank, dtype=torch.float64)
    v = torch.randn(1, 3, 65, 4, dtype=torch.float64)
    with torch.no_grad():
        out = shared_attention(q_map, k_map, v, scale=0.3)
    torch.testing.assert_close(out, shared_attention_reference(q_map, k_map, v, scale=0.3))


def test_dropout_mask_is_shared_by_the_images():
    maps, _, v = inputs(2)
    v = v[:1].expand(2, -1, -1, -1)
    torch.manual_seed(0)
    out = shared_attention(*maps, v, dropout_p=0.5)
    torch.testing.assert_close(out[0], out[1], rtol=0, atol=0)
    assert not torch.allclose(out, shared_attention(*maps, v))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q_map": torch.zeros(1, 2, 4, 3)}, ValueError, r"q_map must be \[heads, N, r\]"),
        ({"k_map": torch.zeros(2, 3, 4)}, ValueError, "k_map must have the shape of q_map"),
        ({"v": torch.zeros(5, 2, 3, 3)}, ValueError, r"v must be \[B, 2, 4, r\]"),
        ({"k_map": torch.zeros(2, 4, 3).double()}, TypeError, "one floating-point dtype"),
        ({"v": torch.zeros(5, 2, 4, 3, dtype=torch.int64)}, TypeError, "v must be a floating"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p must be"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"q_map": torch.zeros(2, 4, 3), "k_map": torch.zeros(2, 4, 3), "v": torch.zeros(5, 2, 4, 7)}
    with pytest.raises(error, match=message):
        shared_attention(**arguments | change)
