"""The data sets by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from convinit._checks import check_int
from convinit.train.config import near
from convinit.train.data.fashion_mnist import MEAN, STD, USUAL, read_fashion_mnist
from convinit.train.data.folders import read_folder, read_tiny_imagenet
from convinit.train.data.images import ImageFiles, ImageTensors
from convinit.train.data.in_memory import load_digits_split
from convinit.train.data.subsets import check_fraction, split_indices
from convinit.train.data.torchvision_sets import read_cifar, read_files, read_stl10, read_svhn

DATA_SETS = (
    "cifar10", "cifar100", "svhn", "fashion-mnist", "stl10", "food101", "flowers102", "pets", "tiny-imagenet",
    "folder", "digits",
)  # fmt: skip

_CIFAR = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
_SVHN = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set, split for training and test.

    Attributes:
        name: as given to `load_data`.
        train, test: map-style data sets of (PIL image or uint8 tensor [C, H, W], class index).
        val: some of the training images that are not in `train`, to validate on; None if none were asked for.
        num_classes: class indices are 0 to num_classes − 1.
        class_names: a name for each class.
        image_size: (H, W) that `augmentation` brings images to; None where they differ and no size was asked
            for.
        channels: 1 or 3.
        mean, std: of each channel, with pixels in [0, 1]; for normalisation.
        crop_pct: side of the window that is cut out of the middle of a test image, as a share of the image's.
    """

    name: str
    train: ImageTensors | ImageFiles
    test: ImageTensors | ImageFiles
    num_classes: int
    class_names: tuple[str, ...]
    image_size: tuple[int, int] | None
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 1.0
    val: ImageTensors | ImageFiles | None = None


def load_data(
    name: str,
    root: str | Path | None = None,
    *,
    train_count: int | None = None,
    train_fraction: float | None = None,
    val_fraction: float | None = None,
    seed: int = 0,
    download: bool = False,
    image_size: int | Sequence[int] | None = None,
    crop_pct: float = 1.0,
    test_fraction: float = 0.2,
    split_seed: int = 0,
) -> ImageData:
    """Reads a data set from disk, all of its training images or a stratified subset.

    Subsets are nested: with one seed, a smaller one lies within every larger one. The test set is never cut.

    Args:
        name: "cifar10", "cifar100" or "svhn", by torchvision; "fashion-mnist", 28×28 and grey, from its four
            idx files; "stl10", 96×96, "food101", "flowers102" and "pets" (Oxford-IIIT), by torchvision, the
            last three in sizes of their own; "tiny-imagenet", in its archive's layout with the validation
            images as test set; "folder", images in a folder for each class, below train/ and val/ or test/ or
            not split yet; "digits", the 8×8 digits of scikit-learn.
        root: folder with the data: of cifar-10-batches-py/, cifar-100-python/, stl10_binary/, food-101/,
            flowers-102/ or oxford-iiit-pet/, of train_32x32.mat and test_32x32.mat, of (or itself)
            tiny-imagenet-200/, of train/ or the class folders. "digits" need
            none, and "fashion-mnist" none where Debian's package dataset-fashion-mnist is installed.
        train_count: training images to keep, classes in proportion; or
        train_fraction: the share of them to keep, above 0 to 1, of those that are not for validation. With
            neither, all of them.
        val_fraction: share of the training images to validate on instead, above 0 and below 1, classes in
            proportion. Default: none.
        seed: of these choices, the same on every machine.
        download: fetch what is missing into root, where torchvision knows the data set. Of several
            processes let one do it first.
        image_size: side in pixels or (H, W) that `augmentation` resizes to. Default: as stored; images that
            differ in size have no default.
        crop_pct: of test images: side of the window in the middle that is kept, as a share of the image's,
            above 0 to 1.
        test_fraction: share of a folder without train/ that becomes the test set, classes in proportion.
        split_seed: of that split; apart from `seed`, so that all seeds are tested on the same images.

    Raises:
        FileNotFoundError, OSError: a file is missing or unreadable; the message names it and its source.
        ImportError: torchvision or scikit-learn is needed and not installed.
        TypeError, ValueError: an argument is out of range, or a file is damaged; the message names it.

    Source: the mean and std of CIFAR and SVHN are those of arXiv 2401.12511, of other photographs ImageNet's.
    """
    if name not in DATA_SETS:
        raise ValueError(
            f"name must be one of {', '.join(DATA_SETS)}, got {name!r}{near(str(name), DATA_SETS)}"
        )
    check_int("seed", seed, minimum=0)
    check_int("split_seed", split_seed, minimum=0)
    size, crop_pct = _check_size(image_size), check_fraction("crop_pct", crop_pct)
    train: ImageTensors | ImageFiles
    test: ImageTensors | ImageFiles
    if download and name in ("tiny-imagenet", "folder"):
        raise ValueError(f"download=True is for the data sets of torchvision, got name = {name!r}")
    if name == "digits":
        train, test, names, mean, std = _digits()
    elif name == "fashion-mnist":
        folder = _check_root(name, USUAL if root is None and USUAL.is_dir() else root, may_be_made=download)
        train, test, names = read_fashion_mnist(folder, download)
        mean, std = MEAN, STD
    else:
        folder = _check_root(name, root, may_be_made=download)
        mean, std = _IMAGENET
        if name == "tiny-imagenet":
            train, test, names = read_tiny_imagenet(folder)
            size = size or (64, 64)
        elif name == "folder":
            train, test, names = read_folder(folder, test_fraction, split_seed)
        elif name == "stl10":
            train, test, names = read_stl10(folder, download)
        elif name in ("food101", "flowers102", "pets"):
            train, test, names = read_files(name, folder, download)
        elif name == "svhn":
            train, test, names = read_svhn(folder, download)
            mean, std = _SVHN
        else:
            train, test, names = read_cifar(name, folder, download)
            mean, std = _CIFAR
    if isinstance(train, ImageTensors):
        size = size or (train.images.shape[-2], train.images.shape[-1])
    val = None
    if not (train_count is None and train_fraction is None and val_fraction is None):
        kept, held_out = split_indices(
            train.labels, count=train_count, fraction=train_fraction, val_fraction=val_fraction, seed=seed
        )
        val = None if val_fraction is None else train.take(held_out)
        train = train.take(kept)
    return ImageData(name, train, test, len(names), names, size, len(mean), mean, std, crop_pct, val)


def _digits() -> tuple[ImageTensors, ImageTensors, tuple[str, ...], tuple[float, ...], tuple[float, ...]]:
    """The split of `load_digits_split`, the pixels 0 … 16 brought to 0 … 255."""
    split = load_digits_split()
    train, test = (
        ImageTensors(images.mul(255).round().to(torch.uint8), labels)
        for images, labels in (
            (split.train_images, split.train_labels),
            (split.test_images, split.test_labels),
        )
    )
    # A mean of 0 leaves the background 0, so that padding looks like it.
    std = split.train_images.double().std(correction=0).item()
    return train, test, tuple("0123456789"), (0.0,), (std,)


def _check_size(image_size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if image_size is None:
        return None
    if not isinstance(image_size, Sequence):
        image_size = (image_size, image_size)
    if len(image_size) != 2:
        raise ValueError(f"image_size must be a side or (H, W) in pixels, got {image_size!r}")
    return check_int("image_size", image_size[0]), check_int("image_size", image_size[1])


def _check_root(name: str, root: str | Path | None, may_be_made: bool) -> Path:
    if root is None:
        raise ValueError(f"root must be the folder with the data set {name!r}, got None")
    folder = Path(root).expanduser()
    if not folder.is_dir() and not may_be_made:
        raise FileNotFoundError(
            f"root must be the folder with the data set {name!r}, but {folder} is no folder"
        )
    return folder
