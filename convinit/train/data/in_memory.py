"""Image data sets, split for training and test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from convinit._checks import check_generator, check_int


@dataclass(frozen=True, eq=False)
class ImageSplit:
    """Images and labels, small enough to be held in memory.

    Attributes:
        train_images, test_images: [n, channels, height, width] float32 in [0, 1], 0 being the background.
        train_labels, test_labels: [n] int64.
        num_classes: labels are 0 to num_classes − 1.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int


def load_digits_split(num_train: int = 1000, *, seed: int = 0) -> ImageSplit:
    """The 1,797 handwritten digits of 8×8 pixels that come with scikit-learn, shuffled and split once.

    Args:
        num_train: images to train on, 1 to 1,796; the rest is to test on.
        seed: of the shuffle. The same seed gives the same split everywhere.

    Returns:
        ImageSplit with images [n, 1, 8, 8]; pixel values 0 … 16 become 0 … 1.

    Raises:
        ImportError: scikit-learn is not installed.
        TypeError, ValueError: a number is not an int, or there are not as many images.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (its test part).
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn, which is not installed; get it with: "
            "pip install 'convinit[demo]'"
        ) from error

    digits = load_digits()
    images = torch.from_numpy(digits.images).to(torch.float32).div_(16).unsqueeze(1)  # [1797, 1, 8, 8]
    labels = torch.from_numpy(digits.target).to(torch.int64)
    total = len(labels)
    if check_int("num_train", num_train) >= total:
        raise ValueError(f"num_train must be below {total}, the number of digits, got {num_train}")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    chosen = order[:num_train], order[num_train:]
    (train_images, test_images), (train_labels, test_labels) = (
        [tensor[indices] for indices in chosen] for tensor in (images, labels)
    )
    return ImageSplit(train_images, train_labels, test_images, test_labels, num_classes=10)


def shift_images(images: Tensor, dy: int, dx: int) -> Tensor:
    """Images moved down by dy pixels and right by dx, with zeros coming in at the edges.

    result[..., i, j] = images[..., i − dy, j − dx], or 0 where that is outside

    Args:
        images: [..., height, width].
        dy, dx: pixels, any sign and size.
    """
    height, width = images.shape[-2:]
    dy, dx = max(-height, min(dy, height)), max(-width, min(dx, width))
    shifted = torch.zeros_like(images)
    to_rows, from_rows = slice(max(dy, 0), height + min(dy, 0)), slice(max(-dy, 0), height - max(dy, 0))
    to_cols, from_cols = slice(max(dx, 0), width + min(dx, 0)), slice(max(-dx, 0), width - max(dx, 0))
    shifted[..., to_rows, to_cols] = images[..., from_rows, from_cols]
    return shifted


def batches(
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    *,
    shuffle: bool = False,
    generator: torch.Generator | None = None,
) -> DataLoader:
    """A DataLoader of (images, labels) that cuts whole batches out of tensors in memory.

    Args:
        images, labels: [n, ...] and [n].
        batch_size: images in a batch; the last one may be smaller.
        shuffle: a new order in every epoch.
        generator: CPU generator of the orders; None means torch's own.
    """
    check_int("batch_size", batch_size)
    check_generator(generator)
    if len(images) != len(labels):
        raise ValueError(f"images and labels must be equally many, got {len(images)} and {len(labels)}")
    dataset = _Tensors(images, labels)
    return DataLoader(dataset, batch_size, shuffle=shuffle, generator=generator, collate_fn=_as_it_is)


class _Tensors(Dataset):
    """Like TensorDataset, but a batch is one indexing instead of one an image and a stack."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(tensor[index] for tensor in self.tensors)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        return tuple(tensor[indices] for tensor in self.tensors)


def _as_it_is(batch: Any) -> Any:
    return batch
