from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import convinit
from convinit import viz
from convinit.records import DriftHistory


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


@pytest.fixture
def vit():
    """A ViT with a class and two register tokens on 4 × 6 patches, and its report."""
    pytest.importorskip("timm", exc_type=ImportError)
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=(16, 24), patch_size=4, embed_dim=48, depth=2, num_heads=3, num_classes=3, reg_tokens=2
    )
    return model, convinit.init_vit_(
        model, pos_embed_gain=60.0, peak=0.8, generator=torch.Generator().manual_seed(1)
    )


def test_head_maps_are_what_the_patches_of_the_model_see(vit):
    model, report = vit
    images = torch.randn(5, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    maps = viz.head_maps(report, model, images)
    with torch.no_grad():
        attn, x = model.blocks[0].attn, model.blocks[0].norm1(model._pos_embed(model.patch_embed(images)))
        q, k, _ = attn.qkv(x).unflatten(2, (3, 3, 16)).permute(2, 0, 3, 1, 4)
        expected = (attn.scale * q @ k.mT).softmax(dim=-1).mean(dim=0)[:, 3:, 3:]
    torch.testing.assert_close(maps[0], expected)
    assert [list(each.shape) for each in maps] == [[3, 24, 24]] * 2
    positions = viz.head_maps(report)
    for each, record in zip(positions, report.records, strict=True):
        inside = record.targets >= 0
        on_target = each.gather(2, record.targets.clamp(min=0)[:, :, None])[:, :, 0]
        torch.testing.assert_close((on_target * inside).sum(1) / inside.sum(1), record.peak.float())


def circles(axes):
    from matplotlib.patches import Circle

    return [patch.center for patch in axes.patches if isinstance(patch, Circle)]


def test_model_filters_circle_the_impulse_of_every_head(vit):
    _, report = vit
    before = viz.head_maps(report)
    figure = viz.model_filters(report, [torch.full_like(each, 1 / 24) for each in before], title="filters")
    start, now = (axes for axes in figure.axes if axes.images)
    assert (start.get_title(), now.get_title()) == ("at the start", "now")
    filters = torch.cat([viz.attention_filter(each, (4, 6), radius=2) for each in before])
    for drawn, filter, (x, y) in zip(now.images, filters, circles(now), strict=True):
        shown = torch.as_tensor(drawn.get_array().data)
        torch.testing.assert_close(shown, filter.double())
        left, right, bottom, top = drawn.get_extent()
        column, row = int((x - left) / (right - left) * 5), int((y - top) / (bottom - top) * 5)
        assert shown[row, column] == shown.max() > 0.5
    assert all(abs(drawn.get_array() - 1 / 24).max() < 1e-6 for drawn in start.images)
    assert pixels(figure).float().std() > 10


def test_model_maps_keep_lines_of_large_maps(vit):
    _, report = vit
    (axes,) = (axes for axes in viz.model_maps(report).axes if axes.images)
    shown = torch.stack([torch.as_tensor(drawn.get_array().data) for drawn in axes.images])
    torch.testing.assert_close(shown, torch.cat(viz.head_maps(report)).double())

    from convinit.viz.model import smaller

    (small,) = smaller([torch.eye(150)[None]])
    torch.testing.assert_close(small, torch.eye(50)[None])


def test_squares_of_layers_with_different_heads_and_without_impulses():
    from convinit.viz.squares import squares

    filters = [torch.rand(2, 5, 5), torch.rand(3, 3, 3), torch.rand(1, 5, 5)]
    offsets = [torch.tensor([[0, 1], [-2, 3]]), None, torch.tensor([[1, 0]])]
    figure = squares({"one": filters}, [0, 3, 4], offsets)
    axes = figure.axes[0]
    assert len(axes.images) == 6
    assert len(circles(axes)) == 2  # one impulse is outside the filter
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "3", "4"]


def test_pictures_of_a_model_refuse(vit):
    model, report = vit
    with pytest.raises(ValueError, match="model and images together"):
        viz.model_filters(report, images=torch.randn(1, 3, 16, 24))
    with pytest.raises(ValueError, match=r"before must be what head_maps\(report\) gave"):
        viz.model_maps(report, viz.head_maps(report)[:1])
    with pytest.raises(ValueError, match="radius must be at most 3"):
        viz.model_filters(report, radius=4)
    model.patch_drop = torch.nn.Module()
    model.patch_drop.forward = lambda x: x[:, :10]
    with pytest.raises(ValueError, match=r"27 tokens to blocks\.0\.attn, got 10"):
        viz.head_maps(report, model, torch.randn(1, 3, 16, 24))


def test_drift_draws_a_line_for_every_head():
    peak = torch.rand(4, 5, 3, generator=torch.Generator().manual_seed(0))
    peak[:, 4, 2] = torch.nan  # a layer of two heads
    history = DriftHistory(torch.tensor([0, 10, 20, 25]), torch.arange(2, 7), peak, peak, 1 - peak)
    figure = viz.drift(history, measure="distance", title="drift")
    assert [len(axes.lines) for axes in figure.axes] == [4, 4, 4, 4, 3]
    for layer, axes in enumerate(figure.axes):
        heads = torch.stack([torch.as_tensor(line.get_ydata()) for line in axes.lines])
        torch.testing.assert_close(heads[:-1], (1 - peak[:, layer, : len(heads) - 1]).mT.double())
        torch.testing.assert_close(heads[-1], heads[:-1].mean(dim=0))
        assert axes.get_title(loc="left") == f"layer {layer + 2}"
        assert axes.get_title(loc="right") == f"{heads[-1, 0]:.2f} → {heads[-1, -1]:.2f}"
        assert list(axes.lines[0].get_xdata()) == [0, 10, 20, 25]
    assert pixels(figure).float().std() > 10
    with pytest.raises(ValueError, match="measure must be one of peak, hit_rate, distance, got 'mse'"):
        viz.drift(history, measure="mse")


def test_viz_needs_no_matplotlib_until_it_draws_and_never_pyplot():
    code = (
        "import sys, torch, convinit.viz as viz; assert 'matplotlib' not in sys.modules\n"
        "viz.learning_curves({'a': torch.ones(1, 2)}); assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_figure_5_of_the_paper():
    """At σ = 1 the maps are nearly uniform, at 10,000 binary, and not one column is much preferred."""
    maps, figure = viz.temperature_maps(generator=torch.Generator().manual_seed(0))
    assert maps.shape == (3, 256, 256) and len(figure.axes) == 3
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones(3, 256))
    flat, middle, binary = maps.max(dim=-1).values.mean(dim=-1).tolist()
    assert flat < 1.1 / 256 and 5 / 256 < middle < 0.5 and binary > 0.95
    assert len(maps[2].argmax(dim=-1).unique()) > 0.5 * 256
    again, _ = viz.temperature_maps((1e4,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(again[0], maps[2])
    with pytest.raises(ValueError, match="scales must be positive"):
        viz.temperature_maps((0.0,))
