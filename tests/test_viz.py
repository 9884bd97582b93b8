from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import convinit
from convinit import viz


def pixels(figure) -> torch.Tensor:
    """The drawn figure [height, width, 4]; Figure has no canvas of a window to draw on."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8).view(
        *canvas.get_width_height()[::-1], 4
    )


def drawn_images(figure) -> torch.Tensor:
    """What was given to imshow in each panel, [panels, rows, columns]; the colour bar has no image."""
    return torch.stack(
        [torch.as_tensor(axes.images[0].get_array().data) for axes in figure.axes if axes.images]
    )


@pytest.mark.parametrize("grid_size", [(5, 5), (4, 7)])
def test_filter_of_an_impulse_matrix_is_the_impulse(grid_size):
    side = torch.arange(-2, 3)
    offsets = torch.cartesian_prod(side, side)
    filters = viz.attention_filter(convinit.impulse_matrix(offsets, grid_size), grid_size, radius=3)
    expected = torch.zeros(25, 7, 7)
    expected[torch.arange(25), 3 + offsets[:, 0], 3 + offsets[:, 1]] = 1
    torch.testing.assert_close(filters, expected, rtol=0, atol=0)


def test_filter_is_the_mean_over_tokens_with_the_neighbour_on_the_grid():
    height, width, radius = 3, 4, 2
    maps = torch.rand(2, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = viz.attention_filter(maps, (height, width), radius=radius)
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            values = [
                maps[..., i * width + j, (i + dy) * width + j + dx]
                for i in range(height)
                for j in range(width)
                if 0 <= i + dy < height and 0 <= j + dx < width
            ]
            torch.testing.assert_close(got[..., radius + dy, radius + dx], torch.stack(values).mean(dim=0))


def test_filter_defaults_to_what_the_grid_allows():
    assert viz.attention_filter(torch.rand(4, 4), (2, 2)).shape == (3, 3)
    assert viz.attention_filter(torch.rand(1, 1), (1, 1)).shape == (1, 1)
    assert viz.attention_filter(torch.rand(0, 64, 64), (8, 8)).shape == (0, 7, 7)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((torch.rand(9, 9), (4, 4)), ValueError, r"\[..., 16, 16\].*got \[9, 9\]"),
        ((torch.ones(9, 9, dtype=torch.int64), (3, 3)), TypeError, "int64"),
        ((torch.rand(9, 9), (3, 3), 3), ValueError, "radius must be at most 2.*got 3"),
    ],
)
def test_filter_refuses(arguments, error, message):
    maps, grid_size, *radius = arguments
    with pytest.raises(error, match=message):
        viz.attention_filter(maps, grid_size, radius=radius[0] if radius else None)


@pytest.fixture
def heads():
    offsets = convinit.sample_offsets(6, 3, generator=torch.Generator().manual_seed(0)).view(2, 3, 2)
    maps = torch.softmax(torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(0)), dim=-1)
    return offsets, maps


def test_pictures_of_heads_show_the_filters_and_maps(heads):
    offsets, maps = heads
    grid_size = (4, 5)
    targets = convinit.impulse_matrix(offsets.flatten(0, 1), grid_size).view(2, 3, 20, 20)
    # row-major: layer, head, then target, start, trained
    stages = torch.stack([targets, maps, 2 * maps], dim=2).flatten(0, 2)
    figure = viz.attention_maps(offsets, maps, 2 * maps, grid_size, title="maps")
    drawn = drawn_images(figure)
    torch.testing.assert_close(drawn, stages.double())
    figure = viz.attention_filters(offsets, maps, 2 * maps, grid_size, radius=2, title="filters")
    drawn = drawn_images(figure)
    torch.testing.assert_close(drawn, viz.attention_filter(stages, grid_size, radius=2).double())
    assert pixels(figure).float().std() > 10


def test_fit_filters_takes_maps_or_filters(heads):
    offsets, maps = heads
    ready = viz.attention_filter(maps, (4, 5))
    whole, small = (viz.fit_filters(offsets, given, (4, 5)) for given in (maps, ready))
    assert torch.equal(pixels(whole), pixels(small))


def test_pictures_refuse_other_shapes(heads):
    offsets, maps = heads
    with pytest.raises(ValueError, match=r"offsets must be \[layers, heads, 2\], got \[6, 2\]"):
        viz.fit_filters(offsets.flatten(0, 1), maps, (4, 5))
    with pytest.raises(ValueError, match=r"\[2, 3, N, N\].*got \[2, 2, 20, 20\]"):
        viz.attention_maps(offsets, maps, maps[:, :2], (4, 5))


def test_learning_curves_draw_mean_and_band():
    curves = {
        "one": torch.tensor([[10.0, 50.0, 90.0], [20.0, 70.0, 94.0]]),
        "a single seed": torch.tensor([[5.0, 6.0, 93.0]]),
    }
    figure = viz.learning_curves(curves, goal=90.0, title="curves")
    axes = figure.axes[0]
    assert list(axes.lines[0].get_ydata()) == [15.0, 60.0, 92.0]
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == 10 and band[:, 1].max() == 94
    assert {text.get_text() for text in axes.texts} == {"one  92.0", "a single seed  93.0"}
    heights = sorted(text.get_position()[1] for text in axes.texts)
    assert heights[1] - heights[0] > 0.05  # labels of close ends do not lie on each other
    assert pixels(figure).float().std() > 10
    with pytest.raises(ValueError, match="at least one setting"):
        viz.learning_curves({})
    with pytest.raises(ValueError, match=r"curves\['a'\] must be \[seeds, epochs\], got \[3\]"):
        viz.learning_curves({"a": torch.ones(3)})


def test_viz_needs_no_matplotlib_until_it_draws_and_never_pyplot():
    code = (
        "import sys, torch, convinit.viz as viz; assert 'matplotlib' not in sys.modules\n"
        "viz.learning_curves({'a': torch.ones(1, 2)}); assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
