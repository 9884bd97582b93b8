from __future__ import annotations

import itertools
import math

import pytest
import torch

from convinit import init
from convinit.fit.result import map_metrics

WINDOW = (4, 6)
OFFSETS = torch.tensor([[0, 0], [1, 0], [0, -2], [-1, 1], [-3, 5]])


def bias_by_hand(table, window):
    """bias[q, k] = table[index], index as the Swin Transformer defines it, [heads, N, N]."""
    height, width = window
    tokens = list(itertools.product(range(height), range(width)))
    index = [
        [(yq - yk + height - 1) * (2 * width - 1) + xq - xk + width - 1 for yk, xk in tokens]
        for yq, xq in tokens
    ]
    return table[torch.tensor(index)].permute(2, 0, 1)


@pytest.mark.parametrize("goal", [{}, {"peak": 0.9}, {"value": 3.0}])
def test_impulse_table_makes_the_impulse_and_the_report_is_true(goal):
    table = torch.full((7 * 11, 5), torch.nan)
    fit = init.impulse_bias_table_(table, OFFSETS, WINDOW, **goal)
    assert ((table != 0).sum(dim=0) == 1).all()
    metrics = map_metrics(bias_by_hand(table.double(), WINDOW).softmax(dim=-1), fit.targets)
    torch.testing.assert_close(
        torch.stack([fit.mse, fit.peak, fit.hit_rate]), torch.stack(metrics), rtol=1e-5, atol=0
    )
    expected = math.exp(3) / (math.exp(3) + 23) if "value" in goal else goal.get("peak", 0.7)
    torch.testing.assert_close(fit.peak, torch.full((5,), expected).double())
    assert (fit.hit_rate == 1).all() and torch.equal(table, fit.bias_table)
    torch.testing.assert_close(fit.weight_norm, table.norm(dim=0).double(), rtol=1e-6, atol=0)
    assert "(-3,+5)" in fit.table() and "BiasTableFit(5 heads, N=24" in repr(fit)


def test_a_window_that_wraps_around():
    """Each row has one target, and one cell that it sees."""
    table = torch.full((7 * 11, 5), torch.nan)
    fit = init.impulse_bias_table_(table, OFFSETS, WINDOW, peak=0.8, padding_mode="circular")
    maps = bias_by_hand(table.double(), WINDOW).softmax(dim=-1)
    rows = list(itertools.product(range(4), range(6)))
    for (dy, dx), of_head, targets in zip(OFFSETS.tolist(), maps, fit.targets, strict=True):
        expected = torch.tensor([(y + dy) % 4 * 6 + (x + dx) % 6 for y, x in rows])
        assert torch.equal(targets, expected)
        on_target = of_head[torch.arange(24), expected]
        torch.testing.assert_close(on_target, torch.full_like(on_target, 0.8), rtol=0, atol=1e-6)
    torch.testing.assert_close(fit.peak, torch.full((5,), 0.8).double())
    torch.testing.assert_close(fit.weight_norm, table.norm(dim=0).double(), rtol=1e-6, atol=0)
    assert (table != 0).sum(dim=0).tolist() == [1, 2, 2, 4, 4]


def test_no_heads_and_another_default_device():
    table = torch.empty(7 * 11, 5)
    with torch.device("meta"):
        fit = init.impulse_bias_table_(table, OFFSETS, WINDOW)
        empty = init.impulse_bias_table_(table[:, :0], OFFSETS[:0], WINDOW)
    assert (fit.hit_rate == 1).all() and len(empty.peak) == 0


def timm_swin(table):
    swin = pytest.importorskip("timm.models.swin_transformer", exc_type=ImportError)
    layer = swin.WindowAttention(40, 5, window_size=WINDOW)
    layer.relative_position_bias_table.data.copy_(table)
    return layer._get_rel_pos_bias()


def timm_relpos(table):
    layers = pytest.importorskip("timm.layers", exc_type=ImportError)
    layer = layers.RelPosBias(WINDOW, 5)
    layer.relative_position_bias_table.data.copy_(table)
    return layer.get_bias()


def torchvision_swin(table):
    swin = pytest.importorskip("torchvision.models.swin_transformer", exc_type=(ImportError, RuntimeError))
    layer = swin.ShiftedWindowAttention(40, list(WINDOW), [0, 0], 5)
    layer.relative_position_bias_table.data.copy_(table)
    return layer.get_relative_position_bias()


def transformers_swin(table):
    swin = pytest.importorskip("transformers.models.swin.modeling_swin", exc_type=ImportError)
    layer = swin.SwinRelativePositionBias(5, WINDOW)
    layer.relative_position_bias_table.data.copy_(table)
    return layer()


@pytest.mark.parametrize("library", [timm_swin, timm_relpos, torchvision_swin, transformers_swin])
def test_real_libraries_read_the_impulse_where_it_stands(library):
    table = torch.empty(7 * 11, 5)
    fit = init.impulse_bias_table_(table, OFFSETS, WINDOW, peak=0.8)
    with torch.no_grad():
        attention = library(table)[0].softmax(dim=-1)
    _, peak, hit_rate = map_metrics(attention.double(), fit.targets)
    torch.testing.assert_close(peak, torch.full((5,), 0.8).double(), rtol=1e-5, atol=0)
    assert (hit_rate == 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": torch.empty(78, 5)}, r"table must be \[77, heads\]"),
        ({"offsets": OFFSETS[:2]}, r"offsets must be \[5, 2\]"),
        ({"offsets": OFFSETS * 4}, "offsets must"),
        ({"peak": 0.04}, "peak must be above 1/N"),
        ({"peak": 1.0}, "peak must be below 1"),
        ({"value": -1.0}, "value must be positive"),
        ({"peak": 0.5, "value": 1.0}, "not both"),
        ({"padding_mode": "reflect"}, "padding_mode must be one of zeros, circular"),
    ],
)
def test_bad_input(change, message):
    arguments = {"table": torch.empty(77, 5), "offsets": OFFSETS, "window_size": WINDOW}
    with pytest.raises(ValueError, match=message):
        init.impulse_bias_table_(**{**arguments, **change})
