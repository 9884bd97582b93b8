"""The plain call of `init_vit_` where it is easy to be wrong in silence."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

import convinit

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.filterwarnings("ignore:attention on its target")


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


def vit(depth=2):
    return timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, depth=depth, num_classes=10)


class Plain(nn.Module):
    """Patches, perhaps BatchNorm, P and PyTorch's own layers."""

    def __init__(self, *, bn=False, width=192, persistent=True):
        super().__init__()
        self.patch = nn.Conv2d(3, 96, 4, 4)
        self.bn = nn.BatchNorm1d(96) if bn else None
        self.register_buffer("pos", 0.02 * torch.randn(64, 96, generator=seeded()), persistent=persistent)
        layer = nn.TransformerEncoderLayer(96, 4, width, batch_first=True, norm_first=True)
        self.enc = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        x = self.patch(x).flatten(2)
        x = x if self.bn is None else self.bn(x)
        return self.enc(x.mT + self.pos)


def by_hand(model, **options):
    return convinit.init_vit_(model, grid_size=(8, 8), pos_embed=model.pos, generator=seeded(), **options)


def peaks(report):
    return [float(record.peak_on_images.mean()) for record in report.records]


def test_sharpness_does_not_depend_on_how_many_images_are_given():
    images = torch.randn(600, 3, 64, 64, generator=seeded())
    few, many = (
        peaks(convinit.init_vit_(vit(), images=images[:count], generator=seeded())) for count in (16, 600)
    )
    assert few == pytest.approx(many, abs=0.05)


@pytest.mark.parametrize("count", [3, 32, 100])
def test_every_image_counts(count):
    images = torch.randn(count, 3, 64, 64, generator=seeded())
    images[1::2] *= 4  # the larger the content, the smaller the share of P
    assert peaks(convinit.init_vit_(vit(), images=images, generator=seeded())) == pytest.approx(
        [0.7, 0.7], abs=0.012
    )


def test_under_autocast():
    plain, under = vit(), vit()
    under.load_state_dict(plain.state_dict())
    convinit.init_vit_(plain, generator=seeded())
    with torch.autocast("cpu", torch.bfloat16):
        convinit.init_vit_(under, generator=seeded())
    for a, b in zip(plain.state_dict().values(), under.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_batch_norm_behind_the_patches_is_refused():
    model = Plain(bn=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match='position must be "keep" .*BatchNorm1d divides'):
        by_hand(model)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    by_hand(Plain())


def test_a_position_embedding_that_is_not_saved_is_not_replaced():
    with pytest.raises(ValueError, match="position embedding of Plain must be in its state_dict"):
        by_hand(Plain(persistent=False))


def test_two_models_in_one_are_both_set_or_neither():
    models = nn.ModuleList([vit(), vit()])
    nn.init.normal_(models[1].blocks[0].norm1.weight)
    before = copy.deepcopy(models.state_dict())
    with pytest.raises(ValueError, match="must not be trained yet"):
        convinit.init_vit_(models, generator=seeded())
    assert all(torch.equal(each, before[name]) for name, each in models.state_dict().items())


def test_a_part_that_does_not_run_is_named():
    class Teacher(nn.Module):
        def __init__(self):
            super().__init__()
            self.student = vit()
            self.teacher = copy.deepcopy(self.student)

        def forward(self, x):
            return self.student(x)

    with pytest.raises(ValueError, match="model must run the .* that makes its tokens"):
        convinit.init_vit_(Teacher(), images=torch.randn(4, 3, 64, 64, generator=seeded()))


def test_only_what_writes_to_the_tokens_leaves_the_subspace():
    model = Plain(width=96)
    by_hand(model)
    assert torch.linalg.matrix_rank(model.enc.layers[0].linear1.weight) == 96
    assert torch.linalg.matrix_rank(model.enc.layers[0].linear2.weight) < 96


def test_options_of_numpy_in_json():
    report = convinit.init_vit_(
        vit(1), kernel_size=np.int64(3), weight_norm=np.float32(3), generator=seeded()
    )
    assert json.loads(report.to_json())["options"]["kernel_size"] == 3
