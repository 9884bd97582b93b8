"""What the demo compares: initial weights, on one small Vision Transformer, and a ConvMixer beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import nn

GRID_SIZE = (8, 8)  # one token a pixel


@dataclass(frozen=True)
class Arm:
    """One line of the table.

    Attributes:
        label: how it is named in the table and the figures.
        model: the class of `convinit.models`, by its name.
        options: what sets it apart; keyword arguments of the model.
    """

    label: str
    model: Literal["SimpleViT", "ConvMixer"]
    options: Mapping[str, Any]


_VIT = {
    "dim": 64,
    "depth": 4,
    "num_heads": 4,
    "head_dim": 16,
    "mlp_dim": 128,
    "variant": "I",
    "alpha": 0.2,
    "kernel_size": 3,
    "offsets": "random",
}
_CONVMIXER = {"dim": 64, "depth": 4, "kernel_size": 3}

ARMS = {
    "default": Arm("default", "SimpleViT", {**_VIT, "method": "default", "values": "default"}),
    "mimetic-vo": Arm("mimetic + V·proj", "SimpleViT", {**_VIT, "method": "mimetic"}),
    "impulse": Arm("impulse", "SimpleViT", {**_VIT, "method": "impulse", "values": "default"}),
    "impulse-vo": Arm("impulse + V·proj", "SimpleViT", {**_VIT, "method": "impulse"}),
    "scrambled-vo": Arm("control: scrambled + V·proj", "SimpleViT", {**_VIT, "method": "scrambled"}),
    "random-vo": Arm(
        "control: random + V·proj",
        "SimpleViT",
        {**_VIT, "method": "norm_matched"},
    ),
    "convmixer": Arm(
        "ConvMixer, frozen impulses",
        "ConvMixer",
        {**_CONVMIXER, "method": "impulse", "trainable_mixing": False},
    ),
}
QUICK = ("default", "mimetic-vo", "impulse-vo", "scrambled-vo")
OURS = "impulse-vo"  # its maps are drawn


def build_model(arm: Arm, num_classes: int, seed: int) -> nn.Module:
    """The model of an arm. One seed gives all Vision Transformers the same offsets."""
    import torch

    from convinit import models

    generator = torch.Generator().manual_seed(seed)
    model: type[nn.Module] = getattr(models, arm.model)
    return model(GRID_SIZE, 1, num_classes, channels=1, generator=generator, **arm.options)
