"""The ends of the range of numbers: what is returned is finite and true, or an error names the argument."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

import convinit
from convinit import init
from convinit.fit import SVD, Adam
from convinit.fit.result import attention_maps, map_metrics
from convinit.nn import ConvInitAttention, SpatialConv, sincos_2d

GRID = (4, 4)
P = sincos_2d(GRID, 16)
OFFSETS = torch.tensor([[0, 1], [1, 0]])
HALF = torch.float16


def fit(pos_embed=P, **options):
    options.setdefault("scale", 0.35)
    return convinit.fit_qk(pos_embed, OFFSETS, GRID, 8, generator=torch.Generator().manual_seed(0), **options)


@pytest.mark.parametrize("size", [2.0**-100, 2.0**-20, 2.0**40])
@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-3, 2.0**100])
def test_a_fit_is_the_same_in_all_units(size, scale):
    """Powers of two change no digit: weights are those of P and scale = 1, in other units."""
    expected, found = fit(P.double(), scale=1.0), fit(P.double() * size, scale=scale * 2.0)
    unit = math.sqrt(2 * scale) * size
    torch.testing.assert_close(found.mse, expected.mse, rtol=0.02, atol=0)
    torch.testing.assert_close(found.weight_norm * unit, expected.weight_norm, rtol=0.02, atol=0)
    if scale in (2.0**-3,):  # 2 · scale is a power of four
        torch.testing.assert_close(found.wq * unit, expected.wq, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "pos_embed, options",
    [
        (P, {"scale": 1e38}),
        (P, {"scale": 1e39}),
        (P, {"scale": 1e-45}),
        (P * 1e-30, {}),
        (P.double() * 1e-300, {}),
        (P.double() * 1e200, {"scale": 1e-100}),
        (P.half(), {}),
        (P.bfloat16(), {}),
        (P.half(), {"fit": "svd"}),
        (P.half(), {"fit": Adam(steps=20)}),
        (P, {"weight_norm": 1e-30}),
        (P, {"fit": SVD(noise_std=1e300)}),
    ],
)
def test_figures_are_those_of_the_weights_that_are_returned(pos_embed, options):
    found = fit(pos_embed, **options)
    assert found.wq.dtype == pos_embed.dtype
    wq, wk = found.wq.double(), found.wk.double()
    maps = attention_maps(wq, wk, pos_embed.double(), found.scale)
    for name, expected in zip(("mse", "peak", "hit_rate"), map_metrics(maps, found.targets), strict=True):
        assert expected.isfinite().all()
        torch.testing.assert_close(getattr(found, name), expected, rtol=1e-12, atol=0)
    top = wq.abs().amax(), wk.abs().amax()
    norms = [(w / t).norm(dim=(1, 2)) * t for w, t in zip((wq, wk), top, strict=True)]
    torch.testing.assert_close(found.weight_norm, norms[0].sqrt() * norms[1].sqrt())


@pytest.mark.parametrize(
    "pos_embed, options, names",
    [
        ((P * 1e-5).half(), {}, "pos_embed.*torch.float16.*wider dtype"),
        (P * 1e-42, {}, "pos_embed.*torch.float32"),
        (P, {"scale": 1e300}, "pos_embed.*scale"),
        (P, {"scale": 1e-300}, "pos_embed.*scale"),
        (P, {"weight_norm": 1e30}, "weight_norm"),
        (P, {"weight_norm": 1e300}, "weight_norm"),
        (P, {"weight_norm": 1e-300}, "weight_norm"),
        (P, {"fit": SVD(weight_norm=1e300)}, "weight_norm"),
        (P, {"fit": SVD(noise=1e308)}, "noise"),
        (P, {"fit": Adam(steps=5, lr=1e30)}, "lr=1e\\+30.*learning rate"),
        (P, {"fit": Adam(steps=5), "scale": 1e39}, "scale"),
    ],
)
def test_what_a_dtype_does_not_hold_is_an_error(pos_embed, options, names):
    with pytest.raises(ValueError, match=names):
        fit(pos_embed, **options)


def test_the_search_is_bounded_whatever_the_numbers():
    """The op itself, whose caller brings the numbers into range: it came back from none of these."""
    X, starts = torch.randn(16, 4, dtype=torch.float64), torch.randn(1, 1, 4, 2, dtype=torch.float64)
    targets = torch.arange(16).roll(1)[None]
    for scale in (0.0, 1e39, 1e-300, math.inf, math.nan):
        *_, diagnostics = convinit.ops.qk_solver.qk_solver(
            X, X, targets, starts, starts, scale=scale, peak=0.7, max_iterations=20
        )
        assert diagnostics[0, 5] < 3 * 20 * 40
    with pytest.raises(RuntimeError, match="max_iterations"):
        convinit.ops.qk_solver.qk_solver(
            X, X, targets, starts, starts, scale=1.0, peak=0.7, max_iterations=2**62
        )


ANGLES = torch.stack([torch.arange(16) // 4 * 0.9, torch.arange(16) % 4 * 0.9], dim=1)


def rotary(dtype, **options):
    options.setdefault("scale", 0.35)
    return init.rotary_impulse_qk_(*torch.zeros(2, 2, 8, dtype=dtype), ANGLES, OFFSETS, GRID, **options)


def test_rotary_figures_are_those_of_the_biases_as_written():
    found = rotary(HALF, weight_norm=3.1)
    expected = map_metrics(found.attention_map(), found.targets)
    for name, figures in zip(("mse", "peak", "hit_rate"), expected, strict=True):
        torch.testing.assert_close(getattr(found, name), figures)
    torch.testing.assert_close(
        found.weight_norm, (found.bq.double().norm(dim=1) * found.bk.double().norm(dim=1)).sqrt()
    )


def test_a_bias_table_s_figures_are_those_of_the_value_as_written():
    found = init.impulse_bias_table_(torch.empty(49, 2, dtype=HALF), OFFSETS, GRID, value=3.3333)
    assert found.value == float(torch.tensor(3.3333, dtype=HALF)) == found.bias_table.max().item()
    torch.testing.assert_close(
        found.peak,
        torch.full((2,), math.exp(found.value) / (math.exp(found.value) + 15), dtype=torch.float64),
    )


def half(*shape):
    return torch.full(shape, 0.5, dtype=HALF)


@pytest.mark.parametrize(
    "write, name",
    [
        (lambda: rotary(HALF, scale=1e-30, peak=0.5), "bq"),
        (lambda: rotary(torch.float32, scale=1e300, peak=0.5), "bq"),
        (lambda: rotary(torch.float64, weight_norm=1e300), "bq|weight_norm"),
        (lambda: init.impulse_bias_table_(half(49, 2), OFFSETS, GRID, value=1e39), "table"),
        (lambda: init.impulse_token_mixing_(
            half(32, 16), None, half(16, 32), None, OFFSETS, GRID, gain=1e6), "fc2_weight"),
        (lambda: init.permutation_mixing_(half(2, 4, 4), gain=1e6), "weight"),
        (lambda: init.full_permutation_mixing_(half(2, 4, 4), gain=1e6), "weight"),
        (lambda: init.impulse_mixing_(half(2, 4, 4), (2, 2), 3, gain=1e6), "weight"),
        (lambda: init.norm_matched_qk_(half(2, 4, 4), half(2, 4, 4), 1e6), "wq"),
        (lambda: init.norm_matched_qk_(torch.ones(2, 4, 4), torch.ones(2, 4, 4), 1e300), "wq"),
        (lambda: init.mimetic_qk_(half(2, 4, 4), half(2, 4, 4), noise=1e12), "wq"),
        (lambda: init.mimetic_qk_(half(2, 4, 4), half(2, 4, 4), noise=1e300), "noise"),
        (lambda: init.mimetic_vo_(half(4, 4), half(4, 4), identity=1e12), "wv"),
        (lambda: init.impulse_qk_(half(2, 16, 8), half(2, 16, 8), P * 1e-5, OFFSETS, GRID, scale=0.35), "wq"),
        (lambda: ConvInitAttention(16, 2, GRID, offsets=OFFSETS, scale=1e-12, dtype=HALF), "pos_embed"),
        (lambda: ConvInitAttention(16, 2, GRID, variant="III", method="random").half().set_qk_(
            torch.full((2, 16, 8), 1e6), torch.full((2, 16, 8), 1e6)), "wq"),
    ],
)  # fmt: skip
def test_initialisers_write_finite_numbers_or_nothing(write, name):
    with pytest.raises(ValueError, match=name):
        write()


def test_gaussian_filters_of_any_variance_are_finite():
    for variance in (5e-324, 1e-300, 1e300):
        weight = init.gaussian_filter_(torch.empty(3, 1, 5, 5), variance)
        torch.testing.assert_close(weight.square().sum() / 3, torch.tensor(1 / 3))


# --- windows on small grids ------------------------------------------------------------------------------


@pytest.mark.parametrize("grid, largest", [((2, 2), 3), ((4, 4), 7), ((1, 4), 1), ((3, 8), 5)])
def test_a_window_is_held_against_the_grid_whatever_the_seed(grid, largest):
    tokens, image = math.prod(grid), (2 * grid[0], 2 * grid[1])
    vit = partial(convinit.models.SimpleViT, image, 2, 3, dim=16, depth=1, num_heads=2, head_dim=8)
    build = [
        lambda f, g: ConvInitAttention(16, 2, grid, kernel_size=f, generator=g),
        lambda f, g: vit(kernel_size=f, generator=g),
        lambda f, g: init.impulse_mixing_(torch.empty(4, tokens, tokens), grid, f, generator=g),
        lambda f, g: SpatialConv(4, f, method="impulse", grid_size=grid, generator=g),
    ]
    for make in build:
        for seed in range(8):
            with pytest.raises(ValueError, match=f"kernel_size must be at most {largest} on the"):
                make(largest + 2, torch.Generator().manual_seed(seed))
            make(largest, torch.Generator().manual_seed(seed))


def test_given_offsets_and_unfitted_baselines_need_no_window():
    ConvInitAttention(16, 2, (2, 2), offsets=OFFSETS)
    ConvInitAttention(16, 2, (2, 2), method="random")
