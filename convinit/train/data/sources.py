"""The data sets by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from convinit._checks import check_int
from convinit._files import cache_folder
from convinit.train.config import (
    DATA_FAMILIES,
    DATA_HINT,
    DATA_SETS,
    check_choice_or_family,
    check_statistics,
)
from convinit.train.data.fashion_mnist import MEAN, STD, USUAL, read_fashion_mnist
from convinit.train.data.folders import read_folder, read_tiny_imagenet
from convinit.train.data.hugging_face import read_hugging_face
from convinit.train.data.images import Images, ImageTensors
from convinit.train.data.in_memory import load_digits_split
from convinit.train.data.measure import measured
from convinit.train.data.npz import read_npz
from convinit.train.data.own import read_datasets
from convinit.train.data.parts import Parts
from convinit.train.data.subsets import check_fraction, split_indices
from convinit.train.data.torchvision_sets import (
    read_cifar,
    read_files,
    read_stl10,
    read_svhn,
    read_torchvision,
)

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of each channel

_CIFAR = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
_SVHN = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set, split for training and test.

    Attributes:
        name: as given to `load_data`.
        train, test: map-style data sets of (PIL image or uint8 tensor [C, H, W], class index).
        val: images to validate on, the data set's own or some of the training images that are then not in
            `train`; None if there are none.
        num_classes: class indices are 0 to num_classes − 1.
        class_names: a name for each class.
        image_size: (H, W) that `augmentation` brings images to; None where they differ and no size was asked
            for.
        channels: 1 or 3.
        mean, std: of each channel, with pixels in [0, 1]; for normalisation.
        crop_pct: side of the window that is cut out of the middle of a test image, as a share of the image's.
    """

    name: str
    train: Images
    test: Images
    num_classes: int
    class_names: tuple[str, ...]
    image_size: tuple[int, int] | None
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 1.0
    val: Images | None = None

    def digest(self) -> str:
        """A hash of classes, size, channels and the order of all labels: other data have another."""
        parts = [each for each in (self.train, self.val, self.test) if each is not None]
        facts = [self.class_names, self.image_size, self.channels, [len(each) for each in parts]]
        found = hashlib.sha256(json.dumps(facts).encode())
        for each in parts:
            found.update(each.labels.numpy().astype("<i8").tobytes())
        return found.hexdigest()


def load_data(
    name: str,
    root: str | Path | None = None,
    *,
    dataset: Any = None,
    options: Mapping[str, Any] | None = None,
    train_count: int | None = None,
    train_fraction: float | None = None,
    val_fraction: float | None = None,
    seed: int = 0,
    download: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
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
            images as test set; "digits", the 8×8 digits of scikit-learn; "torchvision:FashionMNIST" and so
            on, any other data set of images and classes that torchvision has; "hf:NAME", one of the Hugging
            Face Hub, or "hf:FOLDER", a folder of Parquet, both by the library datasets. One's own: "folder",
            images in a folder for each class, below train/ and test/ or val/ or not split yet; "npz", arrays
            images and labels, or train_images, train_labels, test_images and test_labels, in one file;
            "dataset", see `dataset`.
        root: folder with the data: of cifar-10-batches-py/, cifar-100-python/, stl10_binary/, food-101/,
            flowers-102/ or oxford-iiit-pet/, of train_32x32.mat and test_32x32.mat, of (or itself)
            tiny-imagenet-200/, of train/ or the class folders; the .npz file; the cache of datasets. Default:
            for data sets of torchvision the folder data in $CONVINIT_CACHE_DIR (or ~/.cache/convinit), for
            "fashion-mnist" that of Debian's package dataset-fashion-mnist where it is installed.
        dataset: for "dataset": a pair of map-style data sets of (image, label), to train and to test on, or
            one that is not split yet. Images are PIL images, paths, uint8 tensors [C, H, W] or arrays
            [H, W, C], or floats from 0 to 1; labels numbers or texts. An attribute `classes` names them.
        options: for "torchvision:NAME" of its class, such as {"split": "letters"}; for "hf:NAME" of
            `datasets.load_dataset`, such as {"name": SUBSET}.
        train_count: training images to keep, classes in proportion; or
        train_fraction: the share of them to keep, above 0 to 1, of those that are not for validation. With
            neither, all of them.
        val_fraction: share of the training images to validate on instead, above 0 and below 1, classes in
            proportion. Default: none, or the data set's own validation images.
        seed: of these choices, the same on every machine.
        download: fetch what is missing into root, where torchvision or datasets knows the data set. Of
            several processes let one do it first.
        mean, std: of each channel, with pixels in [0, 1]: one number for grey, three for RGB; images in files
            are read so. Default: the published ones of a data set, or measured on at most 500 of its training
            images; then images are grey where all of those are.
        image_size: side in pixels or (H, W) that `augmentation` resizes to. Default: as stored; images that
            differ in size have no default. Of data sets without published figures those 500 are looked at.
        crop_pct: of test images: side of the window in the middle that is kept, as a share of the image's,
            above 0 to 1.
        test_fraction: share of a data set without test images that becomes the test set, classes in
            proportion.
        split_seed: of that split; apart from `seed`, so that all seeds are tested on the same images.

    Raises:
        FileNotFoundError, OSError: a file is missing or unreadable; the message names it and its source.
        ImportError: torchvision, datasets or scikit-learn is needed and not installed.
        TypeError, ValueError: an argument is out of range, or a file is damaged; the message names it.

    Source: the mean and std of CIFAR and SVHN are those of arXiv 2401.12511, of other photographs ImageNet's.
    """
    check_choice_or_family("data.name", str(name), DATA_SETS, DATA_FAMILIES, DATA_HINT)
    check_int("seed", seed, minimum=0)
    check_int("split_seed", split_seed, minimum=0)
    size, crop_pct = _check_size(image_size), check_fraction("crop_pct", crop_pct)
    check_statistics(mean, std)
    if download and name in ("tiny-imagenet", "folder", "npz", "dataset"):
        raise ValueError(
            f"download=True is for the data sets of torchvision and datasets, got name = {name!r}"
        )
    if (dataset is None) == (name == "dataset"):
        raise ValueError(
            "data.name is 'dataset' where the data are given from Python, as run_training(config, out, "
            f"dataset=(train, test)) does, and only there; got {name!r} and dataset = {dataset!r:.60}"
        )
    parts, published = _read(name, root, download, options or {}, dataset, test_fraction, split_seed)
    train, test, names, val = parts
    given = next((each for each in (mean, std, *(published or ())) if each is not None), None)
    if given is not None:
        _set_channels((train, test, val), len(given), name)
    if val is not None and val_fraction is not None:
        raise ValueError(f"val_fraction must not be set: {name!r} has validation images of its own")
    pool = train
    if not (train_count is None and train_fraction is None and val_fraction is None):
        kept, held_out = split_indices(
            train.labels, count=train_count, fraction=train_fraction, val_fraction=val_fraction, seed=seed
        )
        if val_fraction is not None:
            val, pool = train.take(held_out), train.take(np.setdiff1d(np.arange(len(train)), held_out))
        train = train.take(kept)
    if isinstance(train, ImageTensors):
        size = size or (train.images.shape[-2], train.images.shape[-1])
    if published is None:
        # Of all images that may be trained on, so that subsets of one data set are normalised alike.
        seen = measured(pool)
        size, published = size or seen.image_size, (seen.mean, seen.std)
        _set_channels((train, test, val), seen.channels, name)
    elif name == "tiny-imagenet":
        size = size or (64, 64)
    mean = published[0] if mean is None else tuple(map(float, mean))
    std = published[1] if std is None else tuple(map(float, std))
    return ImageData(name, train, test, len(names), names, size, len(mean), mean, std, crop_pct, val)


def _set_channels(parts: Sequence[Images | None], channels: int, name: str) -> None:
    """Lets images be read in grey (1) or RGB (3)."""
    for images in parts:
        if isinstance(images, ImageTensors):
            if images.images.shape[1] != channels:
                raise ValueError(
                    f"data.mean and data.std must have {images.images.shape[1]} numbers for {name!r}, one a "
                    f"channel of its images, got {channels}"
                )
        elif images is not None:
            images.channels = channels


def _read(
    name: str,
    root: str | Path | None,
    download: bool,
    options: Mapping[str, Any],
    dataset: Any,
    test_fraction: float,
    split_seed: int,
) -> tuple[Parts, Statistics | None]:
    """A data set as it is, and its published mean and standard deviation, if it has some."""
    family, _, own_name = name.partition(":")
    split = test_fraction, split_seed
    if name == "digits":
        train, test, names, mean, std = _digits()
        return Parts(train, test, names), (mean, std)
    if name == "dataset":
        given = dataset if isinstance(dataset, tuple) else (dataset, None)
        if len(given) != 2:
            raise TypeError(
                f"dataset must be a pair of data sets, to train and to test on, or one, got {len(given)}"
            )
        return read_datasets(*given, *split), None
    if family == "hf":
        cache = None if root is None else Path(root).expanduser()
        return read_hugging_face(own_name, cache, download, options, *split), None
    if name == "npz":
        return read_npz(_check_root(name, root), *split), None
    if name == "folder":
        return read_folder(_check_folder(name, root), *split), None
    if name == "tiny-imagenet":
        return Parts(*read_tiny_imagenet(_check_folder(name, root))), _IMAGENET
    if name == "fashion-mnist" and root is None and USUAL.is_dir():
        root = USUAL
    folder = Path(root or _usual_folder()).expanduser()
    if root is not None and not download:
        _check_folder(name, root, "; download=True makes it and fetches the data set")
    if family == "torchvision":
        return read_torchvision(own_name, folder, download, options, *split), None
    if name == "fashion-mnist":
        return Parts(*read_fashion_mnist(folder, download)), (MEAN, STD)
    if name == "stl10":
        return Parts(*read_stl10(folder, download)), _IMAGENET
    if name == "svhn":
        return Parts(*read_svhn(folder, download)), _SVHN
    if name in ("food101", "flowers102", "pets"):
        return Parts(*read_files(name, folder, download)), _IMAGENET
    return Parts(*read_cifar(name, folder, download)), _CIFAR


def _usual_folder() -> str:
    """Where data sets of torchvision lie that were fetched without a word on where."""
    return str(cache_folder() / "data")


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


def _check_root(name: str, root: str | Path | None) -> Path:
    if root is None:
        raise ValueError(f"root must be where the data set {name!r} lies, got None")
    return Path(root).expanduser()


def _check_folder(name: str, root: str | Path | None, cure: str = "") -> Path:
    folder = _check_root(name, root)
    if not folder.is_dir():
        found = "is a file, perhaps an archive to unpack" if folder.is_file() else f"is no folder{cure}"
        raise FileNotFoundError(f"root must be the folder with the data set {name!r}, but {folder} {found}")
    return folder
