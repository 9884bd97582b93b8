"""Models of other libraries by name, and sizes that they refuse."""

from __future__ import annotations

import pytest
import torch

from convinit.train.build import build_with_report
from convinit.train.config_files import resolve

SIMPLE = {"dim": 32, "depth": 1, "heads": 2, "dim_head": 16, "mlp_dim": 32}
TORCHVISION = {"hidden_dim": 32, "num_layers": 1, "num_heads": 2, "mlp_dim": 32}


def built(name, patch_size, options):
    pytest.importorskip({"vit-pytorch": "vit_pytorch"}.get(name.split(":")[0], "torchvision"))
    settings = {"model.name": name, "model.patch_size": patch_size, "model.options": options}
    return build_with_report(resolve(None, None, settings), image_size=8, channels=1, num_classes=10)


@pytest.mark.parametrize(
    "name, options", [("vit-pytorch:SimpleViT", SIMPLE), ("torchvision:VisionTransformer", TORCHVISION)]
)
def test_images_tell_apart_what_comes_out(name, options):
    network, report = built(name, 2, options)
    if hasattr(network, "heads"):  # torchvision starts them at 0
        network.heads = torch.nn.Identity()
    with torch.no_grad():
        assert network(torch.randn(4, 1, 8, 8)).std(dim=0).min() > 0
    assert report.missed() is None


@pytest.mark.parametrize(
    "name, patch_size, options, message",
    [
        ("vit-pytorch:SimpleViT", 3, SIMPLE, "must be divisible by the patch size.*--option NAME=VALUE"),
        ("vit-pytorch:SimpleViT", 2, {**SIMPLE, "dim": 30}, "multiple of 4"),
        ("vit-pytorch:SimpleViT", 2, {**SIMPLE, "dim_head": 64}, "64 dimensions .* its tokens 32"),
        ("vit-pytorch:SimpleViT", 2, {"dim": 32}, "missing.*'depth'.*--option NAME=VALUE"),
        ("vit-pytorch:SimpleViT", 1, SIMPLE, "larger model.patch_size"),
        ("torchvision:VisionTransformer", 3, TORCHVISION, "indivisible by patch size"),
        ("torchvision:VisionTransformer", 2, {**TORCHVISION, "num_heads": 5}, "divisible by num_heads"),
    ],
)  # fmt: skip
def test_wrong_sizes_are_errors_of_the_settings(name, patch_size, options, message):
    with pytest.raises(ValueError, match=message):
        built(name, patch_size, options)
