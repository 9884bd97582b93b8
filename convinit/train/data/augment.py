"""Augmentation whose draws depend on the image alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from convinit._checks import check_int
from convinit._optional import require
from convinit.train.config import near
from convinit.train.data.draws import seeded
from convinit.train.data.sources import ImageData

AUGMENTATIONS = ("none", "flip-crop", "paper", "timm")
_NOT_MIRRORED = (  # a mirrored digit, letter or traffic sign is another one
    "digits", "svhn", *(f"torchvision:{name}" for name in
    ("MNIST", "EMNIST", "KMNIST", "QMNIST", "USPS", "SEMEION", "Omniglot", "SVHN", "GTSRB", "RenderedSST2")),
)  # fmt: skip


class Augmentation:
    """Image → float32 tensor, changed at random, resized and normalised; made by `augmentation`.

    Draws come from the generators of torch (CPU), Python and NumPy; `Augmented` seeds them for each image.

    Attributes:
        random: False where nothing is drawn; then whole batches [B, C, H, W] of uint8 are taken too.
    """

    def __init__(self, name: str, data: ImageData, options: Mapping[str, Any]) -> None:
        if data.image_size is None:
            raise ValueError(
                f"image_size must be given, in pixels: the images of {data.name!r} differ in size"
            )
        size, self.random = data.image_size, name != "none"
        normalised = partial(normalise, mean=_per_channel(data.mean), std=_per_channel(data.std))
        steps: list[Callable[[Any], Any]]
        if name == "none":
            steps = [partial(resize_and_crop, size=size, crop_pct=data.crop_pct), normalised]
        elif name == "timm":
            steps = [_to_pil, _timm_transform(data, options)]
        else:
            v2 = require("torchvision.transforms.v2", "augmentation")
            if name == "flip-crop":
                steps = [partial(resize_and_crop, size=size), v2.RandomCrop(size, padding=4)]
                steps += [v2.RandomHorizontalFlip()] * (data.name not in _NOT_MIRRORED)
            else:
                steps = [v2.RandAugment(2, 14), v2.RandomHorizontalFlip(), v2.RandomResizedCrop(size)]
            steps.append(normalised)
        self._steps = tuple(steps)

    def __call__(self, image: Any) -> Tensor:
        for step in self._steps:
            image = step(image)
        return image


def augmentation(name: str, data: ImageData, options: Mapping[str, Any] | None = None) -> Augmentation:
    """The transform of a data set's images: PIL image or uint8 [C, H, W] → float32 [C, H, W], normalised.

    Args:
        name: "none", resized and normalised only, for test images; "flip-crop", a window of the image padded
            by 4 and, but for digits, letters and traffic signs that are known as such, a flip; "paper",
            RandAugment (2 operations, magnitude 14), flip and random resized crop, as the script of arXiv
            2401.12511, also for SVHN; "timm", what `timm.data.create_transform` makes for training.
        data: gives the size, mean and std.
        options: of "timm" alone: arguments of `timm.data.create_transform`, such as auto_augment, scale,
            ratio, color_jitter, re_prob.

    Raises:
        ImportError: torchvision or timm is not installed ("none" without resizing does without them).
        ValueError: there is no such augmentation, it does not take the options, or the data set has no image
            size.
    """
    if name not in AUGMENTATIONS:
        raise ValueError(
            f"augmentation must be one of {', '.join(AUGMENTATIONS)}, got {name!r}{near(name, AUGMENTATIONS)}"
        )
    if options and name != "timm":
        raise ValueError(
            f"options must be empty for augmentation {name!r}, which has none, got {dict(options)}"
        )
    return Augmentation(name, data, options or {})


def _timm_transform(data: ImageData, options: Mapping[str, Any]) -> Callable[[Any], Tensor]:
    """timm's transform of PIL images for training."""
    create_transform = require("timm.data", "augmentation by timm").create_transform
    taken = [name for name in inspect.signature(create_transform).parameters if name not in _GIVEN_TO_TIMM]
    for name in options:
        if name not in taken:
            raise ValueError(f"data.augment_options must be among {', '.join(taken)}, got {name!r}")
    assert data.image_size is not None  # the caller has looked
    given: dict[str, Any] = {
        "input_size": (data.channels, *data.image_size), "is_training": True, "mean": data.mean,
        "std": data.std,
    }  # fmt: skip
    try:
        transform = create_transform(**given, **options)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"timm takes no such data.augment_options, {dict(options)}: {error}") from error
    for step in transform.transforms:
        for operation in getattr(step, "ops", ()):  # of RandAugment
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize
    return transform


def _posterize(image: Any, bits: int, **_: Any) -> Any:
    """timm's, but for the 0 bits that it draws at full magnitude and newer Pillows refuse: a black image."""
    if bits < 1:
        return image.point(lambda value: 0)
    ops = require("PIL.ImageOps", "augmentation by timm")
    return image if bits >= 8 else ops.posterize(image, bits)


_GIVEN_TO_TIMM = ("input_size", "is_training", "mean", "std", "use_prefetcher", "normalize", "separate")


def _to_pil(image: Any) -> Any:
    """A PIL image of itself or of a uint8 tensor [C, H, W]."""
    if not isinstance(image, Tensor):
        return image
    return require("torchvision.transforms.v2", "augmentation").functional.to_pil_image(image)


def resize_and_crop(image: Any, size: tuple[int, int], crop_pct: float = 1.0) -> Any:
    """A PIL image or tensor [..., H, W], scaled to cover size / crop_pct and cut to `size` in the middle."""
    height, width = image.shape[-2:] if isinstance(image, Tensor) else (image.height, image.width)
    if (height, width) == size and crop_pct == 1:
        return image
    functional = require("torchvision.transforms.v2", "resizing images").functional
    scale = max(size[0] / height, size[1] / width) / crop_pct
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
    The states of torch's CPU generator, Python's and NumPy's are put back after each image.

    Args:
        dataset: map-style, of (image, class index). It draws only where it has an attribute `random` that is
            True, and from those generators.
        transform: image → tensor. Its draws, if any, are from those generators; where it has an
            attribute `random` that is False, there are none.
        seed: at least 0.
        aug_repeats: of repeated augmentation. Index i + k·N, k < aug_repeats, is image i of N, drawn anew.
    """

    def __init__(
        self, dataset: Any, transform: Callable[[Any], Tensor], seed: int = 0, aug_repeats: int = 1
    ) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, check_int("seed", seed, minimum=0)
        self.aug_repeats, self.epoch = check_int("aug_repeats", aug_repeats), 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, from 0, of the draws; `train_loader` does this itself."""
        self.epoch = check_int("epoch", epoch, minimum=0)

    @property
    def random(self) -> bool:
        """Whether the transform or the data set may draw."""
        return getattr(self.transform, "random", True) or getattr(self.dataset, "random", False)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        index = range(self.aug_repeats * len(self))[index]
        place = index % len(self)
        if not self.random:
            image, label = self.dataset[place]
            return self.transform(image), label
        with seeded("augment", self.seed, self.epoch, index):  # timm draws from all three generators
            image, label = self.dataset[place]
            return self.transform(image), label

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W] and labels [B]; by one indexing where in memory and nothing is drawn."""
        if isinstance(self.transform, Augmentation) and not self.random and hasattr(self.dataset, "batch"):
            images, labels = self.dataset.batch([index % len(self) for index in indices])
            return self.transform(images), labels
        images, labels = default_collate([self[index] for index in indices])
        return images, labels
