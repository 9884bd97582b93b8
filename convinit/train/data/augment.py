"""Augmentation: options that a configuration can hold, and draws that depend on the image alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from convinit._checks import check_int
from convinit.train.data.draws import derived_seed
from convinit.train.data.images import require
from convinit.train.data.sources import ImageData
from convinit.train.data.subsets import check_real


@dataclass(frozen=True)
class AugmentOptions:
    """How training images are changed, in this order: resized crop, RandAugment, padded crop, flip, erasing.

    Attributes:
        num_ops: operations of RandAugment on an image; 0 leaves RandAugment out.
        magnitude: of RandAugment's operations, 0 to 30.
        flip: mirror every second image, left to right.
        crop: "none"; "pad", a random window of the image padded with zeros; "resized", a random window of
            random size and aspect ratio (3/4 to 4/3), resized.
        padding: pixels on each side, for crop "pad".
        scale: smallest and largest area of the window as shares of the image's, for crop "resized".
        erasing: probability that a random rectangle is set to the mean.
    """

    num_ops: int = 0
    magnitude: int = 14
    flip: bool = False
    crop: str = "none"
    padding: int = 4
    scale: tuple[float, float] = (0.08, 1.0)
    erasing: float = 0.0

    def __post_init__(self) -> None:
        for name in ("num_ops", "magnitude", "padding"):  # NumPy's integers become Python's
            number = check_int(name, getattr(self, name), minimum=1 if name == "padding" else 0)
            object.__setattr__(self, name, number)
        if not isinstance(self.flip, bool):
            raise TypeError(f"flip must be True or False, got {self.flip!r}")
        if self.magnitude > 30:
            raise ValueError(f"magnitude must be 0 to 30, got {self.magnitude}")
        if self.crop not in ("none", "pad", "resized"):
            raise ValueError(f"crop must be none, pad or resized, got {self.crop!r}")
        if not isinstance(self.scale, list | tuple) or len(self.scale) != 2:  # a config file gives a list
            raise TypeError(f"scale must be (smallest, largest), got {self.scale!r}")
        object.__setattr__(self, "scale", tuple(check_real("scale", each) for each in self.scale))
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be (smallest, largest), above 0 and at most 1, got {self.scale}")
        if not 0 <= check_real("erasing", self.erasing) <= 1:
            raise ValueError(f"erasing must be a probability, 0 to 1, got {self.erasing}")

    @property
    def random(self) -> bool:
        """Whether anything is drawn."""
        return bool(self.num_ops or self.flip or self.crop != "none" or self.erasing)


PRESETS = {
    "none": AugmentOptions(),
    "flip-crop": AugmentOptions(flip=True, crop="pad"),
    "paper": AugmentOptions(num_ops=2, magnitude=14, flip=True, crop="resized"),
    # What the authors' training script does, unlike the text of the paper.
    "paper-code": AugmentOptions(num_ops=2, magnitude=14, flip=True, crop="pad"),
}

_NOT_MIRRORED = ("digits", "svhn")  # a mirrored digit is another sign


class Augmentation:
    """Image → float32 tensor, changed at random, resized and normalised; made by `augmentation`.

    Draws come from torch's CPU generator; `Augmented` seeds it for each image.

    Attributes:
        options: what it does.
        random: False where nothing is drawn; then whole batches [B, C, H, W] of uint8 are taken too.
    """

    def __init__(self, options: AugmentOptions, data: ImageData) -> None:
        if data.image_size is None:
            raise ValueError(
                f"the images of {data.name!r} differ in size; give load_data an image_size to resize them to"
            )
        self.options, self.random = options, options.random
        size = data.image_size
        steps: list[Callable[[Any], Any]] = [partial(fit, size=size)]
        if options.random:
            v2 = require("torchvision.transforms.v2", "augmentation")
            if options.crop == "resized":
                steps = [v2.RandomResizedCrop(size, scale=options.scale)]
            if options.num_ops:
                steps.append(v2.RandAugment(options.num_ops, options.magnitude))
            if options.crop == "pad":
                steps.append(v2.RandomCrop(size, padding=options.padding))
            if options.flip:
                steps.append(v2.RandomHorizontalFlip())
        steps.append(partial(normalise, mean=_per_channel(data.mean), std=_per_channel(data.std)))
        if options.erasing:
            steps.append(v2.RandomErasing(options.erasing))
        self._steps = tuple(steps)

    def __call__(self, image: Any) -> Tensor:
        for step in self._steps:
            image = step(image)
        return image


def augmentation(name_or_options: str | AugmentOptions, data: ImageData) -> Augmentation:
    """The transform of a data set's images: PIL image or uint8 [C, H, W] → float32 [C, H, W], normalised.

    Args:
        name_or_options: "none", resized and normalised only, for test images; "flip-crop", a window of the
            image padded by 4 and a flip; "paper", RandAugment (2 operations, magnitude 14), flip and resized
            crop; "paper-code", as the authors' script: RandAugment, window of the image padded by 4, flip.
            The presets do not flip digits and SVHN. Or options spelled out.
        data: gives the size, mean and std.

    Raises:
        ImportError: torchvision is not installed ("none" without resizing does without it).
        ValueError: there is no such preset, or the data set has no image size.
    """
    if isinstance(name_or_options, AugmentOptions):
        return Augmentation(name_or_options, data)
    if name_or_options not in PRESETS:
        raise ValueError(
            f"augmentation must be AugmentOptions or one of {', '.join(PRESETS)}, got {name_or_options!r}"
        )
    options = PRESETS[name_or_options]
    return Augmentation(replace(options, flip=options.flip and data.name not in _NOT_MIRRORED), data)


def fit(image: Any, size: tuple[int, int]) -> Any:
    """A PIL image or tensor [..., H, W], scaled to cover `size` and cut to it in the middle."""
    height, width = image.shape[-2:] if isinstance(image, Tensor) else (image.height, image.width)
    if (height, width) == size:
        return image
    functional = require("torchvision.transforms.v2", "resizing images").functional
    scale = max(size[0] / height, size[1] / width)
    covering = [max(size[0], round(height * scale)), max(size[1], round(width * scale))]
    return functional.center_crop(functional.resize(image, covering, antialias=True), list(size))


def normalise(image: Any, mean: Tensor, std: Tensor) -> Tensor:
    """(pixels / 255 − mean) / std, float32 [..., C, H, W], of a PIL image or uint8 tensor."""
    if not isinstance(image, Tensor):
        pixels = torch.from_numpy(np.array(image))  # [H, W] or [H, W, C]
        image = pixels.unsqueeze(0) if pixels.dim() == 2 else pixels.permute(2, 0, 1).contiguous()
    if image.dtype != torch.uint8 or image.shape[-3] != len(mean):
        raise ValueError(
            f"an image must be uint8 of {len(mean)} channels, got {image.dtype} of shape {list(image.shape)}"
        )
    return image.to(torch.float32).div_(255).sub_(mean).div_(std)


def _per_channel(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)


class Augmented(Dataset):
    """A data set under a transform whose draws depend on (seed, epoch, index) alone.

    So an image of an epoch is the same with any number of workers and processes, and after an interruption.
    The state of torch's CPU generator is put back after each image.

    Args:
        dataset: map-style, of (image, class index).
        transform: image → tensor. Its draws, if any, are from torch's CPU generator; where it has an
            attribute `random` that is False, there are none.
        seed: at least 0.
    """

    def __init__(self, dataset: Any, transform: Callable[[Any], Tensor], seed: int = 0) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, check_int("seed", seed, minimum=0)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, from 0, of the draws; `train_loader` does this itself."""
        self.epoch = check_int("epoch", epoch, minimum=0)

    @property
    def random(self) -> bool:
        """Whether the transform may draw."""
        return getattr(self.transform, "random", True)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        index = range(len(self))[index]
        image, label = self.dataset[index]
        if not self.random:
            return self.transform(image), label
        # Not torch.manual_seed, which would seed the accelerators' generators too and take 40 times as long.
        generator = torch.default_generator
        state = generator.get_state()
        generator.manual_seed(derived_seed("augment", self.seed, self.epoch, index))
        try:
            return self.transform(image), label
        finally:
            generator.set_state(state)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W] and labels [B]; by one indexing where in memory and nothing is drawn."""
        if isinstance(self.transform, Augmentation) and not self.random and hasattr(self.dataset, "batch"):
            images, labels = self.dataset.batch(indices)
            return self.transform(images), labels
        images, labels = default_collate([self[index] for index in indices])
        return images, labels
