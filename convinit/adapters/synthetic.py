"""Images that are like photographs in what an initial ViT feels: how unequal their patches are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SHAPES = 250  # discs an image, the first of which is the ground
_SMALLEST, _LARGEST = 0.03, 0.7  # radius, as a share of the image's shorter side
_TOKENS = 400  # of all images together: 2 of 224 pixels give factors as near to those of photographs as 4


def synthetic_images(channels: int, size: tuple[int, int], tokens: int) -> Tensor:
    """Dead leaves: discs of random place, grey, tint, grain and shade, each over the last; [B, C, H, W].

    Radii r are drawn with density ~ r⁻³, as the sizes of things in photographs. Standardised, mean 0 and
    variance 1 in each channel over the batch. The same for every call.

    Args:
        channels, size: C and (H, W).
        tokens: N that a model makes of an image; B = 400 / N, 2 to 16.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    count = min(max(round(_TOKENS / tokens), 2), 16)
    images = torch.stack([_leaves(channels, *size, generator) for _ in range(count)])
    images -= images.mean(dim=(0, 2, 3), keepdim=True)
    return images / images.square().mean(dim=(0, 2, 3), keepdim=True).sqrt()


def _leaves(channels: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    uniform = torch.rand(_SHAPES, 6, generator=generator, device="cpu")
    normal = torch.randn(_SHAPES, channels, generator=generator, device="cpu")
    noise = torch.randn(channels, height, width, generator=generator, device="cpu")
    light = torch.randn(1, generator=generator, device="cpu")
    contrast = torch.rand(1, generator=generator, device="cpu")
    y, x = (torch.arange(n, device="cpu") + 0.5 for n in (height, width))

    # Radii: the inverse of the distribution function of r⁻³ between the two limits.
    u = uniform[:, 0]
    radius = (u / _LARGEST**2 + (1 - u) / _SMALLEST**2).rsqrt() * min(height, width)
    radius[0] = 2 * (height + width)  # the ground
    top, left = uniform[:, 1] * height, uniform[:, 2] * width
    covered = torch.zeros(height, width, dtype=torch.int64, device="cpu")
    for i, (r, cy, cx) in enumerate(zip(radius.tolist(), top.tolist(), left.tolist(), strict=True)):
        rows = slice(max(int(cy - r), 0), max(int(cy + r) + 2, 0))
        columns = slice(max(int(cx - r), 0), max(int(cx + r) + 2, 0))
        inside = (y[rows, None] - cy) ** 2 + (x[None, columns] - cx) ** 2 < r * r
        covered[rows, columns].masked_fill_(inside, i)

    grey, grain, angle = 2 * uniform[:, 3] - 1, 0.4 * uniform[:, 4] ** 4, 2 * math.pi * uniform[:, 5]
    down, right = (y[:, None] - top[covered]) / radius[covered], (x - left[covered]) / radius[covered]
    shade = 0.3 * (down * angle.sin()[covered] + right * angle.cos()[covered])
    tint = 0.4 * normal[covered].permute(2, 0, 1)
    leaves = grey[covered] + shade + tint + grain[covered] * noise
    return (0.6 + 0.8 * contrast) * leaves + 0.3 * light
