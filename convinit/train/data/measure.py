"""What must be known of images before they are trained on: size, channels, mean and standard deviation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from convinit._progress import progress
from convinit.train.data.draws import seeded
from convinit.train.data.images import Images, ImageTensors
from convinit.train.data.subsets import stratified_order

SAMPLE = 500  # images: the standard error of a mean is below 0.01, and photographs are decoded in seconds


@dataclass(frozen=True)
class Measured:
    """What a sample of images is like.

    Attributes:
        image_size: (H, W) of all of them; None where they differ.
        channels: 1 if all are grey, else 3.
        mean, std: of each channel, with pixels in [0, 1], to 4 decimals; std is 1 where a channel has one
            intensity alone, and so nothing to scale.
    """

    image_size: tuple[int, int] | None
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def measured(images: Images) -> Measured:
    """Measures at most `SAMPLE` images, classes in proportion, which are the same on every machine."""
    if isinstance(images, ImageTensors):
        images = images.take(np.sort(stratified_order(images.labels, 0)[:SAMPLE]))
        counts = [_counts(channel) for channel in images.images.unbind(1)]
        return _of(counts, {(images.images.shape[2], images.images.shape[3])})
    total, sizes = torch.zeros(3, 256, dtype=torch.int64), set()
    channels = 1 if images.channels is None else images.channels
    for index in progress(np.sort(stratified_order(images.labels, 0)[:SAMPLE]).tolist(), "measuring images"):
        with seeded("measure", index):
            image, _ = images[index]
        pixels = image if isinstance(image, Tensor) else torch.from_numpy(np.array(image))
        if not isinstance(image, Tensor):
            pixels = pixels.unsqueeze(0) if pixels.dim() == 2 else pixels.permute(2, 0, 1)
        channels = max(channels, len(pixels))
        sizes.add((pixels.shape[1], pixels.shape[2]))
        total += torch.stack([_counts(channel) for channel in pixels])  # a grey one counts in all three
    return _of(list(total[:channels]), sizes)


def _counts(pixels: Tensor) -> Tensor:
    """How often each of the 256 intensities occurs, [256] int64."""
    return torch.bincount(pixels.flatten(), minlength=256)


def _of(counts: list[Tensor], sizes: set[tuple[int, int]]) -> Measured:
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for each in counts:
        share = each / each.sum()
        mean.append(float((share * levels).sum()))
        std.append(float((share * (levels - mean[-1]) ** 2).sum().sqrt()))
    size = sizes.pop() if len(sizes) == 1 else None
    return Measured(
        size,
        len(counts),
        tuple(round(each, 4) for each in mean),
        tuple(round(each, 4) or 1.0 for each in std),
    )
