from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu

from convinit import impulse_matrix, init, sample_offsets

GRID, TOKENS = (4, 5), 20


def mlp(hidden, bias=True):
    torch.manual_seed(0)
    return nn.Linear(TOKENS, hidden, bias=bias), nn.Linear(hidden, TOKENS, bias=bias)


def write_(fc1, fc2, offsets, **options):
    return init.impulse_token_mixing_(fc1.weight, fc1.bias, fc2.weight, fc2.bias, offsets, GRID, **options)


@pytest.mark.parametrize(("hidden", "bias"), [(20, True), (47, True), (60, False)])
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_mlp_is_a_sum_of_impulse_convolutions(generator, hidden, bias, padding_mode):
    fc1, fc2 = mlp(hidden, bias)
    before = fc1.weight.clone()
    offsets = sample_offsets(hidden // TOKENS, 3, generator=generator)
    assert write_(fc1, fc2, offsets, gain=0.5, padding_mode=padding_mode) == (fc1.weight, fc2.weight)
    x = torch.randn(2, 3, TOKENS, generator=generator)
    shifted = (
        impulse_matrix(offsets, GRID, padding_mode=padding_mode, dtype=torch.float32) @ x[:, :, None, :, None]
    )
    torch.testing.assert_close(fc2(gelu(fc1(x))), 0.5 * gelu(shifted).sum(dim=2)[..., 0])

    left_over = slice(len(offsets) * TOKENS, None)
    assert torch.equal(fc1.weight[left_over], before[left_over])
    fc2(gelu(fc1(x))).mul(x).sum().backward()
    assert (fc2.weight.grad[:, left_over] != 0).all()  # silent, and yet they learn


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_default_gain_keeps_the_second_moment_of_fan_in_scaled_weights(generator, groups):
    fc1, fc2 = mlp(groups * TOKENS)
    x = torch.randn(20000, TOKENS, generator=generator)
    offsets = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1], [-1, 1]])[
        :groups
    ]  # that differ: x is independent
    write_(fc1, fc2, offsets, padding_mode="circular")
    ours = fc2(gelu(fc1(x))).square().mean().item()
    for layer in (fc1, fc2):
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    theirs = fc2(gelu(fc1(x))).square().mean().item()
    assert ours == pytest.approx(0.4252, rel=0.02) and theirs == pytest.approx(ours, rel=0.3)


def test_in_timms_mixer(generator):
    mixer = pytest.importorskip("timm.models.mlp_mixer", exc_type=ImportError)
    block = mixer.MixerBlock(128, 49)
    fc1, fc2 = block.mlp_tokens.fc1, block.mlp_tokens.fc2
    offset = torch.tensor([[1, -2]])
    init.impulse_token_mixing_(fc1.weight, fc1.bias, fc2.weight, fc2.bias, offset, (7, 7))
    block.mlp_channels = nn.Identity()
    block.norm2 = nn.Identity()
    x = torch.randn(2, 49, 128, generator=generator)
    mixed = block(x) / 2 - x  # the identity in place of the channel MLP doubles the residual
    expected = gelu(impulse_matrix(offset, (7, 7))[0] @ block.norm1(x))
    torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("hidden", "offsets", "options", "message"),
    [
        (19, 0, {}, "a hidden unit for each of N = 20 tokens, got T = 19"),
        (41, 1, {}, r"offsets must be \[2, 2\]"),
        (20, 1, {"gain": 0.0}, "gain must be positive"),
        (20, 1, {"padding_mode": "wrap"}, "padding_mode must be"),
    ],
)
def test_bad_input(hidden, offsets, options, message):
    with pytest.raises(ValueError, match=message):
        write_(*mlp(hidden), torch.zeros(offsets, 2).long(), **options)


def test_shapes_that_do_not_agree():
    fc1, fc2 = mlp(20)
    zero = torch.zeros(1, 2).long()
    with pytest.raises(ValueError, match=r"must be \[T, 20\] and \[20, T\]"):
        init.impulse_token_mixing_(fc1.weight[:, :19], None, fc2.weight, None, zero, GRID)
    with pytest.raises(ValueError, match=r"fc1_bias must be \[20\] or None"):
        init.impulse_token_mixing_(fc1.weight, fc1.bias[:3], fc2.weight, None, zero, GRID)
