"""`init_vit_` on diverged models, NumPy's numbers, small grids and another default device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import convinit

timm = pytest.importorskip("timm", exc_type=ImportError)
pytestmark = pytest.mark.filterwarnings("ignore:the position embedding makes up")


def simple_vit(name: str, img_size: int, **options):
    library = pytest.importorskip("vit_pytorch", exc_type=ImportError)
    sizes = {"patch_size": 16, "dim": 64, "depth": 2, "heads": 2, "dim_head": 32, "mlp_dim": 64}
    return getattr(library, name)(image_size=img_size, **{**sizes, **options})


def vit(depth: int = 2, **options):
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=depth, num_classes=3, **options
    )


@pytest.mark.parametrize(
    "name, part",
    [
        ("pos_embed", "pos_embed holds NaN"),
        ("cls_token", "cls_token holds NaN"),
        ("blocks.1.norm1.weight", "blocks.1.norm1.weight holds NaN"),
    ],
)
def test_a_diverged_model_is_named_and_left_alone(name, part):
    model = vit()
    with torch.no_grad():
        model.get_parameter(name).fill_(float("nan"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=part):
        convinit.init_vit_(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(7), before[name].nan_to_num(7))


@pytest.mark.parametrize(
    "given, plain",
    [
        ({"layers": np.arange(1)}, {"layers": [0]}),
        ({"layers": np.int64(-1)}, {"layers": 1}),
        ({"peak": np.float32(0.5)}, {"peak": 0.5}),
        ({"pos_embed_gain": np.int64(60)}, {"pos_embed_gain": 60.0}),
    ],
)
def test_numpy_s_numbers_are_numbers(given, plain):
    weights = []
    for options in (given, plain):
        torch.manual_seed(0)
        model = vit()
        convinit.init_vit_(model, generator=torch.Generator().manual_seed(0), **options)
        weights.append(model.state_dict())
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name])


@pytest.mark.parametrize(
    "layers, error", [(1.0, TypeError), (None, TypeError), ([True], TypeError), ([9], ValueError)]
)
def test_wrong_layers_are_named(layers, error):
    with pytest.raises(error, match="layers must"):
        convinit.init_vit_(vit(), layers=layers)


@pytest.mark.parametrize("method", ["impulse", "scrambled", "norm_matched", "position_only"])
def test_images_of_one_patch_are_refused(method):
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, depth=1)
    with pytest.raises(ValueError, match="two tokens or more on its grid"):
        convinit.init_vit_(model, method=method)
    convinit.init_vit_(model, method="mimetic")


def test_heads_that_are_wider_than_the_tokens_are_refused():
    with pytest.raises(ValueError, match="64 dimensions .* its tokens 32"):
        convinit.init_vit_(simple_vit("SimpleViT", num_classes=3, img_size=64, dim=32, dim_head=64))


def test_a_window_is_held_against_the_grid_whatever_the_seed():
    for seed in range(5):
        with pytest.raises(ValueError, match="kernel_size must be at most 7 on the 4 x 4 grid"):
            convinit.init_vit_(vit(), kernel_size=9, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "mixer_s32_224", "SimpleViT"]
)
def test_another_default_device_changes_nothing(name):
    """As `torch.set_default_device("cuda")` would; the meta device stands for it."""
    made = simple_vit if name == "SimpleViT" else timm.create_model
    model = made(name, num_classes=3, img_size=64)
    next(
        parameter for name, parameter in model.named_parameters() if "qkv" in name or "mlp" in name
    ).requires_grad_(False)
    with torch.device("meta"):
        report = convinit.init_vit_(model, kernel_size=1)
        report.summary()
    assert all(record.mse.device.type == "cpu" for record in report.records)
