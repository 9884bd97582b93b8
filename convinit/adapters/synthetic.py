"""Images that are like photographs in what an initial ViT feels: how unequal their patches are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SHAPES = 250  # discs an image; what they leave is the ground
_SMALLEST, _LARGEST = 0.03, 0.7  # radius, as a share of the image's shorter side
_TOKENS = 800  # of all images together: the means over them then vary by about a hundredth


def synthetic_images(channels: int, size: tuple[int, int], tokens: int) -> Tensor:
    """Dead leaves: discs of random place, grey, tint, grain and shade, each over the last; [B, C, H, W].

    Radii r are drawn with density ~ r⁻³, as the sizes of things in photographs. Standardised, mean 0 and
    variance 1 in each channel over the batch. The same for every call.

    Args:
        channels, size: C and (H, W).
        tokens: N that a model makes of an image; B = 800 / N, 2 to 16.
    """
    generator = torch.Generator().manual_seed(0)
    count = min(max(round(_TOKENS / tokens), 2), 16)
    images = torch.stack([_leaves(channels, *size, generator) for _ in range(count)])
    images -= images.mean(dim=(0, 2, 3), keepdim=True)
    return images / images.square().mean(dim=(0, 2, 3), keepdim=True).sqrt()


def _leaves(channels: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    with torch.device("cpu"):
        uniform = torch.rand(_SHAPES + 1, 6, generator=generator)
        normal = torch.randn(_SHAPES + 1, channels, generator=generator)
        noise = torch.randn(channels, height, width, generator=generator)
        y, x = torch.arange(height) + 0.5, torch.arange(width) + 0.5
        # Radii: inverse of the distribution function of r⁻³ between the two limits.
        u = uniform[:, 0]
        radius = (u / _LARGEST**2 + (1 - u) / _SMALLEST**2).rsqrt() * min(height, width)
        top, left = uniform[:, 1] * height, uniform[:, 2] * width
        radius[0] = 2 * (height + width)  # the ground
        covered = torch.zeros(height, width, dtype=torch.int64)
        for i in range(1, _SHAPES + 1):
            y0, y1 = max(int(top[i] - radius[i]), 0), min(int(top[i] + radius[i]) + 2, height)
            x0, x1 = max(int(left[i] - radius[i]), 0), min(int(left[i] + radius[i]) + 2, width)
            inside = (y[y0:y1, None] - top[i]) ** 2 + (x[None, x0:x1] - left[i]) ** 2 < radius[i] ** 2
            covered[y0:y1, x0:x1][inside] = i
        grey = 2 * uniform[:, 3] - 1
        grain = 0.4 * uniform[:, 4] ** 4
        angle = 2 * math.pi * uniform[:, 5]
        shade = (y[:, None] - top[covered]) * angle.sin()[covered] + (x - left[covered]) * angle.cos()[
            covered
        ]
        shade = 0.3 * shade / radius[covered]
        leaves = grey[covered] + shade + 0.4 * normal[covered].permute(2, 0, 1) + grain[covered] * noise
        light, contrast = torch.randn(1, generator=generator), torch.rand(1, generator=generator)
        return (0.6 + 0.8 * contrast) * leaves + 0.8 * light
