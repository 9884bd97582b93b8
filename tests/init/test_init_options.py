"""The options that layers, models, `init_vit_` and training share: one set of words, defaults and checks."""

import dataclasses
import inspect

import numpy as np
import pytest
import torch

import convinit
from convinit.fit import Adam, Newton
from convinit.init.options import METHODS, InitOptions
from convinit.models import SimpleViT
from convinit.nn import ConvInitAttention
from convinit.train.config import VIT_INITS, InitConfig

DEFAULTS = {each.name: each.default for each in dataclasses.fields(InitOptions)}


@pytest.mark.parametrize("function", [ConvInitAttention, SimpleViT, convinit.init_vit_])
def test_defaults_are_the_same_everywhere(function):
    parameters = inspect.signature(function).parameters
    assert {name: parameters[name].default for name in DEFAULTS} == DEFAULTS


def test_the_configuration_has_the_same_options():
    assert InitConfig().of_queries_keys() == DEFAULTS
    assert VIT_INITS == METHODS


@pytest.mark.parametrize(
    ("side", "window"), [(1, 1), (2, 3), (4, 3), (7, 3), (8, 3), (10, 5), (14, 7), (16, 7), (32, 7)]
)
def test_the_window_is_half_the_grid(side, window):
    assert InitOptions().window([(side, 40)]) == window
    assert InitOptions().window([(40, 40), (40, side)]) == window
    assert InitOptions(method="mimetic", kernel_size=9).window([(2, 2)]) == 9  # nothing is fitted


def test_offsets_are_dealt_evenly_over_the_layers_of_a_model():
    def model(**options):
        sizes = {"dim": 32, "depth": 3, "num_heads": 3, "head_dim": 8, "mlp_dim": 8, "method": "random"}
        return SimpleViT(8, 1, 2, **sizes, generator=torch.Generator().manual_seed(0), **options)

    def offsets(**options):
        return torch.cat([block.attn.offsets for block in model(**options).blocks])

    assert len(offsets().unique(dim=0)) == 9
    assert len(offsets(offsets="random").unique(dim=0)) < 9
    assert offsets(offsets="fixed").view(3, 3, 2).tolist() == [[[0, 0], [-1, 0], [0, 1]]] * 3
    drawn, given = model(), model(offsets=offsets())
    assert all(map(torch.equal, drawn.state_dict().values(), given.state_dict().values()))


def test_what_is_asked_for():
    assert InitOptions().target_peak == 0.7
    assert InitOptions(method="scrambled", peak=np.float32(0.5)).peak == 0.5
    assert type(InitOptions(peak=np.float32(0.5)).peak) is float
    assert InitOptions(weight_norm=np.float64(3)).weight_norm == 3
    assert InitOptions(weight_norm=3).target_peak is None
    assert InitOptions(fit="svd").target_peak is None and InitOptions(method="mimetic").target_peak is None
    assert InitOptions(fit="adam").solver(6) == Adam(heads=6)
    assert InitOptions(fit=Adam(heads=2)).solver(6) == Adam(heads=2)
    assert InitOptions(fit=Newton(tolerance=0.1)).by_newton


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "newton"}, ValueError, "method must be one of impulse, mimetic, random, default"),
        ({"fit": "impulse"}, ValueError, "fit must be one of newton, adam, svd"),
        ({"fit": 3}, TypeError, "fit must be one of newton, adam, svd"),
        ({"values": "keep"}, ValueError, "values must be one of mimetic, default"),
        ({"peak": 0.5, "weight_norm": 3}, ValueError, "weight_norm or peak, not both"),
        (
            {"method": "default", "weight_norm": 3},
            ValueError,
            "weight_norm must be None with method='default'",
        ),
        ({"fit": Adam(), "peak": 0.5}, ValueError, r"peak must be None with .* fit=Adam\("),
        ({"peak": 1}, ValueError, "peak must be below 1"),
        ({"kernel_size": 4}, ValueError, "kernel_size must be odd"),
        ({"offsets": "stratified"}, ValueError, 'offsets must be None, "random", "fixed" or a tensor'),
        ({"offsets": "fixed", "kernel_size": 5}, ValueError, "kernel_size must be 3"),
        ({"offsets": [[0, 1]]}, TypeError, "offsets must be an integer tensor"),
        ({"padding_mode": "same"}, ValueError, "padding_mode must be one of"),
        ({"distribution": "cauchy"}, ValueError, "distribution must be one of"),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        InitOptions(**options)


def test_a_window_must_fit_every_grid():
    with pytest.raises(ValueError, match="kernel_size must be at most 3 on the 2 x 9 grid"):
        InitOptions(kernel_size=5).window([(9, 9), (2, 9)])
    with pytest.raises(ValueError, match=r"offsets must be \[4, 2\], one row for each head of 2 layers"):
        InitOptions(offsets=torch.zeros(3, 2, dtype=torch.int64)).deal([2, 2], 3, None)
